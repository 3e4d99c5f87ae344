"""The log-probabilities of a batch of preference pairs, and the preference gap that they make."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .units import REDUCTIONS as REDUCTIONS


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32 if it is float16 or bfloat16, else `x` itself: gaps and targets are never kept in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@dataclass(frozen=True)
class PairLogps:
    """The four log-probabilities of B preference pairs, in nats: summed over, or averaged per, response token.

    The preference gap is `δ = s(chosen) − s(rejected)`; each field is of shape (B,). Half precision is raised to
    float32. Raises `ValueError` where a field is not a floating-point vector or the four lengths differ: a (B, 1)
    column would broadcast (B,) vectors to (B, B) without a word.
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
                raise ValueError(f"{name} must be a floating-point tensor of shape (B,), one value a pair; got {got}.")
            if value.shape != self.policy_chosen.shape:
                raise ValueError(
                    f"{name} holds {len(value)} pairs and policy_chosen {len(self.policy_chosen)}: "
                    "pass the log-probabilities of the same pairs."
                )
            object.__setattr__(self, name, full_precision(value))

    @property
    def gap(self) -> Tensor:
        """δ_θ = s_θ(chosen) − s_θ(rejected), shape (B,): positive where the policy itself prefers the chosen answer."""
        return self.policy_chosen - self.policy_rejected

    @property
    def ref_gap(self) -> Tensor:
        """δ_ref = s_ref(chosen) − s_ref(rejected), shape (B,): negative where the reference is misaligned."""
        return self.ref_chosen - self.ref_rejected

    def rows(self) -> Tensor:
        """The four log-probabilities as (B, 4), columns in the order of the fields, rows in the order of the pairs."""
        return torch.stack([self.policy_chosen, self.policy_rejected, self.ref_chosen, self.ref_rejected], dim=1)

    @classmethod
    def from_rows(cls, rows: Tensor) -> "PairLogps":
        """The pairs of a (B, 4) tensor that `rows` made."""
        return cls(*rows.unbind(dim=1))

    def detach(self) -> "PairLogps":
        """The same numbers without their graph."""
        return PairLogps(self.policy_chosen.detach(), self.policy_rejected.detach(), self.ref_chosen, self.ref_rejected)


def completion_lengths(completion_mask: Tensor) -> Tensor:
    """Completion tokens of each row of a (R, T) mask, at least 1, shape (R,): what a mean log-probability divides by."""
    return completion_mask.sum(dim=1).clamp(min=1)


def degenerate_pairs(input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Which pairs of a collated batch compare no two answers: one has no scored token, or their tokens are the same.

    Args:
        input_ids: (2B, T), rows [chosen; rejected], padded and truncated.
        completion_mask: (2B, T), 1 on completion tokens; a token in column 0 is never scored.

    Returns:
        (B,), bool; nothing waits for the device.
    """
    chosen_scored, rejected_scored = completion_mask[:, 1:].any(dim=1).chunk(2)
    # The padding token may be the one that ends an answer, so equal ids alone do not make equal answers.
    same_ids, same_mask = (torch.eq(*rows.chunk(2)).all(dim=1) for rows in (input_ids, completion_mask))
    return ~(chosen_scored & rejected_scored) | (same_ids & same_mask)


def sequence_logps(per_token_logps: Tensor, completion_mask: Tensor, ld_alpha: float | None = None) -> Tensor:
    """The summed log-probability of each completion, in nats, as DPOTrainer sums it.

    `s = Σ_t log π(y_t)`; with `ld_alpha` (LD-DPO, arXiv 2409.06411) the tokens past the shorter of the two completions
    are weighted by it. Rows are [chosen; rejected].

    Args:
        per_token_logps: (2B, T−1), position i scores token i+1 and is zero outside the completion. A longer row, as
            prompt-learning adapters make, keeps its last T−1 positions.
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
