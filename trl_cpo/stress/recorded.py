"""A run as its folder records it: what was scored, how, and the held-out pairs, read again."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.identity import digests_of, without
from ..data.loading import SourceError, hold_out
from ..data.models import base_of_adapter, source_of
from ..data.reading import read_pairs
from ..files.run_files import KNOWN_COLUMNS, METRICS, PAIRS, TOKEN_COLUMNS
from ..files.schema import NATS, faults, is_number
from ..units import UNITS

if TYPE_CHECKING:
    from datasets import Dataset

_DTYPES = ("float32", "bfloat16", "float16", "auto")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")


class StressError(ValueError):
    """A run cannot be looked at again: what was got, what is needed, what to do."""


@dataclass(frozen=True)
class Recorded:
    """What a run's folder says.

    Attributes:
        folder: of the run, and of its trained model.
        model: the reference, as it was named.
        dataset, split: of the held-out pairs; the split "held out" is a part of `train_split`.
        about: the record's "pairs".
        settings: the record's "config".
        reduction, gamma: of the gaps.
        rows: log-probabilities as `KNOWN_COLUMNS`, (n, 4), nats.
        tokens: of the chosen and rejected answers, (n, 2); None: not known.
        left_out: held-out pairs that have no row.
    """

    folder: Path
    model: str
    dataset: str
    split: str
    about: dict[str, Any]
    settings: dict[str, Any]
    reduction: str
    gamma: float
    rows: np.ndarray
    tokens: np.ndarray | None
    left_out: int

    @property
    def dtype(self) -> str:
        """Of the weights in training."""
        loading = self.settings.get("model_init_kwargs")
        found = loading.get("dtype") if isinstance(loading, dict) else None
        return found if found in _DTYPES else "float32"

    @property
    def is_half(self) -> bool:
        """Whether the run's numbers carry the rounding of half precision."""
        return self.dtype in _DTYPES[1:] or any(self.settings.get(name) for name in ("bf16", "fp16"))

    def close(self, found: np.ndarray, recorded: np.ndarray) -> np.ndarray:
        """Where log-probabilities are the recorded ones within rounding, elementwise."""
        if self.is_half:
            return np.isclose(found, recorded, rtol=5e-3, atol=0.02)
        return np.isclose(found, recorded, rtol=1e-4, atol=1e-3)


def read_recorded(folder: str | Path) -> Recorded:
    """Reads a run's folder; loads no pairs and no model.

    Raises:
        StressError: it is no finished run's, of a newer version, has no held-out pairs, or holds what cannot be.
    """
    path = Path(folder)
    if not path.is_dir():
        raise StressError(f"There is no folder {path}. Give the folder that trl-cpo train wrote.")
    record, pairs = (_document(path, name) for name in (METRICS, PAIRS))
    _refuse_newer(record, path)
    if not (path / "config.json").is_file() and base_of_adapter(str(path)) is None:
        raise StressError(
            f"{path} holds no model (neither config.json nor adapter_config.json). Give the whole folder of a run."
        )
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        raise StressError(f"{path} holds no weights (*.safetensors). Give the whole folder of a run.")
    about, settings, model = record.get("pairs"), record.get("config"), record.get("model")
    named = about.get("dataset_name") if isinstance(about, dict) else None
    if not isinstance(about, dict) or not isinstance(settings, dict) or not all(isinstance(x, str) for x in (named, model)):
        raise StressError(f"{path / METRICS} names no model or no pairs. Give the folder of a run of trl-cpo train.")
    if settings.get("sync_ref_model"):
        raise StressError(
            "The reference of this run followed its policy (sync_ref_model), and was not kept: δ_ref is not known."
        )
    rows, tokens = _rows(pairs, path)
    counted = record.get("held_out_pairs")
    if counted != len(rows):
        raise StressError(f"The files of this run disagree: {PAIRS} has {len(rows)} pairs, {METRICS} {counted}. Take it anew.")
    split, reduction = pairs.get("split"), pairs.get("reduction")
    gamma: Any = pairs.get("gamma")
    if not isinstance(split, str) or reduction not in UNITS or not is_number(gamma):
        raise StressError(f"{path / PAIRS} does not say split, reduction and gamma as a run writes them. Was it changed?")
    return Recorded(
        folder=path,
        model=str(model),
        dataset=str(named),
        split=split,
        about=about,
        settings=settings,
        reduction=str(reduction),
        gamma=float(gamma),
        rows=rows,
        tokens=tokens,
        left_out=pairs.get("left_out") or 0,
    )


