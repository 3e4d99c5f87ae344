"""The demo's second set under several seeds: what a run keeps, and the table."""

import json
import sys

import pytest

from helpers.paths import ROOT


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import demo_answers

    return demo_answers


@pytest.mark.filterwarnings("ignore")
def test_a_run_is_of_the_recipe_and_its_record_is_kept(benchmark, tmp_path, model_folder, monkeypatch, capsys):
    out = tmp_path / "out.json"
    words = ["run", "--arms", "dpo", "--seeds", "7", "--device", "cpu", "--model", model_folder, "--out", str(out)]
    words += ["--max_steps", "2", "--price_prompts", "2", "--price_tokens", "4", "--max_test_pairs", "8"]
    monkeypatch.setattr(sys, "argv", ["demo_answers", *words])
    benchmark.main()
    (record,) = json.loads(out.read_text())
    assert (record["arm"], record["seed"], record["steps"], record["device"]) == ("dpo", 7, 2, "cpu")
    settings = record["settings"]
    assert (settings["constraint"], settings["beta"], settings["logps_reduction"]) == ("none", 2.5, "mean")
    assert settings["learning_rate"] == 3e-4 and settings["num_train_epochs"] == 1 and record["float32_products"] == "ieee"
    before, after = record["general"]
    assert before["kl"]["value"] == 0 < after["kl"]["value"] and len(after["samples"]) == 2
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["demo_answers", "table", str(out)])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    for line, name, end in zip(lines[2:], ("| the start |  |", "| DPO | 7 |"), (0, 1), strict=True):
        assert line.startswith(f"{name} {100 * record['preferred'][end]:.0f} % |")


def record(arm, seed, preferred, kl):
    ends = [{"kl": {"value": value}, "repetition": {"value": 0.1}, "ended": {"value": 0.5}} for value in (0.0, kl)]
    return {"arm": arm, "seed": seed, "preferred": [0.2, preferred], "in_U": [0, 0], "general": ends, "pairs": ends}


def test_the_table_by_hand(benchmark):
    """Of two seeds, half an interval is 12.7 / 2 times their gap."""
    records = [record("dpo", 2, 0.3, 0.03), record("dpo", 1, 0.28, 0.03), record("clip", 1, 0.3, 0.05)]
    records.append(record("clip", 2, 0.34, 0.06))
    lines = benchmark.table(records).splitlines()
    assert lines[2] == "| the start |  | 20 % | 0 % | 0.000 | 10 % | 0.000 | 10 % | 50 % |"
    assert [line.split(" | ")[1] for line in lines[3:7]] == ["1", "2", "1", "2"]
    assert lines[7].split(" | ")[:4] == ["| clip, the recipe", "mean", "32.0 ± 25.4", "0.0 ± 0.0"]
    assert lines[9].split(" | ")[2:5] == ["+3.0 ± 12.7", "+0.0 ± 0.0", "+0.025 ± 0.064"]
    with pytest.raises(ValueError, match="twice"):
        benchmark.table([*records, records[0]])
