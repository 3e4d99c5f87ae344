"""The benchmark for GPUs: its counting by hand, and its program on tiny rows over emulated kernels."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

from helpers.flash_emulation import flash_on_cpu
from helpers.paths import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import steps
from benchmarks.gpu.lengths import hh_lengths, near
from benchmarks.gpu.models import CONFIGS, useful_operations
from benchmarks.gpu.rows import ROWS, SEGMENTS, TRIAL, TRL, VARLEN
from benchmarks.gpu.table import short_table, speedup, table


@pytest.mark.parametrize(("full", "passes"), [(True, 3), (False, 2)])
def test_useful_operations_by_hand(full, passes):
    """One pair: 2 per weight forward, 4 backward (2 without weight gradients), each distinct token once."""
    config = CONFIGS["8b"]
    hidden, mlp, width = config.hidden_size, config.intermediate_size, 32 * 128
    weights = 36 * (2 * hidden * width + 2 * hidden * width // 4 + 3 * hidden * mlp)
    tokens, scored = 3 + 2 + 4, 6
    dense = 2 * passes * (weights * tokens + hidden * 151936 * scored)
    seen = 3 * 3 / 2 + (2 * 3 + 2 * 2 / 2) + (4 * 3 + 4 * 4 / 2)
    assert useful_operations(config, [(3, 2, 4)], full=full) == pytest.approx(dense + 3 * 4 * 36 * width * seen)


def test_no_two_batches_have_the_same_lengths():
    for row in ROWS:
        batches = [tuple(row.lengths(number)) for number in range(row.batches + 2)]
        assert len(set(batches)) == len(batches), row.name
        assert all(len(batch) == row.pairs for batch in batches)
    assert all(900 <= prompt <= 1127 and 450 <= answer <= 564 for prompt, answer, _ in near(1024, 512, 50, 0))
    assert all(prompt > 0 and min(answers) > 0 and prompt + max(answers) <= 512 for prompt, *answers in hh_lengths(600))


def test_rows_have_names_of_their_own():
    assert len({row.name for row in (*ROWS, *TRIAL)}) == len(ROWS) + len(TRIAL)


def test_the_program_measures_every_arm(tmp_path, monkeypatch, capsys):
    """The rows that a CPU can run; not the 4-bit one, which needs bitsandbytes."""
    out = tmp_path / "gpu.jsonl"
    arguments = ["--trial", "--only", "tiny lora", "tiny full", "--loop", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
    monkeypatch.setattr(steps, "train", functools.partial(steps.train, steps=3, first=1))
    with flash_on_cpu():
        program.main()
    records = [json.loads(line) for line in Path(out).read_text().splitlines()]
    rows = [row for row in TRIAL if row.training != "qlora"]
    assert {(r["row"], r["arm"]) for r in records} == {(row.name, arm) for row in rows for arm in row.arms}
    for record in records:
        assert "failed" not in record, record
        assert len(record["new_s"]) == len(record["again_s"]) == 2 and min(record["new_s"]) > 0
        assert record["card"] == "cpu" and record["useful_operations"] > 0
    assert sum("train_step_s" in record for record in records) == 5  # each model's first row, each arm
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--table", str(out)])
    program.main()
    assert capsys.readouterr().out.partition("\n\n")[0] in printed
    assert all(f"| {row.name} | " in printed for row in rows)


def test_an_arm_that_cannot_run_stops_no_other(tmp_path, monkeypatch, capsys):
    """On a CPU, varlen. And `--arms` names those that run."""
    out = tmp_path / "gpu.jsonl"
    arguments = ["--trial", "--only", "tiny full", "--arms", VARLEN, TRL, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
    program.main()
    found = {record["arm"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert set(found) == {TRL, VARLEN} and "failed" not in found[TRL]
    assert found[VARLEN]["failed"].startswith("NotPackable: ")


@pytest.mark.parametrize("arm", [TRL, VARLEN])
def test_steps_run_under_autocast_as_training_does(arm):
    """The first ones on a GPU did not: adapters were then computed in float32."""
    with flash_on_cpu():
        trainer = steps.trainer_of(TRIAL[0], arm, torch.device("cpu"))
        seen = []
        layer = next(module for name, module in trainer.model.named_modules() if name.endswith("layers.0.mlp"))
        layer.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        steps.step(trainer, steps.batches_of(TRIAL[0], 0, 1)[0])
    assert seen == [True]


def test_the_table_divides_the_right_times():
    def record(arm, *seconds, **other):
        return {
            "row": ROWS[0].name,
            "arm": arm,
            "new_s": list(seconds),
            "again_s": [1.0],
            "peak_bytes": 1e9,
            "busy_s": 0.5,
            **other,
        }

    records = [record(TRL, 3.0, 5.0), record(VARLEN, 1.0, 3.0, useful_operations=2e12), {**record(SEGMENTS), "failed": "x"}]
    del records[2]["new_s"], records[2]["again_s"]
    assert speedup({r["arm"]: r for r in records}) == 2.0
    line = "| 8b lora, hh, 8 pairs | 4000 (1000) | 2000 (1000) | x | 2.00× (1.00×) | 500, 500 | 2 | 1 → 1 |"
    assert table(records).splitlines()[-1] == f"{line} trl 692, varlen 175 |"


def test_the_tables_of_the_docs_are_those_of_the_records():
    records = [json.loads(line) for line in (ROOT / "benchmarks" / "gpu" / "records.jsonl").read_text().splitlines()]
    assert {record["card"] for record in records} == {"NVIDIA H200"}
    for page, made in (("docs/contributing/performance.md", table(records)), ("docs/performance.md", short_table(records))):
        assert f"\n\n{made}\n\n" in (ROOT / page).read_text(encoding="utf-8"), made


def test_rows_that_do_not_exist_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--only", "9b"])
    with pytest.raises(SystemExit):
        program.main()
    assert "the rows are 8b lora, hh, 8 pairs" in capsys.readouterr().err
