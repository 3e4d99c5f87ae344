"""KL to the reference and decisions, of the policy's own answers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .small import padded


def next_logps(model, ids: Tensor, mask: Tensor, last: int) -> Tensor:
    """log π of the next token after each of the last `last` columns, (n, last, vocabulary)."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=last).logits
    return logits.float().log_softmax(-1)


def alike(rows: list[list[int]], count: int = 64) -> Iterator[list[int]]:
    """Places of rows of like length, `count` at a time: little padding."""
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    yield from (order[at : at + count] for at in range(0, len(order), count))


@torch.no_grad()
def first_logps(model, prompts: list[list[int]], pad: int) -> Tensor:
    """log π of the first token of an answer, (n, vocabulary)."""
    found = torch.empty(len(prompts), model.config.vocab_size)
    for places in alike(prompts):
        ids, mask = padded([prompts[at] for at in places], pad, left=True)
        found[places] = next_logps(model, ids, mask, 1)[:, 0]
    return found


@torch.no_grad()
def sampled(model, prompts: list[list[int]], tokenizer, new: int, seed: int) -> list[list[int]]:
    """One answer to each prompt at temperature 1, of at most `new` tokens, with its end where it has one."""
    answers: list[list[int]] = [[] for _ in prompts]
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True}
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    for places in alike(prompts):
        ids, mask = padded([prompts[at] for at in places], tokenizer.pad_token_id, left=True)
        whole = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **options)
        for at, row in zip(places, whole[:, ids.shape[1] :].tolist(), strict=True):
            answers[at] = row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
    torch.random.set_rng_state(state)
    return answers


@torch.no_grad()
def kl(policy, reference, prompts: list[list[int]], answers: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """The exact conditional KL summed over each of the policy's answers, nats, and its tokens, (n,) each."""
    sums = torch.empty(len(prompts))
    for places in alike([p + a for p, a in zip(prompts, answers, strict=True)]):
        part = [answers[at] for at in places]
        longest = max(map(len, part))
        whole = [prompts[at] + answers[at] + [pad] * (longest - len(answers[at])) for at in places]
        ids, mask = padded(whole, pad, left=True)
        given = torch.arange(longest)[None] < torch.tensor([len(a) for a in part])[:, None]
        mask[:, -longest:] *= given
        own, other = (next_logps(model, ids, mask, longest + 1)[:, :-1] for model in (policy, reference))
        sums[places] = ((own.exp() * (own - other)).sum(-1) * given).sum(1)
    return sums, torch.tensor([len(answer) for answer in answers])


def bits(right: Tensor) -> str:
    """Which prompts are right, as hexadecimal digits; the first prompt is the highest bit."""
    return f"{int('1' + ''.join('01'[bool(each)] for each in right.tolist()), 2):x}"


def from_bits(text: str) -> list[bool]:
    """The prompts that `bits` wrote."""
    return [digit == "1" for digit in f"{int(text, 16):b}"[1:]]
