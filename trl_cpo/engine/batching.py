"""Which pairs go into which micro-batch and which optimizer step, so that all of them cost about the same."""

import bisect
import heapq
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch.utils.data import Sampler


def pair_tokens(
    prompt: int, chosen: int, rejected: int, max_length: int | None = None, truncation_mode: str = "keep_start"
) -> int:
    """Tokens that a pair costs with what its two rows begin with computed once, each row cut at max_length as TRL cuts it.

    That beginning is the prompt, whatever is cut behind it. Under "keep_end" it is what is left of the prompt where both
    rows lose as much; where they lose different amounts they begin at different tokens, and have nothing in common.
    """
    whole = prompt + chosen, prompt + rejected
    rows = whole if max_length is None else tuple(min(tokens, max_length) for tokens in whole)
    cuts = whole[0] - rows[0], whole[1] - rows[1]
    if truncation_mode == "keep_start":
        shared = min(prompt, *rows)
    else:
        shared = max(prompt - cuts[0], 0) if cuts[0] == cuts[1] else 0
    return sum(rows) - shared


def deal(costs: Sequence[int], groups: int) -> list[list[int]]:
    """Deals items to `groups` groups of equal size with sums as even as greedy dealing makes them.

    The costliest item left goes to the group with the smallest sum that has room. Returns positions in `costs`, groups in
    falling order of their sums; `len(costs)` must be a multiple of `groups`.
    """
    size = len(costs) // groups
    if size * groups != len(costs):
        raise ValueError(f"{len(costs)} items cannot be dealt to {groups} groups of equal size.")
    dealt: list[list[int]] = [[] for _ in range(groups)]
    heap = [(0, group) for group in range(groups)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, group = heapq.heappop(heap)
        dealt[group].append(item)
        if len(dealt[group]) < size:
            heapq.heappush(heap, (total + costs[item], group))
    return sorted(dealt, key=lambda group: -sum(costs[i] for i in group))


class BalancedSampler(Sampler[int]):
    """Shuffled order in which the micro-batches of each optimizer step hold about as many tokens as each other.

    The pairs of step k are places k·N to (k+1)·N of the epoch's random permutation, N = micro_batch · micro_batches, as in
    plain shuffling: lengths decide only which micro-batch of the step a pair is in. All micro-batches have the same number
    of pairs, so the step's loss, the mean of their means, is the mean over the same pairs, and its gradient the same but
    for rounding. Every process draws the same order from `seed` and the epoch, and takes its own micro-batches of it;
    neighbouring micro-batches, which run at the same time on different processes, cost most nearly the same.

    Args:
        costs: tokens of each pair.
        micro_batch: pairs in a micro-batch of one process.
        micro_batches: micro-batches in an optimizer step, over all processes and accumulation steps.
        seed: of the permutation, with the epoch added.
    """

    def __init__(self, costs: Sequence[int], *, micro_batch: int, micro_batches: int, seed: int):
        self.costs = list(costs)
        self.micro_batch = micro_batch
        self.micro_batches = micro_batches
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop at the start of each epoch, a resumed one too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.costs)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.costs), generator=generator).tolist()
        step = self.micro_batch * self.micro_batches
        for start in range(0, len(order), step):
            pairs = order[start : start + step]
            if len(pairs) < step:  # the epoch's last, short step stays as it was drawn
                yield from pairs
                return
            for group in deal([self.costs[i] for i in pairs], self.micro_batches):
                yield from (pairs[i] for i in group)


class TokenBudget(Sampler[list[int]]):
    """Shuffled micro-batches of optimizer steps that all hold at most about `tokens` tokens, and as many pairs as that makes.

    The epoch's random permutation is cut, in its order, into S = ⌈all tokens / `tokens`⌉ steps at the places nearest to
    equal shares of its tokens; so no step holds more than its share and one round of pairs, a pair for each micro-batch.
    A step's micro-batches have the same number of pairs and about the same tokens (`deal`). S is the same in every epoch, and
    at most the number of rounds. Up to `micro_batches` − 1 pairs at the end of the permutation, others in each epoch, are
    left out of it.

    A step's mean over its pairs would give pairs in steps of long ones more weight. Multiplied by (pairs in the
    micro-batch) / `mean_pairs`, losses give every pair of an epoch the same: over an epoch, the mean over steps of
    the losses so weighed is the mean over pairs.

    Args:
        costs: tokens of each pair.
        tokens: most tokens of a mean optimizer step, over all processes and accumulation steps.
        micro_batches: micro-batches in an optimizer step, over all processes and accumulation steps.
        seed: of the permutation, with the epoch added.

    Raises:
        ValueError: there are fewer pairs than micro-batches, or a pair for each of these holds more than `tokens`, on average.
    """

    def __init__(self, costs: Sequence[int], *, tokens: int, micro_batches: int, seed: int):
        self._rounds = len(costs) // micro_batches
        if not self._rounds:
            raise ValueError(
                f"A step has {micro_batches} micro-batches and there are {len(costs)} pairs to train on. Lower "
                "gradient_accumulation_steps, or train on more pairs."
            )
        total = sum(costs)
        if tokens * len(costs) < total * micro_batches:
            raise ValueError(
                f"tokens_per_step={tokens} is less than one pair for each of a step's {micro_batches} micro-batches holds, "
                f"{-(-total * micro_batches // len(costs))} tokens on average. Raise it, or lower gradient_accumulation_steps."
            )
        self.costs = list(costs)
        self.micro_batches = micro_batches
        self.seed = seed
        self.epoch = 0
        #: Optimizer steps in an epoch.
        self.steps = min(self._rounds, -(-total // tokens))
        #: Pairs in a micro-batch, on average over an epoch.
        self.mean_pairs = self._rounds / self.steps

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop at the start of each epoch, a resumed one too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.costs), generator=generator).tolist()
        size = self.micro_batches
        ends = list(accumulate(sum(self.costs[i] for i in order[r * size : (r + 1) * size]) for r in range(self._rounds)))
        start = 0
        for step in range(1, self.steps + 1):
            end = _nearest(ends, ends[-1] * step / self.steps)
            end = max(start + 1, min(end, self._rounds - (self.steps - step)))  # every step has its round
            pairs = order[start * size : end * size]
            for group in deal([self.costs[i] for i in pairs], size):
                yield [pairs[i] for i in group]
            start = end


def _nearest(ends: Sequence[int], share: float) -> int:
    """How many of the rounds whose running sums `ends` are come nearest to `share`."""
    above = min(bisect.bisect_left(ends, share), len(ends) - 1)
    below = ends[above - 1] if above else 0
    return above + (ends[above] - share <= share - below)
