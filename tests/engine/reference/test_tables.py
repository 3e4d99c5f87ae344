"""Tables of log-probabilities: never of another model or other data, never lost, never half written, continued."""

import json
import logging
import os
import random
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors.numpy import load, save
from tokenizers import normalizers
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoModelForCausalLM

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine.reference import BadScores, layout, table_of
from trl_cpo.engine.reference.digests import text_digest, tokens_digest, weights_digest
from trl_cpo.engine.reference.filling import _check, as_columns
from trl_cpo.engine.reference.layout import Layout
from trl_cpo.engine.reference.store import COLUMNS, MANIFEST, ScoreStore

from helpers.launching import launcher
from helpers.paths import PROCESSES
from helpers.tiny import CHAT_TEMPLATE, make_lora, make_model, make_tokenizer, pair_rows, pairs_dataset, training_options

SCRIPT = PROCESSES / "score_in_processes.py"
PAIRS = 11
#: A shard of these tests: two batches of 2.
SHARD = 4


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(layout, "SHARD_PAIRS", SHARD)
    return tmp_path / "cache" / "scores"


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Rows of each batch that went through the reference."""
    seen, compute = [], CPOConstrainedTrainer.compute_ref_log_probs

    def counted(self, model, inputs):
        seen.append(len(inputs["input_ids"]))
        return compute(self, model, inputs)

    monkeypatch.setattr(CPOConstrainedTrainer, "compute_ref_log_probs", counted)
    return seen


def trainer_of(folder, *, tokenizer=None, model=None, dataset=None, more=None, **options):
    options = {"per_device_train_batch_size": 2, "precompute_ref_log_probs": True, "constraint": "clip", **options}
    return CPOConstrainedTrainer(
        model=make_model() if model is None else model,
        args=CPOConstrainedConfig(**training_options(folder, **options)),
        processing_class=tokenizer or make_tokenizer(),
        train_dataset=pairs_dataset(PAIRS) if dataset is None else dataset,
        **(more or {}),
    )


def table(folder, **kwargs):
    return table_of(trainer_of(folder, **kwargs))


def values(table) -> np.ndarray:
    return np.stack([getattr(table, name) for name in COLUMNS])


def shards(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix == ".safetensors")


# ---- the trainer's table


def test_the_table_is_what_the_reference_gives_in_the_order_of_the_dataset(tmp_path, cache, calls):
    trainer = trainer_of(tmp_path)
    found = table_of(trainer)
    assert len(found) == PAIRS and calls == [4] * 5 + [2]
    assert shards(found.folder) == ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
    assert found.folder.parent == cache
    for row, example in enumerate(trainer.train_dataset):
        alone = trainer.data_collator([example])
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, alone)
        assert found.chosen_logps[row] == pytest.approx(chosen.item(), abs=1e-4)
        assert found.rejected_logps[row] == pytest.approx(rejected.item(), abs=1e-4)
        assert example["ref_chosen_logps"] == found.chosen_logps[row]
        assert example["ref_rejected_logps"] == found.rejected_logps[row]
        assert alone["completion_mask"].sum(dim=1).tolist() == [found.chosen_tokens[row], found.rejected_tokens[row]]
        assert found.chosen_tokens[row] == len(example["chosen_ids"])
    manifest = json.loads((found.folder / MANIFEST).read_text())
    assert manifest["key"]["max_length"] == 64 and manifest["key"]["pairs"] == PAIRS
    assert text_digest(manifest["key"]) == found.folder.name


def test_batches_are_of_like_lengths(tmp_path, cache, monkeypatch):
    """Each batch's rows follow one another in the order of length, the longest first."""
    seen = []
    compute = CPOConstrainedTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        CPOConstrainedTrainer,
        "compute_ref_log_probs",
        lambda self, model, inputs: (seen.append(int(inputs["attention_mask"].sum())), compute(self, model, inputs))[1],
    )
    trainer = trainer_of(tmp_path)
    tokens = [len(e["prompt_ids"]) * 2 + len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in trainer.train_dataset]
    ordered = sorted(tokens, reverse=True)
    assert seen == [sum(ordered[i : i + 2]) for i in range(0, PAIRS, 2)]


