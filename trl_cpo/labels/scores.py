"""Fits the scale of scores: how probable a difference of scores makes it that the chosen answer is the better one."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FittedScale:
    """η by maximum likelihood, its 95 % interval, and the number of pairs it was fitted on."""

    scale: float
    low: float
    high: float
    pairs: int

    def __str__(self):
        return (
            f"score_scale: {self.scale:.4g} is the most likely on {self.pairs} held-out pairs with different scores (95 % "
            f"interval {self.low:.4g} to {self.high:.4g})."
        )


def fit_scale(differences: np.ndarray) -> FittedScale:
    """η in `p = σ(η d)`, d the chosen answer's score less the rejected's: maximizes `Σ log σ(η d)`.

    The log-likelihood is concave in η, so Newton's steps, halved where they overshoot, find its one maximum. The interval is
    Wald's, from the observed information `Σ d² p (1−p)`.

    Raises:
        ValueError: no finite η > 0 is the most likely: every chosen answer has the higher score, or scores do not follow the
            choices.
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[d != 0]
    if not len(d) or (d > 0).all():
        raise ValueError(
            f"score_scale='fit': of {len(d)} held-out pairs with different scores, the chosen answer has the higher one in "
            "all. The likelihood then grows without end: the choices were made by these scores. Give score_scale a number."
        )
    if d.sum() <= 0:  # the slope of the log-likelihood at η = 0 is Σ d / 2
        raise ValueError(
            f"score_scale='fit': scores do not follow the choices of {len(d)} held-out pairs (mean difference {d.mean():.3g}), "
            "so no scale > 0 is likely. Check which column is which."
        )
    unit = np.abs(d).mean()
    d = d / unit
    scale = 0.0
    for _ in range(200):
        p = 0.5 * (1 + np.tanh(0.5 * scale * d))
        slope, curvature = float((d * (1 - p)).sum()), float((d * d * p * (1 - p)).sum())
        step = slope / max(curvature, 1e-300)
        while _likelihood(d, scale + step) < _likelihood(d, scale) and abs(step) > 1e-15:
            step /= 2
        scale += step
        if abs(step) <= 1e-12 * max(scale, 1e-12):
            break
    error = 1.959963984540054 / math.sqrt(curvature)
    return FittedScale(scale / unit, max(scale - error, 0.0) / unit, (scale + error) / unit, len(d))


def _likelihood(d: np.ndarray, scale: float) -> float:
    return float(-np.logaddexp(0.0, -scale * d).sum())
