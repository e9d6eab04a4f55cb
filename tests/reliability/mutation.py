"""Changes the runtime's code a little, many times over, and counts the changes that no test notices.

    python tests/reliability/mutation.py                      the three central modules
    python tests/reliability/mutation.py session --sample 60  some changes to another one
    python tests/reliability/mutation.py clock --show 17      what change 17 is
    python tests/reliability/mutation.py --record             which tests reach which lines, where not known yet

cosmic-ray makes the changes; its own runner wants a package where its files lie, which ours is not. Here each change is
tested in a child that was forked from a process with torch loaded and warm, and only by the tests that reach the changed
line, those that take least first. So it costs seconds. Which those are is recorded once for each file of tests, in
build/mutation. A change that makes the tests run four times as long counts as noticed. Tests of more than LONGEST seconds, and
those that start other processes, are left out: what is measured is a lower bound.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "cache_dit" / "runtime"
RECORDS = ROOT / "build" / "mutation"
# What the runtime is tested by.
FILES = (
    "tests/runtime/test_clock.py",
    "tests/runtime/test_solvers.py",
    "tests/runtime/test_correction.py",
    "tests/runtime/test_session.py",
    "tests/runtime/test_session_alone.py",
    "tests/runtime/test_control_refresh.py",
    "tests/runtime/test_eager_contexts.py",
    "tests/runtime/test_parts.py",
    "tests/runtime/test_timing.py",
    "tests/runtime/test_measurements.py",
    "tests/runtime/test_signs.py",
    "tests/runtime/test_tracing.py",
    "tests/runtime/test_program.py",
    "tests/runtime/test_registry.py",
    "tests/runtime/test_ranks.py",
    "tests/runtime/test_call.py",
    "tests/reliability/test_runs.py",
    "tests/reliability/test_faults.py",
    "tests/reliability/test_models.py",
    "tests/reliability/test_numerics.py",
    "tests/reliability/test_concurrency.py",
    "tests/reliability/test_injected.py",
    "tests/test_api.py",
    "tests/test_backend.py",
    "tests/test_blockwise.py",
    "tests/test_compile_habits.py",
    "tests/test_end_to_end.py",
    "tests/test_explanation.py",
    "tests/test_fidelity.py",
    "tests/test_statistics.py",
    "tests/integrations/test_diffusers.py",
)
MODULES = tuple(sorted(path.stem for path in RUNTIME.glob("*.py") if path.stem != "__init__"))
CENTRAL = ("clock", "buffers", "call")
ALLOWED_TIMES_LONGER = 4.0
LONGEST = 8.0
OPTIONS = ("-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "--show-capture=no", "--tb=short")
MARKS = "not slow and not comfy and not soak"


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
    return RUNTIME / f"{module}.py"


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
    """Imports modules of the package with other code: ``source_of`` gives it by the module's name, or None."""

    def __init__(self, source_of: Callable[[str], ast.Module | str | None]) -> None:
        self._source_of = source_of

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, module = fullname.rpartition(".")
        source = self._source_of(module) if package == "cache_dit.runtime" else None
        if source is None:
            return None

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                code: CodeType = compile(source, self.path, "exec", dont_inherit=True)
                return code

        return importlib.util.spec_from_file_location(fullname, path_of(module), loader=Loader(fullname, str(path_of(module))))


# Which tests reach which lines.


class _Marks(ast.NodeTransformer):
    """Notes each statement of a function when it is about to run."""

    def __init__(self, module: str) -> None:
        self._module, self._depth = module, 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if self._depth and isinstance(statements, list) and statements:
                setattr(node, name, [each for statement in statements for each in (*self._mark(statement), statement)])
        return node

    def _mark(self, statement: ast.stmt) -> list[ast.stmt]:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return []
        call = ast.parse(f"__cache_dit_reached__({self._module!r}, {statement.lineno})").body[0]
        return [ast.copy_location(call, statement)]


def with_marks(module: str) -> ast.Module:
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    return ast.fix_missing_locations(_Marks(module).visit(tree))


