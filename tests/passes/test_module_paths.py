"""Module paths, read from what the tracer left on the nodes."""

from __future__ import annotations

import pytest
from cache_dit.passes.module_paths import block_path, in_module, is_compute, memberships, module_entries, normalize_path
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from tests.models import Block, traced_variant


def node_in(*paths: str) -> fx.Node:
    """A node traced inside these modules, outermost first; an entry may be ``path: class name``."""
    node = fx.Graph().call_function(abs, (1,))
    node.meta["nn_module_stack"] = {
        str(i): (path.partition(": ")[0], type(path.partition(": ")[2] or "Module", (), {})) for i, path in enumerate(paths)
    }
    return node


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("L['self']", ""),
        ("L['self'].blocks.3", "blocks.3"),
        ("L['self']._modules['blocks']._modules['3'].mlp", "blocks.3.mlp"),
        ("L['self'].__dict__['_modules']['transformer_blocks'].1", "transformer_blocks.1"),
        ("L['self']._modules['blocks'][2]", "blocks.2"),
        ("L['fn'].layers.0", "layers.0"),
        ("L['self'].blocks.1@1", "blocks.1"),
        ("L['self'].out_blocks['0'].conv", "out_blocks.0.conv"),
    ],
)
def test_every_spelling_becomes_one_path(written: str, path: str) -> None:
    assert normalize_path(written) == path


def test_a_real_graph_has_the_paths_of_the_modules() -> None:
    nodes = list(traced_variant("tiny").gm.graph.nodes)
    entries = {entry for node in nodes if is_compute(node) for entry in module_entries(node)}
    assert {("blocks.2", "Block"), ("blocks.2.mlp", "Linear"), ("time.mlp.0", "Linear"), ("head", "Linear")} <= entries
    assert not any(path.startswith("L[") for path, _ in entries)


def test_placeholders_and_the_output_do_no_work() -> None:
    ops = {node.op for node in traced_variant("tiny").gm.graph.nodes if not is_compute(node)}
    assert ops == {"placeholder", "output"}


def test_a_node_belongs_to_every_numbered_module_around_it() -> None:
    node = node_in("L['self']: Model", "L['self'].stages.1: Stage", "L['self'].stages.1.layers.12: Layer")
    assert memberships(node) == [("stages", 1, "Stage"), ("stages.1.layers", 12, "Layer")]


def test_a_list_of_parts_that_is_never_called_counts_by_its_prefix() -> None:
    assert memberships(node_in("L['self']: Model", "L['self'].layers.0.attention: Attention")) == [("layers", 0, "")]


def test_attributes_that_end_in_a_number_make_a_container() -> None:
    found = memberships(node_in("L['self'].unet.block11: Block", "L['self'].unet.block11.norm2: Norm"))
    assert found == [("unet.block*", 11, "Block"), ("unet.block11.norm*", 2, "Norm")]


def test_a_node_without_a_stack_belongs_nowhere() -> None:
    node = fx.Graph().call_function(abs, (1,))
    assert memberships(node) == []
    assert module_entries(node) == []
    assert not in_module(node, "blocks")


def test_a_module_holds_what_is_below_it_and_not_what_begins_alike() -> None:
    node = node_in("L['self']._modules['blocks'].10", "L['self']._modules['blocks'].10.mlp")
    assert in_module(node, "blocks.10")
    assert in_module(node, "blocks")
    assert in_module(node, "blocks.10.mlp")
    assert not in_module(node, "blocks.1")
    assert not in_module(node, "block")


NAMES = st.from_regex(r"[a-z_]*[a-z_]", fullmatch=True).filter(lambda name: name != "getattr")


@given(st.lists(NAMES, max_size=2), NAMES, st.integers(0, 99), st.booleans())
def test_a_block_path_names_the_module_the_membership_came_from(
    parents: list[str], name: str, number: int, as_attribute: bool
) -> None:
    path = ".".join([*parents, f"{name}{number}" if as_attribute else f"{name}.{number}"])
    membership = memberships(node_in(f"L['self'].{path}: {Block.__name__}"))[-1]
    assert membership.class_name == "Block"
    assert block_path(membership.container, membership.number) == path


def test_a_model_that_is_a_list_itself_has_bare_numbers_as_paths() -> None:
    assert memberships(node_in("L['self']: Sequential", "L['self']._modules['3']: Block")) == [("", 3, "Block")]
    assert block_path("", 3) == "3"
