"""The page's table "Under shift": what stress.json says, and what becomes of a forged one."""

import copy
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_cpo.cli import main
from trl_cpo.report import shifts
from trl_cpo.report.page import render
from trl_cpo.report.reading import of_runs, read_runs
from trl_cpo.stress.document import FORMAT, document
from trl_cpo.stress.measure import Gaps, Measured
from trl_cpo.stress.recorded import Recorded
from trl_cpo.stress.shifts import Options

from helpers.report_looks import Page
from helpers.run_folders import made_up_pairs, make_run


def written(pairs=60, reproduced=True, mean=None):
    """What `trl-cpo stress` writes, of made-up gaps with the mean of `page_of`'s first run."""
    rows = made_up_pairs(pairs, 0)
    gap = np.linspace(-3.0, 3.0, pairs) + ((rows[:, 0] - rows[:, 1]).mean() if mean is None else mean)
    measured = Measured(
        np.ones(pairs),
        {
            "as it was": Gaps(np.arange(pairs), gap, gap - 1.0),
            "typos": Gaps(np.arange(pairs - 5), gap[:-5] - 1.0, gap[:-5] - 1.5, pairs, {"why": 5}),
        },
        {"no template": "text"},
        0.0,
        reproduced,
    )
    run = Recorded(None, "m", "d", "test", {}, {}, "sum", 1.0, np.zeros((pairs, 4)), None, 0)
    return document(run, measured, Options())


def page_of(tmp_path, *contents):
    folders = []
    for place, content in enumerate(contents):
        folders.append(make_run(tmp_path / str(place), steps=60))
        if content is not None:
            (folders[-1] / "stress.json").write_text(content if isinstance(content, str) else json.dumps(content))
    runs = read_runs(folders)
    return Page(render(runs, of_runs(runs), [])), runs


def test_the_table_says_what_the_file_says(tmp_path):
    assert shifts.FORMAT == FORMAT
    page, (run,) = page_of(tmp_path, written())
    assert run.notes == [] and [row.name for row in run.shifts] == ["as it was", "typos"]
    for row, one in zip(run.shifts, written()["shifts"], strict=True):
        assert row.pairs == one["pairs"] and list(row.numbers) == list(shifts.COLUMNS)
        for name, number in row.numbers.items():
            assert vars(number) == one[name], name
        assert {name: vars(number) for name, number in row.differences.items()} == {
            name: value for name, value in (one["difference"] or {}).items() if name in shifts.COLUMNS
        }
    assert "Under shift" in page.text
    first = run.shifts[1].numbers["prefers_chosen"]
    assert f"{100 * first.value:.1f}\u00a0%" in page.text and f"{100 * first.low:.1f} to {100 * first.high:.1f}" in page.text
    apart = run.shifts[1].differences["gap"]
    assert f"Δ −1 (−{-apart.low:.3g} to −{-apart.high:.3g})" in page.text