def test_the_same_again_runs_no_forward(tmp_path, cache, calls):
    first = table(tmp_path)
    calls.clear()
    # Neither the name of the output, nor the batch size, nor an adapter that the reference does without, nor the training.
    for options in (
        {},
        {"per_device_train_batch_size": 4, "learning_rate": 1.0, "beta": 0.1, "constraint": "softplus", "gamma": 2.0},
        {"more": {"peft_config": make_lora()}},
        {"model": make_model(1), "more": {"ref_model": make_model()}},
    ):
        again = table(tmp_path / "elsewhere", **options)
        assert again.folder == first.folder and np.array_equal(values(again), values(first))
    assert calls == []


def other_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant", "model")
    return tokenizer


def other_tokenizer():
    """The same vocabulary, and every text begins with a line break."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("\n")
    return tokenizer


def nudged():
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    return model


def trained_adapter(seed=5, **settings):
    model = make_model()
    torch.manual_seed(seed)
    return get_peft_model(model, make_lora(**settings))


CHAT = dict(dataset=pairs_dataset(PAIRS, conversational=True))
#: What changes, and what it starts from where that is not a plain trainer.
OTHERS = {
    "weights": (lambda: dict(model=nudged()), None),
    "a trained adapter": (lambda: dict(model=trained_adapter()), None),
    "another trained adapter": (lambda: dict(model=trained_adapter(6)), lambda: dict(model=trained_adapter())),
    "an adapter's scale": (lambda: dict(model=trained_adapter(lora_alpha=9)), lambda: dict(model=trained_adapter())),
    "tokenizer": (lambda: dict(tokenizer=other_tokenizer()), None),
    "template": (lambda: dict(CHAT, tokenizer=other_template()), lambda: CHAT),
    "data": (lambda: dict(dataset=pairs_dataset(PAIRS, seed=1)), None),
    "order": (lambda: dict(dataset=pairs_dataset(PAIRS).select(range(PAIRS - 1, -1, -1))), None),
    "max_length": (lambda: dict(max_length=24), None),
    "truncation_mode": (lambda: dict(max_length=24, truncation_mode="keep_end"), lambda: dict(max_length=24)),
    "ld_alpha": (lambda: dict(ld_alpha=0.5), None),
    "dtype": (lambda: dict(model=make_model().bfloat16()), None),
    "autocast": (lambda: dict(bf16=True), None),
    "forward": (lambda: dict(prefix_sharing=False), None),
    "DPOTrainer's batches": (lambda: dict(constraint="none"), None),
    "attention": (
        lambda: dict(model=make_model(attn_implementation="eager"), prefix_sharing=False),
        lambda: dict(prefix_sharing=False),
    ),
    "config": (lambda: dict(model=make_model(rms_norm_eps=1e-3)), None),
}
#: Of these only the order of additions is another. Whether that shows in a bit depends on the processor's kernels.
ROUNDED_DIFFERENTLY = {"forward", "DPOTrainer's batches", "attention"}


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode")
@pytest.mark.parametrize("other", OTHERS)
def test_another_one_has_another_table(tmp_path, cache, calls, other):
    changed, base = OTHERS[other]
    first = table(tmp_path, **(base() if base else {}))
    calls.clear()
    second = table(tmp_path, **changed())
    assert second.folder != first.folder and sum(calls) == 2 * len(second)
    if other in ROUNDED_DIFFERENTLY:
        np.testing.assert_allclose(values(second), values(first), rtol=0, atol=1e-4)
    else:
        assert not np.allclose(values(second), values(first), rtol=0, atol=1e-4)


def test_batches_as_dpo_trainer_forms_them_are_keyed_by_their_size(tmp_path, cache):
    first, second = (table(tmp_path, constraint="none", per_device_train_batch_size=size) for size in (2, 4))
    assert first.folder != second.folder


def test_new_sets_and_old_ones_are_evaluated_before_and_after_training(tmp_path, cache, calls):
    """TRL refuses a set that has the columns already."""
    sets = {"a": pairs_dataset(3, seed=7), "b": pairs_dataset(5, seed=8)}
    trainer = trainer_of(tmp_path, more={"eval_dataset": sets, "peft_config": make_lora()}, per_device_eval_batch_size=2)
    assert [len(table_of(trainer, name)) for name in ("train", "a", "b")] == [PAIRS, 3, 5]
    before = {name: values(table_of(trainer, name)) for name in sets}
    trainer.train()
    calls.clear()
    assert trainer.evaluate(trainer.eval_dataset["a"])["eval_cpo/pairs"] == 3
    assert np.array_equal(values(table_of(trainer, "eval")), before["a"]) and calls == []
    trainer.evaluate(pairs_dataset(4, seed=9))
    assert sum(calls) == 2 * 4
    with pytest.raises(KeyError, match="no table of 'c'; it has .'a', 'b', 'eval', 'train'."):
        table_of(trainer, "c")


def test_weights_changed_after_construction_are_not_taken_for_the_old_ones(tmp_path, cache, calls):
    trainer = trainer_of(tmp_path)
    trainer.evaluate(pairs_dataset(3, seed=7))
    first = table_of(trainer, "eval")
    with torch.no_grad():
        trainer.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    trainer.evaluate(pairs_dataset(3, seed=7))
    assert table_of(trainer, "eval").folder != first.folder


# ---- what is refused, and what is scored again


def test_nan_is_refused_with_the_rows_and_nothing_is_written(tmp_path, cache):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(BadScores, match=r"(?s)not finite.* rows \d+, .* of the train dataset"):
        table(tmp_path, model=model, prefix_sharing=False)
    (folder,) = cache.iterdir()
    assert [file.name for file in folder.iterdir()] == [MANIFEST]


@pytest.mark.parametrize("planted", [0.0, float("inf"), float("nan")])
def test_bad_values_are_refused_by_row_and_what_was_scored_before_is_kept(tmp_path, cache, monkeypatch, planted):
    compute = CPOConstrainedTrainer.compute_ref_log_probs
    done = []

    def planted_in_the_fourth(self, model, inputs):
        done.append(1)
        found = [side.clone() for side in compute(self, model, inputs)]
        if len(done) == 4:
            found[0][1] = found[1][1] = planted
        return found

    monkeypatch.setattr(CPOConstrainedTrainer, "compute_ref_log_probs", planted_in_the_fourth)
    with pytest.raises(BadScores) as error:
        table(tmp_path)
    (folder,) = cache.iterdir()
    assert shards(folder) == ["000000.safetensors"]
    monkeypatch.setattr(CPOConstrainedTrainer, "compute_ref_log_probs", compute)
    trainer = trainer_of(tmp_path)
    lengths = [len(e["prompt_ids"]) * 2 + len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in trainer.train_dataset]
    row = sorted(range(PAIRS), key=lambda i: (-lengths[i], i))[7]
    assert f"rows {row} of the train dataset" in str(error.value)
    assert ("exactly zero" if planted == 0 else "not finite") in str(error.value)


def test_a_pair_without_scored_tokens_may_have_zeros():
    mask = torch.tensor([[0, 0], [1, 0], [0, 0], [0, 0]])  # chosen, chosen, rejected, rejected
    columns = as_columns(torch.zeros(2), torch.zeros(2), mask)
    assert columns.tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    _check(columns.numpy(), np.arange(2), "train")
    with pytest.raises(BadScores, match="exactly zero for both answers in rows 1 of"):
        _check(as_columns(torch.zeros(2), torch.zeros(2), mask.flip(1)).numpy(), np.arange(2), "train")
    one_side = as_columns(torch.zeros(1), -torch.ones(1), torch.ones(2, 3))
    _check(one_side.numpy(), np.arange(1), "train")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def swap(file: Path) -> None:
    file.write_bytes(file.with_name("000000.safetensors").read_bytes())


def not_finite(file: Path) -> None:
    """Whole in form: it was written so."""
    found = load(file.read_bytes())
    columns = {name: found[name].copy() for name in COLUMNS}
    columns["chosen_logps"][0] = np.nan
    ScoreStore(file.parent, [np.arange(SHARD), found["rows"]]).write(1, columns)


def older(file: Path) -> None:
    found = load(file.read_bytes())
    del found["chosen_tokens"]
    file.write_bytes(save(found))


DAMAGE = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "."),
    "empty": (lambda file: file.write_bytes(b""), "."),
    "a bit flipped": (flip, "contents have changed"),
    "other pairs": (swap, "about other pairs"),
    "not finite": (not_finite, "not all of its values are finite"),
    "of other columns": (older, "other columns"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_shard_is_scored_again_and_said_once(tmp_path, cache, calls, caplog, damage):
    whole = table(tmp_path)
    break_it, reason = DAMAGE[damage]
    break_it(whole.folder / "000001.safetensors")
    calls.clear()
    with caplog.at_level(logging.WARNING, logger="trl_cpo"):
        again = table(tmp_path)
    assert calls == [4, 4] and np.array_equal(values(again), values(whole))
    said = [record.message for record in caplog.records if "scored again" in record.message]
    assert len(said) == 1 and "000001.safetensors" in said[0] and reason in said[0]
    calls.clear()
    assert np.array_equal(values(table(tmp_path)), values(whole)) and calls == []


def test_a_cache_that_cannot_be_written_is_said_before_any_forward(tmp_path, monkeypatch, calls):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="(?s)file/scores/.* cannot be written: .*Set TRL_CPO_CACHE to a folder"):
        trainer_of(tmp_path)
    assert calls == []


# ---- without a trace


def test_scoring_moves_no_random_state_and_no_mode(tmp_path, cache, monkeypatch, model_folder):
    """The order of the training examples, `==`: without a table, with a new one, with one that is found."""
    orders, losses = [], []
    for options in ({"precompute_ref_log_probs": False}, {}, {}):
        trainer = trainer_of(tmp_path, model=model_folder, **options)
        seen, compute = [], trainer.compute_loss

        def recorded(model, inputs, *args, compute=compute, seen=seen, **kwargs):
            seen.append(inputs["input_ids"].tolist())
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = recorded
        trainer.train()
        orders.append(seen)
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(orders[0]) == 3 and orders[0] == orders[1] == orders[2]
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-5)

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]

    compute = CPOConstrainedTrainer.compute_ref_log_probs

    def drawing(self, model, inputs):
        torch.rand(1), random.random(), np.random.rand()
        assert not any(module.training for module in model.modules())
        return compute(self, model, inputs)

    trainer = trainer_of(tmp_path, model=model_folder, precompute_ref_log_probs=False)
    trainer.model.train()
    trainer.model.lm_head.eval()
    modes = [module.training for module in trainer.model.modules()]
    monkeypatch.setattr(CPOConstrainedTrainer, "compute_ref_log_probs", drawing)
    before = states()
    dataset = trainer.train_dataset.select(range(3))
    trainer.reference_tables.table(trainer, dataset, "some", 2, packed=False, as_dpo_trainer=False)
    assert states() == before and [module.training for module in trainer.model.modules()] == modes


def test_live_dropout_is_not_in_the_table(tmp_path, cache):
    """A policy handed over in training mode, dropout on: DPOTrainer's precomputed values are then draws."""
    model = make_model(attention_dropout=0.5)
    model.train()
    dropped = table(tmp_path, model=model, disable_dropout=False, constraint="none")
    assert np.array_equal(values(dropped)[:2], values(table(tmp_path, constraint="none"))[:2])


