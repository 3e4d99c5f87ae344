"""The table of log-probabilities on disk: a folder of shards, each whole or not there, and a manifest for people."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...files.atomic import DRAFTS, replace_file
from ...files.cache import is_trusted

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
#: What is stored of each pair: summed log-probabilities in nats, and the tokens of each answer.
COLUMNS = {
    "chosen_logps": np.dtype("<f4"),
    "rejected_logps": np.dtype("<f4"),
    "chosen_tokens": np.dtype("<i4"),
    "rejected_tokens": np.dtype("<i4"),
}
# A shard is written in milliseconds; what is left of one an hour later is nobody's.
_STALE_SECONDS = 3600


@dataclass(frozen=True)
class ScoreTable:
    """The log-probabilities of N pairs under one model, in the order of their dataset.

    Attributes:
        chosen_logps, rejected_logps: (N,) float32, nats, summed over the tokens of the answer (weighted by `ld_alpha` where
            that is set).
        chosen_tokens, rejected_tokens: (N,) int32, tokens of the answer after truncation; the mean per token is
            `logps / max(tokens, 1)`.
        folder: where the table lies; None if it is not stored.
    """

    chosen_logps: np.ndarray
    rejected_logps: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.chosen_logps)

    @classmethod
    def empty(cls, pairs: int, folder: Path | None = None) -> "ScoreTable":
        """A table of `pairs` rows, not filled in yet: NaN and −1."""
        values = {name: np.full(pairs, np.nan if dtype.kind == "f" else -1, dtype=dtype) for name, dtype in COLUMNS.items()}
        return cls(**values, folder=folder)

    def put(self, rows: np.ndarray | Sequence[int], values: dict[str, np.ndarray]) -> None:
        """Fills in rows."""
        for name in COLUMNS:
            getattr(self, name)[rows] = values[name]

    def take(self, rows: np.ndarray | Sequence[int]) -> dict[str, np.ndarray]:
        """The values of rows, by column."""
        return {name: getattr(self, name)[rows] for name in COLUMNS}


class ScoreStore:
    """A folder with one file a shard.

    A shard is written whole or not at all (`replace_file`), so that a name that can be read stands for a whole file; two
    runs that write the same shard replace equal values. It holds the rows it is about and a digest of its contents, and is
    read only if both are right.

    Args:
        folder: made when needed.
        shards: the rows of each shard.
    """

    def __init__(self, folder: Path, shards: Sequence[np.ndarray]):
        self.folder = folder
        self.shards = [np.asarray(rows, dtype="<i8") for rows in shards]

    def open(self, about: dict[str, Any]) -> None:
        """Makes the folder, with `about` in its manifest, and removes what killed runs left half written.

        Raises:
            OSError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(about, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
            replace_file(self.folder / MANIFEST, text.encode())
            # By the clock of the disk: this process may have another one than those that write beside it.
            now = (self.folder / MANIFEST).stat().st_mtime
        except OSError as error:
            raise OSError(
                f"Log-probabilities are stored as they are computed, and {self.folder} cannot be written: {error}. Set "
                "TRL_CPO_CACHE to a folder that can."
            ) from error
        for leftover in self.folder.glob(DRAFTS):
            try:
                if now - leftover.stat().st_mtime > _STALE_SECONDS:
                    leftover.unlink()
            except OSError:
                continue  # its process just renamed it

    def file(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{shard:06d}.safetensors"

    def read(self, shard: int) -> dict[str, np.ndarray] | None:
        """The values of a shard by column; None if it is not there or cannot be trusted, which is said in the log."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        file = self.file(shard)
        try:
            with open(os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as stream:
                if not is_trusted(os.fstat(stream.fileno()), self.folder):
                    return self._refuse(file, "another user wrote it, or everybody can write it")
                found = load(stream.read())
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            return self._refuse(file, str(error))
        rows = self.shards[shard]
        wanted = {"rows": (rows.dtype, rows.shape), "digest": (np.dtype("u1"), (_digest(rows, {}).size,))}
        wanted |= {name: (dtype, rows.shape) for name, dtype in COLUMNS.items()}
        if {name: (array.dtype, array.shape) for name, array in found.items()} != wanted:
            return self._refuse(file, "other columns, types or sizes than a shard's")
        values = {name: found[name] for name in COLUMNS}
        if not np.array_equal(found["rows"], rows):
            return self._refuse(file, "it is about other pairs")
        if not np.array_equal(found["digest"], _digest(rows, values)):
            return self._refuse(file, "its contents have changed since it was written")
        if not all(np.isfinite(column).all() for column in values.values()):
            return self._refuse(file, "not all of its values are finite")
        return values

    def write(self, shard: int, values: dict[str, np.ndarray]) -> None:
        """Writes a shard, whole or not at all."""
        from safetensors.numpy import save

        rows = self.shards[shard]
        values = {name: np.ascontiguousarray(values[name], dtype=dtype) for name, dtype in COLUMNS.items()}
        replace_file(self.file(shard), save({"rows": rows, "digest": _digest(rows, values), **values}))

    def _refuse(self, file: Path, reason: str) -> None:
        logger.warning("%s is not used, and scored again: %s", file, reason)


def _digest(rows: np.ndarray, values: dict[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.blake2b(rows.tobytes(), digest_size=16)
    for name in sorted(values):
        digest.update(values[name].tobytes())
    return np.frombuffer(digest.digest(), dtype="u1").copy()
