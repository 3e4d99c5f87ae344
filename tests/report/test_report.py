"""The report: what it reads out of whole and broken runs, what its pictures say, and how a browser shows the page."""

import base64
import html
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.patches import Polygon

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.cli import main
from trl_cpo.intervals import clopper_pearson
from trl_cpo.logs.run_log import RunLog
from trl_cpo.pairs import PairLogps
from trl_cpo.report import NotARun, make_report, pair_pictures, pictures, step_pictures, style, table
from trl_cpo.report.reading import MOST_RUNS, of_runs, read_run, read_runs
from trl_cpo.report.run import HeldOut, Run
from trl_cpo.report.writing import CONTENTS, check_free, write
from trl_cpo.run.record import pairs_document

from helpers.once import once
from helpers.report_looks import Page, drawn_figure, texts_of
from helpers.run_folders import made_up_pairs, make_run, metrics_of, price_document
from helpers.tiny import make_model, pairs_dataset, training_options

HOSTILE = "very-long-name-of-a-run-" * 4 + "$x_1$<script>alert(1)<&\u202e\u4e2d"


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> list[Path]:
    """Three runs: long and hostile names and values, a multiplier, nats per response all."""
    root = tmp_path_factory.mktemp("runs")
    attack = '"><img src=x onerror=alert(1)>{{ 7 * 7 }}'
    return [
        make_run(root / "none", seed=1, constraint="none", gamma=0.0, evaluate_every=20, kl=0.7, lengths=True),
        make_run(root / "lagrangian", seed=2, constraint="lagrangian", evaluate_every=20, kl=1.2, lengths=True),
        make_run(
            root / HOSTILE,
            seed=3,
            constraint="clip",
            learning_rate=attack,
            note="</td></table><style>*{display:none}</style>",
        ),
    ]


@pytest.fixture(scope="module")
def page_of_several(several, tmp_path_factory) -> Path:
    return make_report(several, tmp_path_factory.mktemp("out") / "report").page


@pytest.fixture
def coarse(monkeypatch):
    """Pictures of few pixels, for tests that look at none."""
    monkeypatch.setattr(style, "DPI", 24)


# Reading


def test_a_run_is_read_as_it_was_written(tmp_path):
    made = dict(seed=4, pairs=50, steps=40, every=10, evaluate_every=20, gamma=2.0, other_start=True)
    run = read_runs([make_run(tmp_path / "r", **made)])[0]
    rows = made_up_pairs(50, 4, other_start=True)
    np.testing.assert_allclose(run.held_out.gap, rows[:, 0] - rows[:, 1])
    np.testing.assert_allclose(run.held_out.ref_gap, rows[:, 2] - rows[:, 3])
    np.testing.assert_allclose(run.held_out.start_gap, rows[:, 4] - rows[:, 5])
    np.testing.assert_allclose(run.held_out.shift("rejected"), rows[:, 1] - rows[:, 3])
    assert list(run.training) == [10, 20, 30, 40] and list(run.evaluations) == [0, 20, 40]
    assert (run.gamma, run.reduction, run.unit, run.constraint, run.letter, run.name) == (
        2,
        "sum",
        "nats per response",
        "clip",
        "A",
        "r",
    )
    for metric, value in metrics_of(rows, 2.0).items():
        assert run.after.values[metric] == pytest.approx(value), metric
    assert run.after.pairs == run.before.pairs == 50
    assert run.notes == []


def test_what_training_writes_is_what_the_report_reads(tmp_path, tokenizer, coarse):
    """The names of a real trainer's log, and the real writer of pairs.json."""
    options = training_options(tmp_path / "out", eval_on_start=True, eval_strategy="steps", eval_steps=2)
    trainer = CPOConstrainedTrainer(
        model=make_model(),
        ref_model=make_model(1),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(12),
        eval_dataset=pairs_dataset(8, seed=1),
        callbacks=[RunLog(tmp_path / "log.jsonl")],
        args=CPOConstrainedConfig(**options, constraint="lagrangian", gamma=1.0, epsilon=0.5),
    )
    trainer.train()
    rows = made_up_pairs(8, 0)
    pairs = PairLogps(*torch.tensor(rows[:, :4]).unbind(1))
    document = pairs_document(
        pairs, reduction="sum", gamma=1.0, beta=0.5, constraint="lagrangian", split="test", start_is_reference=False
    )
    (tmp_path / "pairs.json").write_text(json.dumps(document))
    run = read_run(tmp_path)
    assert list(run.training) == [1, 2, 3] and list(run.evaluations) == [0, 2, 3] and step_pictures.has_multiplier(run)
    assert run.after.pairs == 8 and not table.started_as_reference(run)
    shown = {row["metric"] for row in table.metric_rows([run])}
    assert shown == {metric for _, metric, _ in table.ROWS + table.MORE_ROWS}
    assert len(run.held_out) == 8 and np.isnan(run.held_out.start_gap).all() and not run.held_out.starts_at_reference
    np.testing.assert_allclose(run.held_out.gap, rows[:, 0] - rows[:, 1])
    for metric in ("loss", "cpo/lambda", "cpo/slack", "cpo/violation_rate", "cpo/chosen_logps_shift"):
        assert len(step_pictures.series(run, metric, of_training=True)[0]) == 3, metric
    drawn = [picture for picture in pictures.draw(read_runs([tmp_path])) if picture.wide]
    assert "multiplier" in {picture.kind.name for picture in drawn}


