"""From a source to the pairs that are trained on or scored: read, put into TRL's form, and cut to size."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..quoting import names
from .hh import RowReport
from .loading import SourceError, load_pairs, to_conversational

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def read_pairs(
    source: str,
    split: str,
    *,
    config: str | None = None,
    data_dir: str | None = None,
    streaming: bool = False,
    number_as: str | None = None,
    needs: Sequence[str] = (),
) -> "tuple[Dataset | IterableDataset, RowReport | None]":
    """The pairs of a split in a form that TRL reads, HH-RLHF text as messages, and for that a report on rows refused.

    Args:
        source, split, config, data_dir, streaming: as for `load_pairs`.
        number_as: a column to add, with each row's number in the source; not of a streamed one.
        needs: columns that must be there.

    Raises:
        SourceError: the pairs cannot be read or used, or a column that is needed is missing.
    """
    loaded = load_pairs(source, split, config=config, data_dir=data_dir, streaming=streaming)
    missing = [name for name in needs if name not in loaded.column_names]
    if missing:
        raise SourceError(
            f"{source}, split {split!r}, has no column {' and no column '.join(map(repr, missing))}; its columns are "
            f"{names(loaded.column_names)}. Give some of these."
        )
    if number_as is not None:
        loaded = loaded.add_column(number_as, list(range(len(loaded))))
    return to_conversational(loaded)


def sample_pairs(pairs: "Dataset", count: int | None, seed: int) -> "Dataset":
    """`count` pairs drawn at random, in the order of the set, or all where there are no more or `count` is None.

    For numbers about the whole set: an interval from the first rows would be about the first rows.
    """
    if count is None or count >= len(pairs):
        return pairs
    return pairs.select(sorted(np.random.default_rng(seed).choice(len(pairs), count, replace=False).tolist()))
