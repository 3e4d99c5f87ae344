"""Compares a model's packed outputs with its padded ones: how much may differ, and in which parts."""

from dataclasses import dataclass

import torch

# Tokens of an answer that count as its beginning (after the first) and as its end.
_EARLY, _END = 16, 12


class Refused(Exception):
    """Packing is wrong for a model, or cannot be tested; the text says why."""


@dataclass(frozen=True)
class Bounds:
    """Tolerances.

    Attributes:
        difference: mean difference, as a share of the effect of a mistake.
        leak: effect of one answer on another, as a share of that of ordinary packing.
        nats: largest difference of a token, in nats.
        rounding: mean difference, as a multiple of the effect of rounding.
    """

    difference: float
    leak: float
    nats: float
    rounding: float


EXACT = Bounds(difference=2e-3, leak=1e-3, nats=1e-2, rounding=float("inf"))
ROUNDED = Bounds(difference=0.15, leak=0.05, nats=1.0, rounding=1.0)


@dataclass(frozen=True)
class Sample:
    """A batch of random pairs, its padded outputs, and the padded outputs with extra rounding (None in float32)."""

    inputs: dict
    padded: object
    perturbed: object | None

    @property
    def scored(self) -> torch.Tensor:
        return self.inputs["labels"][:, 1:] != -100


def compare(sample: Sample, outputs, bounds: Bounds, mistake: float) -> float:
    """Largest gap of log-probs to the padded path's; raise Refused where a part of the answers is off by too much."""
    gaps = _gaps(sample.padded, outputs)
    largest = float(gaps[sample.scored].max())
    if not largest <= bounds.nats:
        raise Refused(f"log-probs differ from the padded path's by up to {largest:.2g} nats")
    noise = None if sample.perturbed is None else _gaps(sample.padded, sample.perturbed)
    for name, part in {"answers": sample.scored, **_parts(sample.scored)}.items():
        mean, share = float(gaps[part].mean()), bounds.difference * mistake
        if not mean <= share and (noise is None or name == "answers"):
            raise Refused(f"log-probs of {name} differ from the padded path's by {mean:.2g} nats a token")
        if noise is None:
            continue
        # With few tokens, rounding may happen to be small in one run and large in another.
        rounding = max(float(noise[part].mean()), float(noise[sample.scored].mean()))
        if not mean <= bounds.rounding * rounding * (1 + 2 / int(part.sum()) ** 0.5):
            raise Refused(
                f"log-probs of {name} differ from the padded path's by {mean:.2g} nats a token, "
                f"rounding alone by {rounding:.2g}"
            )
    return largest


def _parts(scored: torch.Tensor) -> dict[str, torch.Tensor]:
    """The scored tokens in parts that are compared separately, because a mistake may show in one part only.

    For example at the first token of an answer, in rejected answers only, past an attention window, or at the very end.
    """
    place = scored.cumsum(1)
    left = scored.sum(1, keepdim=True) - place
    side = torch.arange(len(scored), device=scored.device)[:, None] < len(scored) // 2
    first, end = place == 1, left < _END
    early = ~first & (place <= _EARLY)
    parts = {"answers' first tokens": first}
    for name, rows in (("chosen answers", side), ("rejected answers", ~side)):
        parts[f"the beginning of {name}"] = early & rows
        parts[f"the middle of {name}"] = ~first & ~early & ~end & rows
        parts[f"the end of {name}"] = end & rows
    return {name: part & scored for name, part in parts.items() if bool((part & scored).any())}


def _gaps(one, other) -> torch.Tensor:
    return (one.log_probs.float() - other.log_probs.float()).abs()


def mean_gap(one, other, where: torch.Tensor) -> float:
    return float(_gaps(one, other)[where].mean())
