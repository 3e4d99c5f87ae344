"""Which pairs go into which micro-batch of an optimizer step, so that all of them cost about the same."""

import heapq
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def pair_tokens(prompt: int, chosen: int, rejected: int, max_length: int | None = None) -> int:
    """Tokens that a pair costs with its prompt computed once: `prompt + chosen + rejected`, each row cut at max_length."""
    if max_length is None:
        return prompt + chosen + rejected
    prompt = min(prompt, max_length)
    return prompt + min(chosen, max_length - prompt) + min(rejected, max_length - prompt)


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
