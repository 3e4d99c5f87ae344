"""From arrays of log-probabilities to the audit's numbers; every group of them is one function.

Below, a pair is *misaligned* where δ_ref < 0: the reference prefers the rejected response. Formulas: docs/audit.md.
"""

from dataclasses import dataclass

import numpy as np

from ..quoting import quoted
from ..scoring.scored_pairs import ScoredPairs
from ..units import REDUCTIONS
from .uncertainty import fraction, quantile, rank_correlation, shares

#: Reward gaps Δr for which Assumption 3.1 is looked at where no scores are known, and the β (per nat of sums, and per nat
#: of means) beside the user's own.
REWARD_GAPS, BETAS = (0.5, 1.0, 2.0, 4.0), {"sum": (0.01, 0.05, 0.1, 0.5), "mean": (0.5, 1.0, 2.5, 5.0)}
#: Escape times of DPO in multiples of clip's.
TIMES = (2.0, 10.0, 100.0)
#: A ratio beyond this is written as this: JSON knows no infinity.
_LARGEST = 1e300


@dataclass(frozen=True)
class Settings:
    """The loss that the audit looks at: β > 0 per nat, γ ≥ 0 in nats of `reduction` ("sum" or "mean")."""

    beta: float
    gamma: float
    reduction: str = "sum"


def measure(pairs: ScoredPairs, settings: Settings) -> dict:
    """Every measure of one set of pairs, as JSON's types; at least one pair."""
    if not len(pairs):
        raise ValueError("There is no pair to measure.")
    ref_gap, gap = pairs.ref_gap(settings.reduction), pairs.gap(settings.reduction)
    return {
        "pairs": len(pairs),
        "distinct_prompts": None if pairs.prompt_of is None else len(np.unique(pairs.prompt_of)),
        "misaligned": misaligned(pairs),
        "ref_gap": {name: _spread(pairs.ref_gap(name)) for name in REDUCTIONS},
        "same_target": fraction(ref_gap >= settings.gamma),
        "assumption": assumption(ref_gap, settings, pairs.reward_gap),
        "gradient": gradient(ref_gap, gap, settings),
        "escape": escape(ref_gap, gap, settings),
        "length": length(pairs),
        "policy": policy(pairs, settings) if pairs.has_policy else None,
    }


def misaligned(pairs: ScoredPairs) -> dict:
    """The fraction with δ_ref < 0, by sums, by means per token, and by both at once."""
    below = {name: pairs.ref_gap(name) < 0 for name in REDUCTIONS}
    return {**{name: fraction(mask) for name, mask in below.items()}, "both": fraction(below["sum"] & below["mean"])}


def groups(pairs: ScoredPairs, group_of: np.ndarray, settings: Settings) -> list[dict]:
    """How each group of pairs starts: its fraction misaligned, and how far below γ its pairs lie. In the order of the names.

    The deficit is `γ − δ_ref`, nats; its median is over the pairs of the group with δ_ref < γ.
    """
    found = []
    for name in sorted(set(group_of.tolist())):
        own = pairs.take(group_of == name)
        deficit = settings.gamma - own.ref_gap(settings.reduction)
        found.append(
            {
                "group": quoted(name, 40),
                "pairs": len(own),
                "misaligned": misaligned(own),
                "deficit": {"50%": quantile(deficit[deficit > 0], 0.5)},
            }
        )
    return found


def _spread(values: np.ndarray) -> dict:
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], method="inverted_cdf")
    return {"mean": float(values.mean()), "10%": float(low), "50%": float(middle), "90%": float(high)}


def assumption(ref_gap: np.ndarray, settings: Settings, reward_gap: np.ndarray | None = None) -> dict:
    """The fraction that violates Assumption 3.1 (arXiv 2605.20834): `δ_ref ≤ −Δr/β`, where RLHF's own optimum
    `δ* = δ_ref + Δr/β` is not above 0.

    With Δr from scores, pair by pair (those with a Δr), and how many scores contradict the label (Δr < 0) or tie;
    else for a grid of Δr and β, where only Δr/β matters.
    """
    from ..theory import assumption_holds

    def violated(gaps: np.ndarray, reward: np.ndarray, beta: float) -> dict:
        return fraction(~assumption_holds(gaps, reward, beta=beta).numpy())

    if reward_gap is not None and np.isfinite(reward_gap).any():
        known = np.isfinite(reward_gap)
        reward = reward_gap[known]
        return {
            "from": "scores",
            "beta": settings.beta,
            "violated": violated(ref_gap[known], reward, settings.beta),
            "contradict_label": fraction(reward < 0),
            "tied": fraction(reward == 0),
            "reward_gap": _spread(reward),
        }
    betas = sorted({*BETAS[settings.reduction], settings.beta})
    cells = [
        {"reward_gap": reward, "beta": b, **violated(ref_gap, np.full_like(ref_gap, reward), b)}
        for reward in REWARD_GAPS
        for b in betas
    ]
    return {"from": "grid", "reward_gaps": list(REWARD_GAPS), "betas": betas, "cells": cells}


