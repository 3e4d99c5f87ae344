"""`trl-cpo report RUN …`: makes a page and pictures of training runs."""

import argparse
import sys
from contextlib import redirect_stdout

from ..quoting import as_json, escaped
from .errors import UserError

HELP = "Make an HTML page and pictures of one or several runs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, with any of log.jsonl, metrics.json and pairs.json"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: report, in the first run's folder)")
    parser.add_argument("--json", action="store_true", help="print the files made and their numbers as one JSON document")


def run(options: argparse.Namespace) -> int:
    from ..files.disk import refusal
    from ..report import NotARun, make_report

    try:
        # Some libraries print to stdout, which is for the answer alone.
        with redirect_stdout(sys.stderr):
            report = make_report(options.runs, options.out)
    except NotARun as error:
        raise UserError(f"{error}\nUsage: trl-cpo report --help") from None
    except FileExistsError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        why = refusal(error) or f"{error}."
        raise UserError(f"cannot write the report: {why}\nWrite it elsewhere: trl-cpo report --out FOLDER …") from None
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise UserError(
            "The pictures need matplotlib, which is not installed.\nInstall it: python -m pip install matplotlib"
        ) from None
    print(_as_json(report) if options.json else _as_text(report))
    return 0


def _as_text(report) -> str:
    lines = [f"{run.letter}  {run.name}: {note}" for run in report.runs for note in run.notes]
    lines = [*report.notes, *lines, f"{len(report.pictures)} pictures beside it", f"report  {report.page}"]
    return "\n".join(map(escaped, lines))


def _as_json(report) -> str:
    from ..report.paired import comparisons
    from ..report.shifts import COLUMNS
    from ..report.table import metric_rows

    def shown(cell):
        if cell is None:
            return None
        # JSON has no NaN.
        value = cell.value if abs(cell.value) < float("inf") else None
        return {"value": value, "interval_95": None if cell.interval is None else list(cell.interval)}

    def ends(one):
        return {"value": one.value, "low": one.low, "high": one.high}

    def price(run):
        """The last measurement; null if there is none."""
        if not run.prices:
            return None
        last = run.prices[-1]
        sets = {name: {key: ends(one) for key, one in found.numbers.items()} for name, found in last.sets.items()}
        # A lone surrogate cannot be printed.
        damage = [sentence.encode("utf-8", "backslashreplace").decode() for sentence in last.damage]
        return {"step": last.step, "sets": sets, "damage": damage}

    def stress(run):
        """The table "Under shift", as stress.json has its rows; null without one."""
        rows = [
            {
                "name": row.name,
                "pairs": row.pairs,
                **{name: ends(row.numbers[name]) if name in row.numbers else None for name in COLUMNS},
                "difference": {name: ends(one) for name, one in row.differences.items()} or None,
            }
            for row in run.shifts
        ]
        return rows or None

    def difference(comparison):
        """A run minus the first that holds the same pairs."""
        named = {"prefers_chosen": comparison.prefers, "in_undesirable_region": comparison.in_u, "gap": comparison.gap}
        numbers = {
            name: {"value": one.value, "interval_95": one.interval and list(one.interval)} for name, one in named.items()
        }
        return {"run": comparison.run.letter, "minus": comparison.other.letter, **numbers}

    rows = metric_rows(report.runs)
    runs = [
        {
            "letter": run.letter,
            "folder": str(run.folder),
            "unit": run.unit,
            "pairs": run.after.pairs if run.after else None,
            "metrics": {
                row["metric"]: {"before": shown(row["cells"][place][0]), "after": shown(row["cells"][place][1])} for row in rows
            },
            "price": price(run),
            "stress": stress(run),
            "notes": run.notes,
        }
        for place, run in enumerate(report.runs)
    ]
    made = {
        "page": str(report.page),
        "pictures": [str(file) for file in report.pictures],
        "notes": report.notes,
        "runs": runs,
        "differences": [difference(comparison) for comparison in comparisons(report.runs)],
    }
    return as_json(made)