def test_progress_is_shown_unless_switched_off(tmp_path, cache, capsys, monkeypatch):
    """Pairs in all and those that were there already; by the main process (scoring.fill) alone."""
    whole = table(tmp_path, disable_tqdm=False)
    assert f"{PAIRS}/{PAIRS}" in capsys.readouterr().err
    (whole.folder / "000001.safetensors").unlink()
    table(tmp_path, disable_tqdm=False)
    shown = capsys.readouterr().err
    assert f"{PAIRS - SHARD}/{PAIRS}" in shown and "pair/s" in shown and "Reference log probs, train dataset" in shown
    (whole.folder / "000001.safetensors").unlink()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    table(tmp_path, disable_tqdm=False)
    assert "Reference log probs" not in capsys.readouterr().err


# ---- killed, continued, shared


def launch(kind: str, folder: Path, runs: list[dict]) -> subprocess.CompletedProcess:
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(PAIRS)))
    job = dict(kind=kind, folder=str(folder), data=str(data), shard_pairs=SHARD, runs=runs)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")},
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    command = [*launcher(kind, folder), str(SCRIPT), json.dumps(job)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def ranks(folder: Path, number: int) -> list[dict]:
    return [
        {"logps": np.load(folder / f"{number}-{rank}.npy"), **json.loads((folder / f"{number}-{rank}.json").read_text())}
        for rank in range(2)
    ]


def test_two_processes_are_one_and_a_killed_run_is_continued(tmp_path, cache, calls, model_folder):
    """Killed with SIGKILL in the middle of writing the second shard, continued by one process: equal, to the bit."""
    whole = table(tmp_path, model=model_folder)
    assert len(calls) == 6
    runs = [
        {"model": model_folder, "cache": str(tmp_path / "two")},
        {"model": model_folder, "cache": str(tmp_path / "killed"), "dies_writing": 1},
    ]
    done = launch("ddp", tmp_path, runs)
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "1-0.json").exists()
    two = ranks(tmp_path, 0)
    for seen in two:
        assert seen["processes"] == 2 and seen["calls"] == 3 and seen["table"] == whole.folder.name
        assert np.array_equal(seen["logps"], values(whole)[:2])
    killed = tmp_path / "killed" / "scores" / whole.folder.name
    assert shards(killed) == ["000000.safetensors"] and len(list(killed.glob(".*.tmp"))) == 1
    os.environ["TRL_CPO_CACHE"] = str(tmp_path / "killed")
    calls.clear()
    continued = table(tmp_path, model=model_folder)
    assert calls == [4, 4, 4, 2]
    assert np.array_equal(values(continued), values(whole)) and continued.folder == killed


