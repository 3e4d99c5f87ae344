"""Filling a table: several processes share the work, and each shard is stored as soon as it is whole."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from .digests import text_digest
from .layout import Layout
from .store import COLUMNS, ScoreStore, ScoreTable

logger = logging.getLogger(__name__)

#: What a forward gives of each pair: the stored columns, and the scored tokens of both answers together.
WIDTH = len(COLUMNS) + 1
_NAMED = 10


class BadScores(ValueError):
    """Log-probabilities that no reference has: not finite, or exactly zero for whole answers."""


def agreed(accelerator: Accelerator, digest: str) -> str:
    """`digest` where all processes have the same; a digest of all of theirs where a process sees only its part."""
    every = gather_object([digest])
    return digest if len(set(every)) == 1 else text_digest(every)


def from_main(accelerator: Accelerator, decide: Callable[[], Any]) -> Any:
    """What `decide` gives on the main process, on every process; an `OSError` of it is raised on every process."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except OSError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome, from_process=0)
    if outcome[1] is not None:
        raise OSError(outcome[1])
    return outcome[0]


def stored(store: ScoreStore, layout: Layout, about: dict[str, Any]) -> tuple[ScoreTable, list[int]]:
    """The table as far as it is stored, and the shards that are missing."""
    store.open(about)
    table, missing = ScoreTable.empty(layout.pairs, store.folder), []
    for shard, rows in enumerate(layout.shards):
        values = store.read(shard)
        if values is None:
            missing.append(shard)
        else:
            table.put(rows, values)
    return table, missing


def fill(
    table: ScoreTable,
    missing: list[int],
    store: ScoreStore,
    layout: Layout,
    forward: Callable[[tuple[int, ...]], Tensor],
    accelerator: Accelerator,
    *,
    name: str,
    shows_progress: bool,
) -> None:
    """Scores the missing shards of `table`, in place, and stores each as soon as it is whole.

    Called by every process; they take the batches in turn and run equally many forwards, because a sharded model runs on
    all of them or on none. Every process ends with the whole table; the main one writes.

    Args:
        table: filled in where nothing is missing.
        missing: the shards to score.
        store, layout: where they go, and what is in them.
        forward: gives the values (len(rows), WIDTH) of rows of the dataset.
        accelerator: of the processes.
        name: of the dataset, for people.
        shows_progress: whether the main process shows a bar with pairs a second and the time left.

    Raises:
        BadScores: a value is not finite, or both log-probabilities of a pair with scored tokens are exactly zero; on every
            process, with the rows, before the shard is written.
        OSError: a shard cannot be written.
    """
    batches = [batch for shard in missing for batch in layout.batches(shard)]
    left = {shard: len(layout.shards[shard]) for shard in missing}
    # Not `disable=False`: where a bar may be shown, TQDM_DISABLE=1 can still hide it.
    hidden = {} if shows_progress and accelerator.is_main_process else {"disable": True}
    progress = tqdm(
        total=layout.pairs,
        initial=layout.pairs - sum(left.values()),
        desc=f"Reference log probs, {name} dataset",
        unit="pair",
        **hidden,
    )
    with progress:
        for start in range(0, len(batches), accelerator.num_processes):
            turn = batches[start : start + accelerator.num_processes]
            # With no batch left for this process it runs another's again, for the company, and the result is dropped.
            mine = turn[min(accelerator.process_index, len(turn) - 1)]
            values = forward(mine.rows)
            padded = values.new_zeros(layout.batch_size, WIDTH)
            padded[: len(values)] = values
            every = accelerator.gather(padded).cpu().numpy().reshape(-1, layout.batch_size, WIDTH)
            for batch, found in zip(turn, every, strict=False):
                rows, found = np.array(batch.rows[: batch.counted]), found[: batch.counted]
                _check(found, rows, name)
                table.put(rows, dict(zip(COLUMNS, found.T, strict=False)))
                left[batch.shard] -= len(rows)
                if not left[batch.shard] and accelerator.is_main_process:
                    store.write(batch.shard, table.take(layout.shards[batch.shard]))
                progress.update(len(rows))


def _check(values: np.ndarray, rows: np.ndarray, name: str) -> None:
    logps, scored = values[:, :2], values[:, -1]
    for bad, what, hint in (
        (
            ~np.isfinite(logps).all(axis=1),
            "not finite (NaN or infinite)",
            "Look for NaN in the reference's weights (a checkpoint of a run that diverged), for overflow in float16 (use "
            "bfloat16 or float32), and for tokens that the model can never give",
        ),
        (
            (logps == 0).all(axis=1) & (scored > 0),
            "exactly zero for both answers",
            "A model gives that when its forward is not run, or its weights are empty or not loaded",
        ),
    ):
        if bad.any():
            named = ", ".join(map(str, rows[bad][:_NAMED])) + (", …" if bad.sum() > _NAMED else "")
            raise BadScores(
                f"The reference's log-probabilities are {what} in rows {named} of the {name} dataset as prepared, and were "
                f"not stored. {hint}; or leave those rows out."
            )


def as_columns(chosen: Tensor, rejected: Tensor, completion_mask: Tensor) -> Tensor:
    """The values (B, WIDTH), float32, of B pairs: their summed log-probabilities (B,) and their mask (2B, T), chosen first."""
    chosen_tokens, rejected_tokens = completion_mask.sum(dim=1).chunk(2)
    # Nothing predicts the first token of a row.
    scored = sum(completion_mask[:, 1:].sum(dim=1).chunk(2))
    columns = chosen, rejected, chosen_tokens, rejected_tokens, scored
    return torch.stack([column.float() for column in columns], dim=1)
