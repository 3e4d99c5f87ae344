"""Counts decisions: where every row lists its options, how often is the right one preferred, likeliest, and given.

A row has `prompt`, `chosen` (the right option), `rejected` (a wrong one) and `options` (all of them, as strings). An
option's score is the sum of its tokens' log-probs, end of the turn included, as in training. Three things are counted:

- preferred: the chosen option has a higher score than the rejected one, which is what a pair asks for;
- right: the chosen option has the highest score of all options;
- answered: the greedy answer, up to the end of its first line, is the chosen option; `named` counts those that are any.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .intervals import clopper_pearson, paired_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The column that makes rows decisions.
OPTIONS = "options"
#: What is counted, and how it is told.
COUNTED = {
    "preferred": "the right option beats the wrong one of its pair",
    "right": "the right option is the likeliest of all",
    "answered": "the greedy answer is the right option",
    "named": "the greedy answer is one of the options",
}


@dataclass(frozen=True)
class Decision:
    """One row: the score of each option in nats, which are chosen and rejected, and the greedy answer."""

    scores: dict[str, float]
    chosen: str
    rejected: str
    answer: str

    @property
    def outcomes(self) -> dict[str, bool]:
        """Each thing that is counted (`COUNTED`), of this row. A tie is not a win."""
        best = max(self.scores.values())
        return {
            "preferred": self.scores[self.chosen] > self.scores[self.rejected],
            "right": [name for name, score in self.scores.items() if score == best] == [self.chosen],
            "answered": self.answer == self.chosen.strip(),
            "named": self.answer in map(str.strip, self.scores),
        }


def counts(decisions: Sequence[Decision]) -> dict[str, Any]:
    """Of each thing that is counted: `count`, `share`, and its exact 95 % interval `low`, `high`; and the number of rows."""
    outcomes, rows = [each.outcomes for each in decisions], len(decisions)
    found: dict[str, Any] = {"rows": rows}
    for name in COUNTED:
        count = sum(outcome[name] for outcome in outcomes)
        low, high = clopper_pearson(count, rows)
        found[name] = {"count": count, "share": count / rows, "low": low, "high": high}
    return found


def document(before: Sequence[Decision] | None, after: Sequence[Decision]) -> dict[str, Any]:
    """Counts before (None: not known) and after training, and of each thing counted the paired gain with its interval."""
    found: dict[str, Any] = {"before": None, "after": counts(after), "gain": None}
    if before is not None:
        found["before"], found["gain"] = counts(before), {}
        pairs = [(then.outcomes, now.outcomes) for then, now in zip(before, after, strict=True)]
        for name in COUNTED:
            gained = sum(now[name] and not then[name] for then, now in pairs)
            lost = sum(then[name] and not now[name] for then, now in pairs)
            low, high = paired_difference(gained, lost, len(pairs))
            found["gain"][name] = {"share": (gained - lost) / len(pairs), "low": low, "high": high}
    return found


def in_words(found: Mapping[str, Any]) -> str:
    """The table of `document`, as text."""
    before, after, gain = found["before"], found["after"], found["gain"]
    lines = [f"{'decisions on ' + str(after['rows']) + ' held-out rows':<50}{'before':>18}{'after':>18}{'gain, points':>18}"]
    for name, label in COUNTED.items():
        then, now = ("-" if part is None else _share(part[name]) for part in (before, after))
        change = "-"
        if gain is not None:
            share, low, high = (100 * gain[name][key] for key in ("share", "low", "high"))
            change = f"{share:+.0f} ({low:+.0f} to {high:+.0f})"
        lines.append(f"{label:<50}{then:>18}{now:>18}{change:>18}")
    lines.append("(95 % intervals in brackets: exact for shares, paired for gains)")
    return "\n".join(lines)


def _share(part: Mapping[str, float]) -> str:
    return f"{100 * part['share']:.0f} % ({100 * part['low']:.0f} to {100 * part['high']:.0f})"


def fault_of(row: Mapping[str, Any]) -> str | None:
    """Why this row is not a decision, or None."""
    options, texts = row.get(OPTIONS), {name: _text(row[name]) for name in ("chosen", "rejected")}
    if not isinstance(options, list) or not all(isinstance(option, str) and option for option in options):
        return f"column {OPTIONS!r} must hold a list of strings, got {options!r}"
    if len(set(options)) != len(options) or len(options) < 2:
        return f"column {OPTIONS!r} must hold at least two different strings, got {options!r}"
    for name, text in texts.items():
        if text not in options:
            return f"{name} is {text!r}, which is not among the options {options!r}"
    return None


def option_logps(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Mapping[str, Any]]):
    """The scores of each row's options as tensors, one a row, for gradients: what `decide` computes, in the model's mode."""
    device, eos = model.get_input_embeddings().weight.device, tokenizer.eos_token_id
    batch = [_tokens(tokenizer, row) for row in rows]
    return _scores(model, _read(model, batch, eos, device), batch, eos)


def decide(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Mapping[str, Any]], batch_size: int = 32
) -> list[Decision]:
    """Scores the options of every row and decodes its greedy answer, in the order of the rows.

    Tokens are those of training. What all prompts begin with is computed once, and each prompt once for all of its options.
    The model's mode is put back; no random number is drawn.

    Raises:
        ValueError: a row is not a decision, or the model keeps more of a prompt than keys and values; the message says which
            and why.
    """
    for number, row in enumerate(rows):
        if (fault := fault_of(row)) is not None:
            raise ValueError(f"Row {number}: {fault}. Give every row its options, or leave the column out.")
    decisions: list[Decision] = []
    with _evaluating(model), torch.no_grad():
        device, eos = model.get_input_embeddings().weight.device, tokenizer.eos_token_id
        tokens = [_tokens(tokenizer, row) for row in rows]
        for start in range(0, len(rows), batch_size):
            batch = tokens[start : start + batch_size]
            read = _read(model, batch, eos, device)
            answers = _greedy(model, read, max(len(option) for row in batch for option in row.options), eos)
            scores = [part.tolist() for part in _scores(model, read, batch, eos)]
            for row, row_scores, answer in zip(rows[start : start + batch_size], scores, answers, strict=True):
                text = tokenizer.decode(answer, skip_special_tokens=True).strip().partition("\n")[0].strip()
                named = dict(zip(row[OPTIONS], row_scores, strict=True))
                decisions.append(Decision(named, _text(row["chosen"]), _text(row["rejected"]), text))
    return decisions


@dataclass(frozen=True)
class _Tokens:
    prompt: list[int]
    options: list[list[int]]


def _text(answer: Any) -> Any:
    return answer[0]["content"] if isinstance(answer, list) and len(answer) == 1 else answer


def _tokens(tokenizer, row) -> _Tokens:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        alone = tokenizer(prompt)["input_ids"]
        whole = [tokenizer(prompt + option + tokenizer.eos_token)["input_ids"] for option in row[OPTIONS]]
    else:
        alone = _templated(tokenizer, prompt, add_generation_prompt=True)
        whole = [_templated(tokenizer, [*prompt, {"role": "assistant", "content": option}]) for option in row[OPTIONS]]
    # Where tokens merge across the seam, the answer begins at the first token that differs, as in DPOTrainer.
    begin = min(_common(alone, each) for each in whole)
    return _Tokens(alone[:begin], [each[begin:] for each in whole])


def _templated(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@contextmanager
def _evaluating(model) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_cache(cache) -> None:
    # Padding between a prompt's beginning and its end is masked in attention. A recurrent state would have read it, and a
    # sliding window would have counted it.
    kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())} - {"DynamicLayer"})
    if kinds or not hasattr(cache, "layers"):
        found = ", ".join(kinds) or type(cache).__name__
        raise ValueError(f"Decisions need a model with full attention in every layer; this one keeps {found}.")


@dataclass
class _Read:
    """Prompts that a model has read: its cache, and the distribution of the token after each (n, vocabulary)."""

    cache: Any
    mask: torch.Tensor
    first: torch.Tensor
    position: torch.Tensor  # of the token after each prompt

    def go_on(self, model, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """Logits after each of `ids` (k, m), which follow the prompts `rows` (k,) of what the cache holds."""
        at = self.position[rows][:, None] + offset + torch.arange(ids.shape[1], device=ids.device)
        whole = torch.cat([self.mask[rows], mask], dim=1)
        output = model(input_ids=ids, attention_mask=whole, position_ids=at, past_key_values=self.cache, use_cache=True)
        return output.logits


def _read(model, batch: Sequence[_Tokens], pad: int, device) -> _Read:
    prefix = batch[0].prompt[:-1]
    for tokens in batch:
        prefix = prefix[: _common(prefix, tokens.prompt[:-1])]
    tails = [tokens.prompt[len(prefix) :] for tokens in batch]
    width, count, shared = max(map(len, tails)), len(batch), len(prefix)
    cache = None
    if prefix:
        beginning = torch.tensor([prefix], device=device)
        cache = model(input_ids=beginning, use_cache=True, logits_to_keep=1).past_key_values
        _check_cache(cache)
        cache.batch_repeat_interleave(count)
    # Padded between the shared beginning and the rest, so that all prompts end in one column.
    missing = torch.tensor([width - len(tail) for tail in tails], device=device)
    mask = torch.ones(count, shared + width, dtype=torch.long, device=device)
    columns = torch.arange(width, device=device)
    mask[:, shared:] = (columns >= missing[:, None]).long()
    output = model(
        input_ids=torch.tensor([[pad] * (width - len(tail)) + tail for tail in tails], device=device),
        attention_mask=mask,
        position_ids=(shared + columns - missing[:, None]).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    _check_cache(output.past_key_values)
    return _Read(output.past_key_values, mask, output.logits[:, -1].float(), shared + width - missing)


def _greedy(model, read: _Read, length: int, eos: int) -> list[list[int]]:
    """Greedy answers of at most `length` tokens, cut before their end. The cache is as it was before."""
    given, rows = [read.first.argmax(-1)], torch.arange(len(read.first), device=read.first.device)
    while len(given) < length:
        # The mask of the tokens given so far, and of the one that is read now.
        logits = read.go_on(model, given[-1][:, None], read.mask.new_ones(len(rows), len(given)), rows, len(given) - 1)
        given.append(logits[:, -1].argmax(-1))
    if length > 1:
        read.cache.crop(1 - length)
    return [row[: row.index(eos)] if eos in row else row for row in torch.stack(given, dim=1).tolist()]


def _scores(model, read: _Read, batch: Sequence[_Tokens], pad: int) -> list[torch.Tensor]:
    """The summed log-probs of the options of each prompt. Uses the cache up."""
    device, sizes = read.first.device, [len(tokens.options) for tokens in batch]
    owners = torch.tensor([row for row, size in enumerate(sizes) for _ in range(size)], device=device)
    options = [option for tokens in batch for option in tokens.options]
    longest = max(map(len, options))
    padded = torch.tensor([option + [pad] * (longest - len(option)) for option in options], device=device)
    real = torch.tensor([[1] * len(option) + [0] * (longest - len(option)) for option in options], device=device)
    logits = read.first[owners][:, None]
    if longest > 1:
        read.cache.batch_select_indices(owners)
        # Nothing follows the last token.
        later = read.go_on(model, padded[:, :-1], real[:, :-1], owners)
        logits = torch.cat([logits, later.float()], dim=1)
    picked = logits.log_softmax(-1).gather(2, padded[..., None])[..., 0] * real
    return list(picked.sum(1).split(sizes))
