"""Whether a run starts at its reference, as DPO does."""

from typing import Any

import torch
from torch import Tensor

from ..pairs import PairLogps, completion_lengths

#: Nats per √token by which the same model's log-probability of the same response may differ between two forwards; in
#: float32, and where any part of it is computed in fewer digits (bfloat16, float16, TF32, 4 or 8 bits).
FULL_PRECISION_TOLERANCE = 1e-3
HALF_PRECISION_TOLERANCE = 0.5


class StartCheck:
    """Whether a run starts at its reference, as DPO's does: looked at once, on the first micro-batch of the first step.

    There the log-probabilities of both are at hand, so looking costs nothing. `exempt` says why the two may differ; None:
    they may not.

    Where they may not, a response of n tokens passes with `|s_θ − s_ref| ≤ c √n`, in nats. On SmolLM2-135M-Instruct, 12
    pairs with answers of 17 to 60 tokens, on a CPU, one model's log-probabilities in padded batches of 4 differed from those
    in batches of 1 or 12, or packed, by at most this many nats per √n: 1.1e-5 in float32, 1.2e-5 in 4 bits computing in
    float32 and 0.023 in bfloat16, 0.096 under bfloat16 autocast, 0.084 with bfloat16 weights. Every weight moved at random
    by a part of its matrix's standard deviation came to 4.7e-4 (1e-5 of it), 4.7e-3 (1e-4), 0.047 (1e-3) and 0.41 (1e-2) in
    float32: so c sees a change of 1e-4 of the weights in float32, and of a few hundredths in half precision.
    """

    def __init__(self, exempt: str | None, half_precision: bool):
        self._due = exempt is None
        self._tolerance = HALF_PRECISION_TOLERANCE if half_precision else FULL_PRECISION_TOLERANCE

    def due(self, step: int) -> bool:
        """Whether this is the batch to look at, `step` optimizer steps into the run. True at most once."""
        due, self._due = self._due, False
        return due and step == 0

    def deviation(self, pairs: PairLogps, completion_mask: Tensor, reduction: str) -> Tensor:
        """By how many tolerances policy and reference differ, (B,), the worse answer of each pair; up to 1 is rounding."""
        policy, reference = pairs.rows().chunk(2, dim=1)
        lengths = torch.stack(completion_lengths(completion_mask).chunk(2), dim=1)
        scale = lengths.sqrt() if reduction == "mean" else lengths.rsqrt()  # a mean times n, over √n
        return ((policy - reference).abs() * scale).amax(dim=1) / self._tolerance

    def message(self, deviation: Tensor, causes: list[str]) -> str:
        """The sentences for a start that is not the reference, from what `deviation` gave, of all processes."""
        worst = deviation.max().item() * self._tolerance
        return (
            f"The policy does not start at its reference: {int((deviation > 1).sum())} of the {len(deviation)} pairs of "
            f"the first micro-batch have other log-probabilities under the one than under the other, by up to {worst:.3g} nats "
            f"per √token, where rounding makes at most {self._tolerance:g}. Training has not begun. Usual causes here:\n"
            + "".join(f"- {cause}\n" for cause in causes)
            + "If policy and reference are meant to differ, pass the reference as ref_model, or set check_reference=False."
        )


def exemption(*, wanted: bool, reference_given: bool, reads_reference: bool, adapter: Any) -> str | None:
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


def likely_causes(*, precomputed: bool, adapter: Any, is_peft: bool, source: str) -> list[str]:
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
