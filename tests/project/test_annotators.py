"""The experiment of docs/labels.md: its tables are those of the record, and its runs can be repeated."""

import json

import pytest

from helpers.paths import ROOT


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import annotators

    return annotators


@pytest.fixture(scope="module")
def record():
    return json.loads((ROOT / "benchmarks" / "annotators.json").read_text(encoding="utf-8"))


def test_the_docs_show_the_record(experiment, record):
    page = (ROOT / "docs" / "labels.md").read_text(encoding="utf-8")
    for table in experiment.table(record).split("\n\n"):
        assert table.strip() in page


def test_every_arm_has_every_seed(experiment, record):
    found = {(run["experiment"], run["arm"], run["seed"]) for run in record}
    wanted = {(name, arm, seed) for name, arms in experiment.ARMS.items() for arm in arms for seed in experiment.SEEDS}
    assert found == wanted and len(record) == len(wanted)
    for run in record:
        assert run["settings"] == {"gamma": 0.0, **experiment.ARMS[run["experiment"]][run["arm"]]}


@pytest.mark.parametrize("arm", ["hard", "weighted, lagrangian"])
def test_a_run_is_repeated(experiment, record, arm):
    """The first thirty steps of a seed, to what is written down."""
    again = experiment.trained("annotators", arm, 3, steps=30)["curve"]
    recorded = next(run for run in record if run["arm"] == arm and run["seed"] == 3)["curve"]
    assert [point["step"] for point in again] == [0, 10, 20, 30]
    for one, other in zip(again, recorded, strict=False):
        assert one["kl"] == pytest.approx(other["kl"], abs=2e-4)
        assert one["right"] == pytest.approx(other["right"], abs=2e-3)