def test_a_resumed_log_counts_every_step_once(tmp_path):
    folder = make_run(tmp_path / "r", steps=40, every=10)
    lines = (folder / "log.jsonl").read_text().splitlines()
    again = [json.loads(line) for line in lines[2:]]
    for line in again:
        line |= {"loss": 1.25} if "loss" in line else {}
    # Killed after step 30 while writing, resumed from the checkpoint of step 10.
    kept = [*lines[:4], '{"step": 40, "los', '{"resumed_from": 10}', *map(json.dumps, again)]
    (folder / "log.jsonl").write_text("\n".join(kept))
    run = read_run(folder)
    steps, losses = step_pictures.series(run, "loss", of_training=True)
    assert steps.tolist() == [10, 20, 30, 40] and losses[1:].tolist() == [1.25] * 3 and losses[0] != 1.25
    assert any("resumed from step 10" in note for note in run.notes)
    # Resumed, and killed again before it was where it had been: what was logged past that counts no more.
    (folder / "log.jsonl").write_text("\n".join([*lines[:4], '{"resumed_from": 10}', json.dumps(again[0])]))
    assert list(read_run(folder).training) == [10, 20]


def test_of_a_run_that_was_killed_the_log_says_all_there_is(tmp_path):
    folder = make_run(tmp_path / "r", steps=60, evaluate_every=20)
    (folder / "metrics.json").unlink()
    lines = (folder / "log.jsonl").read_text().splitlines()
    (folder / "log.jsonl").write_text("\n".join(lines[:12]))
    run = read_run(folder)
    assert run.before.step == 0 and run.after.step == 40
    text = " ".join(run.notes)
    assert "metrics.json is missing" in text and "without the end of training" in text and "at step 40" in text
    # What metrics.json would have said of the run, pairs.json says in part.
    assert run.gamma == 1.0 and run.unit == "nats per response"


BREAKAGES = {
    "no pairs": (lambda folder: (folder / "pairs.json").unlink(), "pairs.json is missing"),
    "no log": (lambda folder: (folder / "log.jsonl").unlink(), "log.jsonl is missing"),
    "torn metrics": (
        lambda folder: (folder / "metrics.json").write_text('{"before": {'),
        "metrics.json cannot be read",
    ),
    "metrics of another kind": (lambda folder: (folder / "metrics.json").write_text("[1]"), "holds a list"),
    "log of one line": (
        lambda folder: (folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "cpo/gap": 1.0}'),
        "ends at step 1",
    ),
    "empty log": (lambda folder: (folder / "log.jsonl").write_text(""), "holds no training"),
    "no rows": (lambda folder: _edit_pairs(folder, lambda pairs: pairs.update(rows=[])), "holds no pairs"),
    "lost column": (
        lambda folder: _edit_pairs(folder, lambda pairs: pairs["columns"].__setitem__(0, "x")),
        "one of the columns",
    ),
    "NaN, null and short rows": (
        lambda folder: _edit_pairs(
            folder, lambda pairs: pairs["rows"].__setitem__(slice(0, 3), [[math.nan] * 6, [None] * 6, [1.0]])
        ),
        "3 of 60 pairs",
    ),
    "an impossible number": (
        lambda folder: _edit_pairs(folder, lambda pairs: pairs["rows"][0].__setitem__(0, 1e300)),
        "1 of 60 pairs",
    ),
    "NaN in the log": (lambda folder: _edit_log(folder, {"loss": math.nan, "cpo/gap": math.inf}), "NaN or infinite"),
    "diverged": (lambda folder: _edit_log(folder, {"loss": 1e300, "cpo/gap": -1e300}), None),
    "pairs of another run": (
        lambda folder: _edit_pairs(folder, lambda pairs: pairs.update(rows=(-made_up_pairs(60, 0)).tolist(), gamma=3.0)),
        "disagree",
    ),
    "pairs of another set": (lambda folder: _edit_pairs(folder, lambda pairs: pairs["rows"].pop()), "holds 59 pairs"),
    "bytes": (
        lambda folder: [(folder / name).write_bytes(bytes(range(256))) for name in ("log.jsonl", "metrics.json")],
        "cannot be read",
    ),
}


def _edit_pairs(folder, change):
    pairs = json.loads((folder / "pairs.json").read_text())
    change(pairs)
    (folder / "pairs.json").write_text(json.dumps(pairs))


