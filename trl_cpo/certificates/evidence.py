"""The evidence of a run's folder: the numbers in pairs.json and metrics.json, and hashes of both."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..constraints import CONSTRAINTS, Constraint
from ..data.identity import split_names
from ..files.run_files import KNOWN_COLUMNS, METRICS, PAIRS
from ..files.schema import COUNT, NATS, SHARE, shown
from ..units import UNITS
from .errors import CertificateError, is_number, read_json, refuse_faults
from .statement import exact


@dataclass(frozen=True)
class Part:
    """The pairs with one value of a column, which pairs.json has among its slices."""

    column: str
    value: str


def evidence_of(folder: str | Path, gamma: float | None, part: Part | None = None) -> dict[str, Any]:
    """What `document` needs from a run's folder: gamma (by default the run's, of its group), subject, numbers, files.

    Raises:
        CertificateError: as `certify_run`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CertificateError(
            f"There is no folder {folder}. Give the folder of a run, which holds pairs.json and metrics.json."
        )
    pairs, metrics = (read_json(folder / name) if (folder / name).is_file() else None for name in (PAIRS, METRICS))
    if pairs is None and metrics is None:
        raise CertificateError(
            f"{folder} holds neither pairs.json nor metrics.json, which a run writes at its end. Training losses, as in "
            "log.jsonl, certify nothing: they are of weights that changed."
        )
    used = [name for name, content in ((PAIRS, pairs), (METRICS, metrics)) if content is not None]
    return read_evidence(pairs, metrics, gamma, part) | {"files": {name: _fingerprint(folder / name) for name in used}}


def parts_of(folder: str | Path, column: str) -> list[Part]:
    """The parts of a run's pairs by a column, in the order of their names.

    Raises:
        CertificateError: there is no such column among the slices of pairs.json.
    """
    if not (Path(folder) / PAIRS).is_file():
        raise CertificateError(f"{folder} holds no {PAIRS}, whose columns part the pairs. Give the folder of a run.")
    pairs = read_json(Path(folder) / PAIRS)
    refuse_faults(pairs, PAIRS)
    return [Part(column, value) for value in sorted(set(_values(pairs, column)))]


def _values(pairs: Any, column: str) -> list[str]:
    """The value of a column for every pair, as text."""
    slices = pairs.get("slices") if isinstance(pairs, dict) else None
    slices = slices if isinstance(slices, dict) else {}
    values = slices.get(column)
    if not isinstance(values, list) or not values or len(values) != len(_part(pairs, "rows", "pairs.json", list)):
        raise CertificateError(
            f"pairs.json has no column {column!r} to part its pairs by, only {', '.join(sorted(slices)) or 'none'}. A run "
            "keeps columns of few values of its held-out pairs."
        )
    return [str(value) for value in values]


def read_evidence(pairs: Any, metrics: Any, gamma: float | None, part: Part | None = None) -> dict[str, Any]:
    """gamma, subject and numbers out of what pairs.json and metrics.json hold; None for a file that is not there.

    Raises:
        CertificateError: as `certify_run`.
    """
    for name, content in ((PAIRS, pairs), (METRICS, metrics)):
        refuse_faults(content, name)
    subject = _subject(pairs, metrics)
    own = _gammas_of_groups(metrics)
    if part is not None:
        values = _values(pairs, part.column)
        subject["part"] = {"column": part.column, "value": part.value, "of": len(set(values))}
    if gamma is None:
        of_group = part is not None and part.column == _part(metrics or {}, "config", METRICS).get("group_column")
        gamma = own.get(part.value, subject["gamma"]) if of_group and part is not None else subject["gamma"]
    if not is_number(gamma):
        raise CertificateError(f"gamma must be a finite number; got {shown(gamma)}.")
    if pairs is None:
        if own:
            raise CertificateError(
                "metrics.json counts the pairs at the γ of their groups; a certificate of one γ needs pairs.json."
            )
        numbers = _numbers_of_metrics(metrics, subject, gamma)
    else:
        of_part = None if part is None else [value == part.value for value in values]
        numbers = _numbers_of_pairs(pairs, metrics, subject, gamma, of_part)
    numbers |= _trained_on(pairs, metrics)
    return {"gamma": gamma, "subject": subject, "numbers": numbers}


