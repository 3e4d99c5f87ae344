"""Seeds of one setting: which runs are, and their band."""

import json

import numpy as np

from trl_cpo.report import pictures, seeds
from trl_cpo.report.reading import read_runs

from helpers.report_looks import drawn_figure
from helpers.run_folders import make_run

SEEDS = next(kind for kind in pictures.KINDS if kind.name == "seeds")


def letters(groups) -> list[str]:
    return ["".join(run.letter for run in group) for group in groups]


def test_runs_that_differ_in_their_seed_alone_are_one_setting(tmp_path):
    made = [("a", 0, "clip"), ("b", 1, "clip"), ("c", 0, "none"), ("d", 2, "clip"), ("e", 5, "none")]
    folders = [make_run(tmp_path / name, seed=seed, constraint=form, steps=5, data_seed=seed) for name, seed, form in made]
    assert letters(seeds.groups(read_runs(folders))) == ["ABD", "CE"]


def test_another_setting_model_or_data_is_another_group(tmp_path):
    folders = [make_run(tmp_path / "base", seed=0, steps=5), make_run(tmp_path / "beta", seed=1, steps=5, beta=0.5)]
    for name, change in (("model", {"model": "other"}), ("data", {"pairs": {"dataset_name": "other"}})):
        folders.append(make_run(tmp_path / name, seed=2, steps=5))
        record = json.loads((folders[-1] / "metrics.json").read_text())
        (folders[-1] / "metrics.json").write_text(json.dumps(record | change))
    folders.append(make_run(tmp_path / "same seed", seed=0, steps=5))
    unknown = [make_run(tmp_path / f"unknown {seed}", seed=seed, steps=5) for seed in (3, 4)]
    for folder in unknown:
        (folder / "metrics.json").unlink()
    runs = read_runs([*folders, *unknown])
    assert seeds.groups(runs) == [] and seeds.with_seeds(runs) == []
    # The picture does not apply, and is not mentioned.
    assert SEEDS not in [picture.kind for picture in pictures.draw(runs[:2])]


def test_the_band_goes_from_the_lowest_to_the_highest_at_the_steps_of_all(tmp_path):
    folders = [make_run(tmp_path / str(seed), seed=seed, evaluate_every=20 if seed else 10) for seed in range(3)]
    runs = read_runs(folders)
    figure, notes = drawn_figure(SEEDS, runs)
    assert notes == ["A, B, C  clip: seeds 0, 1, 2."]
    for axes, metric in zip(figure.axes, ("in_undesirable_region", "violation_rate", "prefers_chosen"), strict=True):
        steps = [0, 20, 40, 60]
        values = 100 * np.array([[run.evaluations[step].values[f"cpo/{metric}"] for step in steps] for run in runs])
        (line,) = axes.lines
        np.testing.assert_allclose(line.get_xydata(), np.stack([steps, values.mean(0)], 1))
        bars = np.array(axes.collections[0].get_segments())
        np.testing.assert_allclose(bars[:, :, 1], np.stack([values.min(0), values.max(0)], 1))


def test_runs_never_evaluated_at_one_step_have_no_band(tmp_path):
    folders = [make_run(tmp_path / str(seed), seed=seed, steps=5) for seed in range(2)]
    lines = (folders[0] / "log.jsonl").read_text().splitlines()
    (folders[0] / "log.jsonl").write_text("\n".join(line for line in lines if "eval_" not in line))
    assert SEEDS not in [picture.kind for picture in pictures.draw(read_runs(folders))]