@pytest.mark.slow(24)
def test_sharded_weights_that_change_at_the_same_path_are_seen(tmp_path, cache, model_folder, ref_model_folder):
    """ZeRO-3: each process holds parts, of which there is nothing to see before they are gathered."""
    same = str(tmp_path / "zero")
    place, folders = str(tmp_path / "model"), (model_folder, ref_model_folder, model_folder)
    done = launch("zero3", tmp_path, [{"model": place, "weights": weights, "cache": same} for weights in folders])
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, third = (ranks(tmp_path, number) for number in range(3))
    for rank in range(2):
        assert first[rank]["partitioned"] > 0 and first[rank]["processes"] == 2
        assert first[rank]["calls"] == second[rank]["calls"] == 3 and third[rank]["calls"] == 0
        assert first[rank]["table"] == third[rank]["table"] != second[rank]["table"]
        for seen, folder in zip((first, second, third), folders, strict=True):
            expected = values(table(tmp_path, model=folder))[:2]
            np.testing.assert_allclose(seen[rank]["logps"], expected, atol=1e-4)


def test_two_runs_at_once_do_no_harm(tmp_path):
    """A shard written over and over is whole whenever it is read."""
    store = ScoreStore(tmp_path / "table", [np.arange(50)])
    columns = {name: np.arange(50).astype(dtype) for name, dtype in COLUMNS.items()}
    store.open({"some": "manifest"})
    store.write(0, columns)
    stop, faults = threading.Event(), []

    def write():
        while not stop.is_set():
            try:
                ScoreStore(store.folder, store.shards).open({"some": "manifest"})
                store.write(0, columns)
            except Exception as error:
                faults.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for _ in range(100):
        found = store.read(0)
        assert found is not None and all(np.array_equal(found[name], columns[name]) for name in COLUMNS)
    stop.set()
    for writer in writers:
        writer.join()
    assert not faults and not list(store.folder.glob(".*.tmp"))