def _subject(pairs: Any, metrics: Any) -> dict[str, Any]:
    """Of which run, from both files; they must agree."""
    config = _part(metrics, "config", "metrics.json") if metrics is not None else {}
    names = {"constraint": "constraint", "beta": "beta", "gamma": "gamma", "reduction": "logps_reduction"}
    subject = {}
    for name, field in names.items():
        told = {}
        if pairs is not None:
            told["pairs.json"] = _part(pairs, name, "pairs.json", object)
        if metrics is not None:
            told["metrics.json"] = _part(config, field, "metrics.json's config", object)
        first, *others = told.values()
        if any(other != first for other in others):
            raise CertificateError(
                f"The files of this run disagree on {name}: {told}. They are of different runs; evaluate the run again."
            )
        subject[name] = first
    # Trainers of other losses have no β; neither have pairs that a model scored outside a run.
    known = subject["beta"] is None or is_number(subject["beta"])
    if (
        not isinstance(subject["reduction"], str)
        or subject["reduction"] not in UNITS
        or not is_number(subject["gamma"])
        or not known
    ):
        raise CertificateError(f"The run's files do not say with what it was trained: {subject}.")
    subject["split"] = "held out" if pairs is None else _part(pairs, "split", "pairs.json", str)
    if metrics is not None:
        data = metrics.get("pairs")
        subject["dataset"] = data.get("dataset_name") if isinstance(data, dict) else None
        subject["model"] = metrics.get("model")
        subject["loss_type"] = config.get("loss_type")
        form = CONSTRAINTS.get(str(subject["constraint"]), Constraint)  # of another version, its hyperparameters are unknown
        own = form.hyperparameters().keys() - Constraint.hyperparameters().keys()
        if config.get("reach") is not None:
            own |= {"reach"}
        subject["hyperparameters"] = {name: config[name] for name in sorted(own & config.keys())}
    else:
        subject |= {name: pairs[name] for name in ("dataset", "model", "ref_model") if name in pairs}
    return subject


def _trained_on(pairs: Any, metrics: Any) -> dict[str, int]:
    """How many pairs were left out because they were trained on; nothing where none was.

    Raises:
        CertificateError: the pairs were trained on, by their split's name; or the files disagree.
    """
    learned = metrics.get("pairs") if metrics is not None else None
    learned = learned if isinstance(learned, dict) else {}
    by_content = learned.get("digests") is not None
    split = learned.get("test_split") if pairs is None else pairs["split"]
    if isinstance(split, str) and not by_content:
        trained = learned.get("train_split")
        names = split_names(trained) if isinstance(trained, str) else {"train"}
        if split.startswith("train") or names & split_names(split):
            raise CertificateError(
                f"The pairs of this run are of the split {split!r}: pairs that were trained on say nothing of others. "
                "Evaluate held-out pairs."
            )
    told = {METRICS: learned.get("trained_on_left_out") or 0} if by_content else {}
    if pairs is not None:
        told[PAIRS] = pairs.get("trained_on_left_out", 0)
    for file, count in told.items():
        if type(count) is not int:
            raise CertificateError(f"{file}: trained_on_left_out must be a count; got {shown(count)}.")
    if len(set(told.values())) > 1:
        raise CertificateError(f"The files of this run disagree on trained_on_left_out: {told}. Evaluate the run again.")
    count = next(iter(told.values()), 0)
    return {"trained_on_left_out": count} if count else {}


def _gammas_of_groups(metrics: Any) -> dict[str, Any]:
    """γ of the groups that have their own, by name, as the run's config says."""
    config = metrics.get("config") if isinstance(metrics, dict) else None
    own = config.get("gamma_by_group") if isinstance(config, dict) else None
    return {str(name): value for name, value in own.items()} if isinstance(own, dict) else {}


