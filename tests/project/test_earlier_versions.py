"""What version 0.1.0 wrote is read today: a run, a checkpoint, a reference table, a certificate (tests/golden/earlier)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import trl
from safetensors.torch import load_file

from trl_cpo import CPOConstrainedTrainer
from trl_cpo.cli import main

from helpers.comparisons import without_timings
from helpers.earlier import EARLIER, SAVED_AT, STEPS, lagrangian, scored

NUMBERS = json.loads((EARLIER / "numbers.json").read_text())


@pytest.fixture
def run(tmp_path) -> str:
    return shutil.copytree(EARLIER / "run", tmp_path / "run")


def told(capsys, *arguments) -> dict:
    """What a command prints with --json; it must have gone well."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_reported_with_the_same_numbers(tmp_path, run, capsys):
    (found,) = told(capsys, "report", run, "--out", tmp_path / "report")["runs"]
    assert {name: found[name] for name in NUMBERS["report"]} == NUMBERS["report"]
    assert found["notes"] == []


def test_a_run_is_certified_with_the_same_numbers(run, capsys):
    found = told(capsys, "certify", run, "--gamma", "0")
    assert {name: found[name] for name in NUMBERS["certify"]} == NUMBERS["certify"]


@pytest.mark.parametrize("evidence", [True, False], ids=["from the run", "from its own numbers"])
def test_a_certificate_is_accepted(run, capsys, evidence):
    found = told(capsys, "certify", "--check", EARLIER / "certificate.json", *(["--evidence", run] if evidence else []))
    assert found == {"true": True, "holds": True, "differences": []}


def test_a_certificate_of_other_numbers_is_refused(tmp_path, run, capsys):
    document = json.loads((EARLIER / "certificate.json").read_text())
    document["evidence"]["numbers"]["meeting"] += 1
    (tmp_path / "c.json").write_text(json.dumps(document))
    assert main(["certify", "--check", str(tmp_path / "c.json"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["differences"]


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in trainer.model.named_parameters()}


def test_a_checkpoint_is_resumed_to_the_end(tmp_path):
    """Without a warning, which would fail this test, and to where an uninterrupted run of today ends.

    Equal to the bit where that run passes through the checkpoint's very weights; another processor may round otherwise.
    """
    checkpoint = shutil.copytree(EARLIER / "checkpoint", tmp_path / "earlier") / f"checkpoint-{SAVED_AT}"
    alone, resumed = lagrangian(tmp_path / "alone"), lagrangian(tmp_path / "resumed")
    alone.train()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == alone.state.global_step == STEPS
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "alone" / checkpoint.name))
    as_then = all(torch.equal(theirs[name], ours[name]) for name in theirs)
    tolerance = dict(rel=0, abs=0) if as_then else dict(rel=1e-3, abs=1e-4)
    logs = [[without_timings(record) for record in trainer.state.log_history] for trainer in (resumed, alone)]
    assert len(logs[1]) == 2 and "cpo/lambda" in logs[1][0]
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, **tolerance)
    for name, weight in weights_of(alone).items():
        torch.testing.assert_close(weights_of(resumed)[name], weight, rtol=0, atol=tolerance["abs"])
    assert not torch.equal(weights_of(resumed)["model.norm.weight"], theirs["model.norm.weight"])


def test_a_table_of_the_reference_is_found_and_no_forward_run(tmp_path, monkeypatch):
    (manifest,) = (EARLIER / "scores").glob("*/manifest.json")
    versions = json.loads(manifest.read_text())["key"]["versions"]
    if versions != (here := {module.__name__: module.__version__ for module in (torch, transformers, trl)}):
        pytest.skip(f"the table is of {versions}, which its key says; here are {here}")
    shutil.copytree(EARLIER / "scores", tmp_path / "scores")
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path))
    monkeypatch.setattr(CPOConstrainedTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("the reference was run"))
    trainer = scored(tmp_path / "out")
    stored = load_file(Path(tmp_path, "scores", manifest.parent.name, "000000.safetensors"))
    assert [path.name for path in (tmp_path / "scores").iterdir()] == [manifest.parent.name]
    rows = stored["rows"].tolist()
    assert sorted(rows) == list(range(len(trainer.train_dataset)))
    for name in ("chosen_logps", "rejected_logps"):
        assert [trainer.train_dataset[row][f"ref_{name}"] for row in rows] == stored[name].tolist()
