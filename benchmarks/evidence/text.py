"""Turns of dialogues, parted by their content into training, validation and test, and a tokenizer learnt from them."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from trl_cpo.data.loading import load_pairs

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Texts:
    """Single turns, and what a person asked with what was answered; by part, in an order of their content."""

    turns: dict[str, list[str]]
    exchanges: dict[str, list[tuple[str, str]]]
    digest: str


def part_of(text: str) -> str:
    """The part of a text: one in ten each for validation and test."""
    place = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 10
    return PARTS[max(0, place - 7)] if place > 7 else "train"


def read_texts(source: str, longest: int) -> Texts:
    """Turns of at most `longest` characters, from pairs as HH-RLHF writes them."""
    dialogues = sorted({row[side] for row in load_pairs(source) for side in ("chosen", "rejected")})
    turns, exchanges = set(), set()
    for dialogue in dialogues:
        said = _said(dialogue)
        turns.update(text for _, text in said if 20 <= len(text) <= longest)
        for at in range(1, len(said)):
            if (found := _exchange(said[at - 1 : at + 1], longest)) is not None:
                exchanges.add(found)
    ordered = sorted(turns, key=_digest)
    # An exchange goes where its question goes.
    by_part = {
        part: [pair for pair in sorted(exchanges, key=lambda p: _digest(p[0])) if part_of(pair[0]) == part] for part in PARTS
    }
    digest = hashlib.sha256(json.dumps(dialogues).encode()).hexdigest()[:16]
    return Texts({part: [turn for turn in ordered if part_of(turn) == part] for part in PARTS}, by_part, digest)


def exchange_of(dialogue: str, longest: int) -> tuple[str, str] | None:
    """A dialogue's last question and answer, as `read_texts` cuts them; None where they do not fit."""
    return _exchange(_said(dialogue)[-2:], longest)


def _said(dialogue: str) -> list[tuple[str, str]]:
    turns = re.split(r"\n\n(?=Human: |Assistant: )", dialogue.strip())
    return [(role, " ".join(text.split())) for role, _, text in (turn.partition(": ") for turn in turns)]


def _exchange(said: list[tuple[str, str]], longest: int) -> tuple[str, str] | None:
    if [role for role, _ in said] != ["Human", "Assistant"]:
        return None
    question, answer = said[0][1], _whole_sentences(said[1][1], longest)
    return (question, answer) if 10 <= len(question) <= longest and len(answer) >= 10 else None


def _whole_sentences(text: str, longest: int) -> str:
    """As many sentences from the beginning as fit; none may."""
    ends = [found.end() for found in re.finditer(r"[.!?](?= |$)", text) if found.end() <= longest]
    return text[: ends[-1]] if ends else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def learn_tokenizer(texts: list[str], vocabulary: int, folder: Path):
    """A byte-level BPE of `vocabulary` tokens, kept in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    wrapped.save_pretrained(folder)
    return wrapped
