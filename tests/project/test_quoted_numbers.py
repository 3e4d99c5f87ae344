"""Numbers that a page quotes from a run, against the record that the run left. A comment before them names the record:

<!-- from benchmarks/demo-clip.txt -->              each line of the next block is a line that the run printed
<!-- from benchmarks/demo-clip.txt: took 9 s -->    the run printed this, and the next paragraph has its numbers
<!-- from benchmarks/demo-clip.jsonl: words -->     each line of the next block is said of that log (`log.jsonl`)
<!-- from benchmarks/decisions.json: decisions -->  each row of the next table is what `TABLES["decisions"]` makes of it;
                                                    the record may be a file of lines too (`.jsonl`)
"""

import json
import re
from statistics import mean, median

import pytest

from trl_cpo.intervals import paired_difference
from trl_cpo.logs.narration import sentence

from helpers.checkout import tracked_files
from helpers.paths import ROOT

TAG = re.compile(r"^[ \t]*<!-- from (?P<record>\S+?)(?:: (?P<what>.+?))? -->$", re.MULTILINE)
PAGES = [name for name in tracked_files() if name.endswith(".md") and TAG.search((ROOT / name).read_text(encoding="utf-8"))]


def quotes(page):
    """(record, what, the paragraph, table or block that follows) of each comment in a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in TAG.finditer(text):
        rest = text[found.end() :].lstrip("\n")
        end = rest.find("```", 3) if rest.lstrip().startswith("```") else rest.find("\n\n")
        yield found["record"], found["what"], rest[: end if end >= 0 else None]


def interval(part) -> str:
    return f"{100 * part['share']:.0f} % ({100 * part['low']:.0f} to {100 * part['high']:.0f})"


def decisions(records) -> set[str]:
    names = {"start": "start", "clip-1-gamma2": "clip, β 1, γ 2"}
    names |= {f"clip-{beta}": f"clip, β {beta}" for beta in ("0.3", "1")} | {f"dpo-{b}": f"DPO, β {b}" for b in ("0.1", "0.3")}
    rows = set()
    for record in records:
        settings = record["settings"]
        rate = {"constant": "constant", "linear": "to 0"}[settings.get("schedule", "constant")]
        rate = f"{settings['learning_rate']:.0e} {rate}".replace("e-0", "e-") if record["step"] else ""
        shares = [interval(record["decisions"][part]) for part in ("preferred", "right", "answered", "named")]
        price = f"{record['kl_general']['value']:.3f}", f"{record['repetition_general']:.3f}"
        sft = f"{settings['sft']:g}" if record["step"] else ""
        name = names[record["arm"]] + (", batches of 8" if settings["batch"] == 8 else "")
        rows.add(" | ".join([name, sft, rate, str(record["step"]), *shares, *price]))
    return rows


def damage(record) -> set[str]:
    names = {"DPO, sums, 1e-3": "plain DPO", "clip, sums, 1e-3": "clip, γ 1", "clip, means, 1e-3": "clip, means"}
    rows = {f"the pairs' chosen answers, by people |  |  | {100 * record['repetition_of_people']:.0f} %"}
    for run in record["runs"]:
        kl, repeated = run["sets"]["general"]["kl"], f"{100 * run['sets']['general']['repetition']['value']:.0f} %"
        if run["step"]:
            moved = f"{kl['value']:.2f} ({kl['low']:.2f} to {kl['high']:.2f})"
            rows.add(f"{names.get(run['setting'], run['setting'])} | {run['step']} | {moved} | {repeated}")
        else:
            rows.add(f"the model before training | 0 | {kl['value']:.0f} | {repeated}")
    return rows


def casts(records) -> set[str]:
    """A row a setting: with PEFT's casts, and without them, which is the next record."""
    shown = (
        lambda record: f"{1000 * mean(record['new_s']):.0f}",
        lambda record: f"{1000 * median(record['again_s']):.0f}",
        lambda record: f"{1000 * record['busy_s']:.0f}",
        lambda record: f"{record['kernels']}",
        lambda record: f"{record['peak_bytes'] / 1e9:.1f}",
    )
    rows = set()
    for both in zip(records[::2], records[1::2], strict=True):
        assert [record["casts"] for record in both] == ["done", "left out"] and both[0]["row"] == both[1]["row"]
        rows.add(" | ".join([both[0]["row"], *(" → ".join(map(show, both)) for show in shown)]))
    return rows


def starts(records) -> set[str]:
    """What making each model's trainer took, DPOTrainer's and ours; of those made again, the last."""
    found: dict[str, dict[str, dict]] = {}
    for record in records:
        if "start_s" in record:
            found.setdefault(record["row"].partition(",")[0], {})[record["arm"]] = record
    rows = set()
    for model, arms in found.items():
        both = arms["trl"], arms["varlen"]
        memory = " → ".join(f"{record['start_bytes'] / 1e9:.1f}" for record in both)
        rows.add(" | ".join([model, *(f"{record['start_s']:.1f}" for record in both), memory]))
    return rows


