"""The page: one self-contained HTML file in which every name and value of a run is shown as plain text."""

import base64
import unicodedata
from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from .. import __version__
from . import price_section, table
from .groups import groups, shown_weight
from .pictures import Drawn, Picture
from .run import Run

#: Runs per table; more runs get further tables, so that no table is wider than the page.
_COLUMNS = 8
_FEW = 4


def shown(value) -> str:
    """`value` as text, with control and direction characters escaped so that they are visible and harmless."""
    return "".join(
        f"\\u{ord(char):04x}" if unicodedata.category(char).startswith("C") and char not in "\n\t" else char
        for char in str(value)
    )


def chunks(runs: list, size: int) -> list[list]:
    """The runs in order, in parts of at most `size`, as even as possible."""
    parts = -(-len(runs) // size)
    return [runs[len(runs) * part // parts : len(runs) * (part + 1) // parts] for part in range(parts)]


def _sentence(run: Run) -> str:
    """One sentence on how a run changed its held-out pairs."""
    after = table.cell(run.after, "cpo/prefers_chosen", True)
    if run.after is None or after is None:
        return "no evaluation after training was found."
    before = table.cell(run.before, "cpo/prefers_chosen", True)
    in_u = table.cell(run.after, "cpo/in_undesirable_region", True)
    of = f"of {run.after.pairs} held-out pairs" if run.after.pairs else "of the held-out pairs"
    when = "after training" if run.after.step is None else f"at step {run.after.step}"
    interval = f" (95\u00a0%: {after.interval_text})" if after.interval else ""
    text = f"{when} the policy itself prefers the chosen answer on {after.text} {of}{interval}"
    if before is not None:
        text += f", {before.text} before"
    return text + ("." if in_u is None else f"; {in_u.text} lie in U.") + price_section.sentence(run)


def _source(drawn: Drawn) -> str:
    """A drawing as an address that needs no network."""
    return f"data:image/png;base64,{base64.b64encode(drawn.png).decode()}"


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    environment.filters["source"] = _source
    environment.filters["weight"] = shown_weight
    return environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


def render(runs: list[Run], run_notes: list[str], pictures: list[Picture]) -> str:
    """The page as HTML."""
    settings = table.settings(runs)
    named = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    return _template().render(
        title=named,
        version=__version__,
        runs=runs,
        several=len(runs) > 1,
        sentences={run.letter: _sentence(run) for run in runs},
        facts={run.letter: table.facts(run) for run in runs},
        fact_names=list(table.facts(runs[0])),
        run_notes=run_notes,
        metric_tables=[(part, table.metric_rows(part)) for part in chunks(runs, _FEW)],
        groups=[(run, found) for run in runs if (found := groups(run))],
        price_tables=[(part, price_section.rows(part)) for part in chunks(runs, _FEW)],
        price_ends={run.letter: price_section.ends(run) for run in runs},
        samples=price_section.samples(runs),
        damage=[(run, found) for run in runs if (found := price_section.damage(run))],
        unmeasured={run.letter: price_section.missing(run) for run in runs},
        units={run.letter: run.unit for run in runs},
        settings=settings,
        setting_parts=chunks(list(range(len(runs))), _COLUMNS),
        versions=table.versions(runs),
        pictures=pictures,
    )