def gradient(ref_gap: np.ndarray, gap: np.ndarray, settings: Settings) -> dict:
    """How much of the loss's pull on δ falls to misaligned pairs: `w = σ(−β(δ − t))`, 1 where a pair pulls with all of β.

    For DPO (t = δ_ref) and clip (t = max(δ_ref, γ)): the mean w of misaligned pairs and of the others, and the
    misaligned pairs' share of the sum, "now" (at `gap`) and "at_zero", where the misaligned pairs with δ < 0 have come to
    δ = 0 and all others stand where they are (Prop. 3.4: DPO then pulls with `σ(βδ_ref)`).
    """
    from ..theory import pull

    low = ref_gap < 0
    arrived = np.where(low, np.maximum(gap, 0.0), gap)
    targets = {"dpo": ref_gap, "clip": np.maximum(ref_gap, settings.gamma)}
    moments = {"now": gap, "at_zero": arrived}
    places = [(name, moment) for name in targets for moment in moments]
    weights = np.stack(
        [pull(moments[moment], targets[name], beta=settings.beta).numpy() / settings.beta for name, moment in places],
        axis=1,
    )
    document: dict[str, dict] = {name: {} for name in targets}
    for (name, moment), weight, share in zip(places, weights.T, shares(weights, low), strict=True):
        document[name][moment] = {
            "misaligned_pull": float(weight[low].mean()) if low.any() else None,
            "other_pull": float(weight[~low].mean()) if not low.all() else None,
            "misaligned_share": share,
        }
    return document


def escape(ref_gap: np.ndarray, gap: np.ndarray, settings: Settings) -> dict:
    """How long misaligned pairs with δ < 0 take to δ = 0, under DPO over under clip: gradient flow on one pair alone.

    The times are `trl_cpo.theory`'s; their ratio has no unit. Beside it `βD`, D = −δ_ref, which it depends on, and the
    fraction of these pairs on which DPO takes more than 2, 10 and 100 times as long.
    """
    from ..theory import escape_time

    some = (ref_gap < 0) & (gap < 0)
    start, depth = gap[some], -ref_gap[some]
    times = {}
    for name, target in (("dpo", -depth), ("clip", np.full_like(depth, settings.gamma))):
        times[name] = escape_time(start, np.zeros_like(start), target, beta=settings.beta).numpy()
    with np.errstate(over="ignore"):
        ratio = np.minimum(times["dpo"] / times["clip"], _LARGEST)
    return {
        "pairs": int(some.sum()),
        "beta_depth": {"50%": quantile(settings.beta * depth, 0.5), "90%": quantile(settings.beta * depth, 0.9)},
        "ratio": {"50%": quantile(ratio, 0.5), "90%": quantile(ratio, 0.9)},
        "longer": [{"times": times_longer, **fraction(ratio > times_longer)} for times_longer in TIMES],
    }


def length(pairs: ScoredPairs) -> dict:
    """How long answers are (median tokens of both), and whether δ_ref follows the lengths: its rank correlation with
    `tokens(chosen) − tokens(rejected)`, and the fraction misaligned where the chosen answer is longer, as long, and shorter;
    by sums and by means.
    """
    longer_by = pairs.chosen_tokens - pairs.rejected_tokens
    groups = {"longer": longer_by > 0, "same": longer_by == 0, "shorter": longer_by < 0}
    tokens = np.concatenate([pairs.chosen_tokens, pairs.rejected_tokens])
    document = {"tokens": float(np.median(tokens)), "longer_by": _spread(longer_by.astype(np.float64))}
    for name in REDUCTIONS:
        ref_gap = pairs.ref_gap(name)
        document[name] = {
            "correlation": rank_correlation(ref_gap, longer_by),
            "misaligned_where_chosen_is": {group: fraction(ref_gap[mask] < 0) for group, mask in groups.items()},
        }
    return document


def policy(pairs: ScoredPairs, settings: Settings) -> dict:
    """The policy against the reference: the fractions that training logs as `cpo/<name>`, with the same definitions."""
    import torch

    from ..metrics import METRICS, PairView
    from ..pairs import PairLogps

    tokens = {"chosen": pairs.chosen_tokens, "rejected": pairs.rejected_tokens}

    def reduced(name: str) -> torch.Tensor:
        sums = getattr(pairs, name)
        return torch.from_numpy(sums / tokens[name.split("_")[1]] if settings.reduction == "mean" else sums)

    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    logps = PairLogps(*(reduced(name) for name in names))
    view = PairView(logps, logps.ref_gap, settings.gamma)
    fractions = ("prefers_chosen", "beats_reference", "in_undesirable_region", "escaped", "violation_rate")
    means = ("gap", "chosen_logps_shift", "rejected_logps_shift")
    return {
        **{name: fraction(METRICS[name][1](view).numpy()) for name in fractions},
        **{name: float(METRICS[name][1](view).mean()) for name in means},
    }