def _edit_log(folder, values):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines[2] |= values
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_is_missing_is_said_on_the_page(tmp_path, coarse, breakage):
    folder = make_run(tmp_path / "r")
    breaks, says = BREAKAGES[breakage]
    breaks(folder)
    page = Page(make_report([folder]).page.read_text())
    if says:
        assert says in page.text
    assert "Traceback" not in page.text and "nan" not in page.text.lower().replace("nan or infinite", "")


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["eval_cpo/gap", "policy_chosen", "sum", "mean"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=3)
            | st.sampled_from(
                [
                    "config",
                    "before",
                    "after",
                    "versions",
                    "pairs",
                    "held_out_pairs",
                    "rows",
                    "columns",
                    "reduction",
                    "gamma",
                    "step",
                    "eval_cpo/gap",
                    "eval_cpo/prefers_chosen",
                    "eval_x_cpo/gap",
                    "cpo/gap",
                    "cpo/lambda",
                    "loss",
                    "resumed_from",
                    "seconds",
                    "logps_reduction",
                    "dual_signal",
                    "trained_on",
                    "eval_cpo/pairs",
                    "constraint",
                    "seed",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metrics=JUNK, pairs=JUNK, lines=st.lists(JUNK, max_size=4))
def test_no_json_whatever_it_holds_stops_the_reading(tmp_path, metrics, pairs, lines):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    from trl_cpo.report.page import render

    runs = read_runs([tmp_path])
    Page(render(runs, of_runs(runs), []))


def test_what_is_no_run_is_refused_before_anything_is_drawn(tmp_path, capsys):
    good = make_run(tmp_path / "good")
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    for wrong, says in (
        ([tmp_path / "nowhere"], "does not exist"),
        ([tmp_path / "file"], "is a file"),
        ([good, tmp_path / "other"], "holds none of log.jsonl, metrics.json and pairs.json"),
        ([good, good / "."], "given twice"),
        ([good] * 13, "At most 12"),
    ):
        with pytest.raises(NotARun, match=re.escape(says)):
            make_report(wrong)
        assert main(["report", *map(str, wrong)]) == 2
        assert says in capsys.readouterr().err
    assert not (good / "report").exists()


def test_names_tell_runs_apart(tmp_path):
    folders = [make_run(tmp_path / part / "demo-clip", steps=5) for part in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/demo-clip", "b/demo-clip"]
    assert [run.letter for run in read_runs(folders)] == ["A", "B"]


def test_what_keeps_runs_from_being_compared_is_said(tmp_path):
    base = make_run(tmp_path / "base", steps=5)
    same = make_run(tmp_path / "same", steps=5, seed=1)
    mean = make_run(tmp_path / "mean", steps=5, reduction="mean", scale=0.5, gamma=0.05)
    others = make_run(tmp_path / "others", steps=5, pairs=61)

    def notes(*folders):
        return " ".join(of_runs(read_runs(folders)))

    assert notes(base) == ""
    assert "seed" in notes(base, same) and "unit" not in notes(base, same) and "different pairs" not in notes(base, same)
    assert "nats per token" in notes(base, mean) and "γ differs" in notes(base, mean)
    assert "different pairs" in notes(base, others)


# Tables


def test_fractions_carry_their_exact_interval(tmp_path):
    runs = read_runs([make_run(tmp_path / "r")])
    rows = {row["metric"]: row["cells"][0] for row in table.metric_rows(runs)}
    values = metrics_of(made_up_pairs(60, 0), 1.0)
    for metric, (before, after) in rows.items():
        assert after.value == pytest.approx(values[metric]), metric
        if after.is_fraction:
            assert after.interval == clopper_pearson(round(60 * values[metric]), 60)
        else:
            assert after.interval is None
        # Against itself a policy shows nothing; its gap it has.
        about_both = metric in (
            "cpo/in_undesirable_region",
            "cpo/beats_reference",
            "cpo/chosen_logps_shift",
            "cpo/rejected_logps_shift",
        )
        assert (before is None) == about_both, metric


def test_a_policy_that_starts_elsewhere_is_compared_from_the_start(tmp_path):
    runs = read_runs([make_run(tmp_path / "r", other_start=True)])
    assert all(before is not None for row in table.metric_rows(runs) for before, _ in row["cells"])


def test_no_interval_of_a_fraction_that_is_of_no_whole_number_of_pairs(tmp_path):
    run = read_runs([make_run(tmp_path / "r")])[0]
    run.after.values["cpo/escaped"] = 0.33
    assert table.cell(run.after, "cpo/escaped", True).interval is None
    run.after.values["cpo/escaped"] = 20 / 60
    assert table.cell(run.after, "cpo/escaped", True).interval == clopper_pearson(20, 60)


def test_settings_that_differ_and_only_those(several):
    runs = read_runs(several)
    found = table.settings(runs)
    assert {name for name, _ in found["rows"]} == {"constraint", "gamma", "learning_rate", "note", "seed"}
    assert dict(found["rows"])["constraint"] == ["none", "lagrangian", "clip"]
    runs[1].settings = {}  # a run of which nothing is known differs in nothing
    assert [name for name, _ in table.settings(runs[:2])["rows"]] == []
    assert [name for name, _ in table.settings(runs[:1])["rows"]][:2] == ["constraint", "gamma"]


# Pictures


LAYOUTS = {
    "one": lambda root: [make_run(root / "one", other_start=True, kl=0.4, lengths=True)],
    "three, long names": None,
    "twelve": lambda root: [
        make_run(
            root / f"{'nW'[i % 2] * 60}{i}",
            seed=i,
            constraint=("clip", "lagrangian")[i % 2],
            evaluate_every=10,
            kl=0.1 * i,
            lengths=True,
        )
        for i in range(12)
    ],
    "huge and tiny": lambda root: [
        make_run(
            root / "huge", scale=3e8, steps=1_000_000, every=50_000, evaluate_every=100_000, constraint="lagrangian", kl=1e9
        ),
        make_run(root / "tiny", scale=1e-7, gamma=0.0, reduction="mean", constraint="lagrangian", kl=1e-9, lengths=True),
    ],
    "one pair": lambda root: [make_run(root / "one", pairs=1, steps=5, kl=0.0, lengths=True)],
    "many pairs": lambda root: [make_run(root / f"{i}", pairs=12345, steps=5, lengths=True) for i in range(3)],
}


@pytest.mark.parametrize("shape", [style.WIDE, style.NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_text_lies_over_another_or_outside_the_picture(tmp_path, several, layout, shape):
    runs = read_runs(LAYOUTS[layout](tmp_path) if LAYOUTS[layout] else several)
    count = 0
    for kind in pictures.KINDS:
        able = pictures.NEEDS[kind.needs].able(runs)
        if len(able) < kind.fewest_runs:
            continue
        figure, _ = drawn_figure(kind, able, shape)
        found, whole = texts_of(figure), figure.bbox
        assert len(found) > 10
        for text, box in found:
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1, (
                kind.name,
                text,
            )
        for (one, first), (other, second) in combinations(found, 2):
            assert not first.padded(-1).overlaps(second.padded(-1)), (kind.name, one, other)
        for axes in figure.axes:
            assert axes.get_xlabel() and axes.get_ylabel()
            labels = axes.get_xlabel() + axes.get_ylabel()
            assert any(unit in labels for unit in ("nats", "%", "fraction")), labels
        count += 1
    assert count >= 6


def test_the_portrait_shades_u_and_nothing_else(tmp_path):
    runs = read_runs([make_run(tmp_path / "r")])
    axes = drawn_figure(pictures.KINDS[0], runs)[0].axes[0]
    (shade,) = [patch for patch in axes.patches if isinstance(patch, Polygon)]
    rng = np.random.default_rng(0)
    x, y = rng.uniform(*axes.get_xlim(), 3000), rng.uniform(*axes.get_ylim(), 3000)
    inside = shade.get_path().contains_points(np.stack([x, y], 1))
    np.testing.assert_array_equal(inside, (y < 0) & (y > x))
    assert 100 < inside.sum() < 2000


def test_arrows_go_from_before_to_after_at_the_references_gap(tmp_path):
    runs = read_runs([make_run(tmp_path / "r", other_start=True)])
    axes = drawn_figure(pictures.KINDS[0], runs)[0].axes[0]
    segments = np.concatenate([part.get_segments() for part in axes.collections if isinstance(part, LineCollection)])
    pairs = runs[0].held_out
    expected = np.stack([np.stack([pairs.ref_gap, pairs.start_gap], 1), np.stack([pairs.ref_gap, pairs.gap], 1)], 1)
    order = np.lexsort(segments[:, 1].T), np.lexsort(expected[:, 1].T)
    np.testing.assert_allclose(segments[order[0]], expected[order[1]])


def test_of_many_pairs_some_arrows_are_drawn_and_all_heads(tmp_path):
    runs = read_runs([make_run(tmp_path / "r", pairs=1000, steps=5)])
    figure, notes = drawn_figure(pictures.KINDS[0], runs)
    parts = figure.axes[0].collections
    arrows = sum(len(part.get_segments()) for part in parts if isinstance(part, LineCollection))
    heads = sum(len(part.get_offsets()) for part in parts if not isinstance(part, LineCollection))
    assert (arrows, heads) == (300, 1000)
    assert notes == ["A: arrows for 300 of 1000 pairs, evenly spaced in δ_ref; heads for all."]


def test_pairs_outside_the_axes_are_counted(tmp_path):
    folder = make_run(tmp_path / "r", pairs=400, steps=5)
    _edit_pairs(folder, lambda pairs: pairs["rows"][0].__setitem__(0, 1e9))
    runs = read_runs([folder])
    figure, notes = drawn_figure(pictures.KINDS[0], runs)
    up = figure.axes[0].get_ylim()
    beyond = pair_pictures.outside(runs[0].held_out.ref_gap, runs[0].held_out.gap, figure.axes[0].get_xlim(), up)
    assert up[1] < 1e4 and 1 <= beyond < 20 and any(f"{beyond} of 400 pairs lie outside" in note for note in notes)


def test_outcomes_share_no_pair_and_leave_none_out():
    edges = np.array([-2.0, -1.0, 0.0, 1.0])
    gap, ref_gap = map(np.ravel, np.meshgrid(edges, edges))
    zero = np.zeros_like(gap)
    masks = pair_pictures.outcomes(HeldOut(np.stack([gap, zero, ref_gap, zero, ref_gap, zero], 1)))
    assert np.all(sum(mask.astype(int) for mask in masks.values()) == 1)
    np.testing.assert_array_equal(masks["in_u"], (gap < 0) & (gap > ref_gap))
    np.testing.assert_array_equal(masks["prefers"], gap > 0)


def test_histograms_hold_all_pairs_and_part_at_zero(tmp_path):
    folder = make_run(tmp_path / "r", pairs=400, steps=5)
    _edit_pairs(folder, lambda pairs: pairs["rows"][0].__setitem__(0, 1e9))
    runs = read_runs([folder])
    kind = kind_named("gap-distributions")
    axes = drawn_figure(kind, runs)[0].axes[0]
    after = next(patch for patch in axes.patches if isinstance(patch, Polygon))
    corners = after.get_xy()
    edges, heights = corners[1:-1:2, 0], corners[1:-1:2, 1]
    assert heights.sum() == pytest.approx(100.0)
    right = heights[edges >= -1e-9 * np.ptp(edges)].sum()
    assert right == pytest.approx(100 * np.mean(runs[0].held_out.gap > 0))


def kind_named(name: str) -> pictures.Kind:
    return next(kind for kind in pictures.KINDS if kind.name == name)


def test_evaluations_over_steps_carry_their_exact_intervals(tmp_path):
    runs = read_runs([make_run(tmp_path / "r", evaluate_every=20)])
    figure, _ = drawn_figure(kind_named("over-steps"), runs)
    for axes, metric in zip(figure.axes, ("in_undesirable_region", "violation_rate", "prefers_chosen"), strict=True):
        bars = [part.get_segments()[0] for part in axes.collections if isinstance(part, LineCollection)]
        assert [bar[0, 0] for bar in bars] == [0, 20, 40, 60]
        for bar, evaluation in zip(bars, runs[0].evaluations.values(), strict=True):
            exact = clopper_pearson(round(60 * evaluation.values[f"cpo/{metric}"]), 60)
            np.testing.assert_allclose(bar[:, 1], 100 * np.array(exact))
    assert "bars: exact 95 % intervals" in [text for text, _ in texts_of(figure)]


def test_of_an_unknown_number_of_pairs_no_interval_is_drawn(tmp_path):
    folder = make_run(tmp_path / "r", evaluate_every=20)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key != "eval_cpo/pairs"} for line in lines]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, kept)))
    figure, _ = drawn_figure(kind_named("over-steps"), read_runs([folder]))
    assert not [part for axes in figure.axes for part in axes.collections]
    assert "bars: exact 95 % intervals" not in [text for text, _ in texts_of(figure)]