def printed(tmp_path, capsys, content) -> dict:
    """The run in what `trl-cpo report --json` prints."""
    page_of(tmp_path, content)
    assert main(["report", str(tmp_path / "0"), "--json", "--out", str(tmp_path / "out")]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    return run


def test_programs_get_the_rows_of_the_file(tmp_path, capsys):
    content = written()
    run = printed(tmp_path, capsys, content)
    assert [row["name"] for row in run["stress"]] == ["as it was", "typos"] and run["notes"] == []
    for row, one in zip(run["stress"], content["shifts"], strict=True):
        assert list(row) == ["name", "pairs", *shifts.COLUMNS, "difference"]
        assert row == {name: one[name] for name in row} | {"difference": row["difference"]}
        apart = one["difference"] and {name: one["difference"][name] for name in shifts.COLUMNS if name != "gain"}
        assert row["difference"] == apart
    assert run["stress"][0]["difference"] is None and run["stress"][1]["difference"]["gap"]["value"] < 0


def test_programs_get_null_for_what_is_at_fault(tmp_path, capsys):
    content = written()
    content["shifts"][1]["violations"]["value"] = 1.5
    content["shifts"][1]["difference"]["violations"] = None
    content["shifts"][1]["name"] = "broken \ud800"
    run = printed(tmp_path, capsys, content)
    (_, row), (note,) = run["stress"], run["notes"]
    assert row["name"] == "broken \ud800" and row["violations"] is None and row["gap"]["value"] and "violations" in note
    assert "violations" not in row["difference"] and row["difference"]["gap"]["value"]
    (tmp_path / "none").mkdir()
    assert printed(tmp_path / "none", capsys, None)["stress"] is None


def test_without_the_file_there_is_no_table_and_no_note(tmp_path):
    page, (run,) = page_of(tmp_path, None)
    assert run.shifts == [] and run.notes == [] and "Under shift" not in page.text


def test_a_file_of_another_evaluation_is_told(tmp_path):
    page, (run,) = page_of(tmp_path, written(mean=1.0))
    (note,) = run.notes
    assert "stress.json says a mean gap of 1 as" in note and "another evaluation" in note and note in page.text


def test_of_two_runs_each_has_its_table(tmp_path):
    page, _ = page_of(tmp_path, written(), written())
    assert page.text.count("Under shift") == 1 and page.text.count("longer dialogue") == 0
    assert page.text.count("as it was") == 2


def forged(change):
    def changed(content):
        change(content)
        return content

    return changed


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (lambda _: "{", "stress.json cannot be read"),
        (lambda _: "[]", "stress.json holds a list"),
        (forged(lambda d: d.update(format=2)), "is not of format 1"),
        (forged(lambda d: d.update(format=True)), "is not of format 1"),
        (forged(lambda d: d.update(shifts={})), "shifts must be a list"),
        (forged(lambda d: d.update(shifts=d["shifts"] * 20)), "40 shifts, of which 24 are read"),
        (forged(lambda d: d["shifts"].append(7)), "shifts[2] has no name"),
        (forged(lambda d: d["shifts"][0].update(name="x" * 99)), "shifts[0] has no name"),
        (forged(lambda d: d["shifts"][1].update(pairs=-1)), "shifts[1].pairs"),
        (
            forged(lambda d: d["shifts"][1]["violations"].update(value=1.5)),
            "shifts[1].violations must have a value from 0 to 1",
        ),
        (forged(lambda d: d["shifts"][1].update(gap="1")), "shifts[1].gap must have a value"),
        (forged(lambda d: d["shifts"][1]["gap"].update(value=float("nan"))), "shifts[1].gap must have a value"),
        (forged(lambda d: d["shifts"][1]["gap"].update(low=99.0)), "its interval must hold its value"),
        (forged(lambda d: d["shifts"][1].update(difference=[])), "shifts[1].difference must be an object"),
        (forged(lambda d: d["shifts"][1]["difference"]["prefers_chosen"].update(value=-1.5)), "a value from -1 to 1"),
        (forged(lambda d: d["reproduced"].update(holds=False)), "did not get the scores of pairs.json again"),
        (forged(lambda d: d.update(held_out_pairs=59)), "another number of held-out pairs"),
    ],
)
def test_what_is_forged_is_said_and_left_out(tmp_path, forge, said):
    page, (run,) = page_of(tmp_path, forge(written()))
    assert said in page.text and any(said in note for note in run.notes), run.notes


def test_names_are_shown_and_do_nothing(tmp_path):
    content = written()
    content["shifts"][1]["name"] = "<script>alert(1)</script>\u202e"
    page, _ = page_of(tmp_path, content)
    assert "<script>alert(1)</script>\\u202e" in page.text and "script" not in [tag for tag, _ in page.tags]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


PLACES = [path for path in places(written()) if path]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(PLACES), ANYTHING)
def test_whatever_stands_anywhere_is_read_without_an_error(path, value):
    content = copy.deepcopy(written())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    rows, notes = shifts.read_shifts(content, "stress.json", 60, 1.0)
    assert all(isinstance(note, str) for note in notes)
    for row in rows:
        for name, number in row.numbers.items():
            least, most = shifts.COLUMNS[name][2]
            assert least <= number.value <= most
