"""KL to the reference and decisions, of the policy's own answers. Results are on the CPU, wherever the model is."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .small import padded


def next_logps(model, ids: Tensor, mask: Tensor, last: int) -> Tensor:
    """log π of the next token after each of the last `last` columns, (n, last, vocabulary), on the model's device."""
    ids, mask = ids.to(model.device), mask.to(model.device)
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
        found[places] = next_logps(model, ids, mask, 1)[:, 0].cpu()
    return found


@torch.no_grad()
def sampled(model, prompts: list[list[int]], tokenizer, new: int, seed: int) -> list[list[int]]:
    """One answer to each prompt at temperature 1, of at most `new` tokens, with its end where it has one."""
    answers: list[list[int]] = [[] for _ in prompts]
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for places in alike(prompts):
            ids, mask = padded([prompts[at] for at in places], tokenizer.pad_token_id, left=True)
            given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            whole = model.generate(**given, max_new_tokens=new, pad_token_id=tokenizer.pad_token_id, **options)
            for at, row in zip(places, whole[:, ids.shape[1] :].tolist(), strict=True):
                answers[at] = row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
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
        sums[places] = ((own.exp() * (own - other)).sum(-1).cpu() * given).sum(1)
    return sums, torch.tensor([len(answer) for answer in answers])


@torch.no_grad()
def gaps(model, tokenizer, rows: list[dict[str, str]], count: int = 128) -> tuple[Tensor, Tensor]:
    """Of each pair, log π(chosen) less log π(rejected), by sums and by means of the answers' tokens, nats, (n,) each."""
    sums, means = [], []
    for at in range(0, len(rows), count):
        sides = [_answer_logps(model, tokenizer, rows[at : at + count], side) for side in ("chosen", "rejected")]
        (chosen, longer), (rejected, other) = sides
        sums.append(chosen - rejected)
        means.append(chosen / longer - rejected / other)
    return torch.cat(sums), torch.cat(means)


def _answer_logps(model, tokenizer, rows: list[dict[str, str]], side: str) -> tuple[Tensor, Tensor]:
    """The summed log-prob of each answer, its end included, and its tokens."""
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    answers = [[*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id] for row in rows]
    longest, lengths = max(map(len, answers)), torch.tensor([len(answer) for answer in answers])
    ids, mask = padded([p + a for p, a in zip(prompts, answers, strict=True)], tokenizer.pad_token_id, left=True)
    found = next_logps(model, ids, mask, longest + 1)[:, :-1]
    logps = found.gather(2, ids[:, -longest:, None].to(found.device))[..., 0].cpu()
    own = torch.arange(longest)[None] >= longest - lengths[:, None]
    return (logps * own).sum(1), lengths


def bits(right: Tensor) -> str:
    """Which prompts are right, as hexadecimal digits; the first prompt is the highest bit."""
    return f"{int('1' + ''.join('01'[bool(each)] for each in right.tolist()), 2):x}"


def from_bits(text: str) -> list[bool]:
    """The prompts that `bits` wrote."""
    return [digit == "1" for digit in f"{int(text, 16):b}"[1:]]
