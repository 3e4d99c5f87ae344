"""A model answers prompts: greedily, and by sampling from its whole distribution, in one batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


@dataclass(frozen=True)
class Answers:
    """Answers to a batch of prompts.

    Attributes:
        ids: (n, prompt + new), prompts padded on the left, answers on the right.
        mask: (n, prompt + new), bool: not padding.
        new: number of columns of the answers. An answer's end token belongs to it.
        ended: (n,), bool: the answer has an end token.
        logps: log π(v | what is before) at each position of the sampled answers, (sampled, new, vocabulary), float32, on the
            CPU; None where none is sampled.
    """

    ids: Tensor
    mask: Tensor
    new: int
    ended: Tensor
    logps: Tensor | None = None

    def tokens(self, row: int) -> list[int]:
        """The answer's tokens, its end token included."""
        return self.ids[row, -self.new :][self.mask[row, -self.new :]].tolist()

    def sampled(self, greedy: int) -> "Answers":
        """The answers after the first `greedy`."""
        return Answers(self.ids[greedy:], self.mask[greedy:], self.new, self.ended[greedy:], self.logps)


class _GreedyRows(LogitsProcessor):
    """Leaves each of the first `count` rows its likeliest token alone, so that sampling takes it.

    Of the other rows it keeps the distribution: a KL to it needs no second forward of the policy.
    """

    def __init__(self, count: int):
        self.count = count
        self.kept: list[Tensor] = []

    def __call__(self, input_ids, scores):
        if self.count < len(scores):
            self.kept.append(scores[self.count :].float().log_softmax(-1).cpu())
        best = scores[: self.count].argmax(-1, keepdim=True)
        scores = scores.clone()
        scores[: self.count] = float("-inf")
        scores[: self.count].scatter_(-1, best, 0.0)
        return scores


def end_tokens(model: Any, tokenizer) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation settings. Empty: none is known."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, (list, tuple)) else [own]
    return sorted({int(token) for token in (tokenizer.eos_token_id, *own) if token is not None})


def answer(
    model: Any, prompts: Sequence[Sequence[int]], *, greedy: int, max_new_tokens: int, ends: Sequence[int], pad: int
) -> Answers:
    """Answers to prompts: the first `greedy` rows greedily, the others sampled at temperature 1 from all tokens.

    Draws from torch's global random state; call it in `evaluation_mode`. Settings of the model's own for generating, such as
    a temperature, do not count.

    Args:
        prompts: token ids, one list a row.
        ends: tokens that end an answer.
        pad: the token to pad with; masked everywhere.
    """
    device = model.get_input_embeddings().weight.device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = True
    ids, mask = ids.to(device), mask.to(device)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
    )
    rows = _GreedyRows(greedy)
    with _own_settings_aside(model):
        ids = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            generation_config=config,
            logits_processor=LogitsProcessorList([rows]),
        )
    new = ids.shape[1] - longest
    is_end = torch.isin(ids[:, longest:], torch.tensor(list(ends), device=device, dtype=ids.dtype))
    after_end = is_end.cumsum(1) - is_end.long() > 0
    logps = torch.stack(rows.kept, 1) if rows.kept else None
    return Answers(ids, torch.cat([mask, ~after_end], 1), new, is_end.any(1), logps)


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    # `generate` fills what a GenerationConfig leaves open from the model's own.
    holders = [m for m in model.modules() if isinstance(getattr(m, "generation_config", None), GenerationConfig)]
    kept = [m.generation_config for m in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, config in zip(holders, kept, strict=True):
            holder.generation_config = config