class Recorder:
    """A plugin of pytest: the lines that each test reaches, and its seconds."""

    def __init__(self) -> None:
        self.reached: set[tuple[str, int]] = set()
        self.seconds = 0.0
        self.tests: dict[str, dict[str, Any]] = {}
        vars(builtins)["__cache_dit_reached__"] = lambda module, line: self.reached.add((module, line))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reached.clear()
        self.seconds = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        lines = [f"{module}:{line}" for module, line in sorted(self.reached)]
        self.tests[nodeid] = {"seconds": round(time.monotonic() - self.seconds, 2), "lines": lines}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            raise SystemExit(f"{report.nodeid} fails without any change:\n{report.longreprtext}")


def record_of(file: str) -> Path:
    """Where the record of a file of tests lies; another place where it or the runtime is another one."""
    content = hashlib.sha256((ROOT / file).read_bytes())
    for path in sorted(RUNTIME.glob("*.py")):
        content.update(path.read_bytes())
    return RECORDS / f"{Path(file).stem}-{content.hexdigest()[:12]}.json"


def record(file: str) -> None:
    """Run the tests of a file once, unchanged, and keep what each reaches."""
    import pytest

    sys.meta_path.insert(0, Swap(with_marks))
    recorder = Recorder()
    pytest.main([*OPTIONS, "--hypothesis-seed=0", "-m", MARKS, str(ROOT / file)], plugins=[recorder])
    path = record_of(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recorder.tests, indent=0), encoding="utf-8")


def files_of_tests(named: Sequence[str] = ()) -> list[str]:
    """Those that are there; of them those whose names hold one of these parts, if any is given."""
    return [file for file in FILES if (ROOT / file).exists() and (not named or any(part in file for part in named))]


def record_missing(files: Sequence[str]) -> None:
    for file in files:
        if not record_of(file).exists():
            start = time.monotonic()
            in_child(lambda file=file: record(file) or 0, 3600.0, quiet=False)  # type: ignore[misc]
            if not record_of(file).exists():
                raise SystemExit(f"the tests in {file} fail without any change")
            print(f"{file}: recorded in {time.monotonic() - start:.1f} s", flush=True)


class Reach:
    """Which tests reach a line of a module."""

    def __init__(self, module: str, files: Sequence[str]) -> None:
        self._module = module
        self.seconds: dict[str, float] = {}
        self._lines: dict[str, set[int]] = {}
        for file in files:
            for test, about in json.loads(record_of(file).read_text(encoding="utf-8")).items():
                lines = {int(line.partition(":")[2]) for line in about["lines"] if line.startswith(f"{module}:")}
                if lines and about["seconds"] <= LONGEST:
                    self.seconds[test], self._lines[test] = about["seconds"], lines
        self._statements = list(_statements(ast.parse(path_of(module).read_text(encoding="utf-8"))))

    def of(self, line: int) -> list[str]:
        """Those that take least first; of what runs at import, all that reach anything in the module."""
        around = [(last - first, first, inside) for first, last, inside in self._statements if first <= line <= last]
        _, first, inside = min(around, default=(0, line, False))
        tests = [test for test, lines in self._lines.items() if not inside or first in lines]
        return sorted(tests, key=self.seconds.__getitem__)


