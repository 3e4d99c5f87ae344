"""The cpo/* metrics: their formulas, and averages that weigh every pair the same over batches, steps and processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.config import DIRECTIONS
from trl_cpo.metrics import METRICS, MetricLedger, PairView, per_pair
from trl_cpo.pairs import PairLogps

from helpers.by_hand import make_trainer, pairs_by_hand
from helpers.paths import PROCESSES, ROOT
from helpers.tiny import make_model, pairs_dataset, training_options

# tests/data/test_validation.py tests the warnings about unused hyperparameters and about inverse_logp.
pytestmark = pytest.mark.filterwarnings("ignore:constraint=:UserWarning")


def by_hand(pairs, targets, gamma) -> dict[str, float]:
    """From (policy chosen, policy rejected, ref chosen, ref rejected) tuples; a second statement of the table."""
    n = len(pairs)
    gaps = [(pc - pr, rc - rr) for pc, pr, rc, rr in pairs]
    return {
        "cpo/gap": sum(g for g, _ in gaps) / n,
        "cpo/ref_gap": sum(r for _, r in gaps) / n,
        "cpo/target": sum(targets) / n,
        "cpo/prefers_chosen": sum(g > 0 for g, _ in gaps) / n,
        "cpo/beats_reference": sum(g > r for g, r in gaps) / n,
        "cpo/in_undesirable_region": sum(g < 0 and g > r for g, r in gaps) / n,
        "cpo/violation": sum(max(0.0, gamma - g) for g, _ in gaps) / n,
        "cpo/violation_rate": sum(g < gamma for g, _ in gaps) / n,
        "cpo/reference_misaligned": sum(r < 0 for _, r in gaps) / n,
        "cpo/escaped": sum(r < 0 and g > 0 for g, r in gaps) / n,
        "cpo/chosen_logps_shift": sum(pc - rc for pc, _, rc, _ in pairs) / n,
        "cpo/rejected_logps_shift": sum(pr - rr for _, pr, _, rr in pairs) / n,
    }


number = st.floats(-100, 0, width=32)


@settings(max_examples=200, deadline=None)
@given(
    batches=st.lists(st.lists(st.tuples(number, number, number, number), min_size=1, max_size=5), min_size=1, max_size=4),
    gamma=st.floats(0, 10, width=32),
)
@example(
    batches=[[(0.0, -18.0, -15.000000953674316, -33.0)]], gamma=0.0
)  # in float32 the gaps are equal, and in float64 they are not
def test_formulas_and_averages_over_uneven_batches(batches, gamma):
    """In float64, as by hand: which of two gaps is larger is then the same in both, however near they are."""
    ledger = MetricLedger()
    for batch in batches:
        pairs = PairLogps(*[torch.tensor(column, dtype=torch.float64) for column in zip(*batch, strict=True)])
        ledger.add(per_pair(PairView(pairs, torch.clamp(pairs.ref_gap, min=gamma), gamma)))
    flat = [pair for batch in batches for pair in batch]
    expected = by_hand(flat, [max(rc - rr, gamma) for _, _, rc, rr in flat], gamma)
    got = ledger.flush()
    assert got.keys() == expected.keys()
    for key in expected:
        assert got[key] == pytest.approx(expected[key], abs=1e-4), key
    assert ledger.flush() == {}


def test_the_region_and_its_edges():
    """U is open: δ_θ = 0 and δ_θ = δ_ref lie outside."""
    policy, ref = torch.tensor([-1.0, 0.0, -3.0, -2.0, 1.0]), torch.tensor([-2.0, -2.0, -2.0, -2.0, -2.0])
    zero = torch.zeros(5)
    rows = per_pair(PairView(PairLogps(policy, zero, ref, zero), ref, 0.0))
    column = list(METRICS).index("in_undesirable_region")
    assert rows[:, column].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_evaluation_is_the_mean_over_pairs(tmp_path, tokenizer, model_folder, ref_model_folder, reduction):
    """6 pairs in batches of 4: the last batch is smaller, and each pair still counts once."""
    trainer = make_trainer(
        tmp_path, tokenizer, model_folder, ref_model_folder, constraint="clip", logps_reduction=reduction, gamma=1.0
    )
    got = trainer.evaluate()
    pairs = []
    for batch in trainer.get_eval_dataloader():
        pairs += pairs_by_hand(trainer, batch)
    assert len(pairs) == got["eval_cpo/pairs"] == 6
    expected = by_hand(pairs, [max(rc - rr, 1.0) for _, _, rc, rr in pairs], 1.0)
    for key, value in expected.items():
        assert got[f"eval_{key}"] == pytest.approx(value, abs=1e-4), key
    assert any(f"eval_{key}" in record for key in expected for record in trainer.state.log_history)


def test_accumulation_averages_over_all_micro_batches(tmp_path, tokenizer, model_folder, ref_model_folder):
    logs, names = [], {*(f"cpo/{name}" for name in METRICS), "cpo/pairs"}
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            tmp_path / str(size),
            tokenizer,
            model_folder,
            ref_model_folder,
            constraint="softplus",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=0.0,
        )
        trainer.train()
        logs.append([{k: v for k, v in r.items() if k.startswith("cpo/")} for r in trainer.state.log_history])
        assert len(logs[-1]) == 4 and all(record.keys() == names for record in logs[-1][:3])
        assert logs[-1][3] == {}, "the summary at the end of training holds no step's metrics"
    for other in logs[1:]:
        for a, b in zip(logs[0][:3], other[:3], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_evaluation_in_the_middle_leaves_the_training_averages_alone(tmp_path, tokenizer, model_folder, ref_model_folder):
    runs = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            tmp_path / strategy,
            tokenizer,
            model_folder,
            ref_model_folder,
            constraint="clip",
            logging_steps=2,
            eval_strategy=strategy,
            eval_steps=1,
            max_steps=4,
        )
        trainer.train()
        runs.append([r for r in trainer.state.log_history if "cpo/gap" in r])
    pick = [{k: v for k, v in r.items() if k.startswith("cpo/")} for r in runs[0]]
    assert len(pick) == 2
    assert pick == [{k: v for k, v in r.items() if k.startswith("cpo/")} for r in runs[1]]


def test_two_processes_log_what_one_does(tmp_path, model_folder, ref_model_folder):
    """Same global batches; 7 pairs to evaluate, so the last batch is filled up with repeats, which must not count."""
    script = PROCESSES / "train_for_metrics.py"
    results = []
    for processes, batch in ((1, 4), (2, 2)):
        out = tmp_path / f"{processes}.json"
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        arguments = [str(script), model_folder, ref_model_folder, str(batch), str(tmp_path / f"run{processes}"), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command + arguments, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(out.read_text()))
        printed = [Path(f"{out}.printed.{rank}").read_text() for rank in range(processes)]
        assert "[first log, step 1] " in printed[0] and "[end, step 3] " in printed[0]
        # DeepSpeed, where it is installed, says on every process that it found no accelerator.
        others = [line for text in printed[1:] for line in text.splitlines() if "real_accelerator.py" not in line]
        assert others == []
    one, two = results
    # Each pair once, in the order of the set, whichever process scored it.
    assert len(one["evaluated_pairs"]) == len(two["evaluated_pairs"]) == 7
    for a, b in zip(one["evaluated_pairs"], two["evaluated_pairs"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["train"]) == len(two["train"]) == 3
    for a, b in zip(one["train"] + [one["eval"]], two["train"] + [two["eval"]], strict=True):
        assert a.keys() == b.keys() and len(a) >= len(METRICS)
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_an_evaluation_starts_from_nothing(tmp_path, tokenizer, model_folder, ref_model_folder):
    """What an interrupted evaluation left, or a loss computed by hand, is not counted in the next one."""
    trainer = make_trainer(tmp_path, tokenizer, model_folder, ref_model_folder, constraint="clip")
    expected = trainer.evaluate()["eval_cpo/gap"]
    trainer.model.eval()
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert trainer.evaluate()["eval_cpo/gap"] == expected


def test_docs_table_is_the_table():
    """docs/metrics.md lists each metric with its formula, word for word."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    for name, (formula, _) in METRICS.items():
        assert f"| `cpo/{name}` | {formula} |" in text, name


