"""A certificate from its evidence: the statement, whether it holds and by how much, as a pure function of numbers."""

import math
from collections.abc import Mapping
from typing import Any

from ..files.schema import COUNT, shown
from ..intervals import CONFIDENCE, lower_bound
from ..units import UNITS
from .errors import CertificateError, is_number

#: Of the documents written. Format 1, which is still read, names no hyperparameters in its subject.
FORMAT = 2

#: What is certified, and from what: the share of a population with δ_θ ≥ γ, from a count of held-out pairs.
KINDS = ("held_out",)

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
    version: int = FORMAT,
) -> dict[str, Any]:
    """The certificate that follows from its evidence, a pure function of what the document itself holds.

    Args:
        kind, gamma, at_least: as for `certify_run`.
        subject: of which run: model, dataset, split, constraint, beta, gamma, reduction, hyperparameters.
        numbers: "pairs" and "meeting" (n, and how many have δ_θ ≥ γ); "trained_on_left_out" (how many are not among them
            because they were trained on), where there are any.
        files: name to blake2b hash and size of the files that the numbers came from.
        confidence: of the bound for a population.
        version: of the format.

    Raises:
        CertificateError: a number is missing, impossible, or contradicts another.
    """
    check_kind(kind)
    _check_numbers(gamma, at_least, confidence, subject, numbers)
    statement, share, assumptions = _said_of_count(gamma, confidence, subject, numbers)
    subject = {name: value for name, value in subject.items() if version > 1 or name != "hyperparameters"}
    return {
        "certificate": "trl-cpo",
        "format": version,
        "kind": kind,
        "statement": statement,
        "holds": share > 0.0 and share >= at_least,
        "certified_share": share,
        "slack": share - at_least,
        "asked": {"gamma": gamma, "at_least": at_least, "confidence": confidence},
        "assumptions": assumptions,
        "subject": subject,
        "evidence": {"numbers": dict(numbers), "files": {name: dict(print_) for name, print_ in files.items()}},
    }


def _said_of_count(gamma, confidence, subject, numbers) -> tuple[str, float, list[str]]:
    count, meeting = numbers["pairs"], numbers["meeting"]
    share = lower_bound(meeting, count, confidence)
    unit = UNITS[subject["reduction"]]
    part = subject.get("part")
    of = "" if part is None else f" with {part['column']}={part['value']}"
    statement = (
        f"{meeting} of {count} held-out pairs{of} have a preference gap δ_θ of at least {exact(gamma)} {unit}. With "
        f"{_confidence(confidence)} % confidence, at least {_percent_down(share)} of the pairs of their population have."
    )
    if part is not None and part["of"] > 1:
        statement += (
            f" The certificates of all {part['of']} values of {part['column']} are true together with "
            f"{exact(100 * CONFIDENCE)} % confidence."
        )
    if trained := numbers.get("trained_on_left_out"):
        statement += f" {trained} more pairs were trained on, and are not counted."
    return statement, share, [_AS_COMPUTED, _DRAWN]


def joint_confidence(subject: Mapping[str, Any]) -> float:
    """The confidence of one certificate: of one among G parts, that with which all G are true together (Bonferroni)."""
    part = subject.get("part")
    return CONFIDENCE if part is None else 1.0 - (1.0 - CONFIDENCE) / part["of"]


def _confidence(confidence: float) -> str:
    """In per cent, rounded down."""
    short = f"{100 * confidence:g}"
    return short if float(short) <= 100 * confidence else f"{math.floor(1e4 * confidence) / 100:.2f}"


def check_kind(kind: Any) -> None:
    """Raises `CertificateError` for a kind that is not made."""
    if kind == "loss":
        raise CertificateError(
            "Certificates of kind 'loss' are no longer made or read: a mean loss proves no more of these pairs than their "
            "count, which the same files hold. Use kind 'held_out'. The bound itself is trl_cpo.theory.most_below."
        )
    if kind not in KINDS:
        raise CertificateError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")


def _check_numbers(gamma, at_least, confidence, subject, numbers) -> None:
    faults = []
    if not is_number(gamma):
        faults.append(f"gamma must be a finite number; got {shown(gamma)}")
    if not is_number(at_least) or not 0.0 <= at_least <= 1.0:
        faults.append(f"at_least must lie in [0, 1]; got {shown(at_least)}")
    if not is_number(confidence) or not 0.0 < confidence < 1.0:
        faults.append(f"confidence must lie between 0 and 1; got {shown(confidence)}")
    if not isinstance(subject.get("reduction"), str) or subject["reduction"] not in UNITS:
        faults.append(f"reduction must be sum or mean; got {shown(subject.get('reduction'))}")
    count = numbers.get("pairs")
    if type(count) is not int or count < 1 or not COUNT.holds(count):
        faults.append(f"a certificate needs at least one pair; got {shown(count)}")
    else:
        meeting = numbers.get("meeting")
        if type(meeting) is not int or not 0 <= meeting <= count:
            faults.append(f"meeting must be a count from 0 to {count}; got {shown(meeting)}")
    part = subject.get("part")
    if part is not None and (
        not isinstance(part, Mapping)
        or not all(isinstance(part.get(name), str) for name in ("column", "value"))
        or type(part.get("of")) is not int
        or not 1 <= part["of"] <= 10**6
    ):
        faults.append(f"a part is a column, a value and the number of values; got {shown(part)}")
    trained = numbers.get("trained_on_left_out", 0)
    if type(trained) is not int or trained < 0:
        faults.append(f"trained_on_left_out must be a count; got {shown(trained)}")
    if faults:
        raise CertificateError("; ".join(faults) + ".")


def exact(value: float) -> str:
    """A number as short as it can be written without changing it."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _percent_down(share: float) -> str:
    """A share in per cent, rounded down: what is printed is never more than what is proven."""
    return f"{math.floor(share * 10_000) / 100:.2f} %"
