"""Two runs pair by pair: which runs hold the same pairs, and the differences that the page tells."""

import json

import numpy as np
import pytest
from scipy import stats

from trl_cpo.cli import main
from trl_cpo.intervals import paired_difference
from trl_cpo.report import paired, pictures
from trl_cpo.report.page import render
from trl_cpo.report.reading import of_runs, read_runs

from helpers.report_looks import Page, drawn_figure
from helpers.run_folders import make_run

PAIRED = next(kind for kind in pictures.KINDS if kind.name == "pair-by-pair")


@pytest.fixture
def runs(tmp_path):
    return read_runs([make_run(tmp_path / name, seed=seed, steps=5) for seed, name in enumerate("abc")])


def edit(folder, change):
    document = json.loads((folder / "pairs.json").read_text())
    change(document)
    (folder / "pairs.json").write_text(json.dumps(document))


def test_differences_are_those_of_the_pairs(runs):
    first, second, _ = runs
    found = paired.compare(second, first)
    mine, theirs = second.held_out.gap > 0, first.held_out.gap > 0
    assert (found.only, found.only_other) == (np.sum(mine & ~theirs), np.sum(theirs & ~mine))
    assert found.prefers.value == pytest.approx(np.mean(mine) - np.mean(theirs))
    assert found.prefers.interval == paired_difference(found.only, found.only_other, 60)
    in_u = [(run.held_out.gap < 0) & (run.held_out.gap > run.held_out.ref_gap) for run in (second, first)]
    assert found.in_u.value == pytest.approx(np.mean(in_u[0]) - np.mean(in_u[1]))
    difference = second.held_out.gap - first.held_out.gap
    assert found.gap.value == pytest.approx(np.mean(difference))
    expected = stats.ttest_rel(second.held_out.gap, first.held_out.gap).confidence_interval()
    assert found.gap.interval == pytest.approx(tuple(expected))


def test_a_run_against_itself_differs_in_nothing_but_may(tmp_path):
    one, other = read_runs([make_run(tmp_path / name, seed=3, steps=5) for name in "ab"])
    found = paired.compare(other, one)
    low, high = found.prefers.interval
    assert found.prefers.value == 0 == found.gap.value and low < 0 < high and found.gap.interval == (0, 0)


def test_each_run_is_compared_to_the_first_with_its_pairs(tmp_path):
    folders = [make_run(tmp_path / "other", pairs=50, steps=5)]
    folders += [make_run(tmp_path / name, seed=seed, steps=5) for seed, name in enumerate("abc")]
    runs = read_runs(folders)
    assert [(found.run.letter, found.other.letter) for found in paired.comparisons(runs)] == [("C", "B"), ("D", "B")]
    picture = next(picture for picture in pictures.draw(runs) if picture.kind is PAIRED)
    assert picture.wide and picture.notes[0].startswith("Without A: it needs two runs with the same pairs")


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["rows"].pop(),
        lambda document: document["rows"].reverse(),
        lambda document: document["rows"][7].__setitem__(2, document["rows"][7][2] - 5.0),
        lambda document: document["rows"][0].__setitem__(0, None),
        lambda document: document.update(rows=(np.array(document["rows"]) / 40).tolist(), reduction="mean"),
    ],
    ids=["one fewer", "another order", "another answer", "one unknown", "per token"],
)
def test_other_pairs_are_not_compared(tmp_path, change):
    folders = [make_run(tmp_path / name, seed=seed, steps=5) for seed, name in enumerate("ab")]
    edit(folders[1], change)
    runs = read_runs(folders)
    assert paired.comparable(runs) == []
    picture = next(picture for picture in pictures.draw(runs) if picture.kind is PAIRED)
    assert picture.wide is None and picture.notes[0].startswith("Not drawn: it needs two runs with the same pairs")


def test_rounding_of_the_reference_does_not_tell_pairs_apart(tmp_path):
    folders = [make_run(tmp_path / name, seed=seed, steps=5) for seed, name in enumerate("ab")]
    edit(folders[1], lambda document: [row.__setitem__(2, row[2] * 1.003) for row in document["rows"]])
    assert len(paired.comparable(read_runs(folders))) == 2


def test_every_pair_is_a_point_and_the_title_tells_the_difference(runs):
    figure, notes = drawn_figure(PAIRED, runs)
    assert len(figure.axes) == 2 and len(notes) == 2
    for panel, run in zip(figure.axes, runs[1:], strict=True):
        at = np.concatenate([part.get_offsets() for part in panel.collections])
        expected = np.stack([runs[0].held_out.gap, run.held_out.gap], 1)
        np.testing.assert_allclose(at[np.lexsort(at.T)], expected[np.lexsort(expected.T)])
        counts = [len(part.get_offsets()) for part in panel.collections]
        found = paired.compare(run, runs[0])
        assert counts[1:3] == [found.only, found.only_other]
        assert paired.points(found.prefers) + " against A" in panel.get_title(loc="left")
    assert notes[0].startswith("B − A on the same 60 pairs: prefers chosen ")


def test_of_one_run_there_is_no_difference(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "r", steps=5)])
    assert PAIRED not in [picture.kind for picture in pictures.draw([run])] and paired.comparisons([run]) == []


def test_one_pair_gives_no_interval_of_a_mean(tmp_path):
    runs = read_runs([make_run(tmp_path / name, seed=seed, pairs=1, steps=5) for seed, name in enumerate("ab")])
    (found,) = paired.comparisons(runs)
    assert found.gap.interval is None and found.prefers.interval and "None" not in paired.sentence(found)


def test_the_page_and_programs_get_the_differences(tmp_path, runs, capsys, monkeypatch):
    (found, _) = paired.comparisons(runs)
    monkeypatch.setattr(pictures, "KINDS", [PAIRED])
    assert paired.sentence(found) in Page(render(runs, of_runs(runs), pictures.draw(runs))).text
    assert main(["report", *(str(run.folder) for run in runs), "--json", "--out", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out)["differences"]
    assert [(one["run"], one["minus"]) for one in told] == [("B", "A"), ("C", "A")]
    assert told[0]["prefers_chosen"] == {"value": found.prefers.value, "interval_95": list(found.prefers.interval)}
