"""Samplers that form micro-batches and optimizer steps of about equal cost."""

import bisect
import heapq
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch.utils.data import Sampler


def pair_tokens(
    prompt: int, chosen: int, rejected: int, max_length: int | None = None, truncation_mode: str = "keep_start"
) -> int:
    """Tokens that a pair costs when the part shared by its two rows is computed once; rows are truncated as in TRL.

    Under "keep_start" the shared part is the prompt, as far as both rows keep it. Under "keep_end" it is what is left of the
    prompt if both rows lose the same number of tokens; otherwise they start at different tokens and share nothing.
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
    """Deals items greedily to `groups` groups of equal size, so that their sums are about even.

    The costliest remaining item goes to the group with the smallest sum that still has room.

    Returns:
        Positions in `costs`, one list per group, groups by decreasing sum.

    Raises:
        ValueError: `len(costs)` is not a multiple of `groups`.
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
    """Shuffled order in which all micro-batches of an optimizer step have about the same number of tokens.

    Step k takes places k·N to (k+1)·N of the epoch's random permutation, N = micro_batch · micro_batches, as in plain
    shuffling; lengths decide only which micro-batch of the step a pair is in. All micro-batches have the same number of
    pairs. So the step's loss, the mean of their means, is the mean over the same pairs, and its gradient is the same up to
    rounding. Every process draws the same order from `seed` and the epoch and takes its own micro-batches from it.
    Neighbouring micro-batches, which run at the same time on different processes, are the closest in cost.

    Args:
        costs: tokens of each pair.
        micro_batch: pairs in a micro-batch of one process.
        micro_batches: micro-batches in an optimizer step, over all processes and accumulation steps.
        seed: seed of the permutation; the epoch is added.
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
            if len(pairs) < step:  # the epoch's last, short step keeps its order
                yield from pairs
                return
            for group in deal([self.costs[i] for i in pairs], self.micro_batches):
                yield from (pairs[i] for i in group)


class TokenBudget(Sampler[list[int]]):
    """Shuffled micro-batches of optimizer steps with a token budget: each step takes about `tokens` tokens.

    The epoch's random permutation is cut, in order, into S = ⌈all tokens / `tokens`⌉ steps, as close as possible to equal
    shares of its tokens. The unit of cutting is a round: one pair for each micro-batch of a step. So no step exceeds its
    share by more than one round. The micro-batches of a step have the same number of pairs and about the same number of
    tokens (`deal`). S is the same in every epoch, and at most the number of rounds. Each epoch leaves out up to
    `micro_batches` − 1 pairs, those at the end of its permutation.

    Averaging each step over its pairs would give more weight to pairs in steps with few, long pairs. So the loss of a
    micro-batch is multiplied by its number of pairs over `mean_pairs`; every pair of an epoch then weighs the same.

    Args:
        costs: tokens of each pair.
        tokens: token budget of an average optimizer step, over all processes and accumulation steps.
        micro_batches: micro-batches in an optimizer step, over all processes and accumulation steps.
        seed: seed of the permutation; the epoch is added.

    Raises:
        ValueError: there are fewer pairs than micro-batches, or an average round has more than `tokens` tokens.
    """

    def __init__(self, costs: Sequence[int], *, tokens: int, micro_batches: int, seed: int):
        self._rounds = len(costs) // micro_batches
        if not self._rounds:
            raise ValueError(
                f"Got {len(costs)} training pairs, fewer than the {micro_batches} micro-batches of one step. Lower "
                "gradient_accumulation_steps, or train on more pairs."
            )
        total = sum(costs)
        if tokens * len(costs) < total * micro_batches:
            raise ValueError(
                f"tokens_per_step={tokens} is too small: one pair for each of a step's {micro_batches} micro-batches takes "
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
            end = max(start + 1, min(end, self._rounds - (self.steps - step)))  # at least one round per step
            pairs = order[start * size : end * size]
            for group in deal([self.costs[i] for i in pairs], size):
                yield [pairs[i] for i in group]
            start = end


def _nearest(ends: Sequence[int], share: float) -> int:
    """The number of rounds whose cumulative tokens, `ends`, come closest to `share`."""
    above = min(bisect.bisect_left(ends, share), len(ends) - 1)
    below = ends[above - 1] if above else 0
    return above + (ends[above] - share <= share - below)
