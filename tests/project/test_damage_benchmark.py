"""The runs behind the thresholds of damage, on a tiny model: what they measure, and the table of several files."""

import json
import sys

import pytest

from helpers.paths import ROOT


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import damage

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["damage", *map(str, words)])
        damage.main()
        return capsys.readouterr().out

    return run


@pytest.mark.filterwarnings("ignore")
def test_settings_are_measured_and_shown(run, tmp_path, model_folder, monkeypatch):
    from trl_cpo.files import atomic

    write, written = atomic.write_json, []  # how many measurements the file holds, each time: a run cut off keeps its own
    monkeypatch.setattr(atomic, "write_json", lambda file, held: (written.append(len(held["runs"])), write(file, held)))
    out = tmp_path / "out.json"
    options = ["--max_steps", 2, "--every", 1, "--prompts", 2, "--tokens", 4, "--seed", 7, "--model", model_folder]
    run("run", "--settings", "clip, means, 1e-3", "--device", "cpu", *options, "--out", out)
    found = json.loads(out.read_text())
    assert written == [1, 2] and 0 <= found["repetition_of_people"] < 1
    assert [(row["setting"], row["seed"], row["step"]) for row in found["runs"]] == [
        ("clip, means, 1e-3", 7, n) for n in (1, 2)
    ]
    for row in found["runs"]:
        assert (row["device"], row["float32_products"], row["answers_cut_at"]) == ("cpu", "ieee", 4)
        assert row["sets"]["general"]["prompts"] == 2 == len(row["sets"]["general"]["samples"])
        assert row["nll"]["chosen"] > 0 and set(row["before"]) == {"pairs", "general"} and not row["missing"]
    assert 0 < found["runs"][0]["sets"]["general"]["kl"]["value"] < 0.01
    committed = ROOT / "benchmarks" / "damage.json"
    lines = run("table", committed, out).splitlines()[2:]
    trained = [row for row in json.loads(committed.read_text())["runs"] if row["step"]]
    assert len(lines) == len(trained) + 2 and all(" | 7 | " in line for line in lines[:2])


def test_settings_are_what_their_names_say(run):
    from benchmarks.damage import SETTINGS

    assert SETTINGS["clip, means, 3e-4"] == ("clip", 2.5, 0.05, "mean", 3e-4)
    assert SETTINGS["DPO, means, 6e-4"] == ("none", 2.5, 0.0, "mean", 6e-4)
    assert SETTINGS["clip, sums, 1e-3"] == ("clip", 0.1, 1.0, "sum", 1e-3)
    assert SETTINGS["DPO, sums, 2e-4"] == ("none", 0.1, 0.0, "sum", 2e-4)
