"""The embedded decisions: every message is its own, held-out ones have other words, and every row can be counted."""

import re
from collections import Counter

import pytest

from trl_cpo.data.loading import load_pairs, to_conversational

SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def rows():
    return {split: list(load_pairs("demo", split)) for split in SPLITS}


def message(row) -> str:
    return row["prompt"][-1]["content"].removeprefix("Message: ").removesuffix("\nTeam:")


def sentences(text: str) -> set[str]:
    return {part.strip().lower() for part in re.split(r"[.?!]+", text) if part.strip()}


def runs_of_words(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_they_are_many_and_all_different(rows):
    assert len(rows["train"]) >= 300 and len(rows["test"]) >= 100
    messages = [message(row).lower() for split in SPLITS for row in rows[split]]
    assert len(set(messages)) == len(messages)


def test_held_out_messages_have_other_wordings(rows):
    """No held-out sentence occurs in training, and no run of four words: they share no template."""
    train, test = ([message(row) for row in rows[split]] for split in SPLITS)
    for shared in (sentences, lambda text: runs_of_words(text, 4)):
        seen = set().union(*map(shared, train))
        assert [text for text in test if shared(text) & seen] == []


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_can_be_counted(rows, split):
    for row in rows[split]:
        options = row["options"]
        assert options == rows["train"][0]["options"] and 4 <= len(set(options)) == len(options) <= 6
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert chosen == {"role": "assistant", "content": row["team"]} and row["team"] in options
        assert rejected == {"role": "assistant", "content": row["confused_with"]} and row["confused_with"] in options
        assert row["team"] != row["confused_with"]
        # The instruction names all options, so that a model can answer with one of them.
        assert ", ".join(options) in row["prompt"][0]["content"]
        assert message(row) and row["prompt"][-1]["role"] == "user"


@pytest.mark.parametrize("split", SPLITS)
def test_teams_are_equally_frequent(rows, split):
    counts = Counter(row["team"] for row in rows[split])
    assert len(counts) == len(rows[split][0]["options"]) and max(counts.values()) - min(counts.values()) <= 1
    # Answering with one team for everything is right for a sixth; being wrong is spread over all of them too.
    assert len({row["confused_with"] for row in rows[split]}) == len(counts)


def test_examples_in_the_prompt_are_no_messages_of_the_set(rows):
    examples = {
        turn["content"] for split in SPLITS for row in rows[split] for turn in row["prompt"][:-1] if turn["role"] == "user"
    }
    assert examples.isdisjoint(row["prompt"][-1]["content"] for split in SPLITS for row in rows[split])


def test_the_long_answers_are_still_there():
    for split, count in (("train", 240), ("test", 60)):
        pairs, report = to_conversational(load_pairs("demo-answers", split))
        assert len(pairs) == count and report.refused == {}