@pytest.mark.parametrize("pairs", [2, 60, 1000])
def test_the_share_below_each_gap_has_its_exact_interval(tmp_path, pairs):
    runs = read_runs([make_run(tmp_path / name, seed=seed, pairs=pairs, steps=5) for seed, name in enumerate("ab")])
    figure, _ = drawn_figure(kind_named("gaps-together"), runs)
    shades = figure.axes[0].collections
    assert len(shades) == 3  # two runs and the reference that they share
    gaps = np.sort(runs[0].held_out.gap)
    corners = shades[0].get_paths()[0].vertices
    ends = {gap: sorted(corners[corners[:, 0] == gap][:, 1]) for gap in gaps if (corners[:, 0] == gap).any()}
    assert len(ends) == min(pairs, pair_pictures.MOST_INTERVALS)
    for place in (0, pairs - 1):
        exact = 100 * np.array(clopper_pearson(place + 1, pairs))
        assert set(np.round(exact, 6)) <= set(np.round(ends[gaps[place]], 6))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 40))
def test_evenly_keeps_the_ends_and_repeats_nothing(values, most):
    chosen = pair_pictures.evenly(np.array(values), most)
    assert len(chosen) == len(set(chosen.tolist())) == min(most, len(values))
    if most > 1:
        assert min(values) == values[chosen[0]] and max(values) == values[chosen[-1]]


