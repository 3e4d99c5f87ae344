"""What the model sees of the pairs: the token ids that training would use, looked through before a model is loaded."""

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..quoting import quoted
from ..scoring.token_pairs import TokenPairs, Truncation

#: Rows named for each finding, and rows whose prompt is tokenized again.
_ROWS_NAMED, _PROMPTS_LOOKED_AT = 5, 2000
#: Longest decoded text that the document keeps, and how much of that is its end.
_SHOWN, _SHOWN_TAIL = 1200, 400
#: So few tokens may be blank; decoding longer answers to see it would cost time and find nothing.
_MAY_BE_BLANK = 8

#: Finding to (whether it is a fault, what it means). A fault makes numbers or training wrong; the rest is to be known.
FINDINGS = {
    "double_bos": (True, "begin with more than one BOS token: the template and the tokenizer both add one"),
    "missing_bos": (False, "begin without BOS, which this tokenizer puts in front of a plain text"),
    "no_end": (True, "have an answer without an end token: the model does not learn to stop there"),
    "double_end": (
        True,
        "have an answer with two end tokens in a row, or with only blanks between: text or template adds one that the other "
        "has. Give text without its template, or messages",
    ),
    "prompt_not_prefix": (
        True,
        "have a prompt that is not the beginning of prompt + answer in tokens: its end is left out of training, and at "
        "inference the model sees it",
    ),
    "empty_chosen": (True, "have an empty chosen answer"),
    "empty_rejected": (True, "have an empty rejected answer"),
    "identical": (True, "have the same chosen and rejected answer: nothing can be learnt from them; left out below"),
    "identical_when_cut": (True, "have answers that max_length makes the same; left out below"),
    "nothing_scored": (True, "have an answer of which max_length leaves nothing to score; left out below"),
    "other_turns": (
        True,
        "have an answer with turns that are not the assistant's, which are scored and trained on too without "
        "assistant_turns_only",
    ),
    "turns_left_out": (False, "have an answer with turns that are not the assistant's, of which nothing is scored"),
    "contradicted": (True, "are also there with chosen and rejected exchanged"),
    "duplicate": (False, "repeat an earlier pair"),
    "prompt_cut": (False, "have a prompt cut by max_length (keep_end): the answers are scored without its beginning"),
    "cut_chosen": (False, "have a chosen answer cut by max_length, its end token with it if truncation is keep_start"),
    "cut_rejected": (False, "have a rejected answer cut by max_length"),
}


def digests(pairs: TokenPairs) -> tuple[np.ndarray, list[tuple[bytes, bytes, bytes]]]:
    """A number for each prompt, equal where prompts are, (n,), and the digests of prompt, chosen and rejected."""

    def digest(ids: list[int]) -> bytes:
        return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()

    parts = [tuple(map(digest, ids)) for ids in zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True)]
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt, _, _ in parts], dtype=np.int64), parts


def examine(
    pairs: TokenPairs,
    tokenizer: Any,
    truncation: Truncation,
    *,
    ends: set[int],
    prompt_alone: Callable[[int], list[int]],
    tokens_of_others: Callable[[int], tuple[int, int]] = lambda at: (0, 0),
    given: int,
    shown: int = 2,
) -> dict:
    """The preflight of a set, as JSON's types.

    Args:
        pairs: what DPOTrainer's preparation left, before truncation.
        tokenizer: the one that made the ids.
        truncation: how training cuts them.
        ends: ids of the tokens that end an answer.
        prompt_alone: position of a pair to the ids of its prompt by itself.
        tokens_of_others: position of a pair to the tokens of its two answers in turns that are not the assistant's.
        given: pairs before preparation; those missing were dropped for a prompt that fills max_length.
        shown: pairs decoded: the first, then the longest.
    """
    found = _found(pairs, tokenizer, truncation, ends)
    looked_at = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), _PROMPTS_LOOKED_AT)).round().astype(int)).tolist()
    tails = {at: prompt_alone(at)[len(pairs.prompt[at]) :] for at in looked_at}
    found["prompt_not_prefix"] = [at for at, tail in tails.items() if tail]
    others = {at: sum(tokens_of_others(at)) for at in range(len(pairs))}
    if pairs.masks is not None:
        # Unscored are also the marks of a turn that the prompt for it holds at inference.
        others = {at: sum(len(mask) - sum(mask) for mask in both) for at, both in enumerate(zip(*pairs.masks, strict=True))}
    of_others = "other_turns" if pairs.masks is None else "turns_left_out"
    found[of_others] = [at for at, count in others.items() if count]
    findings = []
    for name, (is_fault, says) in FINDINGS.items():
        if places := found.get(name):
            rows = [int(pairs.rows[at]) for at in places[:_ROWS_NAMED]]
            of = len(looked_at) if name == "prompt_not_prefix" else len(pairs)
            finding = {"finding": name, "fault": is_fault, "count": len(places), "of": of, "rows": rows, "says": says}
            if name == "prompt_not_prefix":
                finding["left_out"] = quoted(tokenizer.decode(tails[places[0]]), 80)
            if name == of_others:
                finding["tokens"] = sum(others[at] for at in places)
                finding["of_tokens"] = sum(len(pairs.chosen[at]) + len(pairs.rejected[at]) for at in places)
            findings.append(finding)
    return {
        "given": given,
        "dropped": given - len(pairs),
        "pairs": len(pairs),
        "max_length": truncation.max_length,
        "truncation_mode": truncation.mode,
        "bos_token": tokenizer.bos_token,
        "leading_bos": _counted(_leading(ids, tokenizer.bos_token_id) for ids in _sequences(pairs)),
        "end_tokens": sorted(tokenizer.convert_ids_to_tokens(list(ends))),
        "ends_an_answer": _counted(sum(t in ends for t in ids) for ids in (*pairs.chosen, *pairs.rejected)),
        "tokens": {name: _lengths(getattr(pairs, name)) for name in ("prompt", "chosen", "rejected")},
        "findings": findings,
        "seen": [_seen(pairs, at, tokenizer, truncation) for at in _to_show(pairs, shown)],
    }


