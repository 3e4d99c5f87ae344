"""The log-probabilities of a batch of preference pairs, and the preference gap computed from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .units import REDUCTIONS as REDUCTIONS


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32 if it is float16 or bfloat16, else `x` itself; gaps and targets are never kept in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@dataclass(frozen=True)
class PairLogps:
    """The four log-probabilities of B preference pairs, in nats: sums over the response tokens, or means per token.

    The preference gap is `δ = s(chosen) − s(rejected)`. Each field has shape (B,); half precision is converted to float32.

    Raises:
        ValueError: a field is not a floating-point vector, or the four lengths differ. Unchecked, a (B, 1) column would
            silently broadcast with a (B,) vector to (B, B).
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor

    def __post_init__(self):
        for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dim() != 1 or not value.is_floating_point():
                got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} must be a floating-point tensor of shape (B,), one value per pair; got {got}.")
            if value.shape != self.policy_chosen.shape:
                raise ValueError(
                    f"{name} has {len(value)} pairs, policy_chosen has {len(self.policy_chosen)}. "
                    "Pass the log-probabilities of the same pairs."
                )
            object.__setattr__(self, name, full_precision(value))

    @property
    def gap(self) -> Tensor:
        """δ_θ = s_θ(chosen) − s_θ(rejected), shape (B,); positive where the policy prefers the chosen answer."""
        return self.policy_chosen - self.policy_rejected

    @property
    def ref_gap(self) -> Tensor:
        """δ_ref = s_ref(chosen) − s_ref(rejected), shape (B,); negative where the reference is misaligned."""
        return self.ref_chosen - self.ref_rejected

    def rows(self) -> Tensor:
        """The four log-probabilities as (B, 4): one row per pair, columns in the order of the fields."""
        return torch.stack([self.policy_chosen, self.policy_rejected, self.ref_chosen, self.ref_rejected], dim=1)

    @classmethod
    def from_rows(cls, rows: Tensor) -> "PairLogps":
        """The inverse of `rows`: the pairs of a (B, 4) tensor."""
        return cls(*rows.unbind(dim=1))

    def detach(self) -> "PairLogps":
        """The same pairs, detached from the graph."""
        return PairLogps(self.policy_chosen.detach(), self.policy_rejected.detach(), self.ref_chosen, self.ref_rejected)


def completion_lengths(completion_mask: Tensor) -> Tensor:
    """Number of completion tokens in each row of an (R, T) mask, at least 1, shape (R,); the divisor of a mean per token."""
    return completion_mask.sum(dim=1).clamp(min=1)


def degenerate_pairs(input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Marks the pairs of a collated batch whose answers cannot be compared: one has no scored token, or both are equal.

    Args:
        input_ids: (2B, T), rows [chosen; rejected], padded and truncated.
        completion_mask: (2B, T), 1 on completion tokens; a token in column 0 is never scored.

    Returns:
        (B,), bool, computed without waiting for the device.
    """
    chosen_scored, rejected_scored = completion_mask[:, 1:].any(dim=1).chunk(2)
    # Padding may use the token that ends an answer, so equal ids alone do not mean equal answers.
    same_ids, same_mask = (torch.eq(*rows.chunk(2)).all(dim=1) for rows in (input_ids, completion_mask))
    return ~(chosen_scored & rejected_scored) | (same_ids & same_mask)


def sequence_logps(per_token_logps: Tensor, completion_mask: Tensor, ld_alpha: float | None = None) -> Tensor:
    """The summed log-probability of each completion, in nats, as DPOTrainer sums it.

    `s = Σ_t log π(y_t)`. With `ld_alpha` (LD-DPO, arXiv 2409.06411), tokens beyond the length of the pair's shorter
    completion are weighted by it. Rows are [chosen; rejected].

    Args:
        per_token_logps: (2B, T−1); position i scores token i+1 and is zero outside the completion. Of longer rows, which
            prompt-learning adapters produce, the last T−1 positions are used.
        completion_mask: (2B, T), 1 on completion tokens.

    Returns:
        (2B,), float32 at least.
    """
    mask = completion_mask[:, 1:]
    logps = full_precision(per_token_logps[:, -mask.size(1) :])
    if ld_alpha is None:
        return logps.sum(dim=1)
    position = mask.cumsum(dim=1)
    shorter = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2).unsqueeze(1)
    shared = (position > 0) & (position <= shorter)
    return (logps * shared).sum(dim=1) + ld_alpha * (logps * (position > shorter)).sum(dim=1)