@given(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=1, max_size=40), st.integers(1, 9))
def test_running_means_are_means_of_what_is_around(values, window):
    values = np.array(values)
    means = step_pictures.running_mean(values, window)
    for place, mean in enumerate(means):
        around = [v for k, v in enumerate(values) if abs(k - place) <= window // 2 and not math.isnan(v)]
        assert (math.isnan(mean) and not around) or mean == pytest.approx(sum(around) / len(around), abs=1e-9)


@given(st.text(max_size=80))
def test_any_name_can_be_drawn(name):
    drawable = style.drawable(name)
    assert style.width_of(drawable) <= 19.0 and "\n" not in drawable
    if name.isascii() and name.isprintable() and style.width_of(name) <= 19.0:
        assert drawable == name
    elif name.isascii() and name.isprintable():
        head, tail = drawable.split("…")
        assert name.startswith(head) and name.endswith(tail) and len(head) > 3 and len(tail) > 3


def test_names_are_no_mathematics(tmp_path):
    runs = read_runs([make_run(tmp_path / r"$\frac$ x_1", steps=5)])
    figure, _ = drawn_figure(pictures.KINDS[0], runs)
    assert r"A  $\frac$ x_1" in figure.axes[0].get_title(loc="left")


def test_runs_of_one_report_are_told_apart(tmp_path):
    looks = [style.run_style(Run(tmp_path, letter)) for letter in "ABCDEFGHIJKL"[:MOST_RUNS]]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == MOST_RUNS
    assert len({(look["color"], look["marker"], look["markerfacecolor"]) for look in looks}) == MOST_RUNS


def test_the_users_matplotlibrc_changes_nothing_and_is_left_alone(tmp_path, coarse, monkeypatch):
    monkeypatch.setattr(pictures, "KINDS", pictures.KINDS[:2])
    runs = read_runs([make_run(tmp_path / "r", steps=5)])
    plain = [picture.wide for picture in pictures.draw(runs)]
    strange = {
        "text.usetex": True,
        "savefig.dpi": 20,
        "axes.facecolor": "black",
        "font.size": 30,
        "savefig.bbox": "tight",
    }
    with matplotlib.rc_context(strange):
        assert [picture.wide for picture in pictures.draw(runs)] == plain
        assert all(matplotlib.rcParams[name] == value for name, value in strange.items())


# The page


def test_the_page_is_whole_and_safe(page_of_several, several):
    text = page_of_several.read_text()
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "embed", "base", "form", "link", "svg"})
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "href"))
    assert "://" not in text, "the page is to be read without a network"
    assert (
        "{{ 7 * 7 }}" in page.text and "onerror=alert(1)" in page.text and "$x_1$<script>alert(1)<&\\u202e\u4e2d" in page.text
    )
    tables = [attributes["class"] for tag, attributes in page.tags if tag == "table"]
    assert tables == ["runs", "metrics", "metrics price", "settings", "versions"]
    for row in table.metric_rows(read_runs(several)):
        assert row["label"] in page.text
        for cell in (cell for pair in row["cells"] for cell in pair if cell):
            assert cell.text in page.text and cell.interval_text in page.text


