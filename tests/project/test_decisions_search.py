"""The search of the demo's recipe, on a tiny model: what it measures, and how it compares arms."""

import json
import sys

import pytest

from helpers.paths import ROOT


@pytest.fixture
def search(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import decisions

    return decisions


def test_arms_are_measured_and_shown(search, tmp_path, model_folder, monkeypatch, capsys):
    out = tmp_path / "out.json"
    command = ["decisions", "run", "--arms", "start", "penalty-1", "--steps", "1", "2", "--model", model_folder]
    command += ["--options", '{"learning_rate": 0.02, "target_modules": "all-linear"}', "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    search.main()
    records = json.loads(out.read_text())
    assert [(record["arm"], record["step"]) for record in records] == [("start", 0), ("penalty-1", 1), ("penalty-1", 2)]
    assert records[0]["kl_general"]["value"] == 0 and records[2]["kl_general"]["value"] > 0
    for record in records:
        assert record["decisions"]["rows"] == len(record["outcomes"]["right"]) == 104
        assert record["outcomes"]["right"].count("1") == record["decisions"]["right"]["count"]
    assert "penalty-1 learning_rate 0.02 target_modules all-linear, step 2: preferred 0." in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["decisions", "table", str(out)])
    search.main()
    assert capsys.readouterr().out.count("| penalty-1 learning_rate 0.02") == 3


def test_arms_at_equal_levels(search):
    curve = [(0.0, 0.2), (0.01, 0.4), (0.03, 0.8)]
    assert search.at_level(curve, 0.02) == pytest.approx(0.6) and search.at_level(curve, 0.0) == 0.2
    assert search.at_level(curve, 0.04) is None and search.at_level([], 0.1) is None


def test_the_committed_results_are_of_known_arms(search):
    records = json.loads((ROOT / "benchmarks" / "decisions.json").read_text())
    assert {record["arm"] for record in records} >= {"start", "clip-1", "dpo-0.1"}
    assert all(record["arm"] in search.ARMS for record in records)
    assert search.table(records).count("\n") > len(records)
