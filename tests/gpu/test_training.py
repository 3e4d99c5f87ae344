"""The trainer on the device: TRL's to the bit where it promises that, itself again after a resume, and packed as padded."""

import logging

import pytest
import torch

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine.slow_steps import SlowSteps

from helpers import identity
from helpers.checkpoint_runs import assert_same_end, trainer_of
from helpers.on_gpu import LORA, ON_GPU, REHEARSAL, on_device, random_states, some
from helpers.tiny import make_lora, make_model, pairs_dataset

pytestmark = [*ON_GPU, pytest.mark.usefixtures("no_model_cards")]

EVERY_STEP = dict(eval_strategy="steps", eval_steps=1, eval_on_start=True)


@pytest.fixture
def build(tmp_path, model_folder, tokenizer):
    """Makes a trainer under a constraint."""

    def build(lora=False, model=None, **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        options = {"constraint": "clip", "gamma": 0.5, "narrate": False, "learning_rate": 1e-3, **options}
        return CPOConstrainedTrainer(
            model=model_folder if model is None else model,
            args=CPOConstrainedConfig(**on_device(folder, **options)),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(12),
            eval_dataset=pairs_dataset(6, seed=5),
            peft_config=make_lora() if lora else None,
        )

    return build


def attention_of(trainer) -> str | None:
    return trainer._sharing.verdict(trainer.model).attention


def trained(trainer):
    """Losses, an evaluation's numbers, and the weights that were trained."""
    trainer.train()
    losses = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return losses, trainer.evaluate(), weights


def same_weights(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "options",
    some([{}, {"bf16": False}, {"gradient_checkpointing": True}, {"precompute_ref_log_probs": True}]),
    ids=lambda options: "-".join(options) or "default",
)
@LORA
def test_without_a_constraint_it_is_dpotrainer_to_the_bit(tmp_path, plain, lora, options, deterministic):
    given = on_device(tmp_path, **options)
    given.pop("output_dir")
    identity.check(tmp_path, lambda: plain(peft_config=make_lora()) if lora else plain(), given)


@pytest.mark.parametrize("sharing", [True, False], ids=["packed", "padded"])
@LORA
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, tokenizer, small_model, lora, sharing, deterministic):
    options = on_device(tmp_path)
    options = {name: options[name] for name in ("use_cpu", "bf16")}
    options |= dict(constraint="lagrangian", epsilon=0.2, dual_lr=0.3, dual_max=5.0, prefix_sharing=sharing, lora=lora)
    alone = trainer_of(tmp_path / "alone", small_model, tokenizer, **options)
    alone.train()
    if sharing:
        assert attention_of(alone) == "varlen"
    resumed = trainer_of(tmp_path / "resumed", small_model, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "alone" / "checkpoint-2"))
    assert_same_end(resumed, alone)


@LORA
def test_measuring_the_price_changes_nothing(build, lora, deterministic):
    runs = []
    for price in (False, True):
        torch.manual_seed(0)
        options = dict(price=price, price_prompts=4, price_tokens=8, price_share=1.0, disable_dropout=False, **EVERY_STEP)
        trainer = build(lora=lora, **options)
        losses, _, weights = trained(trainer)
        runs.append((losses, weights, random_states()))
    assert torch.equal(runs[0][0], runs[1][0]) and same_weights(runs[0][1], runs[1][1])
    assert all(torch.equal(one, other) for one, other in zip(runs[0][2], runs[1][2], strict=True))
    kls = [log["eval_cpo/kl_general"] for log in trainer.state.log_history if "eval_cpo/kl_general" in log]
    assert len(kls) >= 4 and kls[-1] > kls[0]