def test_every_picture_is_in_the_page_and_beside_it(page_of_several):
    page = Page(page_of_several.read_text())
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    narrow = [attributes for tag, attributes in page.tags if tag == "source"]
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    kinds = [kind for kind in pictures.KINDS if kind.name != "seeds"]
    assert len(images) == len(kinds) == 12
    for image, kind in zip(images, kinds, strict=True):
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert data == (page_of_several.parent / f"{kind.name}.png").read_bytes()
        size = struct.unpack(">II", data[16:24])
        shown = int(image["width"]), int(image["height"])
        assert shown[0] == 1152 and size[0] == 1152 / 96 * style.DPI
        assert size[1] == pytest.approx(shown[1] / 96 * style.DPI, abs=2)
        assert int(image["height"]) / int(image["width"]) == pytest.approx(size[1] / size[0], rel=0.01)
        assert kind.name in sections and kind.shows in image["alt"] and kind.shows in page.text and kind.good in page.text
    # A phone's pictures are in the page alone, as wide as its screen.
    assert len(narrow) == len(images)
    for source in narrow:
        data = base64.b64decode(source["srcset"].removeprefix("data:image/png;base64,"), validate=True)
        size = struct.unpack(">II", data[16:24])
        assert (int(source["width"]), size[0]) == (369, 614) and source["media"] == "(max-width: 640px)"
        assert int(source["height"]) / int(source["width"]) == pytest.approx(size[1] / size[0], rel=0.01)


def test_the_same_runs_make_the_same_bytes(tmp_path, coarse, monkeypatch):
    monkeypatch.setattr(pictures, "KINDS", pictures.KINDS[:3])
    run = make_run(tmp_path / "r", steps=5)
    first, second = (make_report([run], tmp_path / name).page for name in ("one", "two"))
    for file in first.parent.iterdir():
        assert file.read_bytes() == (second.parent / file.name).read_bytes()


BROWSER = os.environ.get("TRL_CPO_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
#: Runs in a copy of the page and tells the page around it what it saw.
LOOK = """
<script>
addEventListener("load", () => {
  const root = document.documentElement;
  const right = e => e.getBoundingClientRect().right;
  const seen = {
    images: [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.getBoundingClientRect().width]),
    tables: [...document.querySelectorAll("table")].map(t => [t.className, t.rows.length, right(t.parentElement)]),
    cut: [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth + 1).length,
    width: [root.scrollWidth, root.clientWidth, innerWidth],
    wide: [...document.querySelectorAll("body *:not(.scroll)")]
      .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map(e => e.tagName),
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    answers: [...document.querySelectorAll(".answers")].map(e => new Set([...e.children].map(c => c.offsetLeft)).size),
    requests: performance.getEntriesByType("resource").map(r => r.name.slice(0, 40)).filter(n => !n.startsWith("data:")),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
  };
  parent.postMessage(seen, "*");
});
</script>
"""
#: A window cannot be as narrow as a phone; a frame in it can.
FRAME = """<!DOCTYPE html><body style="margin: 0"><script>
addEventListener("message", message => {{
  const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(message.data);
  document.body.append(out);
}});
</script><iframe src="copy.html" style="border: 0; width: {width}px; height: 850px"></iframe>"""


def seen_by_a_browser(page: Path, folder: Path, width: int, dark: bool) -> dict:
    """What a browser makes of the page in a frame of this width."""
    text = page.read_text()
    policy = re.search(r"<meta http-equiv=\"Content-Security-Policy\".*?>", text)[0]
    (folder / "copy.html").write_text(text.replace(policy, "").replace("</body>", f"{LOOK}</body>"))
    (folder / "frame.html").write_text(FRAME.format(width=width))
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            *(["--force-dark-mode"] if dark else []),
            "--window-size=1280,900",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def with_a_browser(test):
    """Marks of a test."""
    reason = "no chromium, chromium-browser or google-chrome on PATH, nor TRL_CPO_BROWSER"
    return pytest.mark.slow(pytest.mark.skipif(BROWSER is None, reason=reason)(test))


def make_pages(several: list[Path], place: Path) -> dict[str, str]:
    """Pages by name; all but the first with pictures of few pixels."""
    broken, answers = make_run(place / "broken", steps=5), make_run(place / "answers", steps=5)
    (broken / "pairs.json").unlink()
    (answers / "price.json").write_text(json.dumps(price_document(prompts=("long" * 500, "short"))))
    twelve = [make_run(place / f"{'long-' * 20}{i}", seed=i, steps=10) for i in range(12)]
    pages = {"several": make_report(several, place / "report").page}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 24)
        pages["twelve"] = make_report(twelve, place / "o").page
        pages |= {"broken": make_report([broken]).page, "answers": make_report([answers]).page}
    return {name: str(page) for name, page in pages.items()}


