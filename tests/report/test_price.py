"""The price on the report's page: gain against KL."""

import json

import numpy as np
import pytest

from trl_cpo.intervals import clopper_pearson
from trl_cpo.report import make_report, pictures, price_pictures, style
from trl_cpo.report.reading import read_runs

from helpers.report_looks import Page, drawn_figure
from helpers.run_folders import make_run

GAIN = next(kind for kind in pictures.KINDS if kind.name == "gain-against-price")


@pytest.fixture
def coarse(monkeypatch):
    """Pictures of few pixels, for tests that look at none."""
    monkeypatch.setattr(style, "DPI", 24)


def edit_log(folder, change):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def curves(axes) -> list[np.ndarray]:
    """The curves of a panel, (k, 2) each, without the large marker of the last evaluation."""
    return [line.get_xydata() for line in axes.lines if line.get_markersize() < 10]


def test_a_curve_is_a_run_and_its_points_are_evaluations(tmp_path):
    runs = read_runs(
        [
            make_run(tmp_path / name, seed=seed, evaluate_every=20, kl=kl)
            for seed, (name, kl) in enumerate([("a", 0.5), ("b", 2)])
        ]
    )
    figure, notes = drawn_figure(GAIN, runs)
    own, general = figure.axes
    assert notes == []
    for run, kl, curve, far in zip(runs, (0.5, 2.0), curves(own), curves(general), strict=True):
        progress = np.array([0, 1 / 3, 2 / 3, 1])
        np.testing.assert_allclose(curve[:, 0], kl * progress**2)
        np.testing.assert_allclose(far[:, 0], 0.1 * kl * progress)
        prefers = [100 * evaluation.values["cpo/prefers_chosen"] for evaluation in run.evaluations.values()]
        assert curve[:, 1].tolist() == far[:, 1].tolist() == prefers
    # One bar an evaluation: the exact interval.
    bars = [bar.get_segments()[0] for bar in own.collections]
    assert len(bars) == 8
    for bar, evaluation in zip(bars, [e for run in runs for e in run.evaluations.values()], strict=True):
        expected = clopper_pearson(round(60 * evaluation.values["cpo/prefers_chosen"]), 60)
        np.testing.assert_allclose(bar[:, 1], 100 * np.array(expected))


def test_general_prompts_have_a_panel_only_if_measured(tmp_path):
    folder = make_run(tmp_path / "r", evaluate_every=20, kl=0.5)
    edit_log(folder, lambda line: line.pop("eval_cpo/kl_general", None))
    figure, _ = drawn_figure(GAIN, read_runs([folder]))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["KL on the pairs' prompts"]


def test_without_a_measured_price_a_sentence_takes_the_pictures_place(tmp_path, coarse):
    old, priced = make_run(tmp_path / "old", steps=5), make_run(tmp_path / "priced", steps=5, kl=0.5)
    start_only = make_run(tmp_path / "start", steps=5, kl=0.5)
    edit_log(start_only, lambda line: line.pop("eval_cpo/kl", None) if line["step"] else None)
    why = "it needs evaluations after the start with eval_cpo/kl in log.jsonl, and none measured the price."
    for folder in (old, start_only):
        (picture,) = [picture for picture in pictures.draw(read_runs([folder])) if picture.kind is GAIN]
        assert picture.wide is picture.narrow is None and picture.notes == [f"Not drawn: {why}"]
        assert f"Not drawn: {why}" in Page(make_report([folder]).page.read_text()).text
        assert not (folder / "report" / "gain-against-price.png").exists()
    (picture,) = [picture for picture in pictures.draw(read_runs([old, priced])) if picture.kind is GAIN]
    assert picture.wide and picture.narrow and picture.notes == [f"Without A: {why}"]


@pytest.mark.parametrize("forged", [float("nan"), float("inf"), -0.5, 1e300, "0.3", None, True, [1.0]])
def test_what_is_no_kl_is_no_point(tmp_path, forged):
    folder = make_run(tmp_path / "r", evaluate_every=20, kl=0.5)
    edit_log(folder, lambda line: line.update({"eval_cpo/kl": forged}) if line["step"] == 20 and "eval_loss" in line else None)
    (run,) = read_runs([folder])
    assert [evaluation.step for _, evaluation in price_pictures.points(run)] == [0, 40, 60]
    figure, notes = drawn_figure(GAIN, [run])
    assert len(curves(figure.axes[0])[0]) == 3 and notes == ["A: 1 of 4 evaluations measured no KL."]


def test_rounding_below_zero_is_zero(tmp_path):
    folder = make_run(tmp_path / "r", kl=0.5)
    edit_log(folder, lambda line: line.update({"eval_cpo/kl": -1e-7}) if "eval_loss" in line and not line["step"] else None)
    (run,) = read_runs([folder])
    assert price_pictures.points(run)[0][0] == 0.0
