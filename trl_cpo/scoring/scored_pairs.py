"""The log-probabilities of a set of pairs, as arrays, and what goes with each pair."""

from dataclasses import dataclass, field, fields, replace

import numpy as np

_PER_PAIR = ("ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")
_OPTIONAL = ("policy_chosen", "policy_rejected", "reward_gap", "prompt_of")


@dataclass(frozen=True)
class ScoredPairs:
    """n preference pairs: summed log-probabilities in nats, scored tokens, and what else is known of each pair.

    `δ = s(chosen) − s(rejected)`, with s the sum or, divided by the tokens, the mean per token. Raises `ValueError`
    where lengths differ, a log-probability is not finite, or an answer has no scored token.

    Args:
        ref_chosen, ref_rejected: (n,), the reference's.
        chosen_tokens, rejected_tokens: (n,), at least 1.
        policy_chosen, policy_rejected: (n,), the policy's; None where the policy is the reference.
        reward_gap: (n,), Δr = r(chosen) − r(rejected); None where no scores are known. May hold NaN: not known.
        prompt_of: (n,), equal where two pairs have the same prompt; None: not known.
        slices: column to its value in each pair, (n,).
    """

    ref_chosen: np.ndarray
    ref_rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    policy_chosen: np.ndarray | None = None
    policy_rejected: np.ndarray | None = None
    reward_gap: np.ndarray | None = None
    prompt_of: np.ndarray | None = None
    slices: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "slices" or value is None:
                continue
            kind = np.int64 if item.name.endswith("tokens") else None if item.name == "prompt_of" else np.float64
            value = np.asarray(value, dtype=kind)
            if value.shape != (len(self.ref_chosen),):
                raise ValueError(f"{item.name} must hold one value a pair, ({len(self.ref_chosen)},); got {value.shape}.")
            if "_chosen" in item.name or "_rejected" in item.name:
                bad = np.flatnonzero(~np.isfinite(value))
                if len(bad):
                    raise ValueError(
                        f"{item.name} is not finite in {len(bad)} of {len(value)} pairs, the first of them at position "
                        f"{bad[0]}: {value[bad[0]]}. A model that gives NaN or infinity cannot be audited; check its weights "
                        "and dtype."
                    )
            elif item.name.endswith("tokens") and (value < 1).any():
                raise ValueError(f"{item.name} must be at least 1; leave out pairs with an answer of no scored token.")
            object.__setattr__(self, item.name, value)
        if (self.policy_chosen is None) != (self.policy_rejected is None):
            raise ValueError("policy_chosen and policy_rejected belong together: give both or neither.")

    def __len__(self) -> int:
        return len(self.ref_chosen)

    @property
    def has_policy(self) -> bool:
        """Whether the policy is another model than the reference."""
        return self.policy_chosen is not None

    def ref_gap(self, reduction: str) -> np.ndarray:
        """δ_ref, (n,), in nats of `reduction`."""
        return self._gap(self.ref_chosen, self.ref_rejected, reduction)

    def gap(self, reduction: str) -> np.ndarray:
        """δ_θ, (n,), in nats of `reduction`; δ_ref where the policy is the reference."""
        if not self.has_policy:
            return self.ref_gap(reduction)
        return self._gap(self.policy_chosen, self.policy_rejected, reduction)

    def _gap(self, chosen: np.ndarray, rejected: np.ndarray, reduction: str) -> np.ndarray:
        if reduction == "mean":
            return chosen / self.chosen_tokens - rejected / self.rejected_tokens
        return chosen - rejected

    def take(self, index: np.ndarray) -> "ScoredPairs":
        """The pairs at `index` (positions or a mask)."""
        some = {name: getattr(self, name) for name in (*_PER_PAIR, *_OPTIONAL)}
        some = {name: value if value is None else value[index] for name, value in some.items()}
        return replace(self, **some, slices={name: value[index] for name, value in self.slices.items()})