@pytest.fixture
def pages(several, tmp_path_factory) -> dict[str, Path]:
    made = once(tmp_path_factory, "pages", lambda folder: make_pages(several, folder))
    return {name: Path(page) for name, page in made.items()}


@with_a_browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize(("which", "count"), [("several", 12), ("twelve", 9), ("broken", 3)])
def test_a_browser_shows_all_of_it(tmp_path, pages, which, count, width):
    """Every picture loaded, every table there, nothing wider than the window, nothing asked of a network."""
    seen = seen_by_a_browser(pages[which], tmp_path, width, dark=False)
    shape = style.WIDE if width == 1280 else style.NARROW
    dpi = style.DPI if which == "several" else 24
    assert len(seen["images"]) == count
    for loaded, natural, height, across in seen["images"]:
        # As wide as the page: letters of 9.5 points stay that large.
        assert loaded and natural == int(shape.width * dpi) and height > 0
        assert 0.85 * 96 * shape.width < across <= min(width, 96 * shape.width)
    kinds = [kind for kind, _, _ in seen["tables"]]
    assert {"runs", "metrics", "settings", "versions"} <= set(kinds)
    assert all(rows >= 2 and right <= width for _, rows, right in seen["tables"])
    assert seen["width"][0] <= seen["width"][1] <= seen["width"][2] == width and seen["wide"] == []
    # On a desk no table has to be scrolled.
    assert width == 400 or seen["cut"] == 0
    assert seen["background"] == "rgb(255, 255, 255)" and seen["requests"] == [] and not seen["dark"]


@pytest.mark.slow(30)  # the others come later, and find the pages made
@with_a_browser
def test_a_browser_in_dark_mode_shows_the_page_dark(tmp_path, pages):
    seen = seen_by_a_browser(pages["several"], tmp_path, 1280, dark=True)
    assert seen["dark"] and seen["background"] == "rgb(26, 26, 26)" and seen["ink"] == "rgb(230, 230, 230)"


@with_a_browser
@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (400, 1)])
def test_a_browser_sets_answers_side_by_side_where_there_is_room(tmp_path, pages, width, columns):
    seen = seen_by_a_browser(pages["answers"], tmp_path, width, dark=False)
    assert seen["answers"] == [columns] * 4 and seen["wide"] == []


def in_dark_mode(colour: str) -> np.ndarray:
    """A colour of a picture as the page's filter shows it: `invert(0.9) hue-rotate(180deg)`, sRGB in 0 to 1."""
    rgb = 0.9 - 0.8 * np.array(matplotlib.colors.to_rgb(colour))
    weights = np.array([0.213, 0.715, 0.072])
    turned = 2 * weights @ rgb - rgb  # the filter's matrix at 180 degrees
    return np.clip(turned, 0, 1)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """The contrast of two sRGB colours by WCAG 2."""

    def luminance(rgb):
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_lines_and_letters_are_seen_in_the_dark():
    """The page's filter keeps every colour of a run at the contrast that WCAG asks of graphics, and letters at that of text."""
    back = in_dark_mode("white")
    np.testing.assert_allclose(back, 26 / 255, atol=2e-3)
    for colour in style.COLOURS:
        assert contrast(in_dark_mode(colour), back) > 3, colour
    for colour in ("black", style.QUIET):
        assert contrast(in_dark_mode(colour), back) > 4.5, colour
    # In the light, black letters on white are what the filter starts from.
    assert contrast(np.zeros(3), np.ones(3)) == pytest.approx(21)
    css = (Path(style.__file__).parent / "page.html").read_text()
    assert "invert(0.9) hue-rotate(180deg)" in css


# Writing


def test_the_report_lies_in_the_first_run_and_replaces_itself(tmp_path, coarse):
    first, second = make_run(tmp_path / "a", steps=5, constraint="lagrangian"), make_run(tmp_path / "b", steps=5)
    before = {file.name: file.read_bytes() for file in first.iterdir()}
    report = make_report([first, second])
    assert report.page == first / "report" / "report.html"
    assert (report.page.parent / "multiplier.png").exists()
    assert {file.name: file.read_bytes() for file in first.iterdir() if file.is_file()} == before
    # Made again of fewer pictures, it keeps none of the old ones.
    (first / "pairs.json").unlink()
    names = {file.name for file in make_report([first]).page.parent.iterdir()}
    assert names == {
        "report.html",
        CONTENTS,
        "over-steps.png",
        "loss-and-gap.png",
        "multiplier.png",
        "displacement-over-steps.png",
    }