def test_leftovers_of_killed_runs_are_removed_once_nobody_can_own_them(tmp_path):
    store = ScoreStore(tmp_path, [np.arange(2)])
    old, new = tmp_path / ".000000.safetensors.1-aa.tmp", tmp_path / ".000000.safetensors.2-bb.tmp"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (1, 1))
    store.open({})
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, step):
    """Written elsewhere, synced, renamed: each step is taken, and until the last one nothing has changed."""
    store = ScoreStore(tmp_path, [np.arange(2)])
    columns = {name: np.arange(2).astype(dtype) for name, dtype in COLUMNS.items()}
    store.write(0, columns)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        store.write(0, {name: column + 1 for name, column in columns.items()})
    monkeypatch.undo()
    assert all(np.array_equal(store.read(0)[name], columns[name]) for name in COLUMNS)
    assert [file.name for file in tmp_path.iterdir()] == ["000000.safetensors"]


# ---- the parts


@settings(max_examples=200, deadline=None)
@given(pairs=st.integers(1, 60), batch=st.integers(1, 9), processes=st.integers(1, 5))
def test_batches_are_those_that_accelerate_deals(pairs, batch, processes):
    ours = Layout.as_dpo_trainer(pairs, batch, processes)
    batches = [b for shard in range(len(ours.shards)) for b in ours.batches(shard)]
    theirs = BatchSampler(SequentialSampler(range(pairs)), batch, drop_last=False)
    if processes > 1:
        dealt = [list(BatchSamplerShard(theirs, processes, rank)) for rank in range(processes)]
        theirs = [dealt[n % processes][n // processes] for n in range(len(batches))]
    assert [list(b.rows) for b in batches] == list(theirs)
    assert [row for b in batches for row in b.rows[: b.counted]] == list(range(pairs))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=300), size=st.integers(1, 9))