@LORA
def test_packed_trains_as_padded_does(build, lora, record):
    """In float32 up to its rounding; under bfloat16 no farther from float32 than the padded path is, or little."""
    runs = {}
    for precision in (False, True):
        for sharing in (False, True):
            trainer = build(lora=lora, bf16=precision, prefix_sharing=sharing, max_steps=6)
            if sharing:
                assert attention_of(trainer) == ("varlen" if precision else "segments")
            runs[precision, sharing] = trained(trainer)
    truth = runs[False, False]
    losses = {key: float((run[0] - truth[0]).abs().mean()) for key, run in runs.items()}
    flat = {key: torch.cat([w.flatten().double() for w in run[2].values()]) for key, run in runs.items()}
    weights = {key: float((each - flat[False, False]).norm()) for key, each in flat.items()}
    named = {f"{'bf16' if half else 'float32'}, {'packed' if sharing else 'padded'}": (half, sharing) for half, sharing in runs}
    record(
        losses={name: losses[key] for name, key in named.items()},
        weights={name: weights[key] for name, key in named.items()},
        size=float(flat[False, False].norm()),
    )
    assert losses[False, True] < 2e-3 and weights[False, True] < 0.02 * float(flat[False, False].norm())
    assert losses[True, True] <= 3 * losses[True, False] + 5e-3
    assert weights[True, True] <= 2 * weights[True, False]
    assert truth[0][0] != truth[0][-1]
    for name, value in truth[1].items():
        if name.startswith("eval_cpo/"):
            assert runs[False, True][1][name] == pytest.approx(value, rel=5e-3, abs=5e-3), name


@pytest.mark.skipif(REHEARSAL, reason="transformers trains in float16 on a GPU alone")
def test_float16_is_trained_packed(build, record):
    """With its loss scaler; no micro-batch is given up, and the numbers are bfloat16's but for rounding."""
    half, brain = build(bf16=False, fp16=True), build()
    runs = [trained(trainer) for trainer in (half, brain)]
    assert attention_of(half) == "varlen"
    record(float16=runs[0][0].tolist(), bfloat16=runs[1][0].tolist())
    assert bool(runs[0][0].isfinite().all())
    torch.testing.assert_close(runs[0][0][0], runs[1][0][0], rtol=0.02, atol=0.05)


def test_the_log_says_which_attention_and_kernel(build, caplog, device):
    with caplog.at_level(logging.INFO, logger="trl_cpo"):
        half, full = build(), build(bf16=False)
    lines = [record.getMessage() for record in caplog.records if "prefix sharing" in record.getMessage()]
    assert attention_of(half) == "varlen" and attention_of(full) == "segments"
    assert "varlen attention: torch.nn.attention.varlen, bfloat16" in lines[0], lines
    assert any("segments attention: sdpa, float32" in line for line in lines), lines
    watched = any(isinstance(callback, SlowSteps) for callback in half.callback_handler.callbacks)
    assert watched == (device.type == "cuda")


@pytest.mark.parametrize("sharing", [True, False], ids=["packed", "padded"])
@LORA
def test_a_reference_that_was_scored_before_is_the_live_one(build, lora, sharing, record):
    live, precomputed = (
        trained(build(lora=lora, prefix_sharing=sharing, precompute_ref_log_probs=before)) for before in (False, True)
    )
    difference = float((live[0] - precomputed[0]).abs().max())
    gap = abs(live[1]["eval_cpo/ref_gap"] - precomputed[1]["eval_cpo/ref_gap"])
    record(losses=difference, ref_gap=gap)
    # Scored in other batches, so that rounding differs.
    assert difference < 0.1 and gap < 0.3


@pytest.mark.parametrize("reentrant", some([None, False, True]))
@LORA
def test_checkpointing_changes_nothing(build, lora, reentrant, deterministic):
    """`None` is what TRL sets."""
    chosen = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain = trained(build(lora=lora, prefix_sharing=True))
    trainer = build(lora=lora, prefix_sharing=True, gradient_checkpointing=True, **chosen)
    assert attention_of(trainer) == "varlen"
    checkpointed = trained(trainer)
    assert torch.equal(plain[0], checkpointed[0]) and same_weights(plain[2], checkpointed[2])


def test_evaluation_leaves_training_as_it_is(build, deterministic):
    """Packed evaluations between the steps, on the device."""
    without, with_it = trained(build()), trained(build(**EVERY_STEP))
    assert torch.equal(without[0], with_it[0]) and same_weights(without[2], with_it[2])
    assert without[1]["eval_loss"] == with_it[1]["eval_loss"]


def test_heads_of_128_are_trained_packed(build, record):
    """The size of most models' heads, grouped by four."""
    shape = dict(hidden_size=512, intermediate_size=512, num_attention_heads=4, num_key_value_heads=1, initializer_range=0.03)
    losses = []
    for sharing in (False, True):
        trainer = build(model=make_model(**shape), prefix_sharing=sharing, precompute_ref_log_probs=True)
        losses.append(trained(trainer)[0])
    assert attention_of(trainer) == "varlen"
    record(padded=losses[0].tolist(), packed=losses[1].tolist())
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)