def _sequences(pairs: TokenPairs):
    # The two sequences of a pair begin alike, unless there is no prompt.
    return (prompt or chosen for prompt, chosen in zip(pairs.prompt, pairs.chosen, strict=True))


def _leading(ids: list[int], token: int | None) -> int:
    count = 0
    while token is not None and count < len(ids) and ids[count] == token:
        count += 1
    return count


def _counted(numbers) -> dict[str, int]:
    counts: dict[int, int] = {}
    for number in numbers:
        counts[number] = counts.get(number, 0) + 1
    return {str(number): counts[number] for number in sorted(counts)}


def _lengths(ids: Sequence[list[int]]) -> dict[str, int]:
    lengths = np.array([len(one) for one in ids])
    return {"median": int(np.quantile(lengths, 0.5, method="inverted_cdf")), "longest": int(lengths.max())}


def _found(pairs: TokenPairs, tokenizer: Any, truncation: Truncation, ends: set[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {name: [] for name in FINDINGS}
    special, bos = set(tokenizer.all_special_ids), tokenizer.bos_token_id
    adds_bos = bos is not None and _leading(list(tokenizer("a")["input_ids"]), bos) > 0
    _, parts = digests(pairs)
    earlier: set[tuple[bytes, bytes, bytes]] = set()
    everything = set(parts)

    def is_empty(ids: list[int]) -> bool:
        content = [token for token in ids if token not in special]
        return len(content) <= _MAY_BE_BLANK and not tokenizer.decode(content).strip()

    for at, (first, key) in enumerate(zip(_sequences(pairs), parts, strict=True)):
        prompt, chosen, rejected = pairs.prompt[at], pairs.chosen[at], pairs.rejected[at]
        leading = _leading(first, bos)
        left = [truncation.left(prompt, answer, pairs.mask(side, at)) for side, answer in enumerate((chosen, rejected))]
        same, unscored = chosen == rejected, any(scored < 1 for *_, scored in left)
        holds = {
            "double_bos": leading > 1,
            "missing_bos": adds_bos and leading == 0,
            "no_end": bool(ends) and any(ends.isdisjoint(ids) for ids in (chosen, rejected)),
            "double_end": any(_ends_twice(ids, ends, tokenizer) for ids in (chosen, rejected)),
            "empty_chosen": is_empty(chosen),
            "empty_rejected": is_empty(rejected),
            "identical": same,
            "identical_when_cut": not same and not unscored and left[0][1] == left[1][1],
            "nothing_scored": unscored,
            "contradicted": not same and (key[0], key[2], key[1]) in everything,
            "duplicate": key in earlier,
            "prompt_cut": any(len(before) < len(prompt) for before, *_ in left),
            "cut_chosen": len(left[0][1]) < len(chosen),
            "cut_rejected": len(left[1][1]) < len(rejected),
        }
        earlier.add(key)
        for name, it_holds in holds.items():
            if it_holds:
                found[name].append(at)
    return found


def _ends_twice(ids: list[int], ends: set[int], tokenizer: Any) -> bool:
    """Whether two end tokens stand in a row, or with nothing but blanks between them."""
    places = [at for at, token in enumerate(ids) if token in ends]
    return any(b - a <= _MAY_BE_BLANK and not tokenizer.decode(ids[a + 1 : b]).strip() for a, b in pairwise(places))


def _to_show(pairs: TokenPairs, count: int) -> list[int]:
    lengths = [sum(map(len, ids)) for ids in zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True)]
    longest = sorted(range(1, len(pairs)), key=lambda at: -lengths[at])
    return [0, *longest][:count]


def _seen(pairs: TokenPairs, at: int, tokenizer: Any, truncation: Truncation) -> dict:
    """A pair's text as the model sees it, special tokens and all: cut as training cuts it."""
    prompt, document = pairs.prompt[at], {"row": int(pairs.rows[at])}
    for name in ("chosen", "rejected"):
        answer = getattr(pairs, name)[at]
        kept, answer, _ = truncation.left(prompt, answer)
        if name == "chosen":
            document["prompt"] = quoted(tokenizer.decode(kept), _SHOWN, _SHOWN_TAIL)
        document[name] = quoted(tokenizer.decode(answer), _SHOWN, _SHOWN_TAIL)
    return document
