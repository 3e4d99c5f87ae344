"""The cases of the benchmark: each is a function from a setting to a record; `cases` lists them by name."""

import functools
import time

import torch
from transformers import TrainerCallback

from .arms import (
    Setting,
    batches_of,
    reduced,
    reference_pass_of,
    release_step_of,
    step_of,
    trainer_of,
)
from .measure import compared, interleaved, peak_memory

#: The most tokens to which DPOTrainer can pad a batch of 8 in 24 GB, on a CPU, without gradient checkpointing.
PADDED_TOKENS = 4600


def _steps(setting: Setting, *arms: str):
    trainers = {arm: trainer_of(setting, arm) for arm in arms}
    batches = batches_of(trainers[arms[0]], setting)
    return trainers, {arm: step_of(trainer, setting) for arm, trainer in trainers.items()}, batches


def _work(setting: Setting, arm: str, loaded) -> None:
    """The work of `peak_memory`: runs the longest batch twice."""
    torch.set_num_threads(1)
    trainer = trainer_of(setting, "dpo" if arm == "release" else arm)
    batches = sorted(batches_of(trainer, setting), key=lambda batch: batch["input_ids"].numel())
    step = release_step_of(trainer) if arm == "release" else step_of(trainer, setting)
    loaded()
    for _ in range(2):
        step(batches[-1])


def _memory(setting: Setting, baseline: str, ours: str, wanted: bool) -> dict:
    """Memory peaks of two arms. Call it before timing, while this process holds no model."""
    if not wanted:
        return {}
    peaks = {arm: peak_memory(functools.partial(_work, setting, arm)) for arm in (baseline, ours)}
    ratio = peaks[ours] / peaks[baseline] if peaks[baseline] else float("nan")
    return {"baseline_mib": peaks[baseline], "ours_mib": peaks[ours], "memory_ratio": ratio}


def constraint_cost(setting: Setting, memory: bool) -> dict:
    """The cost of the constraint itself: ours padded, constraint on, against DPOTrainer."""
    peaks = _memory(setting, "dpo", "padded", memory)
    _, steps, batches = _steps(setting, "dpo", "padded")
    return {**compared(interleaved(steps, batches * 2), "dpo", "padded"), **peaks}


def packed(setting: Setting, memory: bool) -> dict:
    """Packed pairs with shared prefixes, forward and backward, against DPOTrainer."""
    peaks = _memory(setting, "dpo", "packed", memory)
    _, steps, batches = _steps(setting, "dpo", "packed")
    record = compared(interleaved(steps, batches), "dpo", "packed")
    return {**record, "pairs_per_s": setting.batch / record["ours_s"], **peaks}


def equal_lengths(setting: Setting, memory: bool) -> dict:
    """The gain from sharing alone (all lengths equal), against its limit (2p + 2a)/(p + 2a), the ratio of tokens."""
    prompt, answer = setting.made_up
    record = packed(setting, memory=False)
    record["limit"] = (2 * prompt + 2 * answer) / (prompt + 2 * answer)
    record["share_of_limit"] = record["ratio"] / record["limit"]
    return record


def reference_pass(setting: Setting, memory: bool) -> dict:
    """Our reference pass, used by precomputing and audit, against TRL's."""
    trainers = {arm: trainer_of(setting, arm) for arm in ("dpo", "packed")}
    batches = batches_of(trainers["dpo"], setting)
    return compared(
        interleaved({arm: reference_pass_of(trainer) for arm, trainer in trainers.items()}, batches), "dpo", "packed"
    )


def release(setting: Setting, memory: bool) -> dict:
    """Ours against a stand-in for the release: full-vocabulary logits and an extra cross-entropy (`release_step_of`)."""
    peaks = _memory(setting, "release", "packed", memory)
    trainers = {"release": trainer_of(setting, "dpo"), "packed": trainer_of(setting, "packed")}
    batches = batches_of(trainers["release"], setting)
    steps = {"release": release_step_of(trainers["release"]), "packed": step_of(trainers["packed"], setting)}
    return {**compared(interleaved(steps, batches), "release", "packed"), **peaks}


def growth(setting: Setting, memory: bool, sizes=(100, 1000, 10000)) -> dict:
    """Seconds per pair to prepare and train 10² to 10⁴ pairs in one epoch, with all batches.

    The first step, with the checks and the probe before it, has a fixed cost and is reported separately.
    """
    per_pair = {}
    for size in (sizes[0], *sizes):  # run the first size twice: once as a warm-up
        start = time.perf_counter()
        trainer = trainer_of(setting, "packed", count=size)
        prepared = time.perf_counter()
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 1
        first = FirstStep()
        trainer.add_callback(first)
        trainer.train()
        end = time.perf_counter()
        per_pair[size] = {
            "prepare_s": (prepared - start) / size,
            "train_s": (end - first.ended) / (size - setting.batch),
            "first_step_s": first.ended - prepared,
        }
    spread = max(v["train_s"] for v in per_pair.values()) / min(v["train_s"] for v in per_pair.values())
    return {"seconds_per_pair": per_pair, "largest_over_smallest": spread}


class FirstStep(TrainerCallback):
    """Records when the first training step ended."""

    ended = float("nan")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.ended = time.perf_counter()


def cases(model: str, pairs: str, batches: int, max_length: int = 512) -> dict:
    """The cases by name: (function, setting, target in words)."""
    base = Setting(model=model, pairs=pairs, batches=batches, max_length=max_length)
    # Gradient checkpointing, TRL's default, is on in one case. Without it, a padded batch of 8 × 512 needs
    # more than 20 GB on a CPU, as TRL's head scores every position over SmolLM2's vocabulary. So only those batches of 8
    # are used that fit; they have the least padding to save. Batches of 4 all fit into 24 GB.
    eight = reduced(base, padded_tokens=PADDED_TOKENS)
    # In batches of 16, every row is cut to fit: 32 rows of at most 143 tokens.
    sixteen = reduced(eight, batch=16, padded_tokens=None, max_length=min(max_length, PADDED_TOKENS // 32))
    table = {
        "constraint-cost": (constraint_cost, reduced(base, batch=2), "step time 1/1.01, memory 1.00"),
        "packed-lora-8": (packed, eight, "3.0× pairs/s, 0.6× memory"),
        "packed-full-8": (packed, reduced(eight, lora=False), "3.0× pairs/s, 0.6× memory"),
        "packed-lora-8-checkpointing": (packed, reduced(eight, checkpointing=True), "3.0× pairs/s, 0.6× memory"),
        "packed-lora-4": (packed, reduced(base, batch=4), "reported"),
        "packed-full-4": (packed, reduced(base, batch=4, lora=False), "reported"),
        "packed-lora-2": (packed, reduced(base, batch=2), "reported"),
        "packed-lora-16": (packed, sixteen, "reported"),
        "reference-pass-8": (reference_pass, base, "3× pairs/s"),
        "release-4": (release, reduced(base, batch=4), "4× pairs/s, 1/3 memory"),
        "growth": (growth, reduced(base, batch=8), "within 10 %"),
    }
    for made_up in ((4, 1), (1, 1), (1, 4)):
        setting = reduced(base, batch=2, made_up=made_up, precomputed=True)
        table[f"equal-{made_up[0]}to{made_up[1]}"] = (equal_lengths, setting, "90 % of the limit, never slower")
    return table
