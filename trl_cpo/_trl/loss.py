"""The loss seam: DPOTrainer's own loss, with the reference's gap moved to a target margin, observed from outside.

It relies on these internals of TRL's `compute_loss`, which the identity tests check (tests/test_identity.py):

- `compute_loss` calls its `model` argument once with `fused_lm_head=True` and reads per-token values from the output;
  `return_outputs=True` adds a second call afterwards.
- With `precompute_ref_logps` it takes the reference's log-probabilities from `inputs`, after the first call.
- `compute_ref_log_probs(model, inputs)` returns the numbers that it would otherwise compute itself.
- `_metrics[mode]` holds one number per logged name and call; `log` averages them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer
from trl import __version__ as trl_version

from ..pairs import PairLogps, completion_lengths, degenerate_pairs, sequence_logps
from .rewards import MovedRewards

#: What each of DPOTrainer's loss types depends on: the difference of summed log-ratios ("sum") or of their means per token
#: ("mean"), each side's log-ratio by itself ("one side"), or no reference at all ("no reference").
LOSS_READS = {
    "sigmoid": "sum",
    "hinge": "sum",
    "exo_pair": "sum",
    "robust": "sum",
    "discopop": "sum",
    "aot": "sum",
    "sigmoid_norm": "mean",
    "ipo": "mean",
    "sft": "no reference",
    "nca_pair": "one side",
    "bco_pair": "one side",
    "sppo_hard": "one side",
    "apo_zero": "one side",
    "apo_down": "one side",
    "aot_unpaired": "one side",
}

#: For a loss type over sums, the same loss over means per token.
MEAN_OF = {"sigmoid": "sigmoid_norm"}


@dataclass(frozen=True)
class ObservedLoss:
    """DPOTrainer's loss for a batch of B pairs, and the log-probabilities that it used.

    Attributes:
        loss: scalar, nats: the mean pair loss at the targets, plus the mean added loss.
        outputs: the model outputs under `return_outputs=True`; otherwise empty.
        pairs: log-probabilities, (B,) each; the policy's keep their graph.
        target: target margins t, (B,), nats.
        degenerate: (B,), bool: pairs whose answers cannot be compared.
        rewards: DPO's rewards, to be put in place of those just logged; None: the target was not moved.
    """

    loss: Tensor
    outputs: tuple
    pairs: PairLogps
    target: Tensor
    degenerate: Tensor
    rewards: MovedRewards | None = None


class _Observed:
    """Stands in for `model` in DPOTrainer's loss: sends the first call through `forward` and reports its output."""

    def __init__(self, model: Callable, forward: Callable, report: Callable[[Any], None]):
        self._model = model
        self._forward = forward
        self._report = report
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls > 1:
            return self._model(*args, **kwargs)
        outputs = self._forward(*args, **kwargs)
        self._report(outputs)
        return outputs

    def __getattr__(self, name: str):
        return getattr(self._model, name)