def _numbers_of_pairs(pairs, metrics, subject, gamma, of_part: list[bool] | None) -> dict[str, Any]:
    sides = KNOWN_COLUMNS[:2]
    columns, rows = _part(pairs, "columns", "pairs.json", list), _part(pairs, "rows", "pairs.json", list)
    if not all(side in columns for side in sides) or any(not isinstance(row, list) or len(row) != len(columns) for row in rows):
        raise CertificateError(f"pairs.json must have the columns {', '.join(sides)}, and a number for each in every row.")
    if not rows:
        raise CertificateError("pairs.json holds no pair: there is nothing to certify. Evaluate held-out pairs.")
    where = [columns.index(side) for side in sides]
    logps = [[row[column] for column in where] for row in rows]
    bad = [index for index, row in enumerate(logps) if not all(map(NATS.holds, row))]
    if bad:
        raise CertificateError(
            f"pairs.json: {len(bad)} pairs have log-probabilities that are none, the first in row {bad[0]}: "
            f"{shown(logps[bad[0]])}. A pair without a gap cannot be counted; find out why the model gives none."
        )
    if metrics is not None:
        _refuse_stale([chosen - rejected for chosen, rejected in logps], metrics)
    if of_part is not None:
        logps = [row for row, counts in zip(logps, of_part, strict=True) if counts]
        if not logps:
            raise CertificateError(f"pairs.json holds no pair of {subject['part']['column']}={subject['part']['value']!r}.")
    # Of the recorded numbers exactly: a difference that was rounded could reach a γ that the numbers miss by less than a
    # float can tell.
    meeting = sum(math.fsum((chosen, -rejected, -gamma)) >= 0.0 for chosen, rejected in logps)
    left_out = pairs.get("left_out", 0)
    if type(left_out) is not int:
        raise CertificateError(f"pairs.json: left_out must be a count; got {shown(left_out)}.")
    # A pair that could not be scored has no gap to meet γ with; of which part it was is not known.
    return {"pairs": len(logps) + left_out, "meeting": meeting}


def _numbers_of_metrics(metrics, subject, gamma) -> dict[str, Any]:
    if gamma != subject["gamma"]:
        raise CertificateError(
            f"metrics.json counts the pairs at the run's γ = {exact(subject['gamma'])} alone; γ = {gamma!r} needs pairs.json."
        )
    after = _part(metrics, "after", "metrics.json")
    count, rate = (after.get(f"eval_cpo/{name}") for name in ("pairs", "violation_rate"))
    if not COUNT.holds(count) or not SHARE.holds(rate) or count < 1:
        raise CertificateError(
            f"metrics.json must say on how many pairs it evaluated and what fraction violates γ: eval_cpo/pairs is {count!r}, "
            f"eval_cpo/violation_rate {rate!r}."
        )
    violating = rate * count
    if abs(violating - round(violating)) > 1e-6 * count:
        raise CertificateError(
            f"metrics.json: a fraction of {rate!r} of {count} pairs is no whole number of pairs. It is not of this evaluation."
        )
    lost = after.get("eval_cpo/nonfinite_pairs", 0)
    if lost != 0:
        raise CertificateError(
            f"metrics.json: {lost} pairs have log-probabilities that are none. A pair without a gap cannot be counted; find "
            "out why the model gives none."
        )
    # As in pairs.json, pairs that were left out do not meet γ.
    left_out = after.get("eval_cpo/incomparable_pairs", 0) or 0
    return {"pairs": int(count) + int(left_out), "meeting": int(count) - round(violating)}


def _refuse_stale(gaps, metrics) -> None:
    """Raises where number and mean gap of pairs.json are not those of the last evaluation: it is of other weights or pairs."""
    after = metrics.get("after")
    counted = after.get("eval_cpo/pairs") if isinstance(after, dict) else None
    if counted is not None and counted != len(gaps):
        raise CertificateError(
            f"The files of this run disagree: pairs.json has {len(gaps)} pairs, metrics.json {counted}. One of them is of "
            "another evaluation; evaluate the run again."
        )
    logged = after.get("eval_cpo/gap") if isinstance(after, dict) else None
    mean, size = math.fsum(gaps) / len(gaps), math.fsum(map(abs, gaps)) / len(gaps)
    # Another batch's padding moves a log-probability in half precision, and a mean over pairs by far less than this.
    if is_number(logged) and abs(mean - logged) > 0.05 * (1.0 + size):
        raise CertificateError(
            f"The files of this run disagree: the mean gap is {mean:.6g} nats in pairs.json and {logged:.6g} in metrics.json. "
            "One of them is of another evaluation; evaluate the run again."
        )


def _part(whole: Any, name: str, where: str, kind: type = dict) -> Any:
    if not isinstance(whole, dict) or name not in whole or not isinstance(whole[name], kind):
        raise CertificateError(f"{where} lacks {name!r}, or it is not what it should be. Was it written by trl-cpo train?")
    return whole[name]


def _fingerprint(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"blake2b": hashlib.blake2b(content, digest_size=32).hexdigest(), "bytes": len(content)}
