"""What the numbers of a batch must be before they may move weights: finite, of two answers that differ, begun at the reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..pairs import PairLogps, completion_lengths

#: Nats per √token by which the same model's log-probability of the same response may differ between two forwards; in
#: float32, and where any part of it is computed in fewer digits (bfloat16, float16, TF32, 4 or 8 bits).
FULL_PRECISION_TOLERANCE = 1e-3
HALF_PRECISION_TOLERANCE = 0.5

#: Micro-batches in a row with numbers that are not finite after which a float16 run is stopped all the same: the loss
#: scaler mends an overflow of gradients within a few, and none of the forward.
FLOAT16_PATIENCE = 20


def comparable(input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Which pairs of a collated batch compare two answers: both have a scored token, and their tokens differ.

    Args:
        input_ids: (2B, T), rows [chosen; rejected], padded and truncated.
        completion_mask: (2B, T), 1 on completion tokens; a token in column 0 is never scored.

    Returns:
        (B,), bool; nothing waits for the device.
    """
    chosen_scored, rejected_scored = completion_mask[:, 1:].any(dim=1).chunk(2)
    # The padding token may be the one that ends an answer, so equal ids alone do not make equal answers.
    same_ids, same_mask = (torch.eq(*rows.chunk(2)).all(dim=1) for rows in (input_ids, completion_mask))
    return chosen_scored & rejected_scored & ~(same_ids & same_mask)


@dataclass(frozen=True)
class BatchCheck:
    """What a gathered batch holds, known on every process alike, for one wait for the device.

    Args:
        logps: (N, 4), as `PairLogps.rows` makes them, of all processes.
        comparable: (N,), bool, as `comparable` says.
        losses: (N,), the loss of each pair's micro-batch.
    """

    logps: Tensor
    comparable: Tensor
    losses: Tensor
    #: Whether every log-probability and every loss is finite; every log-probability of the reference; and whether
    #: `counted` holds of every pair.
    sound: bool
    reference_sound: bool
    all_counted: bool

    @classmethod
    def of(cls, logps: Tensor, comparable: Tensor, losses: Tensor) -> "BatchCheck":
        comparable = comparable.bool()
        finite = logps.isfinite()
        known = finite.all() & losses.isfinite().all(), finite[:, 2:].all(), (finite.all(dim=1) & comparable).all()
        return cls(logps, comparable, losses, *torch.stack(known).tolist())

    @property
    def finite(self) -> Tensor:
        """(N,), bool: pairs whose four log-probabilities are finite."""
        return self.logps.isfinite().all(dim=1)

    def counted(self, rows: Tensor) -> Tensor:
        """Of (N, ...) rows those of pairs that metrics and multiplier count: finite, and comparable."""
        return rows if self.all_counted else rows[self.finite & self.comparable]

    def left_out(self) -> dict[str, int]:
        """How many pairs `counted` leaves out, by reason; empty if none."""
        if self.all_counted:
            return {}
        counts = {
            "nonfinite_pairs": int((~self.finite).sum()),
            "incomparable_pairs": int((self.finite & ~self.comparable).sum()),
        }
        return {name: count for name, count in counts.items() if count}


