"""Pairs as token ids, and what truncation leaves of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.spans import scored_span


@dataclass(frozen=True)
class TokenPairs:
    """n pairs as token ids, and the number of each in its source. An answer's ids are those after the prompt's.

    `masks` are those of the chosen and of the rejected answers: 1 where a token is scored; None: all are.
    """

    prompt: Sequence[list[int]]
    chosen: Sequence[list[int]]
    rejected: Sequence[list[int]]
    rows: Sequence[int]
    masks: tuple[Sequence[list[int]], Sequence[list[int]]] | None = None

    def __len__(self) -> int:
        return len(self.prompt)

    def mask(self, side: int, at: int) -> list[int] | None:
        """Which tokens of a pair's chosen (0) or rejected (1) answer are scored; None: all."""
        return None if self.masks is None else self.masks[side][at]


@dataclass(frozen=True)
class Truncation:
    """How a sequence is cut to `max_length` tokens (None: not), as DPOTrainer's collator cuts it."""

    max_length: int | None
    mode: str = "keep_start"

    def left(self, prompt: list[int], answer: list[int], mask: list[int] | None = None) -> tuple[list[int], list[int], int]:
        """The tokens of a prompt and of its answer that are left, and how many of the answer's are scored.

        The first token of a sequence is never scored: where nothing of the prompt is left, it is one of the answer's.
        """
        first, end, _, scored = scored_span(len(prompt), len(answer), self.max_length, self.mode, mask)
        kept = len(prompt) if self.max_length is None else min(len(prompt), self.max_length - (end - first))
        prompt = prompt[:kept] if self.mode == "keep_start" else prompt[len(prompt) - kept :]
        return prompt, answer[first:end], scored

    def counted(self, prompt: list[int], answer: list[int], mask: list[int] | None = None) -> int:
        """Tokens of the answer that are left and that a mean per token divides by."""
        return scored_span(len(prompt), len(answer), self.max_length, self.mode, mask)[2]


def answer_tokens(pairs: TokenPairs, truncation: Truncation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counted tokens left of the chosen and of the rejected answers, (n,) each, and which pairs are degenerate, (n,).

    A pair is degenerate where one answer has no scored token, or both are the same, as in training
    (`trl_cpo.pairs.degenerate_pairs`), whose cpo/ metrics leave these out.
    """
    counts, degenerate = np.zeros((2, len(pairs)), dtype=np.int64), np.zeros(len(pairs), dtype=bool)
    for at, (prompt, chosen, rejected) in enumerate(zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True)):
        given = [(prompt, answer, pairs.mask(side, at)) for side, answer in enumerate((chosen, rejected))]
        left = [truncation.left(*each) for each in given]
        counts[:, at] = [truncation.counted(*each) for each in given]
        degenerate[at] = any(scored < 1 for *_, scored in left) or left[0][1] == left[1][1]
    return counts[0], counts[1], degenerate
