"""Several processes that run cached models together: real ones, over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker.py")
# Longer than a busy machine may stand still; the launches that wait for it to pass have a short one.
PATIENT, SHORT = 180, 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def launch(folder: Path, world: int, limit: int, names: tuple[str, ...], kills: bool = False) -> None:
    """Run the scenarios in `world` processes."""
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    logs = [folder / f"log.{rank}.txt" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(WORKER), str(folder), str(limit), *names]
        with log.open("w") as out:
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    end = time.monotonic() + 600
    codes = []
    try:
        for process in processes:
            codes.append(process.wait(timeout=max(1.0, end - time.monotonic())))
    finally:
        for process in processes:
            process.kill()
    assert kills or codes == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)


class Seen:
    """What the ranks of one launch wrote."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.world = folder, world

    def __getitem__(self, name: str) -> list[dict[str, Any]]:
        paths = [self.folder / f"{name}.{rank}.json" for rank in range(self.world)]
        return [json.loads(path.read_text()) for path in paths if path.exists()]


TWO = (
    "data_parallel",
    "one_decision",
    "known_to_the_host",
    "fsdp",
    "tensor_parallel",
    "sequence_parallel",
    "context_parallel",
    "guidance_over_two",
    "artifact",
    "pipeline_stages",
    "distributed_activations",
    "different_options",
    "control_refresh",
)
FOUR = ("one_decision", "own_group", "fsdp", "sequence_parallel")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("two")
    launch(folder, 1, PATIENT, ("export",))
    launch(folder, 2, PATIENT, TWO)
    yield Seen(folder, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("four")
    launch(folder, 4, PATIENT, FOUR)
    yield Seen(folder, 4)


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Seen:
    """The launch that a test names."""
    found: Seen = request.getfixturevalue(request.param)
    return found


both = pytest.mark.parametrize("seen", ["two", "four"], indirect=True)


def agree(found: list[dict[str, Any]], members: list[int]) -> None:
    """Same decisions and same errors, bit for bit, on all ranks; some steps were skipped."""
    assert len({each["mask"] for each in found}) == 1
    assert len({tuple(each["errors"]) for each in found}) == 1
    assert all(each["members"] == members for each in found)
    assert "0" in found[0]["mask"]


def test_data_parallel_ranks_decide_by_themselves(two: Seen) -> None:
    """They share nothing, so nobody waits for anybody: other pictures, other decisions, no message."""
    first, second = two["data_parallel"]
    assert first["mask"] != second["mask"]
    for each in (first, second):
        assert each["apart"] == 0.0
        assert (each["members"], each["messages"]) == ([], 0)


@both
def test_one_decision_for_different_pictures(seen: Seen) -> None:
    found = seen["one_decision"]
    agree(found, list(range(seen.world)))
    for each in found:
        assert each["apart"] == 0.0 and each["effect"] > 0.01
        assert each["messages"] <= len(each["mask"])
        assert f"decides alike with {seen.world} ranks" in each["notes"]
    assert len({each["effect"] for each in found}) == seen.world


def test_loaded_artifacts_decide_alike(two: Seen) -> None:
    found = two["artifact"]
    agree(found, [0, 1])
    for each in found:
        # another compiler rounds otherwise
        assert each["apart"] < 1e-4 and each["effect"] > 0.01


def test_groups_decide_apart_from_each_other(four: Seen) -> None:
    found = four["own_group"]
    agree(found[:2], [0, 1])
    agree(found[2:], [2, 3])
    assert found[0]["errors"] != found[2]["errors"]


def test_decisions_known_to_the_host_cost_no_message(two: Seen) -> None:
    for each in two["known_to_the_host"]:
        assert each["mask"] == "111010101010"
        assert each["messages"] == 0
        assert each["apart"] == 0.0


@both
def test_sharded_weights(seen: Seen) -> None:
    """`fully_shard`: blocks that are skipped gather no weights."""
    found = seen["fsdp"]
    agree(found, list(range(seen.world)))
    for each in found:
        assert each["apart"] < 1e-5 < 0.01 < each["effect"]
        skipped = [count for count, bit in zip(each["collectives"], each["mask"], strict=True) if bit == "0"]
        computed = [count for count, bit in zip(each["collectives"], each["mask"], strict=True) if bit == "1"]
        # what a computed step gathers beyond a skipped one: the weights of the three blocks behind the front
        assert max(skipped) == min(computed) - 3


def test_tensor_parallel(two: Seen) -> None:
    agree(two["tensor_parallel"], [0, 1])
    for each in two["tensor_parallel"]:
        assert each["apart"] < 1e-5 < 0.01 < each["effect"]


@both
def test_sequence_parallel(seen: Seen) -> None:
    """The collectives in the graph tell; each rank keeps its part of the residual, and decides as one process does."""
    found = seen["sequence_parallel"]
    agree(found, list(range(seen.world)))
    for each in found:
        assert each["mask"] == each["alone"]
        assert each["apart"] < 1e-5 < 0.01 < each["effect"]
        assert each["bytes"] * seen.world == each["alone_bytes"]


@pytest.mark.parametrize("name", ["ulysses", "ring"])
def test_context_parallel_of_diffusers(two: Seen, name: str) -> None:
    found = [each[name] for each in two["context_parallel"]]
    if any("unavailable" in each for each in found):
        pytest.skip(f"not to be had on this machine without the cache either: {found[0]}")
    for each in found:
        assert (each["mask"], each["members"]) == ("111010101010", [0, 1])
        assert each["apart"] < 1e-4 < 1e-2 < each["effect"]


def test_guidance_over_two_ranks(two: Seen) -> None:
    agree(two["guidance_over_two"], [0, 1])
    assert all(each["apart"] < 1e-5 for each in two["guidance_over_two"])


def test_stages_of_a_pipeline(two: Seen) -> None:
    agree(two["pipeline_stages"], [0, 1])
    assert all(each["apart"] < 1e-5 for each in two["pipeline_stages"])


def test_distributed_activations_stay_split(two: Seen) -> None:
    """Each rank keeps the residual of its part; forms that cannot take distributed tensors give way, said once."""
    for each in two["distributed_activations"]:
        for lowering in ("specialize", "cond", "pieces"):
            found = each[lowering]
            assert found["mask"] == "111010101010" and found["members"] == [0, 1]
            assert found["apart"] < 1e-5 < 0.01 < each["effect"]
            assert found["bytes"] * 2 == each["alone_bytes"]
            assert found["lowered"] == ["specialize"]
            said = [f"lowering='{lowering}' does not suit this model: its graph holds distributed tensors (DTensor)"]
            assert [text.split(";")[0] for text in found["said"]] == (said if lowering != "specialize" else [])


def test_different_options_are_refused_at_the_start(two: Seen) -> None:
    for each in two["different_options"]:
        assert "Ranks 0 and 1 differ: skip_interval='2' / '3'" in each["error"]


def test_what_cannot_be_agreed_on_is_refused(two: Seen) -> None:
    for each in two["control_refresh"]:
        assert "control_refresh" in each["error"]


@pytest.mark.parametrize(
    ("name", "said", "ranks"),
    [
        ("sharded_and_not", "Ranks [1] have not come within 20 s", 2),
        ("late_rank", "What the other ranks measured has not come within 20 s", 2),
        ("dead_rank", "What the other ranks measured has not come within 20 s", 1),
    ],
)
def test_a_rank_that_does_not_come_is_an_error_and_no_hang(tmp_path: Path, name: str, said: str, ranks: int) -> None:
    launch(tmp_path, 2, SHORT, (name,), kills=True)
    found = Seen(tmp_path, 2)[name]
    assert len(found) == ranks
    assert said in found[0]["error"]
    assert found[0]["seconds"] < SHORT + 60
