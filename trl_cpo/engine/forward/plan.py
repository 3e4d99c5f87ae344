"""The packing plan: where every token of a batch of pairs goes when each pair's common prefix is computed once.

A pair is two rows of tokens with a common prefix. Packed, it is three consecutive parts:

    shared (s tokens) | tail of the chosen row (c tokens) | tail of the rejected row (r tokens)

with positions 0..s-1 | s..s+c-1 | s..s+r-1. The state of a shared token does not depend on the answer that follows, so
both rows use it: the first token of each answer is predicted from the same place, position s-1.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

SHARED, CHOSEN, REJECTED = 0, 1, 2


class NotPackable(ValueError):
    """The batch or model cannot be packed; the text is the reason, as a clause for a log line."""


@dataclass(frozen=True)
class PairParts:
    """One pair in the packed rows: its row, its start in that row, and its three lengths in tokens."""

    pair: int
    row: int
    start: int
    shared: int
    chosen: int
    rejected: int

    @property
    def tokens(self) -> int:
        """Number of tokens of the pair: s + c + r."""
        return self.shared + self.chosen + self.rejected


@dataclass(frozen=True)
class PackingPlan:
    """The packed rows of one batch, and the mapping back to TRL's layout.

    R packed rows of L places hold the tokens of the padded (2B, T) batch. A "flat" place is a row-major index, over (R, L)
    for packed and over (2B, T) for padded places.

    Attributes:
        parts: the pairs in batch order, without pairs that have no tokens.
        shape: (R, L).
        source: (R, L), flat padded place of the token that stands here; filling repeats the first token.
        position_ids: (R, L), the token's position in its own sequence; 0 for filling.
        pair: (R, L), the pair that a place belongs to; -1 for filling.
        branch: (R, L), SHARED, CHOSEN or REJECTED.
        home: (2B, T), flat packed place of a padded token; 0 for padding.
        scored: (N,), flat packed place that predicts each scored token, in padded order.
        labels: (N,), the scored tokens.
        target: (N,), flat place of each in TRL's output layout (2B, T-1).
        output_shape: (2B, T-1).
    """

    parts: tuple[PairParts, ...]
    shape: tuple[int, int]
    source: torch.Tensor
    position_ids: torch.Tensor
    pair: torch.Tensor
    branch: torch.Tensor
    home: torch.Tensor
    scored: torch.Tensor
    labels: torch.Tensor
    target: torch.Tensor
    output_shape: tuple[int, int]
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # What is on a device stays in this process.
        return {**vars(self), "_kept": {}}

    def keep(self, what: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for every model that runs this batch."""
        if what not in self._kept:
            self._kept[what] = make()
        return self._kept[what]

    def on(self, device: torch.device) -> "Indices":
        """The index tensors on a device: sent once, in one copy that nothing waits for."""
        return self.keep(("on", device), lambda: Indices(*sent(self._indices(), device)))

    def home_on(self, device: torch.device) -> torch.Tensor:
        """`home` on a device, flat (2B·T,); sent once."""
        return self.keep(("home", device), lambda: sent([self.home.reshape(-1)], device)[0])

    def _indices(self) -> tuple[torch.Tensor, ...]:
        scored, labels = self.scored, self.labels
        if not len(scored):
            # Nothing is scored: one place without a label keeps the outputs in the model's graph, like TRL's zeros.
            scored, labels = torch.zeros(1, dtype=torch.long), torch.full((1,), -100)
        return self.source, self.position_ids, scored, labels, self.target

    def rearranged(self, row_length: int | None = None, one_row: bool = False) -> "PackingPlan":
        """The plan of the same batch with other rows."""
        rows, columns = self.output_shape[0], self.output_shape[1] + 1
        shared, lengths = [0] * (rows // 2), [0] * rows
        for part in self.parts:
            shared[part.pair] = part.shared
            lengths[part.pair] = part.shared + part.chosen
            lengths[rows // 2 + part.pair] = part.shared + part.rejected
        labels = torch.full((rows, columns - 1), -100)
        labels.view(-1)[self.target] = self.labels
        return _arranged(shared, lengths, labels, row_length, one_row)

    @property
    def tokens(self) -> int:
        """Number of tokens computed, without filling."""
        return sum(parts.tokens for parts in self.parts)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence, prompt plus answer."""
        return max(parts.shared + max(parts.chosen, parts.rejected) for parts in self.parts)


@dataclass(frozen=True)
class Indices:
    """The tensors of a `PackingPlan` that a forward reads, on one device. Without scored tokens: one place, without a label."""

    source: torch.Tensor
    position_ids: torch.Tensor
    scored: torch.Tensor
    labels: torch.Tensor
    target: torch.Tensor


def sent(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of one type on a device, in one copy. The CPU does not wait for it: on CUDA it is from pinned memory."""
    if device.type == "cpu":
        return list(tensors)
    together = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if device.type == "cuda":
        together = together.pin_memory()
    parts = together.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def shared_lengths(input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Length of the longest common prefix of each pair's two rows: (2B, T) tokens and (2B,) lengths to (B,).

    It is measured on the tokens, not taken from the prompt's length: truncation from the left can shift the two rows of a
    pair against each other, and answers may start with the same words.
    """
    chosen, rejected = input_ids.chunk(2)
    both = torch.minimum(*lengths.chunk(2))
    same = (chosen == rejected) & (torch.arange(chosen.size(1)) < both[:, None])
    return same.long().cumprod(1).sum(1)


def row_lengths(attention_mask: torch.Tensor) -> torch.Tensor:
    """Number of real tokens of each right-padded row: (2B, T) to (2B,).

    Raises:
        NotPackable: a row is padded on the left or has holes.
    """
    mask = attention_mask != 0
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise NotPackable("rows are padded on the left or have holes; only right padding can be packed")
    return mask.sum(1)


def fill_rows(sizes: list[int], row_length: int | None) -> list[list[int]]:
    """Distributes items over rows by first-fit decreasing, and lists each row's items.

    Items of equal size keep their order, so the result depends only on the sizes.

    Args:
        sizes: tokens of each item.
        row_length: places in a row; raised to the largest item if that is longer. None: the largest item.
    """
    length = max([*sizes, row_length or 0])
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((at for at, free in enumerate(room) if sizes[item] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(item)
        room[row] -= sizes[item]
    return rows


def plan_pairs(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    row_length: int | None = None,
    one_row: bool = False,
) -> PackingPlan:
    """Plans the packed rows of a batch [chosen; rejected] from TRL's collator.

    Args:
        input_ids: (2B, T), the chosen rows followed by the rejected rows, padded on the right.
        attention_mask: (2B, T), 1 for real tokens; None: all tokens are real.
        labels: (2B, T), the token where it is scored and -100 elsewhere. Column 0 has no predictor and is never scored,
            as in TRL.
        row_length: places in a packed row; None: the length of the longest pair.
        one_row: put all pairs one after the other in a single row without filling.

    Returns:
        The plan; its tensors are on the CPU, whatever the batch's device.

    Raises:
        NotPackable: odd number of rows, differing shapes, left padding, scored padding, or nothing but padding.
    """
    if input_ids.ndim != 2 or input_ids.size(0) % 2 or input_ids.size(0) == 0:
        raise NotPackable(f"got a batch of shape {tuple(input_ids.shape)}; pairs need (2B, T), [chosen; rejected]")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape or labels.shape != input_ids.shape:
        raise NotPackable(
            f"shapes differ: input_ids {tuple(input_ids.shape)}, attention_mask {tuple(attention_mask.shape)}, "
            f"labels {tuple(labels.shape)}"
        )
    # One copy to the host for all three: on a GPU every copy waits for the device.
    input_ids, attention_mask, labels = torch.stack([input_ids, attention_mask.long(), labels]).cpu()
    if bool(((labels != -100) & (attention_mask == 0)).any()):
        raise NotPackable("padding has labels")
    lengths = row_lengths(attention_mask)
    shared = shared_lengths(input_ids, lengths).tolist()
    return _arranged(shared, lengths.tolist(), labels[:, 1:], row_length, one_row)


def _arranged(
    shared: list[int], lengths: list[int], labels: torch.Tensor, row_length: int | None, one_row: bool
) -> PackingPlan:
    """The plan of B pairs with these shared lengths, (B,), and lengths, (2B,); labels are of TRL's output, (2B, T-1)."""
    pairs, columns = len(shared), labels.size(1) + 1
    sizes = [lengths[i] + lengths[pairs + i] - shared[i] for i in range(pairs)]
    filled = [i for i in range(pairs) if sizes[i]]
    if not filled:
        raise NotPackable("the batch holds nothing but padding")
    if one_row:
        rows = [filled]
    else:
        rows = [[filled[i] for i in row] for row in fill_rows([sizes[i] for i in filled], row_length)]
    places = max(sum(sizes[i] for i in row) for row in rows)

    shape = (len(rows), places)
    source, position_ids, branch = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    pair = torch.full(shape, -1)
    home = torch.zeros(2 * pairs, columns, dtype=torch.long)
    parts: list[PairParts] = []
    for row, members in enumerate(rows):
        start = 0
        for i in members:
            s, c, r = shared[i], lengths[i] - shared[i], lengths[pairs + i] - shared[i]
            trunk, stop = slice(start, start + s + c), start + s + c + r
            # The shared part and the chosen tail together are the chosen row; the rejected tail follows.
            source[row, trunk] = torch.arange(s + c) + i * columns
            source[row, trunk.stop : stop] = torch.arange(s, s + r) + (pairs + i) * columns
            position_ids[row, trunk] = torch.arange(s + c)
            position_ids[row, trunk.stop : stop] = torch.arange(s, s + r)
            branch[row, start + s : trunk.stop] = CHOSEN
            branch[row, trunk.stop : stop] = REJECTED
            pair[row, start:stop] = i
            flat = row * places + start
            home[i, : s + c] = torch.arange(flat, flat + s + c)
            home[pairs + i, :s] = torch.arange(flat, flat + s)
            home[pairs + i, s : s + r] = torch.arange(flat + s + c, flat + s + c + r)
            parts.append(PairParts(i, row, start, s, c, r))
            start = stop

    scored = labels != -100
    return PackingPlan(
        parts=tuple(sorted(parts, key=lambda p: p.pair)),
        shape=shape,
        source=source,
        position_ids=position_ids,
        pair=pair,
        branch=branch,
        home=home,
        scored=home[:, :-1][scored],
        labels=labels[scored],
        target=scored.reshape(-1).nonzero().squeeze(1),
        output_shape=(2 * pairs, columns - 1),
    )


class BatchPlans:
    """The plans of one batch, for every model that runs it: one for each way to arrange its rows."""

    def __init__(self, plan: PackingPlan | None = None):
        self._plans: dict[tuple[int | None, bool], PackingPlan] = {} if plan is None else {(None, True): plan}

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "BatchPlans":
        """The plans of a collated batch on the CPU; none if it cannot be packed, which the forward will say."""
        ids, mask = batch.get("input_ids"), batch.get("completion_mask")
        if ids is None or mask is None:
            return cls()
        labels = ids.masked_fill(mask == 0, -100)
        try:
            return cls(plan_pairs(ids, batch.get("attention_mask"), labels, one_row=True))
        except NotPackable:
            return cls()

    def get(self, shape: torch.Size, *, row_length: int | None, one_row: bool) -> PackingPlan | None:
        """The plan with such rows, of a batch of this shape, (2B, T); None if there is none yet."""
        first = next(iter(self._plans.values()), None)
        if first is None or shape != (first.output_shape[0], first.output_shape[1] + 1):
            self._plans.clear()  # another batch took this one's place
            return None
        if (row_length, one_row) not in self._plans:
            self.add(first.rearranged(row_length, one_row), row_length=row_length, one_row=one_row)
        return self._plans[row_length, one_row]

    def add(self, plan: PackingPlan, *, row_length: int | None, one_row: bool) -> None:
        """Adds the plan with such rows."""
        self._plans[row_length, one_row] = plan
