"""What numbers in a run's documents can be: one table, and every reader holds to it."""

import json
import math
from contextlib import suppress

import pytest

from trl_cpo.certificates import CertificateError, certify_run, check
from trl_cpo.files import schema
from trl_cpo.logs.log_file import read_log
from trl_cpo.metrics import METRICS
from trl_cpo.report import make_report, style

from helpers.run_folders import make_run

HUGE = 10**400
CANNOT_BE = {
    "eval_cpo/incomparable_pairs": [-10, 0.5, True, HUGE, "10", [10]],
    "eval_cpo/nonfinite_pairs": [-1],
    "eval_cpo/pairs": [-1, 59.5, 2**60],
    "eval_cpo/violation_rate": [-0.1, 1.1, True, "0.5"],
    "eval_easy_cpo/prefers_chosen": [1.5],
    "cpo/in_undesirable_region": [-1e-9],
    "cpo/violation": [-1.0],
    "eval_cpo/gap": [HUGE, -HUGE, 1e300, True, {}],
    "eval_cpo/of_another_version": [HUGE, math.inf, math.nan],
    "step": [-1, 0.5, True],
    "seconds": [-1],
    "anything": [HUGE, math.inf],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in CANNOT_BE.items() for value in values])
def test_what_cannot_be(name, value):
    (fault,) = schema.faults({"after": {name: value}})
    assert fault.startswith(f"after.{name} must be a") and len(fault) < 200
    assert schema.sound({"after": {name: value, "loss": 1.0}}) == {"after": {name: None, "loss": 1.0}}


def test_what_can_be():
    whole = {
        "eval_cpo/pairs": 20.0,
        "eval_cpo/violation_rate": 1,
        "eval_cpo/gap": -3.5,
        "eval_loss": None,
        "config": {"bf16": True, "gamma": "inf", "betas": [0.9, 0.999]},
        "pairs": {"trained_on": "streamed"},
        "rows": [["not looked at"]],
    }
    assert list(schema.faults(whole)) == [] and schema.sound(whole) == whole
    assert list(schema.faults({"cpo/gap": math.nan}, finite=False)) == []


def test_every_condition_is_a_share():
    for name, (formula, _) in METRICS.items():
        if formula.startswith("["):
            assert schema.range_of(f"eval_cpo/{name}") is schema.SHARE, name


def test_no_depth_stops_it():
    deep: list = []
    for _ in range(900):
        deep = [deep]
    assert len(list(schema.faults({"a": deep}))) == 1 and schema.sound({"a": deep})


def forge(folder, name, path, value):
    document = json.loads((folder / name).read_text())
    part = document
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (folder / name).write_text(json.dumps(document))


FORGED = [
    ("metrics.json", ("after", "eval_cpo/incomparable_pairs"), -10),
    ("metrics.json", ("after", "eval_cpo/pairs"), 20),
    ("metrics.json", ("after", "eval_cpo/gap"), HUGE),
    ("metrics.json", ("after", "eval_cpo/prefers_chosen"), 1.2),
    ("metrics.json", ("config", "gamma"), HUGE),
    ("metrics.json", ("config", "learning_rate"), HUGE),
    ("metrics.json", ("held_out_pairs",), -60),
    ("pairs.json", ("rows", 0, 0), HUGE),
    ("pairs.json", ("rows", 0, 1), True),
    ("pairs.json", ("left_out",), -10),
    ("pairs.json", ("left_out",), 0.0),
    ("pairs.json", ("gamma",), True),
    ("pairs.json", ("reduction",), ["sum"]),
    ("pairs.json", ("columns", 0), ["policy_chosen"]),
]


@pytest.mark.parametrize("name, path, value", FORGED)
def test_a_forged_folder_neither_makes_nor_passes_for_evidence(tmp_path, name, path, value):
    run = make_run(tmp_path / "run", steps=5)
    made = certify_run(run)
    assert check(made, run) == []
    forge(run, name, path, value)
    with pytest.raises(CertificateError):
        certify_run(run)
    with pytest.raises(CertificateError):
        check(made, run)


def test_fewer_left_out_than_none_does_not_raise_the_share(tmp_path):
    """Counts alone, without pairs.json: 10 of 20 pairs do not become 10 of 10."""
    run = make_run(tmp_path / "run", pairs=20, steps=5)
    (run / "pairs.json").unlink()
    forge(run, "metrics.json", ("after", "eval_cpo/violation_rate"), 0.5)
    assert certify_run(run)["evidence"]["numbers"] == {"pairs": 20, "meeting": 10}
    forge(run, "metrics.json", ("after", "eval_cpo/incomparable_pairs"), -10)
    with pytest.raises(CertificateError, match="after.eval_cpo/incomparable_pairs must be a whole number, 0 or more; got -10"):
        certify_run(run)


@pytest.mark.parametrize(
    "path",
    [("asked", "gamma"), ("certified_share",), ("evidence", "numbers", "pairs"), ("evidence", "files", "pairs.json", "bytes")],
)
@pytest.mark.parametrize("value", [HUGE, math.inf, True, -1])
def test_a_forged_certificate_is_refused_or_differs(tmp_path, path, value):
    run = make_run(tmp_path / "run", steps=5)
    (tmp_path / "c.json").write_text(json.dumps(certify_run(run)))
    forge(tmp_path, "c.json", path, value)
    made = json.loads((tmp_path / "c.json").read_text())
    for folder in (None, run):
        with suppress(CertificateError):
            assert check(made, folder) != []


@pytest.mark.parametrize("value", [HUGE, math.inf, math.nan, -10, True, "x", [], 1e308])
def test_a_report_leaves_them_out_and_says_so(tmp_path, value, monkeypatch):
    monkeypatch.setattr(style, "DPI", 24)
    run = make_run(tmp_path / "run", steps=10)
    for name in ("eval_cpo/gap", "eval_cpo/violation_rate", "eval_cpo/pairs"):
        forge(run, "metrics.json", ("after", name), value)
    forge(run, "metrics.json", ("seconds",), value)
    forge(run, "metrics.json", ("config", "gamma"), value)
    forge(run, "pairs.json", ("rows", 0, 0), value)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line["cpo/gap" if "cpo/gap" in line else "eval_cpo/gap"] = value
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (made,) = make_report([run]).runs
    assert any("metrics.json holds" in note and "cannot be" in note for note in made.notes)


def test_a_logs_steps_are_whole_numbers(tmp_path):
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": True},
        {"step": -1},
        {"step": HUGE},
        {"resumed_from": -3},
        {"resumed_from": False},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_log(tmp_path / "log.jsonl") == lines[:1]