@pytest.mark.parametrize("theirs", ["notes.txt", "phase-portrait.png", "report.html", CONTENTS])
def test_what_is_somebody_elses_stays(tmp_path, theirs, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda runs: pytest.fail("the folder is looked at before anything is drawn"))
    out = tmp_path / "out"
    out.mkdir()
    (out / theirs).write_text("{}")
    assert main(["report", str(make_run(tmp_path / "r", steps=5)), "--out", str(out)]) == 2
    assert f"--out {out}-2" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == [theirs] and (out / theirs).read_text() == "{}"


def test_a_report_with_a_strangers_file_or_changed_by_hand_stays(tmp_path):
    write(tmp_path / "out", {"report.html": b"1", "a.png": b"2"})
    for change in (
        lambda: (tmp_path / "out" / "mine.txt").write_text("x"),
        lambda: (tmp_path / "out" / "a.png").write_bytes(b"mine"),
    ):
        check_free(tmp_path / "out")
        change()
        with pytest.raises(FileExistsError, match="not a report's|has been changed"):
            write(tmp_path / "out", {"report.html": b"3"})
        assert (tmp_path / "out" / "report.html").read_bytes() == b"1"
        (tmp_path / "out" / "mine.txt").unlink(missing_ok=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        check_free(tmp_path / "file")


def test_an_interrupted_report_can_be_made_again(tmp_path, monkeypatch):
    out, files = tmp_path / "out", {"report.html": b"old", "a.png": b"old", "b.png": b"old"}
    write(out, files)
    new = {"report.html": b"new", "a.png": b"new", "c.png": b"new"}
    for stop in range(1, 12):
        calls = iter(range(1, 100))

        def replace(source, target, stop=stop, calls=calls, real=os.replace):
            if next(calls) == stop:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            write(out, new)
        except KeyboardInterrupt:
            monkeypatch.undo()
            check_free(out)
            write(out, files)
        else:
            break
    monkeypatch.undo()
    assert stop == 6, "list, three files, list; then whole"
    assert {file.name for file in out.iterdir()} == {*new, CONTENTS}


@pytest.mark.parametrize("draft", [".{}.12-0123abcd.tmp", ".{}.unfinished"], ids=["now", "earlier versions"])
def test_drafts_of_a_killed_report_are_its_own(tmp_path, draft):
    """A kill leaves drafts of the list, alone in the folder, or of any file of a report."""
    out, files = tmp_path / "out", {"report.html": b"1", "a.png": b"2"}
    out.mkdir()
    for half_written in (CONTENTS, "a.png"):
        (out / draft.format(half_written)).write_bytes(b"half")
        write(out, files)
        assert {file.name for file in out.iterdir()} == {*files, CONTENTS}
    (out / draft.format("notes.txt")).write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="not a report's"):
        write(out, files)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("planted", [f".{CONTENTS}.unfinished", f".{CONTENTS}.1-0123abcd.tmp"])
def test_a_link_planted_as_a_draft_is_never_written_through(tmp_path, coarse, planted, exists):
    """Whoever hands over a run folder cannot have the report overwrite, make or remove a file of its reader."""
    run, mine = make_run(tmp_path / "r", steps=5), tmp_path / "mine"
    if exists:
        mine.write_bytes(b"mine")
    (run / "report").mkdir()
    (run / "report" / planted).symlink_to(mine)
    make_report([run])
    assert mine.read_bytes() == b"mine" if exists else not mine.exists()
    assert not (run / "report" / planted).is_symlink() and (run / "report" / CONTENTS).is_file()


# The command


def test_the_command_speaks_and_gives_json(tmp_path, capsys, coarse):
    run = make_run(tmp_path / "r", steps=5)
    assert main(["report", str(run)]) == 0
    assert str(run / "report" / "report.html") in capsys.readouterr().out
    (run / "log.jsonl").unlink()
    assert main(["report", str(run), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert Path(made["page"]).is_file() and all(Path(file).is_file() for file in made["pictures"])
    (only,) = made["runs"]
    values = metrics_of(made_up_pairs(60, 0), 1.0)
    assert only["metrics"]["cpo/escaped"]["after"] == {
        "value": values["cpo/escaped"],
        "interval_95": list(clopper_pearson(round(60 * values["cpo/escaped"]), 60)),
    }
    assert only["unit"] == "nats per response" and any("log.jsonl is missing" in note for note in only["notes"])


def test_a_runs_name_cannot_drive_the_terminal(tmp_path, capsys, coarse):
    run = make_run(tmp_path / "r\x1b[2J\n", steps=5)
    (run / "log.jsonl").unlink()
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "r\\x1b[2J\\n: log.jsonl is missing" in said


def test_it_is_light_and_says_what_to_install(tmp_path):
    """Neither torch nor transformers is needed for it; without matplotlib it ends with the command that gets it."""
    run = make_run(tmp_path / "r", steps=5)
    code = (
        "import sys; {}from trl_cpo.cli import main; code = main(['report', {!r}])\n"
        "print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules]); sys.exit(code)"
    )
    without = subprocess.run(
        [sys.executable, "-c", code.format("sys.modules['matplotlib'] = None; ", str(run))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        without.returncode == 2 and "python -m pip install matplotlib" in without.stderr and "Traceback" not in without.stderr
    )
    assert not (run / "report").exists()
    done = subprocess.run([sys.executable, "-c", code.format("", str(run))], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
