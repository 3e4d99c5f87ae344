"""The loss seam: DPOTrainer's own loss, with the reference's gap moved to a target margin, observed from outside.

It rests on how TRL's `compute_loss` is built inside, which the identity tests hold (tests/test_identity.py):

- `compute_loss` calls its `model` argument once (and once more, afterwards, for `return_outputs=True`) with
  `fused_lm_head=True` and reads per-token values off what comes back;
- where `precompute_ref_logps` is true it takes the reference's log-probabilities from `inputs`, and only after that call;
- `compute_ref_log_probs(model, inputs)` gives the numbers it would have computed itself;
- `_metrics[mode]` holds one number per logged name and call, averaged in `log`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer
from trl import __version__ as trl_version

from ..pairs import PairLogps, completion_lengths, degenerate_pairs, sequence_logps

#: What each of DPOTrainer's loss types reads: the difference of summed log-ratios ("sum") or of their means per token
#: ("mean"), one side's log-ratio by itself ("one side"), or no reference at all ("no reference").
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

#: The loss type that is `sigmoid` over means per token instead of sums.
MEAN_OF = {"sigmoid": "sigmoid_norm"}


@dataclass(frozen=True)
class ObservedLoss:
    """What DPOTrainer's loss gave for a batch of B pairs, and the log-probabilities that it used.

    Attributes:
        loss: scalar, nats: the mean pair loss at the targets, plus the mean of what was added.
        outputs: what `return_outputs=True` gave beside it; empty without.
        pairs: log-probabilities, (B,) each, the policy's with their graph.
        target: target margins t, (B,), nats.
        degenerate: (B,), bool: pairs that compare no two answers.
    """

    loss: Tensor
    outputs: tuple
    pairs: PairLogps
    target: Tensor
    degenerate: Tensor


class _Observed:
    """Stands in for `model` in DPOTrainer's loss: the first call goes through `forward`, and what it gave is reported."""

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

    DPO's loss at the target t is DPO's loss against a reference whose gap is t, so the rejected side of the reference
    is lowered by `t − δ_ref` (times the response's length where the loss averages per token) on the way in, and the
    logged `rewards/*` are put back to the true reference on the way out. No forward is run that DPOTrainer would not
    run, and in its order. Degenerate pairs keep DPO's target, and nothing is added to them.

    Args:
        trainer: the trainer whose loss it is.
        compute_loss: the bound `compute_loss` of TRL's DPOTrainer.
        model: the policy, wrapped as the training loop has it.
        inputs: a collated batch; it is not changed.
        forward: what computes the policy's log-probabilities in place of `model`; may be `model`.
        reduction: "sum" or "mean", how the returned log-probabilities are reduced over tokens.
        target_of: gives the target margins (B,) of a batch, in nats of `reduction`; None leaves DPO's loss untouched.
        added_loss: gives what is added to each pair's loss, (B,), or None.
        return_outputs: passed on, as are `kwargs`.

    Raises:
        RuntimeError: DPOTrainer did not call `model` the way this module rests on.
    """
    inputs = dict(inputs)
    mask = inputs["completion_mask"]
    degenerate = degenerate_pairs(inputs["input_ids"], mask)
    chosen_lengths, rejected_lengths = completion_lengths(mask).chunk(2)
    seen: dict[str, Any] = {}

    def reduced(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        return (chosen / chosen_lengths, rejected / rejected_lengths) if reduction == "mean" else (chosen, rejected)

    def report(outputs) -> None:
        # Called after the policy's forward, where DPOTrainer would run the reference: with dropout left on, running it
        # before would draw the random numbers in another order.
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
            f"DPOTrainer of TRL {trl_version} called the model {observed.calls} times in one loss, where trl-cpo knows "
            "of one call: it cannot tell which log-probabilities the loss used. Please report this, with the TRL version."
        )
    if "log_ratios" in seen:
        _restore_rewards(trainer, seen["log_ratios"])
    loss, *others = result if return_outputs else (result,)
    added = None if added_loss is None else added_loss(seen["pairs"])
    if added is not None:
        loss = loss + torch.where(degenerate, 0.0, added).mean()
    return ObservedLoss(loss, tuple(others), seen["pairs"], seen["target"], degenerate)


def reference_logps(trainer: DPOTrainer, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The reference's summed log-probabilities of a batch, chosen and rejected, (B,), nats: precomputed or computed now."""
    if trainer.precompute_ref_logps:
        return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
    return _live_reference_logps(trainer, inputs)


def _live_reference_logps(trainer: DPOTrainer, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    # Not `or`: a compiled model has no truth value.
    return trainer.compute_ref_log_probs(trainer.model if trainer.ref_model is None else trainer.ref_model, inputs)


def policy_logps(trainer: DPOTrainer, forward: Callable, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The policy's summed log-probabilities of a batch, chosen and rejected, (B,), nats, by a forward of its own."""
    mask = inputs["completion_mask"]
    others = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    features = {name: value for name, value in inputs.items() if name not in others}
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    with trainer.accelerator.autocast():
        outputs = forward(**features, use_cache=False, labels=labels, fused_lm_head=True)
    return sequence_logps(outputs.log_probs, mask, trainer.ld_alpha).chunk(2)


def _restore_rewards(trainer: DPOTrainer, log_ratios: Tensor) -> None:
    """Sets the `rewards/*` just logged for a moved target to DPO's meaning, β (s_θ − s_ref), from (B, 2) log-ratios."""
    rewards = trainer.beta * log_ratios
    chosen, rejected = trainer.accelerator.gather(rewards).unbind(dim=1)
    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    logged["rewards/rejected"][-1] = rejected.mean().item()
    logged["rewards/accuracies"][-1] = (chosen > rejected).float().mean().item()
    logged["rewards/margins"][-1] = (chosen - rejected).mean().item()
