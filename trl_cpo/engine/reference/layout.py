"""Which pairs are scored together, and which are stored together."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

#: Pairs in a shard: what a killed run loses at most of what it had scored, and what one file holds.
SHARD_PAIRS = 128


@dataclass(frozen=True)
class Batch:
    """One forward: the rows it runs, of which the first `counted` are its own and the rest fill it up."""

    shard: int
    rows: tuple[int, ...]
    counted: int


@dataclass(frozen=True)
class Layout:
    """The rows of each shard, in order, and of the batches within it.

    `by_length` puts rows of like length together, the longest first, so that padding costs little and a batch that does
    not fit in memory fails at the start. Shards then do not depend on the batch size: tables scored in batches of
    another size are the same table. `as_dpo_trainer` keeps the batches that DPOTrainer forms, for equal rounding.

    Attributes:
        shards: rows of each shard; every row of the dataset is in exactly one.
        batch_size: pairs in a batch.
        filler: rows that a last, short batch is filled up with.
        order: "by length", or "as given", with all that decides the batches.
    """

    shards: tuple[np.ndarray, ...]
    batch_size: int
    filler: tuple[int, ...]
    order: str

    @classmethod
    def by_length(cls, lengths: Sequence[int] | np.ndarray, batch_size: int) -> "Layout":
        """Rows in falling order of `lengths` (N,), equal ones in the order of the dataset."""
        order = np.argsort(-np.asarray(lengths), kind="stable")
        return cls(_cut(order, SHARD_PAIRS), batch_size, (), "by length")

    @classmethod
    def as_dpo_trainer(cls, pairs: int, batch_size: int, processes: int) -> "Layout":
        """Rows as they come, in DPOTrainer's batches: on several processes it fills the last one up with the first rows."""
        missing = -pairs % batch_size if processes > 1 else 0
        order = f"as given, batches of {batch_size}, {missing} rows more in the last"
        # Batches must not cross the seam of two shards.
        size = -(-SHARD_PAIRS // batch_size) * batch_size
        return cls(_cut(np.arange(pairs), size), batch_size, tuple(islice(cycle(range(pairs)), missing)), order)

    @property
    def pairs(self) -> int:
        """Rows in all."""
        return sum(map(len, self.shards))

    def batches(self, shard: int) -> list[Batch]:
        """The batches of one shard."""
        size, rows = self.batch_size, self.shards[shard].tolist()
        batches = []
        for start in range(0, len(rows), size):
            own = rows[start : start + size]
            last = shard == len(self.shards) - 1 and start + size >= len(rows)
            batches.append(Batch(shard, (*own, *(self.filler if last else ())), len(own)))
        return batches


def _cut(order: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    return tuple(order[start : start + size] for start in range(0, len(order), size))
