"""The check that a run starts at its reference, as DPO assumes."""

from typing import Any

import torch
from torch import Tensor

from ..pairs import PairLogps, completion_lengths

#: Allowed difference between two forwards of the same model on the same response, in nats per √token: in float32, and when
#: any part is computed in lower precision (bfloat16, float16, TF32, 4 or 8 bits).
FULL_PRECISION_TOLERANCE = 1e-3
HALF_PRECISION_TOLERANCE = 0.5


class StartCheck:
    """Checks once, on the first micro-batch of the first step, that policy and reference agree.

    Both log-probabilities are available there, so the check costs nothing. `exempt` says why the two may differ; None: they
    may not. Then a response of n tokens passes if `|s_θ − s_ref| ≤ c √n`, in nats.

    The tolerances c were chosen on SmolLM2-135M-Instruct with 12 pairs (answers of 17 to 60 tokens) on a CPU. Rounding: the
    same model's log-probabilities in padded batches of 4 differed from those in batches of 1 or 12, or packed, by at most
    the following, in nats per √n:

        1.1e-5 in float32; 1.2e-5 in 4 bits computing in float32, 0.023 in 4 bits computing in bfloat16;
        0.096 under bfloat16 autocast; 0.084 with bfloat16 weights.

    Changed weights: moving every weight at random by a fraction of its matrix's standard deviation gave, in float32, 4.7e-4
    (fraction 1e-5), 4.7e-3 (1e-4), 0.047 (1e-3) and 0.41 (1e-2). So the check detects changes of 1e-4 of the weights in
    float32, and of a few hundredths in half precision.
    """

    def __init__(self, exempt: str | None, half_precision: bool):
        self._due = exempt is None
        self._tolerance = HALF_PRECISION_TOLERANCE if half_precision else FULL_PRECISION_TOLERANCE

    @property
    def is_open(self) -> bool:
        """Whether `due` was not asked yet, and may say yes."""
        return self._due

    def due(self, step: int) -> bool:
        """Whether to check this batch, `step` optimizer steps into the run; True at most once."""
        due, self._due = self._due, False
        return due and step == 0

    def deviation(self, pairs: PairLogps, completion_mask: Tensor, reduction: str) -> Tensor:
        """Difference of policy and reference in units of the tolerance, (B,), for each pair's worse answer; ≤ 1 is rounding."""
        policy, reference = pairs.rows().chunk(2, dim=1)
        lengths = torch.stack(completion_lengths(completion_mask).chunk(2), dim=1)
        scale = lengths.sqrt() if reduction == "mean" else lengths.rsqrt()  # a mean times n, over √n
        return ((policy - reference).abs() * scale).amax(dim=1) / self._tolerance

    def message(self, deviation: Tensor, causes: list[str]) -> str:
        """The error message for a policy that is not its reference, from the `deviation` of all processes."""
        worst = deviation.max().item() * self._tolerance
        return (
            f"The policy does not start at its reference: {int((deviation > 1).sum())} of the {len(deviation)} pairs of the "
            f"first micro-batch have different log-probabilities under the two, by up to {worst:.3g} nats per √token; rounding "
            f"explains at most {self._tolerance:g}. Training has not begun. Likely causes:\n"
            + "".join(f"- {cause}\n" for cause in causes)
            + "If policy and reference are meant to differ, pass the reference as ref_model, or set check_reference=False."
        )


def exemption(*, wanted: bool, reference_given: bool, reads_reference: bool, adapter: Any) -> str | None:
    """Why a run may start away from its reference; None if it must not. `adapter`: a new adapter's PEFT config, or None."""
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
    """Causes for policy and reference to differ at the start, the likeliest first."""
    causes = []
    if precomputed:
        causes.append(
            "the precomputed ref_chosen_logps and ref_rejected_logps are stale, or come from another model, tokenizer or chat "
            "template: drop these columns and the cache, and compute them again."
        )
    start = getattr(adapter, "init_lora_weights", True)
    if isinstance(start, str) and start != "gaussian":
        causes.append(
            f"init_lora_weights={start!r} changes the base model, and the reference is the base model without the adapter: "
            "use the default init_lora_weights, or pass ref_model."
        )
    elif is_peft:
        causes.append(
            "the adapter does not start at zero, or the adapter 'ref' (the reference of a PeftModel) is not a copy of the "
            "trained one: pass the model without an adapter and a peft_config, or the PeftModel as loaded."
        )
    elif not precomputed:
        causes.append(
            f"the model object differs from {source!r}, from which the reference is loaded: save the model and pass its "
            "folder, or pass a copy as ref_model."
        )
    causes.append("the weights changed between creating the trainer and train(): create the trainer last.")
    return causes


def drift_message(names: list[str]) -> str:
    """The refusal of parameters that are trained and belong to the reference as well."""
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return (
        f"The reference would change in training: {len(names)} trained parameters lie outside the adapter ({shown}), and the "
        "reference is this model without its adapter. Score the reference once, before training, with "
        "precompute_ref_log_probs=True; or pass a copy of the model as ref_model; or train the adapter alone: bias='none' in "
        "its config, and requires_grad_(False) for parameters that were unfrozen by hand (modules_to_save trains a copy of "
        "a module)."
    )
