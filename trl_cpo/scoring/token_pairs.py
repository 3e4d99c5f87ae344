"""Pairs as token ids, and what truncation leaves of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenPairs:
    """n pairs as token ids, and the number of each in its source. An answer's ids are those after the prompt's."""

    prompt: Sequence[list[int]]
    chosen: Sequence[list[int]]
    rejected: Sequence[list[int]]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class Truncation:
    """How a sequence is cut to `max_length` tokens (None: not), as DPOTrainer's collator cuts it."""

    max_length: int | None
    mode: str = "keep_start"

    def left(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int], int]:
        """The tokens of a prompt and of its answer that are left, and how many of the answer's are scored.

        The first token of a sequence is never scored: where nothing of the prompt is left, it is one of the answer's.
        """
        from ..data.validation import visible_span

        first, end, scored = visible_span(len(prompt), len(answer), self.max_length, self.mode)
        kept = len(prompt) if self.max_length is None else min(len(prompt), self.max_length - (end - first))
        prompt = prompt[:kept] if self.mode == "keep_start" else prompt[len(prompt) - kept :]
        return prompt, answer[first:end], scored


def answer_tokens(pairs: TokenPairs, truncation: Truncation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens left of the chosen and of the rejected answers, (n,) each, and which pairs can be compared, (n,).

    A pair compares two answers where both have a token that is scored and they are not the same, as in training, whose
    cpo/ metrics leave the other pairs out.
    """
    counts, comparable = np.zeros((2, len(pairs)), dtype=np.int64), np.ones(len(pairs), dtype=bool)
    for at, (prompt, chosen, rejected) in enumerate(zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True)):
        left = [truncation.left(prompt, answer) for answer in (chosen, rejected)]
        counts[:, at] = [len(answer) for _, answer, _ in left]
        comparable[at] = all(scored > 0 for *_, scored in left) and left[0][1] != left[1][1]
    return counts[0], counts[1], comparable