def _statements(node: ast.AST, inside: bool = False) -> Iterator[tuple[int, int, bool]]:
    """First and last line of every statement, and whether it stands in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child.lineno, child.end_lineno or child.lineno, inside
        yield from _statements(child, inside or isinstance(child, ast.FunctionDef))


# Changes.


class InOrder:
    """A plugin of pytest: runs some tests alone, file by file, and says which of them failed."""

    def __init__(self, tests: Sequence[str], failed: int) -> None:
        self._place = {test: i for i, test in enumerate(tests)}
        self._failed = failed

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        chosen = [item for item in items if item.nodeid in self._place]
        first: dict[str, int] = {}
        for item in chosen:
            file = item.nodeid.partition("::")[0]
            first[file] = min(first.get(file, len(items)), self._place[item.nodeid])
        items[:] = sorted(chosen, key=lambda item: (first[item.nodeid.partition("::")[0]], self._place[item.nodeid]))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(self._failed, report.nodeid.encode() + b"\n")


def run_tests(tests: Collection[str], mutant: Mutant | None, failed: int) -> int:
    """In a child: the exit status of the tests, with the change in force."""
    import pytest

    if mutant is not None:
        sys.meta_path.insert(0, Swap({mutant.module: mutant.source}.get))
    files = dict.fromkeys(str(ROOT / test.partition("::")[0]) for test in tests)
    arguments = ["-x", *OPTIONS, "--hypothesis-seed=0", "-m", MARKS, *files]
    return int(pytest.main(arguments, plugins=[InOrder(list(tests), failed)]))


def in_child(work: Callable[[], int], limit: float, quiet: bool = True) -> int | None:
    """The exit status of what a forked child does; None where it took longer than the limit."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            if quiet:
                sink = os.open(os.devnull, os.O_WRONLY)
                os.dup2(sink, 1)
                os.dup2(sink, 2)
            status = work()
        except SystemExit as end:
            print(end, flush=True)
        finally:
            os._exit(min(status, 100))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - start > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a change: 'survived', 'killed' or 'timed out', by which test, and the seconds it took."""

    how: str
    by: str
    seconds: float


def outcome(tests: Sequence[str], mutant: Mutant | None, limit: float) -> Outcome:
    if not tests:
        return Outcome("survived", "no test reaches it", 0.0)
    start = time.monotonic()
    reader, writer = os.pipe()
    status = in_child(lambda: run_tests(tests, mutant, writer), limit)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as failed:
        by = failed.read().partition("\n")[0]
    how = "timed out" if status is None else "survived" if status == 0 else "killed"
    return Outcome(how, by, time.monotonic() - start)


def measure(
    module: str, files: Sequence[str], sample: int | None, seed: int, numbers: Collection[int]
) -> tuple[int, int, list[Mutant]]:
    """Number of changes tried, number noticed, and those that were not."""
    reach = Reach(module, files)
    mutants = list(mutants_of(module))
    print(f"{module}: {len(mutants)} changes; {len(reach.seconds)} tests reach it", flush=True)
    if numbers:
        mutants = [mutant for mutant in mutants if mutant.number in numbers]
    elif sample is not None and sample < len(mutants):
        mutants = sorted(random.Random(seed).sample(mutants, sample), key=lambda mutant: mutant.number)
    survivors, killers = [], set[str]()
    for done, mutant in enumerate(mutants, 1):
        tests = reach.of(mutant.line)
        limit = 20.0 + ALLOWED_TIMES_LONGER * sum(reach.seconds[test] for test in tests)
        found = outcome(tests, mutant, limit)
        if found.how == "survived":
            survivors.append(mutant)
        if found.by in reach.seconds:
            killers.add(found.by)
        by = found.by or "import"
        print(f"{done}/{len(mutants)} {found.how} in {found.seconds:.1f} s ({len(tests)} tests, {by}): {mutant}", flush=True)
    # a test that fails by itself, without those that ran before it, has noticed nothing
    alone = [test for test in sorted(killers) if outcome([test], None, 20.0 + 10 * LONGEST).how != "survived"]
    if alone:
        print(f"{module}: these fail alone without any change: {', '.join(alone)}")
    return len(mutants), len(mutants) - len(survivors), survivors


def warm() -> None:
    """Load what every child needs; nothing of the package, which each child imports with its change."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        torch.compile(layer, backend="eager")(torch.ones(1, 2))
    torch._dynamo.reset()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "modules",
        nargs="*",
        default=CENTRAL,
        choices=[*MODULES, CENTRAL],
        metavar="module",
        help="modules of cache_dit/runtime",
    )
    parser.add_argument("--sample", type=int, help="try so many changes of each module, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", default=[], help="try these changes of one module again")
    parser.add_argument("--files", nargs="+", default=[], help="only the files of tests whose names hold one of these parts")
    parser.add_argument("--record", action="store_true", help="record what each test reaches and try nothing")
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
    warm()
    files = files_of_tests(given.files)
    record_missing(files)
    if given.record:
        return 0
    results = {module: measure(module, files, given.sample, given.seed, given.only) for module in modules}
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
