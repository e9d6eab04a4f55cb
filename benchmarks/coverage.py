"""Every transformer class of the installed diffusers, cached through `enable_cache`: writes docs/coverage.md.

Each class runs in a tiny configuration (tests/coverage) with a real forward: plain, cached twice, and against two
references of its skipped steps. What has been measured is kept in build/coverage.jsonl, so that a run can be resumed.

    python benchmarks/coverage.py                   everything
    python benchmarks/coverage.py --resume          what is missing
    python benchmarks/coverage.py --part 2/3        every third class; --part today/3: which third the date says
    python benchmarks/coverage.py --quick NAME …    these, without the second compilation and the variations
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import os
import queue
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# the script's own folder would hide the package named `coverage`
sys.path[0] = str(ROOT)

import diffusers  # noqa: E402
import torch  # noqa: E402

from tests.coverage import TINY_MODELS, TinyModel, discovered  # noqa: E402
from tests.coverage.check import HITS, SCHEDULE, VARIATIONS, Report, check, check_variation  # noqa: E402

RESULTS = ROOT / "build" / "coverage.jsonl"
PAGE = ROOT / "docs" / "coverage.md"
# Models checked by one process.
GROUP = 8
HEAD = """# Coverage: every diffusion transformer of diffusers {diffusers}

[README](../README.md) · [Tested models](models.md)

Written by `make coverage` on {date} with torch {torch}: {classes} of {all_classes} classes cached ({cached} of {total}
configurations), {wrong} wrong, {untested} untested. One row a class (`+name`: a variant of its configuration), in a
tiny configuration with random weights on the CPU, float32, run three times, once to compile, through
`enable_cache(model, schedule="{schedule}", forecast="reuse", noise_scale=0, inner="eager")`. No class is named in the code of
the package: all of it is found.

- **verdict**: yes, no, or WRONG (a number that must agree does not).
- **chain of lists**: where the blocks were found; "block by block": they do not come into one graph, so each of them keeps
  a residual of its own and what lies between them runs in eager.
- **cached**: the blocks that a skipped step leaves out, of all in the chain of lists.
- **live-outs**: what leaves the cached part, and what it is a residual to; "whole": stored as it is.
- **graphs/breaks**: compiled graphs and graph breaks, in brackets those of plain `torch.compile`; "?": not compared.
- **hits**: skipped calls of the two runs behind the compiling one together, of {hits}.
- **computed**: largest error of a computed step against the eager model, relative to the largest element.
- **skipped**: the same of skipped steps against the graph with the cached part replaced by hand / against the eager
  model with the blocks bypassed by hooks (–: that reference needs blocks that hand their streams on one to the next).
- **bf16**, **batches** (2, 3, 4 and 2 samples in turns, so that sizes become dynamic), **inductor** (a dozen classes on each
  day): the same checks once more; empty where not run.

"""
COLUMNS = (
    "class",
    "verdict",
    "chain of lists",
    "cached",
    "live-outs and bases",
    "graphs/breaks",
    "hits",
    "computed",
    "skipped",
    *VARIATIONS,
    "why not",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 where a number is wrong."""
    options = _parsed(arguments)
    known = _known() if options.resume and not options.worker else {}
    chosen = _chosen(options)
    open_ = [tiny.label for tiny in chosen if tiny.label not in known]
    compiled = _dozen(datetime.date.today())
    started = perf_counter()
    if options.worker:
        _work(open_, options.quick, compiled)
        return 0
    for number, report in enumerate(_reports(open_, options), 1):
        known[report.label] = report
        _keep(report)
        print(f"{number:3}/{len(open_)} {report.seconds:5.0f} s  {_verdict(report):5}  {_line(report)}", flush=True)
    if set(known) == set(TINY_MODELS):
        _write(known)
    found = [known[tiny.label] for tiny in chosen]
    print(f"{sum(report.cached for report in found)} of {len(found)} cached, in {(perf_counter() - started) / 60:.1f} minutes")
    return int(any(_wrong(report) for report in found))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="classes; all where none is given")
    parser.add_argument("--part", default="1/1", help="which part of the classes, such as 2/3; today/3: by the date")
    parser.add_argument("--quick", action="store_true", help="without the plain compilation beside it and the variations")
    parser.add_argument("--resume", action="store_true", help="keep what was measured before")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    return parser.parse_args(arguments)


def _chosen(options: argparse.Namespace) -> list[TinyModel]:
    if options.worker:
        return [TINY_MODELS[label] for label in options.names]
    named = [tiny for tiny in TINY_MODELS.values() if not options.names or {tiny.name, tiny.label} & set(options.names)]
    part, parts = options.part.split("/")
    number = datetime.date.today().toordinal() % int(parts) if part == "today" else int(part) - 1
    return named[number :: int(parts)]


def _dozen(day: datetime.date) -> set[str]:
    """The configurations that are compiled with inductor on a day: another dozen on each."""
    labels = sorted(TINY_MODELS)
    return {labels[(day.toordinal() * 12 + i) % len(labels)] for i in range(12)}