def test_by_length_every_row_is_in_one_batch_and_shards_do_not_depend_on_the_batch(lengths, size):
    ours = Layout.by_length(lengths, size)
    rows = [row for shard in range(len(ours.shards)) for b in ours.batches(shard) for row in b.rows]
    assert sorted(rows) == list(range(len(lengths))) and len(rows) == ours.pairs
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    other = Layout.by_length(lengths, size + 1)
    assert all(np.array_equal(a, b) for a, b in zip(ours.shards, other.shards, strict=True)) and ours.order == other.order


def test_the_digest_of_weights_sees_every_byte_name_type_and_shape():
    base = make_model()
    digests = {weights_digest(base)}
    for weight in base.parameters():
        with torch.no_grad():
            flat = weight.reshape(-1).view(torch.int32)
            flat[-1] ^= 1
            digests.add(weights_digest(base))
            flat[-1] ^= 1
    base.model.rotary_emb.inv_freq[-1] *= 2
    digests.add(weights_digest(base))
    base.model.rotary_emb.inv_freq[-1] /= 2
    assert len(digests) == 2 + len(list(base.named_parameters()))
    assert weights_digest(base) == weights_digest(make_model()) and weights_digest(base) in digests

    def one(value):
        module = torch.nn.Module()
        module.register_buffer("value", value)
        return weights_digest(module)

    zeros = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(8, dtype=torch.bfloat16),
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(16, dtype=torch.bool),
    ]
    assert len({one(value) for value in zeros}) == len(zeros)
    assert one(torch.arange(6.0).reshape(2, 3).T) == one(torch.arange(6.0).reshape(2, 3).T.contiguous())


def test_the_digest_of_weights_reads_past_the_first_piece(monkeypatch):
    from trl_cpo.engine.reference import digests

    value = torch.arange(1000.0)
    module = torch.nn.Module()
    module.register_buffer("value", value)
    whole = weights_digest(module)
    monkeypatch.setattr(digests, "_CHUNK", 64)
    assert weights_digest(module) == whole
    value[-1] += 1
    assert weights_digest(module) != whole