def held_out_pairs(run: Recorded, dataset: str | None = None) -> "Dataset":
    """The pairs that the run's held-out ones are the first of, in their order.

    Args:
        dataset: where they are now, if elsewhere.

    Raises:
        StressError: they cannot be read.
    """
    source, about = dataset or run.dataset, run.about
    cut = run.split == "held out"
    split = about.get("train_split") if cut else about.get("test_split", run.split)
    try:
        pairs, _ = read_pairs(
            source,
            split if isinstance(split, str) else "train",
            config=_text(about.get("dataset_config")),
            data_dir=_text(about.get("data_dir")),
        )
        trained = digests_of(about.get("digests"))
        if cut:
            count = about.get("held_out")
            if type(count) is not int:  # an earlier version did not record it: what was not trained on
                count = len(without(pairs, trained))
            _, pairs = hold_out(pairs, count, seed=0)
    except SourceError as error:
        raise StressError(
            f"The held-out pairs cannot be read again: {error}\nIf they are elsewhere now, give --dataset."
        ) from error
    return without(pairs, trained) if trained else pairs


def gammas(run: Recorded, pairs: "Dataset") -> np.ndarray:
    """γ of each pair, (n,): the run's, or that of the pair's group."""
    own, column = run.settings.get("gamma_by_group"), run.settings.get("group_column")
    values = np.full(len(pairs), run.gamma)
    if isinstance(own, dict) and column in pairs.column_names:
        named = [own.get(str(value)) for value in pairs[column]]
        values = np.array([gamma if is_number(gamma) else run.gamma for gamma in named], dtype=np.float64)
    return values


def reference_of(run: Recorded, given: str | None) -> str:
    """Where the reference is loaded from."""
    return source_of(given or run.model)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _document(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "no finished run of trl-cpo train" if name == METRICS else "without its held-out pairs"
        raise StressError(f"{folder} is {what}: it has no {name}. Give the folder that a run has left at its end.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StressError(
            f"{file} cannot be read: {type(error).__name__}: {error}. A run writes it whole; take it anew."
        ) from error
    if not isinstance(found, dict):
        raise StressError(f"{file} holds a {type(found).__name__}, not what a run writes.")
    wrong = next(faults(found), None)
    if wrong is not None:
        raise StressError(f"{file} holds what cannot be: {wrong}. It was changed, or is damaged.")
    return found


def _refuse_newer(record: dict[str, Any], folder: Path) -> None:
    from packaging.version import InvalidVersion, Version

    from .. import __version__

    versions = record.get("versions")
    made_by = versions.get("trl-cpo") if isinstance(versions, dict) else None
    try:
        newer = isinstance(made_by, str) and Version(made_by) > Version(__version__)
    except InvalidVersion:
        return
    if newer:
        raise StressError(f"{folder} is of trl-cpo {made_by}; this is {__version__}, which may misread it. Upgrade trl-cpo.")


def _rows(pairs: dict[str, Any], folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    columns, rows = pairs.get("columns"), pairs.get("rows")
    if not isinstance(rows, list) or not rows:
        raise StressError(f"{folder / PAIRS} holds no held-out pair. Train with held-out pairs, and give that run.")
    columns = columns if isinstance(columns, list) else []
    if any(name not in columns for name in KNOWN_COLUMNS) or any(
        not isinstance(row, list) or len(row) != len(columns) for row in rows
    ):
        raise StressError(
            f"{folder / PAIRS} must have the columns {', '.join(KNOWN_COLUMNS)}, with a number each in every row."
        )
    places = [columns.index(name) for name in KNOWN_COLUMNS]
    known = [[row[place] for place in places] for row in rows]
    if not all(NATS.holds(value) for row in known for value in row):
        raise StressError(
            f"{folder / PAIRS} has log-probabilities that are none (null or NaN). Such a run has no gaps to compare."
        )
    tokens = None
    if all(name in columns for name in TOKEN_COLUMNS):
        places = [columns.index(name) for name in TOKEN_COLUMNS]
        counts = [[row[place] for place in places] for row in rows]
        if all(is_number(value) and math.isfinite(value) for row in counts for value in row):
            tokens = np.array(counts, dtype=np.int64)
    return np.array(known, dtype=np.float64), tokens