def test_no_metric_is_lost_between_two_trainers(tmp_path, tokenizer):
    """Each trainer counts for itself."""
    trainers = [
        CPOConstrainedTrainer(
            model=make_model(),
            ref_model=make_model(1),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            args=CPOConstrainedConfig(**training_options(tmp_path / str(i))),
            eval_dataset=pairs_dataset(4, seed=i),
        )
        for i in range(2)
    ]
    first = trainers[0].evaluate()["eval_cpo/gap"]
    assert trainers[1].evaluate()["eval_cpo/gap"] != first
    assert trainers[0].evaluate()["eval_cpo/gap"] == first


# --- which checkpoint is best -----------------------------------------------------------------------------------------


def test_the_direction_of_every_metric_of_ours_is_known(tmp_path, tokenizer):
    args = CPOConstrainedConfig(
        **training_options(tmp_path, constraint="lagrangian", gamma=1.0, epsilon=0.1)
        | dict(price=True, price_prompts=2, price_tokens=4)
    )
    trainer = CPOConstrainedTrainer(
        make_model(),
        make_model(1),
        args=args,
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
        eval_dataset={"held_out": pairs_dataset(6)},
    )
    logged = {name.rpartition("cpo/")[2] for name in trainer.evaluate() if "cpo/" in name}
    assert logged <= DIRECTIONS.keys() and METRICS.keys() | {"kl", "kl_general", "chosen_nll"} <= logged
    assert {"incomparable_pairs", "nonfinite_pairs"} <= DIRECTIONS.keys()  # logged only where there are any


