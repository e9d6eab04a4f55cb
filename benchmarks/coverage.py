"""Every transformer class of the installed diffusers, cached through `enable_cache`: writes docs/coverage.md.

Each class runs in a tiny configuration (tests/coverage) with a real forward: plain, cached twice, and against two
references of its skipped steps. What has been measured is kept in build/coverage.jsonl, so that a run can be resumed.

    python benchmarks/coverage.py                   everything
    python benchmarks/coverage.py --resume          what is missing
    python benchmarks/coverage.py --part 2/3        every third class
    python benchmarks/coverage.py --quick NAME …    these, without the second compilation; docs stay as they are
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# the script's own folder would hide the package named `coverage`
sys.path[0] = str(ROOT)

import diffusers  # noqa: E402
import torch  # noqa: E402

from tests.coverage import TINY_MODELS, TinyModel, discovered  # noqa: E402
from tests.coverage.check import HITS, SCHEDULE, Report, check  # noqa: E402

RESULTS = ROOT / "build" / "coverage.jsonl"
PAGE = ROOT / "docs" / "coverage.md"
HEAD = """# Coverage: every diffusion transformer of diffusers {diffusers}

Written by `make coverage` on {date} with torch {torch}: {cached} of {total} configurations cached, {wrong} wrong,
{untested} classes untested. One row a class (`+name`: a variant of its configuration), in a tiny configuration with
random weights on the CPU, float32, run three times, once to compile, through `enable_cache(model, schedule="{schedule}",
forecast="reuse", noise_scale=0, inner="eager")`. No class is named in the code of the package: all of it is found.

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

| class | verdict | chain of lists | cached | live-outs and bases | graphs/breaks | hits | computed | skipped | why not |
|---|---|---|---|---|---|---|---|---|---|
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 where a number is wrong."""
    options = _parsed(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    known = _known() if options.resume else {}
    chosen = _chosen(options)
    for number, tiny in enumerate(chosen, 1):
        if tiny.label not in known:
            known[tiny.label] = report = _checked(tiny, whole=not options.quick)
            _keep(report)
            print(f"{number:3}/{len(chosen)} {report.seconds:5.0f} s  {_verdict(report):5}  {_line(report)}", flush=True)
    if len(chosen) == len(TINY_MODELS):
        _write(known)
    print(f"{sum(report.cached for report in known.values())} of {len(known)} cached")
    return int(any(report.wrong for report in known.values()))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="classes; all where none is given")
    parser.add_argument("--part", default="1/1", help="which part of the classes, such as 2/3")
    parser.add_argument("--quick", action="store_true", help="without the plain compilation beside it")
    parser.add_argument("--resume", action="store_true", help="keep what was measured before")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def _chosen(options: argparse.Namespace) -> list[TinyModel]:
    named = [tiny for tiny in TINY_MODELS.values() if not options.names or {tiny.name, tiny.label} & set(options.names)]
    part, parts = map(int, options.part.split("/"))
    return named[part - 1 :: parts]


def _checked(tiny: TinyModel, *, whole: bool) -> Report:
    try:
        return check(tiny, whole=whole)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return Report(tiny.label, False, reason=f"{why} ({Path(where.filename).name}:{where.lineno})", wrong=("it raised",))


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
    return "WRONG" if report.wrong else "yes" if report.cached else "no"


def _line(report: Report) -> str:
    return f"{report.label}: {' -> '.join(report.lists) or '-'}  {'; '.join([*report.wrong, report.reason]).strip('; ')}"


def _write(reports: Mapping[str, Report]) -> None:
    tested = {TINY_MODELS[label].name for label in reports}
    untested = sorted(set(discovered()) - tested)
    counts = {
        "cached": sum(report.cached and not report.wrong for report in reports.values()),
        "total": len(reports),
        "wrong": sum(bool(report.wrong) for report in reports.values()),
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
    rows.extend(f"| {name} | untested |" + " |" * 8 for name in untested)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(head + "\n".join(rows) + "\n")
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