def not_finite_message(check: BatchCheck, *, step: int, per_process: int, beginning: Callable[[int], str], rank: int) -> str:
    """The sentences for numbers that are not finite: which pairs and which model, what usually causes it, what to do.

    Args:
        check: of a batch that is not `sound`.
        step: the optimizer step it was for, from 1.
        per_process: pairs that each process brought to `check`.
        beginning: gives the text of pair i of this process's micro-batch.
        rank: this process.
    """
    bad = (~check.finite).nonzero().flatten().tolist()
    if not bad:
        return (
            f"The loss of step {step} is not finite ({check.losses[~check.losses.isfinite()][0].item()}), though every "
            "log-probability is: the loss itself overflowed. Nothing of this step has reached the weights. Lower beta or "
            "the weight of the constraint, or use a loss_type that does not grow exponentially (discopop, forward_kl and "
            "alpha_divergence do)."
        )
    lines = []
    for index in bad[:5]:
        policy, reference = (part.isfinite().all().item() for part in check.logps[index].chunk(2))
        whose = "the policy's" if reference else "the reference's" if policy else "the policy's and the reference's"
        process, position = divmod(index, per_process)
        text = f", {beginning(position)!r}" if process == rank else ""
        lines.append(f"pair {position} of the micro-batch of process {process} ({whose}{text})")
    more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
    if check.reference_sound:
        remedy = (
            "Nothing of this step has reached the weights, but a step before may have broken them: a learning rate that is "
            "too high and an overflow in float16 are the usual causes. Resume from the last checkpoint with a lower "
            "learning_rate or with bf16, and look at the pairs named if it is always these."
        )
    else:
        remedy = (
            "The reference never changes, so these pairs can never be trained on: its weights may hold NaN, its precision "
            "may overflow (float16), or a token may be impossible under it. Load it in bfloat16 or float32, or take these "
            "pairs out of the dataset."
        )
    return f"Step {step}: log-probabilities that are NaN or infinite: {'; '.join(lines)}{more}. {remedy}"


def texts(input_ids: Tensor, attention_mask: Tensor | None, decode: Callable[[Any], str], length: int = 80) -> Callable:
    """What gives the beginning of the text of pair i of a collated batch, as its chosen row has it."""

    def beginning(pair: int) -> str:
        ids = input_ids[pair]
        if attention_mask is not None:
            ids = ids[attention_mask[pair].bool()]
        text = decode(ids[:length].tolist())
        return text[:length] + ("…" if len(text) > length else "")

    return beginning


class StartCheck:
    """Whether a run starts at its reference, as DPO's does: looked at once, on the first micro-batch of the first step.

    There the log-probabilities of both are at hand, so looking costs nothing. `excused` says why the two may differ;
    None: they may not.

    Where they may not, a response of n tokens passes with `|s_θ − s_ref| ≤ c √n`, in nats. On SmolLM2-135M-Instruct, 12
    pairs with answers of 17 to 60 tokens, on a CPU, one model's log-probabilities in padded batches of 4 differed from those
    in batches of 1 or 12, or packed, by at most this many nats per √n: 1.1e-5 in float32, 1.2e-5 in 4 bits computing in
    float32 and 0.023 in bfloat16, 0.096 under bfloat16 autocast, 0.084 with bfloat16 weights. Every weight moved at random
    by a part of its matrix's standard deviation came to 4.7e-4 (1e-5 of it), 4.7e-3 (1e-4), 0.047 (1e-3) and 0.41 (1e-2) in
    float32: so c sees a change of 1e-4 of the weights in float32, and of a few hundredths in half precision.
    """

    def __init__(self, excused: str | None, half_precision: bool):
        self._due = excused is None
        self._tolerance = HALF_PRECISION_TOLERANCE if half_precision else FULL_PRECISION_TOLERANCE

    def due(self, step: int) -> bool:
        """Whether this is the batch to look at, `step` optimizer steps into the run. True at most once."""
        due, self._due = self._due, False
        return due and step == 0

    def apart(self, pairs: PairLogps, completion_mask: Tensor, reduction: str) -> Tensor:
        """By how many tolerances policy and reference differ, (B,), the worse answer of each pair; up to 1 is rounding."""
        policy, reference = pairs.rows().chunk(2, dim=1)
        lengths = torch.stack(completion_lengths(completion_mask).chunk(2), dim=1)
        scale = lengths.sqrt() if reduction == "mean" else lengths.rsqrt()  # a mean times n, over √n
        return ((policy - reference).abs() * scale).amax(dim=1) / self._tolerance

    def message(self, apart: Tensor, causes: list[str]) -> str:
        """The sentences for a start that is not the reference, from what `apart` gave, of all processes."""
        worst = apart.max().item() * self._tolerance
        return (
            f"The policy does not start at its reference: {int((apart > 1).sum())} of the {len(apart)} pairs of the first "
            f"micro-batch have other log-probabilities under the one than under the other, by up to {worst:.3g} nats "
            f"per √token, where rounding makes at most {self._tolerance:g}. Training has not begun. Usual causes here:\n"
            + "".join(f"- {cause}\n" for cause in causes)
            + "If policy and reference are meant to differ, pass the reference as ref_model, or set check_reference=False."
        )