def test_an_adapter_that_is_off_does_not_count_and_one_that_is_on_does():
    plain = weights_digest(make_model())
    adapted = get_peft_model(make_model(), make_lora(modules_to_save=["norm"]))
    assert weights_digest(adapted, ("default",)) == plain
    assert weights_digest(adapted, ("default",), keep="default") != plain
    with torch.no_grad():
        adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight[0, 0] += 1
    assert weights_digest(adapted, ("default",)) != plain


@pytest.mark.parametrize("name", ["model", "layers", "weight", "lora_A", "base_layer"])
def test_an_adapter_may_be_called_what_a_part_of_the_model_is(name):
    plain, settings = weights_digest(make_model()), {"modules_to_save": ["norm"], "use_dora": True}
    adapted = get_peft_model(make_model(), make_lora(**settings), adapter_name=name)
    assert weights_digest(adapted, (name,)) == plain
    assert weights_digest(adapted, (name,), keep=name) != plain
    with torch.no_grad():
        adapted.base_model.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert weights_digest(adapted, (name,)) != plain


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        VeraConfig(target_modules=["q_proj"], r=4),
        LoHaConfig(target_modules=["q_proj"], r=4),
        LoraConfig(target_modules=["embed_tokens", "q_proj"], r=4),
        LoraConfig(target_modules=["q_proj"], r=4, trainable_token_indices=[3, 5]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_name_of_an_adapter_changes_no_digest(config):
    """Its own weights, drawn anew each time, do not count, and the model's all do."""

    def adapted(name):
        return get_peft_model(make_model(tie_word_embeddings=False), config, adapter_name=name)

    model = adapted("model")
    whole = weights_digest(model, ("model",))
    assert whole == weights_digest(adapted("another"), ("another",))
    with torch.no_grad():
        model.get_base_model().lm_head.weight[0, 0] += 1
    assert weights_digest(model, ("model",)) != whole


def test_the_digest_of_quantised_weights_sees_their_scales():
    """Twice the weights are the same 4-bit codes with twice the scales."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(factor):
        torch.manual_seed(0)
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(torch.randn(64, 64) * factor, requires_grad=False, quant_type="nf4")
        return torch.nn.Sequential(layer.to("cpu"))

    one, two = quantised(1.0), quantised(2.0)
    assert torch.equal(one[0].weight.data, two[0].weight.data)
    assert weights_digest(one) == weights_digest(quantised(1.0)) != weights_digest(two)


def test_the_digest_of_tokens_sees_ids_and_where_rows_and_columns_end():
    def digest(a, b):
        return tokens_digest(Dataset.from_dict({"a": a, "b": b}), ("a", "b"))[0]

    base = digest([[1, 2], [3]], [[4], [5]])
    others = [
        ([[1], [2, 3]], [[4], [5]]),
        ([[1, 2], [4]], [[3], [5]]),
        ([[3], [1, 2]], [[4], [5]]),
        ([[1, 2, 3]], [[4, 5]]),
        ([[1, 2], [3]], [[4], [6]]),
    ]
    assert len({base, *(digest(*other) for other in others)}) == 6
    rows = Dataset.from_dict({"a": [[9], [1, 2], [3]], "b": [[9], [4], [5]], "c": ["x", "y", "z"]})
    found, lengths = tokens_digest(rows.select([1, 2]), ("a", "b"))
    assert found == base and lengths["a"].tolist() == [2, 1] and lengths["b"].tolist() == [1, 1]


def test_a_digest_of_a_dict_does_not_depend_on_order():
    assert text_digest({"a": 1, "b": {"y", "x"}}) == text_digest({"b": {"x", "y"}, "a": 1}) != text_digest({"a": 1, "b": {"x"}})


def test_models_are_loaded_alike(model_folder):
    assert weights_digest(AutoModelForCausalLM.from_pretrained(model_folder)) == weights_digest(make_model())