@pytest.mark.parametrize("prefix", ["", "eval_", "eval_held_out_"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_greater_is_better_follows_the_metric_and_the_opposite_is_warned_of(tmp_path, name, prefix):
    def config(**given):
        return CPOConstrainedConfig(**training_options(tmp_path, metric_for_best_model=f"{prefix}cpo/{name}", **given))

    def notes(args):
        return [note for note in args.cautions() if "metric_for_best_model" in note]

    better = DIRECTIONS[name]
    assert config().greater_is_better is (True if better is None else better)  # transformers' own default
    if better is None:
        assert "finds no best checkpoint" in notes(config())[0]
        return
    assert notes(config()) == [] and notes(config(greater_is_better=better)) == []
    (note,) = notes(config(greater_is_better=not better))
    assert f"Set greater_is_better={better}" in note


@pytest.mark.parametrize("metric, greater", [("eval_loss", False), ("eval_rewards/margins", True), (None, None)])
def test_other_metrics_keep_the_direction_that_transformers_gives_them(tmp_path, metric, greater):
    args = CPOConstrainedConfig(**training_options(tmp_path, metric_for_best_model=metric))
    assert args.greater_is_better is greater
    assert not [note for note in args.cautions() if "metric_for_best_model" in note]


def test_the_checkpoint_with_the_least_violation_is_kept(tmp_path, tokenizer):
    args = CPOConstrainedConfig(
        **training_options(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, constraint="clip", gamma=3.0)
        | dict(save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="cpo/violation")
    )
    trainer = CPOConstrainedTrainer(
        make_model(),
        make_model(1),
        args=args,
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
        eval_dataset=pairs_dataset(6),
    )
    trainer.train()
    seen = {log["step"]: log["eval_cpo/violation"] for log in trainer.state.log_history if "eval_cpo/violation" in log}
    assert len(set(seen.values())) == 4 and trainer.state.best_metric == min(seen.values())
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{min(seen, key=seen.get)}")


def test_the_trainer_warns_of_the_opposite(tmp_path, tokenizer):
    args = CPOConstrainedConfig(
        **training_options(tmp_path, metric_for_best_model="eval_cpo/violation", greater_is_better=True)
    )
    with pytest.warns(UserWarning, match="keeps the worst checkpoint: less of it is better"):
        CPOConstrainedTrainer(make_model(), make_model(1), args=args, processing_class=tokenizer, train_dataset=pairs_dataset())