def excuse(*, wanted: bool, reference_given: bool, reads_reference: bool, adapter: Any) -> str | None:
    """Why a run need not start at its reference; None if it must. `adapter` is the PEFT config of a new adapter, or None."""
    if not wanted:
        return "check_reference=False"
    if reference_given:
        return "ref_model was given"
    if not reads_reference:
        return "the loss reads no reference"
    if getattr(adapter, "is_prompt_learning", False):
        return "prompt learning starts away from the model without its adapter, which is the reference"
    if getattr(adapter, "init_lora_weights", True) is False:
        return "init_lora_weights=False starts the adapter away from the model without it, which is the reference"
    return None


def causes_of_another_start(*, precomputed: bool, adapter: Any, is_peft: bool, source: str) -> list[str]:
    """What can make policy and reference differ at the start, likeliest first, one sentence or two each."""
    causes = []
    if precomputed:
        causes.append(
            "the precomputed ref_chosen_logps and ref_rejected_logps are stale or another model's, tokenizer's or chat "
            "template's: drop these columns and the cache, and compute them again."
        )
    start = getattr(adapter, "init_lora_weights", True)
    if isinstance(start, str) and start != "gaussian":
        causes.append(
            f"init_lora_weights={start!r} changes the model under the adapter, and the reference is that model without "
            "the adapter: use the default start, or pass ref_model."
        )
    elif is_peft:
        causes.append(
            "the adapter does not start at zero, or the adapter 'ref', which is the reference of a PeftModel, is not a copy "
            "of the one trained: pass the model without an adapter and a peft_config, or the PeftModel as it was loaded."
        )
    elif not precomputed:
        causes.append(
            f"the model object is no longer what {source!r} holds, and the reference is loaded from there: save the model, "
            "and pass the folder's name, or pass a copy as ref_model."
        )
    causes.append("weights changed between making the trainer and train(): make the trainer last.")
    return causes


class FiniteWeights(TrainerCallback):
    """Stops a run before weights that are NaN or infinite are saved, or are given out as its result.

    Log-probabilities are looked at in every batch; weights that the last gradient broke have not been through one yet.

    Args:
        gather: gives a (1,) tensor of every process, concatenated, so that all stop together.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor], device: torch.device):
        self._gather = gather
        self._device = device

    def before_saving(self, model: torch.nn.Module, step: int) -> None:
        """Called by every process just before a checkpoint is written, whatever asked for it."""
        self._look(model, step, "Nothing was saved; resume from the checkpoint before it")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._look(model, state.global_step, "Resume from the last checkpoint")

    def _look(self, model, step: int, remedy: str) -> None:
        broken = torch.zeros(1, device=self._device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                # What this process holds of it: a ZeRO-3 partition, an FSDP shard, or all.
                held = getattr(parameter, "ds_tensor", parameter).detach()
                held = held.to_local() if hasattr(held, "to_local") else held
                broken += (~held.isfinite()).any().to(self._device)
        if self._gather(broken).any():
            raise FloatingPointError(
                f"After step {step} trained weights are NaN or infinite: its gradient was. {remedy}, with a lower learning_rate, "
                "or with bf16 in place of fp16."
            )


def is_patient(unsound_in_a_row: int, mixed_precision: str, check: BatchCheck) -> bool:
    """Whether numbers that are not finite are left to the loss scaler, which skips the step: float16, and not for long."""
    return mixed_precision == "fp16" and check.reference_sound and unsound_in_a_row < FLOAT16_PATIENCE