def observed_loss(
    trainer: DPOTrainer,
    compute_loss: Callable,
    model: Callable,
    inputs: dict[str, Tensor],
    *,
    forward: Callable,
    reduction: str = "sum",
    target_of: Callable[[PairLogps], Tensor] | None = None,
    added_loss: Callable[[PairLogps], Tensor | None] | None = None,
    return_outputs: bool = False,
    **kwargs,
) -> ObservedLoss:
    """DPOTrainer's own loss at a target margin, `mean_i ℓ(δ_i; t_i) + mean_i added_i`.

    DPO's loss at the target t equals DPO's loss against a reference whose gap is t. So the reference's rejected
    log-probability is lowered by `t − δ_ref` before the loss (times the response's length where the loss averages per
    token). The logged `rewards/*` are then of that reference, until DPO's are put in their place (`MovedRewards`). The
    forwards are those of DPOTrainer, in the same order. Degenerate pairs keep DPO's target and get nothing added.

    Args:
        trainer: the trainer that computes the loss.
        compute_loss: the bound `compute_loss` of TRL's DPOTrainer.
        model: the policy, wrapped as in the training loop.
        inputs: a collated batch; not modified.
        forward: called in place of `model` for the policy's log-probabilities; may be `model`.
        reduction: "sum" or "mean": how the returned log-probabilities are reduced over tokens.
        target_of: returns the target margins (B,) of a batch, in nats of `reduction`; None leaves DPO's loss untouched.
        added_loss: returns the term added to each pair's loss, (B,), or None.
        return_outputs: passed on, as are `kwargs`.

    Raises:
        RuntimeError: DPOTrainer did not call `model` exactly as expected.
    """
    inputs = dict(inputs)
    mask = inputs["completion_mask"]
    degenerate = degenerate_pairs(inputs["input_ids"], mask)
    chosen_lengths, rejected_lengths = completion_lengths(mask).chunk(2)
    seen: dict[str, Any] = {}

    def reduced(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        return (chosen / chosen_lengths, rejected / rejected_lengths) if reduction == "mean" else (chosen, rejected)

    def report(outputs) -> None:
        # DPOTrainer runs the reference after the policy's forward. With dropout on, another order would draw other random
        # numbers.
        if not precomputed:
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = _live_reference_logps(trainer, inputs)
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        policy = sequence_logps(outputs.log_probs, mask, trainer.ld_alpha).chunk(2)
        pairs = PairLogps(*reduced(*policy), *reduced(*reference))
        seen["pairs"], seen["target"] = pairs, pairs.ref_gap
        if target_of is None:
            return
        with torch.no_grad():
            seen["target"] = torch.where(degenerate, pairs.ref_gap, target_of(pairs.detach()))
            seen["log_ratios"] = torch.stack([policy[0] - reference[0], policy[1] - reference[1]], dim=1)
            shift = seen["target"] - pairs.ref_gap
            inputs["ref_rejected_logps"] = reference[1] - (shift * rejected_lengths if reduction == "mean" else shift)

    observed = _Observed(model, forward, report)
    precomputed = trainer.precompute_ref_logps
    trainer.precompute_ref_logps = True
    try:
        result = compute_loss(observed, inputs, return_outputs=return_outputs, **kwargs)
    finally:
        trainer.precompute_ref_logps = precomputed
    if observed.calls != 1 + bool(return_outputs):
        raise RuntimeError(
            f"DPOTrainer of TRL {trl_version} called the model {observed.calls} times in one loss; trl-cpo expects "
            f"{1 + bool(return_outputs)}. It cannot tell which log-probabilities the loss used. Please report this, with the "
            "TRL version."
        )
    rewards = MovedRewards.of(trainer, seen["log_ratios"]) if "log_ratios" in seen else None
    loss, *others = result if return_outputs else (result,)
    added = None if added_loss is None else added_loss(seen["pairs"])
    if added is not None:
        loss = loss + torch.where(degenerate, 0.0, added).mean()
    return ObservedLoss(loss, tuple(others), seen["pairs"], seen["target"], degenerate, rewards)


def reference_logps(trainer: DPOTrainer, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The reference's summed log-probabilities, chosen and rejected, (B,), nats; precomputed ones, else computed now."""
    if trainer.precompute_ref_logps:
        return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
    return _live_reference_logps(trainer, inputs)


def _live_reference_logps(trainer: DPOTrainer, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    # Not `or`: a compiled model cannot be converted to bool.
    return trainer.compute_ref_log_probs(trainer.model if trainer.ref_model is None else trainer.ref_model, inputs)


def policy_logps(trainer: DPOTrainer, forward: Callable, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The policy's summed log-probabilities, chosen and rejected, (B,), nats, from one more forward."""
    mask = inputs["completion_mask"]
    others = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    features = {name: value for name, value in inputs.items() if name not in others}
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    with trainer.accelerator.autocast():
        outputs = forward(**features, use_cache=False, labels=labels, fused_lm_head=True)
    return sequence_logps(outputs.log_probs, mask, trainer.ld_alpha).chunk(2)