def seeds(records) -> set[str]:
    """Both tables of `python -m benchmarks.decision_seeds`, at its own levels and at those looked at afterwards."""
    from benchmarks.decision_seeds import LEVELS, seeds_table

    return {line.strip("| ") for line in seeds_table(records, (*LEVELS, 0.08, 0.1)).splitlines() if line.startswith("| ")}


def answers(records) -> set[str]:
    """The table of `python -m benchmarks.demo_answers`."""
    from benchmarks.demo_answers import table

    return {line.strip("| ") for line in table(records).splitlines() if line.startswith("| ")}


def bound(records) -> set[str]:
    """As the program prints them."""
    from benchmarks.bound import row

    return {row(record) for record in records}


#: What a record's tables hold, row by row, and how many columns of a page's table that is.
TABLES = {
    "decisions": (decisions, 10),
    "damage": (damage, 4),
    "seeds": (seeds, 6),
    "answers": (answers, 9),
    "casts": (casts, 6),
    "starts": (starts, 4),
    "bound": (bound, 9),
}


def words(log: str) -> set[str]:
    """What the Narrator says of a run whose held-out pairs are evaluated before and after."""
    lines = [json.loads(line) for line in log.splitlines()]
    train, held_out = ([line for line in lines if f"{prefix}cpo/gap" in line] for prefix in ("", "eval_"))
    end = sentence(held_out[0], held_out[-1], prefix="eval_")
    return {
        f"[first log, step {train[0]['step']}] {sentence(None, train[0])}",
        f"[end, step {held_out[-1]['step']}] {end}",
    }


def rows_of(table: str, columns: int) -> list[str]:
    lines = [line.strip().strip("|").split("|") for line in table.splitlines()][2:]
    return [" | ".join(cell.strip() for cell in line[:columns]) for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_quotes_is_in_the_record(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for record, what, block in quotes(page):
        text = (ROOT / record).read_text(encoding="utf-8")
        if what in TABLES:
            made, columns = TABLES[what]
            rows = rows_of(block, columns)
            found = [json.loads(line) for line in text.splitlines()] if record.endswith(".jsonl") else json.loads(text)
            assert rows and not set(rows) - made(found), f"{page} has rows that {record} does not give"
        elif what == "words":
            lines = [line.strip() for line in block.splitlines()]
            assert lines and not set(lines) - words(text), f"{page} quotes what is not said of {record}: {words(text)}"
        elif what:
            assert what in text, f"{page}: {record} does not have {what!r}"
            missing = [number for number in re.findall(r"\d[\d.,]*\d|\d", what) if number not in block]
            assert not missing, f"{page}: {missing} of {what!r} are not in the paragraph that follows"
        else:
            printed = {line.strip() for line in text.splitlines()}
            lines = [line.strip() for line in block.splitlines() if not line.strip().startswith("```")]
            lines = [line for line in lines if line not in ("", "...", "…")]
            assert lines and not set(lines) - printed, f"{page} quotes what {record} does not have"


def test_the_pages_that_quote_runs_are_among_them():
    assert {"README.md", "docs/cli.md", "docs/price.md", "docs/contributing/constraints.md"} <= set(PAGES)


@pytest.mark.parametrize("page", ["docs/contributing/constraints.md"])
def test_paired_gains_that_pages_quote(page):
    """Of 100 steps at a rate that falls to 0 and SFT 0.3: clip over the start, and over DPO, in points."""
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    records = json.loads((ROOT / "benchmarks" / "decisions.json").read_text(encoding="utf-8"))
    found = {
        record["arm"]: record["outcomes"]
        for record in records
        if record["step"] == 0 or (record["step"] == 100 and record["settings"]["sft"] == 0.3)
    }
    for arm, other, points in (("clip-1", "start", " points"), ("clip-1", "dpo-0.1", ""), ("clip-0.3", "dpo-0.3", "")):
        said = []
        for part, name in (("preferred", "preferred"), ("right", "likeliest of six"), ("answered", "greedy answer right")):
            pairs = list(zip(found[other][part], found[arm][part], strict=True))
            gained, lost = pairs.count(("0", "1")), pairs.count(("1", "0"))
            value, *ends = (100 * x for x in ((gained - lost) / len(pairs), *paired_difference(gained, lost, len(pairs))))
            said.append(f"{name} {value:+.0f}{points} ({ends[0]:+.0f} to {ends[1]:+.0f})")
            points = ""
        assert ", ".join(said) in text, said
