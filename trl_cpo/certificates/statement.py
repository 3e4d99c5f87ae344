"""A certificate from its evidence: the statement, whether it holds and by how much, as a pure function of numbers."""

import math
from collections.abc import Mapping
from typing import Any

from ..intervals import CONFIDENCE, lower_bound
from ..theory import most_below
from ..units import UNITS
from .errors import CertificateError, is_number

FORMAT = 1

#: What is certified, and from what: the share of a population with δ_θ ≥ γ, from a count of held-out pairs; or the number
#: of these pairs with δ_θ ≥ γ, from the mean of their losses.
KINDS = ("held_out", "loss")

_AS_COMPUTED = (
    "The log-probabilities are as they were computed: by the weights of that moment, in the precision used, of prompts and "
    "responses as they were truncated."
)
_DRAWN = (
    "The pairs are independent draws from the population spoken of, none of them was trained on, and they, γ and the share "
    "asked for were chosen before these numbers were seen."
)


def document(
    *,
    kind: str,
    gamma: float,
    at_least: float,
    subject: Mapping[str, Any],
    numbers: Mapping[str, Any],
    files: Mapping[str, Any],
    confidence: float = CONFIDENCE,
) -> dict[str, Any]:
    """The certificate that follows from its evidence, a pure function of what the document itself holds.

    Args:
        kind, gamma, at_least: as for `certify_run`.
        subject: of which run: model, dataset, split, constraint, beta, gamma, reduction.
        numbers: "pairs" and "meeting" (n, and how many have δ_θ ≥ γ); for "loss" also "mean_loss", "smallest_target" and
            "meeting_target" (how many have δ_θ ≥ t).
        files: name to blake2b hash and size of the files that the numbers came from.
        confidence: of the bound for a population.

    Raises:
        CertificateError: a number is missing, impossible, or contradicts another.
    """
    _check_numbers(kind, gamma, at_least, confidence, subject, numbers)
    if kind == "held_out":
        said = _said_of_count(gamma, confidence, subject, numbers)
    else:
        said = _said_of_loss(gamma, subject, numbers)
    statement, share, assumptions = said
    return {
        "certificate": "trl-cpo",
        "format": FORMAT,
        "kind": kind,
        "statement": statement,
        "holds": share > 0.0 and share >= at_least,
        "certified_share": share,
        "slack": share - at_least,
        "asked": {"gamma": gamma, "at_least": at_least, "confidence": confidence},
        "assumptions": assumptions,
        "subject": dict(subject),
        "evidence": {"numbers": dict(numbers), "files": {name: dict(print_) for name, print_ in files.items()}},
    }


def _said_of_count(gamma, confidence, subject, numbers) -> tuple[str, float, list[str]]:
    count, meeting = numbers["pairs"], numbers["meeting"]
    share = lower_bound(meeting, count, confidence)
    unit = UNITS[subject["reduction"]]
    statement = (
        f"{meeting} of {count} held-out pairs have a preference gap δ_θ of at least {exact(gamma)} {unit}. With "
        f"{exact(100 * confidence)} % confidence, at least {_percent_down(share)} of the pairs of their population have."
    )
    return statement, share, [_AS_COMPUTED, _DRAWN]


def _said_of_loss(gamma, subject, numbers) -> tuple[str, float, list[str]]:
    count, loss, beta = numbers["pairs"], numbers["mean_loss"], subject["beta"]
    unit, lowest = UNITS[subject["reduction"]], numbers["smallest_target"]
    below_target = most_below(loss, count, 0.0, beta=beta)
    statement = (
        f"By their mean loss of {loss:.6g} nats, at most {below_target} of these {count} pairs have a preference gap δ_θ "
        f"below their target t (counted: {count - numbers['meeting_target']})"
    )
    bar = f"{exact(gamma)} {unit}"
    if gamma > lowest:
        below = count
        statement += f"; of a gap of {bar} it proves nothing, because a target is as low as {lowest:.6g}"
    else:
        below = most_below(loss, count, lowest - gamma, beta=beta)
        statement += f", and at most {below} have one below {bar}"
    statement += f" (counted: {count - numbers['meeting']})."
    if count - numbers["meeting_target"] > below_target or count - numbers["meeting"] > below:
        raise CertificateError("The counts contradict the mean loss: more pairs lie below the bar than their losses allow.")
    assumptions = [
        _AS_COMPUTED,
        f"The loss of a pair is −log σ(β(δ_θ − t)) at β = {exact(beta)} and the target t of constraint "
        f"{subject['constraint']!r}, without what a constraint adds to it, of each pair once, at one set of weights.",
        "It speaks of these pairs alone.",
    ]
    return statement, (count - below) / count, assumptions


def _check_numbers(kind, gamma, at_least, confidence, subject, numbers) -> None:
    faults = []
    if kind not in KINDS:
        raise CertificateError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    if not is_number(gamma):
        faults.append(f"gamma must be a finite number; got {gamma!r}")
    if not is_number(at_least) or not 0.0 <= at_least <= 1.0:
        faults.append(f"at_least must lie in [0, 1]; got {at_least!r}")
    if not is_number(confidence) or not 0.0 < confidence < 1.0:
        faults.append(f"confidence must lie between 0 and 1; got {confidence!r}")
    if subject.get("reduction") not in UNITS:
        faults.append(f"reduction must be sum or mean; got {subject.get('reduction')!r}")
    count = numbers.get("pairs")
    if type(count) is not int or count < 1:
        faults.append(f"a certificate needs at least one pair; got {count!r}")
    else:
        for name in ("meeting",) if kind == "held_out" else ("meeting", "meeting_target"):
            value = numbers.get(name)
            if type(value) is not int or not 0 <= value <= count:
                faults.append(f"{name} must be a count from 0 to {count}; got {value!r}")
    if kind == "loss":
        for name, value in (("mean_loss", numbers.get("mean_loss")), ("beta", subject.get("beta"))):
            if not is_number(value) or value < 0.0 or (name == "beta" and value == 0.0):
                faults.append(f"{name} must be a finite number above 0; got {value!r}")
        if not is_number(numbers.get("smallest_target")):
            faults.append(f"smallest_target must be a finite number; got {numbers.get('smallest_target')!r}")
    if faults:
        raise CertificateError("; ".join(faults) + ".")


def exact(value: float) -> str:
    """A number as short as it can be written without changing it."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _percent_down(share: float) -> str:
    """A share in per cent, rounded down: what is printed is never more than what is proven."""
    return f"{math.floor(share * 10_000) / 100:.2f} %"