def _reports(labels: Sequence[str], options: argparse.Namespace) -> Iterator[Report]:
    """Reports as they come, from processes that check a few models each: compiled code is never freed."""
    groups = [labels[i : i + GROUP] for i in range(0, len(labels), GROUP)]
    done: queue.Queue[Report] = queue.Queue()

    def run(group: Sequence[str]) -> None:
        left = dict.fromkeys(group)
        command = [sys.executable, __file__, "--worker", *(["--quick"] if options.quick else []), *group]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("{"):
                    report = Report(**_tuples(json.loads(line)))
                    left.pop(report.label, None)
                    done.put(report)
        for label in left:
            done.put(Report(label, False, reason=f"the process ended with {process.returncode}", wrong=("it died",)))

    with ThreadPoolExecutor(options.jobs) as threads:
        for group in groups:
            threads.submit(run, group)
        for _ in labels:
            yield done.get()


def _work(labels: Sequence[str], quick: bool, compiled: Container[str]) -> None:
    """What a process of `_reports` does: one line of JSON for each model."""
    _quiet()
    for label in labels:
        print(json.dumps(dataclasses.asdict(_checked(label, quick, label in compiled))), flush=True)


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    logging.getLogger("cache_dit").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def _checked(label: str, quick: bool, compiled: bool) -> Report:
    tiny = TINY_MODELS[label]
    try:
        start = perf_counter()
        report = check(tiny, whole=not quick)
        names = [] if quick or not report.cached else ["bf16", *(["inductor"] if compiled else [])]
        others = tuple((name, _varied(tiny, name)) for name in names)
        return dataclasses.replace(report, variations=(*report.variations, *others), seconds=perf_counter() - start)
    except Exception as error:
        return Report(tiny.label, False, reason=_told(error), wrong=("it raised",))


def _varied(tiny: TinyModel, name: str) -> str:
    try:
        return check_variation(tiny, name)
    except Exception as error:
        return f"WRONG: {_told(error)}"


def _told(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return f"{why} ({Path(where.filename).name}:{where.lineno})"


def _wrong(report: Report) -> bool:
    return bool(report.wrong) or any(verdict.startswith("WRONG") for _, verdict in report.variations)


def _keep(report: Report) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(report)) + "\n")


def _known() -> dict[str, Report]:
    """The last report of each configuration that is still there."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    reports = [Report(**_tuples(json.loads(line))) for line in lines]
    return {report.label: report for report in reports if report.label in TINY_MODELS}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(map(_tuple, value)) if isinstance(value, list) else value for name, value in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _verdict(report: Report) -> str:
    return "WRONG" if _wrong(report) else "yes" if report.cached else "no"


def _line(report: Report) -> str:
    varied = [f"{name}: {verdict}" for name, verdict in report.variations if verdict != "yes"]
    told = "; ".join(text for text in (*report.wrong, report.reason, *varied) if text)
    return f"{report.label}: {' -> '.join(report.lists) or '-'}  {told}"


def _write(reports: Mapping[str, Report]) -> None:
    tested = {TINY_MODELS[label].name for label in reports}
    untested = sorted(set(discovered()) - tested)
    counts = {
        "cached": sum(report.cached and not _wrong(report) for report in reports.values()),
        "total": len(reports),
        "classes": len({TINY_MODELS[report.label].name for report in reports.values() if report.cached and not _wrong(report)}),
        "all_classes": len(tested) + len(untested),
        "wrong": sum(map(_wrong, reports.values())),
        "untested": len(untested),
    }
    head = HEAD.format(
        diffusers=diffusers.__version__,
        torch=torch.__version__,
        date=datetime.date.today(),
        schedule=SCHEDULE,
        hits=2 * HITS,
        **counts,
    )
    rows = [_row(report) for _, report in sorted(reports.items())]
    rows.extend(f"| {name} | untested |" + " |" * (len(COLUMNS) - 2) for name in untested)
    PAGE.parent.mkdir(exist_ok=True)
    columns = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    PAGE.write_text(head + "\n".join([*columns, *rows]) + "\n")
    print(f"wrote {PAGE.relative_to(ROOT)}")


def _row(report: Report) -> str:
    compared = report.graph_error is not None or not report.cached
    beside = f"{report.plain_graphs}/{report.plain_breaks}" if compared else "?"
    cells = [
        report.label,
        _verdict(report),
        " → ".join(report.lists) + (" (block by block)" if report.blockwise else ""),
        f"{report.cached_blocks} of {report.blocks}" if report.blocks else "",
        "; ".join(f"{out} − {base}" if base else f"{out}, whole" for out, base in report.live_outs),
        f"{report.graphs}/{report.breaks} ({beside})",
        str(report.hits),
        f"{report.computed_error:.0e}" if report.computed_error else "0",
        f"{_number(report.graph_error)} / {_number(report.eager_error)}" if report.cached else "",
        *(dict(report.variations).get(name, "") for name in VARIATIONS),
        "; ".join(_cells([*report.wrong, report.reason])),
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}" if value else "0"


def _cells(texts: Iterable[str]) -> list[str]:
    """Texts for a table, without the folder that this machine keeps its packages in."""
    return [re.sub(r"/\S*site-packages/", "", text).replace("|", "\\|").replace("\n", " ") for text in texts if text]


if __name__ == "__main__":
    sys.exit(main())
