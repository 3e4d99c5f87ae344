"""The search of the demo's recipe, on a tiny model: what it measures, and how it compares arms."""

import json
import os
import subprocess
import sys

import pytest
import torch

from trl_cpo.data.loading import load_pairs

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
        assert record["seed"] == 42 and record["float32_products"] == "ieee"
        assert record["device"] == ("cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name())
    assert "penalty-1 learning_rate 0.02 target_modules all-linear, seed 42, step 2: preferred 0." in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["decisions", "table", str(out)])
    search.main()
    assert capsys.readouterr().out.count("| penalty-1 learning_rate 0.02") == 3


def test_every_tensor_goes_to_the_device_of_the_model(model_folder):
    command = [sys.executable, str(ROOT / "tests" / "processes" / "decisions_on_fake_gpu.py"), model_folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"steps": [0, 1, 2]}


def test_padded_rows_score_as_those_that_share_their_beginning(search, model_folder):
    """Prompts and options of several lengths; gradients too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    rows = list(load_pairs("demo", "test"))[:5]
    rows[1] = {**rows[1], "options": rows[1]["options"][:2]}
    found = {}
    for logps in (search.padded_logps, search.option_logps):
        scores = logps(model, tokenizer, rows)
        torch.cat(scores)[::3].sum().backward()
        found[logps] = [[*map(torch.Tensor.detach, scores)], [weight.grad for weight in model.parameters()]]
        model.zero_grad()
    assert [len(scores) for scores in found[search.padded_logps][0]] == [6, 2, 6, 6, 6]
    torch.testing.assert_close(found[search.padded_logps], found[search.option_logps], rtol=1e-4, atol=1e-5)


def of_seed(arm, seed, constraint, *points, schedule="constant"):
    """Records of a run: (step, KL, share) each."""
    settings = {"learning_rate": 0.0004, "schedule": schedule, "batch": 4, "target_modules": None, "sft": 0.0}
    return [
        {
            "arm": arm,
            "seed": seed,
            "settings": {**settings, "constraint": constraint, "beta": float(arm.split("-")[1])},
            "step": step,
            "kl_general": {"value": kl},
            "decisions": {name: {"share": share} for name in ("preferred", "right", "answered")},
        }
        for step, kl, share in points
    ]


@pytest.fixture
def seeds(search):
    from benchmarks import decision_seeds

    return decision_seeds


START = {"arm": "start", "seed": 1, "settings": {}, "step": 0, "kl_general": {"value": 0.0}} | {
    "decisions": {name: {"share": 0.2} for name in ("preferred", "right", "answered")}
}


def test_seeds_at_equal_kl_by_hand(seeds):
    """At KL 0.02: clip 40 and 46.7 %, DPO 30 and 40 %. Of two seeds, half an interval is 12.7 / 2 times their gap."""
    records = [START, *of_seed("clip-1", 1, "clip", (10, 0.02, 0.4), (20, 0.06, 0.8))]
    records += of_seed("clip-1", 2, "clip", (20, 0.04, 0.68), (10, 0.01, 0.36))  # another process's order
    records += of_seed("dpo-0.1", 1, "none", (10, 0.04, 0.4)) + of_seed("dpo-0.1", 2, "none", (10, 0.04, 0.6))
    arms = seeds.grouped(records)
    (_, (_, runs)), (_, (_, others)) = sorted(arms.items())
    assert seeds.shares_at(runs, 0.02, "right") == pytest.approx({1: 40.0, 2: 36 + 32 / 3})
    assert seeds.shares_at(others, 0.02, "right") == pytest.approx({1: 30.0, 2: 40.0})
    assert seeds.shares_at(runs, 0.05, "right") == pytest.approx({1: 70.0})
    lines = seeds.seeds_table(records, [0.02, 0.05]).splitlines()
    half = 12.7062 / 2
    assert lines[0] == "All arms: learning_rate 0.0004, schedule constant, batch 4, target_modules None, sft 0.0."
    assert lines[4] == "| clip-1 | 2 | 0.02 |" + f" {(40 + 36 + 32 / 3) / 2:.1f} ± {half * (32 / 3 - 4):.1f} |" * 3
    assert lines[5] == "| clip-1 | 2 | 0.05 |" + " – (1 of 2) |" * 3
    gained = f" {(10 + 20 / 3) / 2:+.1f} ± {half * (10 - 20 / 3):.1f} [1: +10, 2: +7] |"
    assert lines[11] == "| clip-1 less dpo-0.1 | 0.02 |" + gained * 3


def test_arms_that_differ_in_more_than_the_constraint_are_not_compared(seeds):
    records = [START, *of_seed("clip-1", 1, "clip", (10, 0.02, 0.4)), *of_seed("dpo-0.1", 1, "none", (10, 0.04, 0.4))]
    assert " less " in seeds.seeds_table(records)
    records[-1]["settings"]["sft"] = 0.3
    table = seeds.seeds_table(records)
    assert " less " not in table and "| dpo-0.1 | sft 0.3 | 1 |" in table and "| clip-1 | sft 0.0 | 1 |" in table


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda records: records[1:], "No record of the start"),
        (lambda records: [*records, records[-1]], "is there twice"),
        (lambda records: [*records, *of_seed("dpo-1", 1, "none", (1, 0.1, 0.1), schedule="linear")], "no curve"),
    ],
)
def test_records_that_are_no_curves_are_refused(seeds, change, says):
    records = [START, *of_seed("clip-1", 1, "clip", (10, 0.02, 0.4))]
    with pytest.raises(ValueError, match=says):
        seeds.seeds_table(change(records))


def test_arms_at_equal_levels(search):
    curve = [(0.0, 0.2), (0.01, 0.4), (0.03, 0.8)]
    assert search.at_level(curve, 0.02) == pytest.approx(0.6) and search.at_level(curve, 0.0) == 0.2
    assert search.at_level(curve, 0.04) is None and search.at_level([], 0.1) is None


def test_the_committed_results_are_of_known_arms(search):
    records = json.loads((ROOT / "benchmarks" / "decisions.json").read_text())
    assert {record["arm"] for record in records} >= {"start", "clip-1"}
    assert all(record["arm"] in search.ARMS for record in records)
    assert search.table(records).count("\n") > len(records)
