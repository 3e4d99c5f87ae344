"""What a run proves of its pairs, as small JSON documents that anyone can recompute from their evidence."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files.schema import shown
from ..quoting import escaped
from .errors import CertificateError, is_number, read_json, refuse_faults
from .evidence import Part, evidence_of, parts_of
from .statement import FORMAT, KINDS, check_kind, document, joint_confidence

__all__ = [
    "FORMAT",
    "KINDS",
    "CertificateError",
    "certify_parts",
    "certify_run",
    "check",
    "check_kind",
    "document",
    "read_json",
]


def certify_parts(
    folder: str | Path, column: str, *, kind: str = "held_out", gamma: float | None = None, at_least: float = 0.0
) -> list[dict[str, Any]]:
    """A certificate for each value of a column, all of them true together with 95 % confidence.

    Of G values each is made at 1 − 0.05/G (Bonferroni). γ is by default that of the run, or of the group where the column
    is the run's `group_column`. Otherwise as `certify_run`.
    """
    return [certify_run(folder, kind=kind, gamma=gamma, at_least=at_least, part=part) for part in parts_of(folder, column)]


def certify_run(
    folder: str | Path,
    *,
    kind: str = "held_out",
    gamma: float | None = None,
    at_least: float = 0.0,
    part: Part | None = None,
) -> dict[str, Any]:
    """The certificate of a run's folder (docs/theory.md, 'Certificates').

    With k of n held-out pairs at `δ_θ ≥ γ`, the exact one-sided 95 % Clopper–Pearson lower bound on the share of such pairs
    in the population. From pairs.json, or, for the run's own γ, from the counts in metrics.json. Losses are never used.

    Args:
        folder: holds pairs.json and metrics.json, as `trl-cpo train` writes them.
        kind: "held_out", the one kind there is.
        gamma: γ, nats of the run's reduction; by default the run's.
        at_least: the share, in [0, 1], that the certified share is held against.
        part: of these pairs alone; see `certify_parts`.

    Returns:
        The document, ready for JSON. Its "holds" says whether the certified share is above 0 and at least `at_least`.

    Raises:
        CertificateError: a file is missing or cannot be read; a number is NaN; there are no pairs; pairs that were
            trained on are to speak for others; there is no such kind.
    """
    check_kind(kind)
    evidence = evidence_of(folder, gamma, part)
    return document(kind=kind, at_least=at_least, confidence=joint_confidence(evidence["subject"]), **evidence)


def check(found: Any, folder: str | Path | None = None) -> list[str]:
    """Recomputes a certificate and says, a line each, which fields differ; empty where none does.

    Without a folder it is recomputed from the numbers in it, which shows that it does not contradict itself; with the
    run's folder, from the run's files, which shows that it is theirs.

    Raises:
        CertificateError: it is no certificate of this format, or `certify_run` cannot make one of the folder.
    """
    if not isinstance(found, dict) or found.get("certificate") != "trl-cpo":
        raise CertificateError('This is no certificate of trl-cpo: it lacks "certificate": "trl-cpo".')
    refuse_faults(found, "This certificate")
    version = found.get("format")
    if type(version) is not int or version not in (1, FORMAT):
        raise CertificateError(f"This certificate has format {shown(version)}; this version reads formats 1 and {FORMAT}.")
    asked, evidence = (found[name] if isinstance(found.get(name), dict) else {} for name in ("asked", "evidence"))
    parts: dict[str, Any] = {"subject": found.get("subject"), **{name: evidence.get(name) for name in ("numbers", "files")}}
    lacking = [name for name in ("gamma", "at_least", "confidence") if name not in asked]
    lacking += [name for name, value in parts.items() if not isinstance(value, dict)]
    if lacking or not all(isinstance(print_, dict) for print_ in parts["files"].values()):
        raise CertificateError(f"This certificate cannot be recomputed: it lacks {', '.join(lacking) or 'hashes of files'}.")
    kind = str(found.get("kind"))
    check_kind(kind)
    if folder is not None:
        parts = evidence_of(folder, asked["gamma"], _part_of(found["subject"]))
        asked = {"at_least": asked["at_least"], "confidence": joint_confidence(parts["subject"])}
    return list(_differences(found, document(kind=kind, **asked, **parts, version=version), ""))


def _part_of(subject: dict[str, Any]) -> Part | None:
    part = subject.get("part")
    if part is None:
        return None
    if not isinstance(part, dict) or not all(isinstance(part.get(name), str) for name in ("column", "value")):
        raise CertificateError("This certificate does not say of which part of the pairs it is.")
    return Part(part["column"], part["value"])


def _differences(found: Any, recomputed: Any, path: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(recomputed, dict):
        for name in found.keys() | recomputed.keys():
            inner = f"{path}.{escaped(name)}" if path else escaped(name)
            if name not in recomputed or name not in found:
                yield f"{inner}: {'there should be none' if name not in recomputed else 'missing'}"
            else:
                yield from _differences(found[name], recomputed[name], inner)
    elif is_number(found) and is_number(recomputed):
        # Versions of the libraries may differ in the last digits.
        if not math.isclose(found, recomputed, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{path}: {shown(found)} in the certificate, {shown(recomputed)} recomputed"
    elif type(found) is not type(recomputed) or found != recomputed:
        yield f"{path}: {shown(found)} in the certificate, {shown(recomputed)} recomputed"
