"""Changes the runtime's code a little, many times over, and counts the changes that no test notices.

    python tests/reliability/mutation.py                      the three central modules
    python tests/reliability/mutation.py session --sample 60  some changes to another one
    python tests/reliability/mutation.py clock --show 17      what change 17 is

cosmic-ray makes the changes; its own runner wants a package where its files lie, which ours is not. Here each change is
tested in a child that was forked from a process with torch loaded, so that it costs seconds. A change that makes the tests
run four times as long counts as noticed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The tests of each module, those that notice most first.
TESTS: dict[str, tuple[str, ...]] = {
    "clock": ("tests/runtime/test_clock.py", "tests/reliability/test_runs.py"),
    "buffers": (
        "tests/runtime/test_session.py",
        "tests/runtime/test_control_refresh.py",
        "tests/reliability/test_models.py",
        "tests/test_end_to_end.py",
    ),
    "call": (
        "tests/runtime/test_session.py",
        "tests/test_api.py",
        "tests/reliability/test_models.py",
        "tests/test_blockwise.py",
        "tests/runtime/test_eager_contexts.py",
        "tests/test_compile_habits.py",
    ),
    "signs": ("tests/reliability/test_runs.py", "tests/reliability/test_concurrency.py"),
    "registry": ("tests/test_backend.py", "tests/test_api.py", "tests/reliability/test_models.py"),
    "session": (
        "tests/runtime/test_session.py",
        "tests/reliability/test_runs.py",
        "tests/test_end_to_end.py",
        "tests/test_api.py",
        "tests/test_fidelity.py",
        "tests/runtime",
    ),
}
CENTRAL = ("clock", "buffers", "call")
ALLOWED_TIMES_LONGER = 4.0


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of a module."""

    module: str
    number: int
    operator: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        name = self.operator.partition("/")[2]
        return f"{self.module}.py:{self.line} [{self.number}, {name}]\n    - {self.before.strip()}\n    + {self.after.strip()}"


def path_of(module: str) -> Path:
    return ROOT / "cache_dit" / "runtime" / f"{module}.py"


def mutants_of(module: str) -> Iterator[Mutant]:
    """Every change that cosmic-ray knows for a module, but for those that change nothing that runs."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    source = path_of(module).read_text(encoding="utf-8")
    seen = {meaning(source)}
    number = 0
    for name in sorted(plugins.operator_names()):
        operator_class = plugins.get_operator(name)
        if operator_class.arguments():
            # these want to be told names of variables
            continue
        operator = operator_class()
        count = sum(len(list(operator.mutation_positions(node))) for node in ast_nodes(get_ast(source)))
        for occurrence in range(count):
            try:
                changed = mutate_code(source, operator, occurrence)
            except AttributeError:
                # its operator for exceptions knows plain names alone (8.7)
                continue
            if changed is None:
                continue
            try:
                what = meaning(changed)
            except SyntaxError:
                continue
            if what in seen:
                continue
            seen.add(what)
            number += 1
            yield Mutant(module, number, name, *_difference(source, changed), changed)


def _difference(source: str, changed: str) -> tuple[int, str, str]:
    before, after = source.splitlines(), changed.splitlines()
    for i, line in enumerate(before):
        if i >= len(after) or after[i] != line:
            return i + 1, line, after[i] if i < len(after) else ""
    return len(before), "", ""


class _Running(ast.NodeTransformer):
    """Without annotations and docstrings: what is left runs."""

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        node.annotation = ast.Constant(None)
        return node

    def _function(self, node: Any) -> Any:
        self.generic_visit(node)
        node.returns = None
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_If(self, node: ast.If) -> Any:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return ast.Pass()
        self.generic_visit(node)
        return node


def meaning(source: str) -> str:
    """Equal for two texts that run alike."""
    return ast.dump(_Running().visit(ast.parse(source)))


class Swap(importlib.abc.MetaPathFinder):
    """Imports one module of the package with other code."""

    def __init__(self, mutant: Mutant) -> None:
        self._name, self._path, self._source = f"cache_dit.runtime.{mutant.module}", path_of(mutant.module), mutant.source

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        source = self._source

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                return compile(source, self.path, "exec", dont_inherit=True)

        return importlib.util.spec_from_file_location(fullname, self._path, loader=Loader(fullname, str(self._path)))


def run_tests(tests: Sequence[str], mutant: Mutant | None) -> int:
    """In a child: the exit status of the tests, with the change in force."""
    import pytest

    if mutant is not None:
        sys.meta_path.insert(0, Swap(mutant))
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "--show-capture=no", "--tb=no"]
    # what is left out notices nothing that shorter tests do not
    left_out = "not fifty and not hundred and not adapter and not hypothesis and not interleave and not other_options"
    options += ["--hypothesis-seed=0", "-m", "not slow and not comfy and not soak", "-k", left_out]
    return int(pytest.main([*options, *tests]))


def outcome(tests: Sequence[str], mutant: Mutant | None, limit: float) -> tuple[str, float]:
    """'survived', 'killed' or 'timed out', and the seconds it took."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            status = run_tests(tests, mutant)
        except BaseException:
            status = 1
        os._exit(min(status, 100))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        spent = time.monotonic() - start
        if done:
            return ("survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"), spent
        if spent > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timed out", spent
        time.sleep(0.02)


def measure(module: str, sample: int | None, seed: int) -> tuple[int, int, list[Mutant]]:
    """Number of changes tried, number noticed, and those that were not."""
    tests = [str(ROOT / test) for test in TESTS[module]]
    plain, seconds = outcome(tests, None, 3600.0)
    if plain != "survived":
        raise SystemExit(f"the tests of {module} fail without any change")
    print(f"{module}: the tests take {seconds:.1f} s", flush=True)
    mutants = list(mutants_of(module))
    if sample is not None and sample < len(mutants):
        mutants = sorted(random.Random(seed).sample(mutants, sample), key=lambda mutant: mutant.number)
    survivors = []
    for done, mutant in enumerate(mutants, 1):
        how, spent = outcome(tests, mutant, ALLOWED_TIMES_LONGER * seconds)
        if how == "survived":
            survivors.append(mutant)
        print(f"{done}/{len(mutants)} {how} in {spent:.1f} s: {mutant}", flush=True)
    return len(mutants), len(mutants) - len(survivors), survivors


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(CENTRAL), choices=[*TESTS, []], help="modules of cache_dit/runtime")
    parser.add_argument("--sample", type=int, help="try so many changes of each module, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, help="print one change and try nothing")
    parser.add_argument("--list", action="store_true", help="print every change and try nothing")
    given = parser.parse_args(arguments)
    modules: list[str] = list(given.modules)
    if given.show is not None or given.list:
        for module in modules:
            for mutant in mutants_of(module):
                if given.list or mutant.number == given.show:
                    print(mutant)
        return 0
    # what every child needs, loaded once; nothing of the package, which each child imports with its change
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    results = {module: measure(module, given.sample, given.seed) for module in modules}
    for module, (_, _, survivors) in results.items():
        print(f"\n{module}: {len(survivors)} not noticed")
        for mutant in survivors:
            print(mutant)
    print()
    for module, (tried, noticed, _) in results.items():
        print(f"{module}: {noticed} of {tried} changes noticed, {100.0 * noticed / max(tried, 1):.1f} %")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
