"""Fractions by slice and by length, and sums beside means: what pairs.json needs for them, and what is drawn."""

import json
import math

import numpy as np
import pytest

from trl_cpo.intervals import clopper_pearson
from trl_cpo.report import pictures, slice_pictures
from trl_cpo.report.reading import read_run, read_runs

from helpers.report_looks import drawn_figure
from helpers.run_folders import make_run

BY_SLICE, BOTH = (next(kind for kind in pictures.KINDS if kind.name == name) for name in ("by-slice", "sums-and-means"))


def edit(folder, change):
    document = json.loads((folder / "pairs.json").read_text())
    change(document)
    (folder / "pairs.json").write_text(json.dumps(document))
    return folder


def test_every_parting_holds_every_pair_once(tmp_path):
    run = read_run(make_run(tmp_path / "r", lengths=True))
    parted = slice_pictures.partings(run.held_out)
    assert list(parted) == ["tokens in both", "longer answer", "source", "margin"]
    for name, parts in parted.items():
        assert np.all(np.sum([mask for _, mask in parts], axis=0) == 1), name
    assert len(parted["tokens in both"]) == 4 == len(parted["margin"])
    assert {name for name, _ in parted["source"]} == {"one", "two", "a long name of a source of pairs", "(missing)"}
    chosen, rejected = run.held_out.tokens.T
    np.testing.assert_array_equal(dict(parted["longer answer"])["chosen"], chosen > rejected)


def test_fractions_of_a_part_are_drawn_with_their_exact_interval(tmp_path):
    runs = read_runs([make_run(tmp_path / name, seed=seed, lengths=True) for seed, name in enumerate("ab")])
    figure, notes = drawn_figure(BY_SLICE, runs)
    assert len(figure.axes) == 8 and notes == []
    of_source = [axes for axes in figure.axes if axes.get_title(loc="left") == "by source"]
    for axes, measure in zip(of_source, ("prefers", "in_u"), strict=True):
        drawn = iter(zip(axes.lines, axes.collections, strict=True))
        for run in runs:
            for _, mask in slice_pictures.partings(run.held_out)["source"]:
                pairs = run.held_out
                found = pairs.gap > 0 if measure == "prefers" else (pairs.gap < 0) & (pairs.gap > pairs.ref_gap)
                point, bar = next(drawn)
                assert point.get_xdata() == pytest.approx([100 * np.mean(found[mask])])
                ends = clopper_pearson(int(found[mask].sum()), int(mask.sum()))
                np.testing.assert_allclose(bar.get_segments()[0][:, 0], 100 * np.array(ends))
        assert "one (15)" in [text.get_text() for text in axes.get_yticklabels()]


def test_many_slices_are_cut_with_a_note(tmp_path):
    folder = make_run(tmp_path / "r", lengths=True)
    edit(folder, lambda document: document["slices"].update(source=[str(at % 20) for at in range(60)]))
    _, notes = drawn_figure(BY_SLICE, read_runs([folder]))
    assert notes == [f"By source: the first {slice_pictures.MOST_SLICES} of 20 slices."]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sums_and_means_are_those_of_the_tokens(tmp_path, reduction):
    run = read_run(make_run(tmp_path / "r", reduction=reduction, lengths=True, other_start=True))
    rows, (chosen, rejected) = run.held_out.rows, run.held_out.tokens.T
    if reduction == "mean":
        rows = rows * np.stack([chosen, rejected] * 3, axis=1)
    found = slice_pictures.both_gaps(run)
    for when, at in (("after", 0), ("before", 4)):
        sums, means = found[when]
        np.testing.assert_allclose(sums, rows[:, at] - rows[:, at + 1])
        np.testing.assert_allclose(means, rows[:, at] / chosen - rows[:, at + 1] / rejected)
    figure, notes = drawn_figure(BOTH, read_runs([run.folder]))
    points = np.concatenate([part.get_offsets() for part in figure.axes[0].collections])
    assert len(points) == 60
    share = (
        f"above 0: {100 * np.mean(found['after'][0] > 0):.0f} % by sums, {100 * np.mean(found['after'][1] > 0):.0f} % by means"
    )
    assert share in figure.axes[0].get_title(loc="left") and notes[0].startswith("A before training: ")


def test_folders_of_earlier_versions_are_read_and_say_what_they_lack(tmp_path):
    run = read_run(make_run(tmp_path / "r"))
    assert run.notes == [] and run.held_out.tokens is None and run.held_out.slices == {}
    for picture in pictures.draw(read_runs([run.folder])):
        if picture.kind in (BY_SLICE, BOTH):
            assert picture.wide is None and "as new runs write" in picture.notes[0]


def test_of_weighted_sums_the_means_are_not_known(tmp_path):
    assert not slice_pictures.has_both_reductions(read_run(make_run(tmp_path / "r", lengths=True, ld_alpha=0.5)))
    assert slice_pictures.has_both_reductions(read_run(make_run(tmp_path / "s", lengths=True, ld_alpha=None)))


FORGED = {
    "no count": (lambda document: document["rows"][3].__setitem__(6, "x"), "must be whole numbers of 1 or more"),
    "none": (lambda document: document["rows"][3].__setitem__(7, 0), "must be whole numbers of 1 or more"),
    "half": (lambda document: document["rows"][3].__setitem__(7, 2.5), "must be whole numbers of 1 or more"),
    "infinite": (lambda document: document["rows"][3].__setitem__(7, math.inf), "must be whole numbers of 1 or more"),
    "slices of a list": (lambda document: document.update(slices=[1]), "slices must be an object of columns; got a list"),
    "short column": (lambda document: document["slices"]["source"].pop(), "the slices 'source' must be one text or number"),
    "objects": (lambda document: document["slices"].update(source=[{}] * 60), "the slices 'source' must be one text or number"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_what_is_forged_is_said_and_left_out(tmp_path, forgery):
    change, says = FORGED[forgery]
    folder = edit(make_run(tmp_path / "r", lengths=True), change)
    run = read_run(folder)
    assert all(note.startswith("pairs.json") for note in run.notes) and len(run.held_out) == 60
    assert sum(says in note for note in run.notes) == 1
    assert "source" not in run.held_out.slices or run.held_out.tokens is None


@pytest.mark.parametrize("value", [10**400, math.nan, math.inf, True, "x" * 500, "\x1b[2J\u202e$x$", 0])
def test_any_value_of_a_slice_can_be_drawn(tmp_path, value):
    folder = make_run(tmp_path / "r", lengths=True)
    edit(
        folder,
        lambda document: document["slices"].update({"\ud800$_": [value, 1, "a", None] * 15, "n": [value, 1, 2, 3.5] * 15}),
    )
    drawn_figure(BY_SLICE, read_runs([folder]))


def test_rows_that_are_lost_take_their_slices_with_them(tmp_path):
    folder = make_run(tmp_path / "r", lengths=True)
    edit(folder, lambda document: (document["rows"].__setitem__(0, None), document["rows"][4].__setitem__(0, None)))
    pairs = read_run(folder).held_out
    assert len(pairs) == len(pairs.tokens) == len(pairs.slices["source"]) == 58
    assert pairs.slices["margin"].tolist() == [at / 7 for at in range(60) if at not in (0, 4)]
