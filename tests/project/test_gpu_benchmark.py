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


def test_an_arm_that_cannot_run_stops_no_other(tmp_path, monkeypatch):
    """As varlen on a CPU. And `--arms` names those that run."""
    out, trainer_of = tmp_path / "gpu.jsonl", steps.trainer_of

    def without_kernel(row, arm, device):
        if arm == VARLEN:
            raise RuntimeError("no kernel")
        return trainer_of(row, arm, device)

    monkeypatch.setattr(steps, "trainer_of", without_kernel)
    monkeypatch.setattr(
        sys, "argv", ["benchmarks.gpu", "--trial", "--only", "tiny full", "--arms", VARLEN, TRL, "--out", str(out)]
    )
    program.main()
    found = {record["arm"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert set(found) == {TRL, VARLEN} and "failed" not in found[TRL]
    assert found[VARLEN]["failed"] == "RuntimeError: no kernel"


def test_each_arm_has_a_process_of_its_own(monkeypatch):
    """What the first leaves behind would be counted as the second's."""
    asked = []
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--only", "0.5b lora, hh, 8 pairs", "--out", "x.jsonl"])
    monkeypatch.setattr(program.subprocess, "run", lambda command, check: asked.append(command[1:]))
    program.main()
    given = ["-m", "benchmarks.gpu", "--only", "0.5b lora, hh, 8 pairs", "--out", "x.jsonl", "--arms"]
    assert asked == [[*given, arm] for arm in (TRL, VARLEN, SEGMENTS)]


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


def record(arm, *seconds, row=ROWS[0], **other):
    made = {"row": row.name, "arm": arm, "new_s": list(seconds), "again_s": [1.0], "peak_bytes": 1e9, "busy_s": 0.5}
    return {**made, "useful_operations": 2e12, **other}


def test_the_table_divides_the_right_times():
    records = [record(TRL, 3.0, 5.0), record(VARLEN, 1.0, 3.0), {**record(SEGMENTS), "failed": "x"}]
    del records[2]["new_s"], records[2]["again_s"]
    assert speedup({r["arm"]: r for r in records}) == 2.0
    line = "| 8b lora, hh, 8 pairs | 4000 (1000) | 2000 (1000) | x | 2.00× (1.00×) | 500, 500 | 2 | 1 → 1 |"
    assert table(records).splitlines()[-1] == f"{line} trl 692, varlen 175 |"


def test_of_what_was_measured_again_the_last_counts():
    once = [record(TRL, 8.0), record(VARLEN, 2.0)]
    again = [record(VARLEN, 1.0, again_s=[0.25]), record(TRL, 6.0, row=ROWS[2])]
    assert "| 8000 (1000) | 1000 (250) |  | 8.00× (4.00×) |" in table(once + again)
    assert "| 8000 (1000) | 2000 (1000) |  | 4.00× (1.00×) |" in table(again + once)
    assert "| 1000 ms | 250 ms | 4.0× |" in short_table(once + again)


def test_arms_of_two_machines_are_marked():
    """Those that are compared, as they stand after measuring again; DPOTrainer with checkpointing too, where it stands in."""
    kept, left_out = ROWS[2], ROWS[3]
    assert (kept.pairs, kept.checkpointing, left_out.checkpointing, left_out.arms) == (32, True, False, (VARLEN,))
    old = [record(arm, 1.0, row=kept, machine=1) for arm in (TRL, VARLEN)]
    new = [record(VARLEN, 1.0, row=left_out, machine=2)]
    marked = [line.count("‡") for made in (table, short_table) for line in made(old + new).splitlines()[2:]]
    assert marked == [0, 1, 0, 1]
    again = [record(arm, 1.0, row=kept, machine=2) for arm in (TRL, VARLEN)]
    assert "‡" not in table(old + new + again) + short_table(old + new + again)
    assert [line.count("‡") for line in table(old + new + again[:1]).splitlines()[2:]] == [1, 0]


def measured_rows():
    return [json.loads(line) for line in (ROOT / "benchmarks" / "gpu" / "records.jsonl").read_text().splitlines()]


def test_the_tables_of_the_docs_are_those_of_the_records():
    records = measured_rows()
    assert {record["card"] for record in records} == {"NVIDIA H200"}
    assert {record["machine"] for record in records} == {1, 2}
    for page, made in (("docs/contributing/performance.md", table(records)), ("docs/performance.md", short_table(records))):
        assert f"\n\n{made}\n\n" in (ROOT / page).read_text(encoding="utf-8"), made


def test_the_targets_that_the_docs_name_are_as_measured():
    found: dict[str, dict[str, dict]] = {}
    for one in measured_rows():
        found.setdefault(one["row"], {})[one["arm"]] = one
    text = " ".join((ROOT / "docs/contributing/performance.md").read_text(encoding="utf-8").split())

    def times(name, beside=None):
        arms = found[name] if beside is None else {**found[name], TRL: found[beside][TRL]}
        return f"{speedup(arms, key='again_s'):.2f}"

    assert f"at prompts of 2,048 tokens ({times('8b lora, 2048+512, 2 pairs')})" in text
    at_8, at_32 = ((f"8b lora, hh, {pairs} pairs", f"8b full, hh, {pairs} pairs") for pairs in (8, 32))
    assert f"with 8 pairs (LoRA {times(at_8[0])}, full {times(at_8[1])})" in text
    kept = " and ".join(map(times, at_32))
    without = " and ".join(times(f"{name}, no checkpointing", name) for name in at_32)
    assert f"4 times with 32 ({kept}; packed without checkpointing {without})" in text
    small = "1.5b lora, hh, 8 pairs"
    assert f"8 pairs: {times(small)}, without checkpointing {times(f'{small}, no checkpointing')})" in text


def test_rows_that_do_not_exist_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--only", "9b"])
    with pytest.raises(SystemExit):
        program.main()
    assert "the rows are 8b lora, hh, 8 pairs" in capsys.readouterr().err
