"""Reads the labels of pairs from a dataset's columns: checked before training, then carried beside the tokens."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets
from torch import Tensor

from .fields import FIT, LabelFields
from .form import PairLabels
from .scores import FittedScale, fit_scale

#: Columns of a prepared dataset, and of a batch, that hold labels, and their type.
CARRIED = {"cpo_probability": "float32", "cpo_margin": "float32", "cpo_group": "int64"}
#: More groups than this are taken for a mistake: a column of texts, or of numbers.
MOST_GROUPS = 100


@dataclass(frozen=True)
class LabelColumns:
    """Where the labels of pairs are, and the groups that there are.

    Attributes:
        options: the fields that name the columns.
        groups: the names of the groups, sorted; a group's index is its place here.
        scale: η of the scores; None without scores.
        fitted: how η was fitted, if it was.
        shares: of each group, the share of the training pairs; empty where they cannot be counted.
    """

    options: LabelFields
    groups: tuple[str, ...] = ()
    scale: float | None = None
    fitted: FittedScale | None = None
    shares: Mapping[str, float] | None = None

    @classmethod
    def of(cls, options: LabelFields, datasets: Mapping[str, Any]) -> "LabelColumns":
        """Checks the columns of all datasets, finds the groups, and fits the scale of scores if that is asked for.

        Args:
            datasets: "train_dataset" and "eval_dataset": a dataset, a dictionary of datasets, or None.

        Raises:
            ValueError: a column is missing, or a row's label is not what it has to be; or groups are named that no pair is
                of. The message names the row.
        """
        sets = dict(_each(datasets))
        for name, dataset in sets.items():
            _check(options, dataset, name)
        groups, shares = cls._groups(options, sets)
        scale, fitted = options.score_scale, None
        if scale == FIT:
            fitted = _fitted(options, {name: each for name, each in sets.items() if name != "train_dataset"})
            scale = fitted.scale
        return cls(options, groups, scale, fitted, shares)

    @staticmethod
    def _groups(options: LabelFields, sets: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, float] | None]:
        if options.group_column is None:
            return (), None
        asked = {str(name) for each in (options.gamma_by_group, options.epsilon_by_group) for name in (each or {})}
        counts = {
            name: Counter(map(str, each[options.group_column])) for name, each in sets.items() if isinstance(each, Dataset)
        }
        if len(counts) < len(sets):  # a stream is not read in advance
            return tuple(sorted(asked.union(*counts.values()))), None
        found = set().union(*counts.values())
        if unknown := sorted(asked - found):
            raise ValueError(
                f"No pair is of the group {', '.join(map(repr, unknown))}, which gamma_by_group or epsilon_by_group names. The "
                f"column {options.group_column!r} has {_listed(sorted(found))}. Correct the name, or leave it out."
            )
        if len(found) > MOST_GROUPS:
            raise ValueError(
                f"The column {options.group_column!r} has {len(found)} different values, such as {_listed(sorted(found)[:3])}: "
                f"too many for groups (at most {MOST_GROUPS}). Name a column with few values in group_column."
            )
        trained = counts.get("train_dataset", Counter())
        total = sum(trained.values())
        return tuple(sorted(found)), {name: count / total for name, count in trained.items()} if total else None

    @property
    def present(self) -> tuple[bool, bool, bool]:
        """Whether pairs have a probability, a margin and a group."""
        options = self.options
        return options.has_soft_labels, options.margin_column is not None, options.group_column is not None

    @property
    def carried(self) -> tuple[str, ...]:
        """The columns that `attached` adds and `taken` takes out of a batch."""
        return tuple(name for name, wanted in zip(CARRIED, self.present, strict=True) if wanted)

    def attached(self, dataset: Any, name: str) -> Any:
        """`dataset` with its labels as numbers in the columns of `carried`."""
        if not self.carried:
            return dataset
        if isinstance(dataset, IterableDataset):
            return dataset.map(lambda row: self._of_rows({key: [value] for key, value in row.items()}, name, single=True))
        _check(self.options, dataset, name)
        columns = [column for column in _named(self.options) if column in dataset.column_names]
        labels = self._of_rows({column: dataset[column] for column in columns}, name)
        features = Features({column: Value(CARRIED[column]) for column in labels})
        # A dataset that was prepared before already has these columns.
        dataset = dataset.remove_columns([column for column in labels if column in dataset.column_names])
        return concatenate_datasets([dataset, Dataset.from_dict(labels, features=features)], axis=1)

    def _of_rows(self, rows: Mapping[str, Sequence], name: str, *, single: bool = False) -> dict[str, Any]:
        options, labels = self.options, {}
        if single:
            for fault in _faults(options, rows):
                raise ValueError(f"A row of {name}: {fault[1]}.")
        if options.probability_column is not None:
            labels["cpo_probability"] = [float(p) for p in rows[options.probability_column]]
        elif options.score_columns is not None:
            differences = _differences(options, rows)
            labels["cpo_probability"] = (0.5 * (1.0 + np.tanh(0.5 * self.scale * differences))).tolist()
        if options.margin_column is not None:
            labels["cpo_margin"] = [float(m) for m in rows[options.margin_column]]
        if options.group_column is not None:
            labels["cpo_group"] = [self._index(str(group), name) for group in rows[options.group_column]]
        return {column: values[0] for column, values in labels.items()} if single else labels

    def _index(self, group: str, name: str) -> int:
        if group not in self.groups:
            raise ValueError(
                f"{name} has a pair of the group {group!r}; known are {_listed(self.groups)}. Groups are those of the datasets "
                "that the trainer was made with; for a streamed one, name every group in gamma_by_group."
            )
        return self.groups.index(group)

    def taken(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], PairLabels]:
        """A collated batch without its labels, and the labels."""
        labels = {name: batch[name] for name in self.carried}
        rest = {name: value for name, value in batch.items() if name not in labels}
        return rest, PairLabels(*(labels.get(name) for name in CARRIED))

    def gammas(self, gamma: float) -> Tensor | None:
        """γ of each group, (G,), nats; None where all have the same."""
        own = {str(name): value for name, value in (self.options.gamma_by_group or {}).items()}
        return torch.tensor([float(own.get(group, gamma)) for group in self.groups]) if own else None

    def epsilons(self) -> dict[str, float]:
        """ε of the groups that have their own."""
        return {str(name): float(value) for name, value in (self.options.epsilon_by_group or {}).items()}


def _each(datasets: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, dataset in datasets.items():
        if isinstance(dataset, Mapping):
            yield from ((f"{name}[{key!r}]", part) for key, part in dataset.items())
        elif dataset is not None:
            yield name, dataset


def _named(options: LabelFields) -> list[str]:
    """The columns of the data that the options name."""
    single = (options.probability_column, options.margin_column, options.group_column)
    return [name for name in (*single, *(options.score_columns or ())) if name is not None]


def _check(options: LabelFields, dataset: Any, name: str) -> None:
    """Raises `ValueError` if a column is missing, or a label cannot be used; of a stream, the first row is looked at."""
    stream = not isinstance(dataset, Dataset)
    first = next(iter(dataset), {}) if stream else {}
    columns = list(first) if stream else dataset.column_names
    if missing := [column for column in _named(options) if column not in columns]:
        asked = {getattr(options, each): each for each in ("probability_column", "margin_column", "group_column")}
        option = asked.get(missing[0], "score_columns")
        raise ValueError(
            f"{name} has no column {missing[0]!r}, which {option} names; its columns are {sorted(columns)}. Correct the name, "
            "or leave the option out."
        )
    rows = {column: [first[column]] if stream else dataset[column] for column in _named(options)}
    for row, fault in _faults(options, rows):
        raise ValueError(f"{name}, row {row}: {fault}. Correct it, or leave the pair out.")


def _faults(options: LabelFields, rows: Mapping[str, Sequence]) -> Iterator[tuple[int, str]]:
    """The number of each row that has a label which cannot be used, and why."""
    limits = {
        options.probability_column: (0.0, 1.0, "a probability, from 0 to 1"),
        options.margin_column: (0.0, math.inf, "a margin, a finite number ≥ 0"),
        **dict.fromkeys(options.score_columns or (), (-math.inf, math.inf, "a score, a finite number")),
    }
    for column, (lowest, highest, what) in limits.items():
        if column is None:
            continue
        for row, value in enumerate(rows[column]):
            is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or not lowest <= value <= highest:
                yield row, f"{column} must be {what}; got {value!r}"
    if options.group_column is not None:
        for row, value in enumerate(rows[options.group_column]):
            if isinstance(value, (list, dict)) or value is None or not str(value).strip() or "/" in str(value):
                yield row, f"{options.group_column} must be the name of a group, without '/'; got {value!r}"


def _differences(options: LabelFields, rows: Mapping[str, Sequence]) -> np.ndarray:
    chosen, rejected = (np.array(list(rows[column]), dtype=np.float64) for column in options.score_columns)
    return chosen - rejected


def _fitted(options: LabelFields, held_out: Mapping[str, Any]) -> FittedScale:
    sets = [each for each in held_out.values() if isinstance(each, Dataset)]
    if not sets:
        raise ValueError(
            "score_scale='fit' needs pairs that are not trained on, as an eval_dataset that is not streamed. Give one, or a "
            "number."
        )
    return fit_scale(np.concatenate([_differences(options, {c: each[c] for c in options.score_columns}) for each in sets]))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:8])) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
