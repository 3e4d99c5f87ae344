"""Whether what a model gives packed is what it gives padded, or something else: what may differ, and where to look."""

from dataclasses import dataclass

import torch

# Tokens of an answer, behind its first, that are its beginning, and those that are its end.
_EARLY, _END = 16, 12


class Refused(Exception):
    """A model is not right packed, or nothing can be told; the text says why."""


@dataclass(frozen=True)
class Bounds:
    """What is allowed: as a share of what a mistake does, outright in nats, and as a multiple of what rounding does."""

    difference: float
    leak: float
    nats: float
    rounding: float


EXACT = Bounds(difference=2e-3, leak=1e-3, nats=1e-2, rounding=float("inf"))
ROUNDED = Bounds(difference=0.15, leak=0.05, nats=1.0, rounding=1.0)


@dataclass(frozen=True)
class Sample:
    """A batch of made-up pairs, what the padded path says of it, and what it says where it is rounded once more."""

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
        # Few tokens may happen to be rounded by little in one run, and by much in another.
        rounding = max(float(noise[part].mean()), float(noise[sample.scored].mean()))
        if not mean <= bounds.rounding * rounding * (1 + 2 / int(part.sum()) ** 0.5):
            raise Refused(
                f"log-probs of {name} differ from the padded path's by {mean:.2g} nats a token, "
                f"where rounding makes {rounding:.2g}"
            )
    return largest


def _parts(scored: torch.Tensor) -> dict[str, torch.Tensor]:
    """The scored tokens in parts that are judged by themselves, as a mistake may show in one of them alone.

    It hides at the seam, in a rejected answer, behind a window that a long answer leaves again, or at the very end.
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
