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
    return row["prompt"].splitlines()[-1].removesuffix(" ->")


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
        assert row["chosen"] == f" {row['team']}" in options and row["rejected"] == f" {row['confused_with']}" in options
        assert row["team"] != row["confused_with"]
        # The prompt begins with all options, so that a model can answer with one of them.
        assert row["prompt"].startswith(f"Teams:{','.join(options)}.\n") and message(row)


@pytest.mark.parametrize("split", SPLITS)
def test_teams_are_equally_frequent(rows, split):
    counts = Counter(row["team"] for row in rows[split])
    assert len(counts) == len(rows[split][0]["options"]) and max(counts.values()) - min(counts.values()) <= 1
    # Answering with one team for everything is right for a sixth; being wrong is spread over all of them too.
    assert len({row["confused_with"] for row in rows[split]}) == len(counts)


def test_examples_in_the_prompt_are_no_messages_of_the_set(rows):
    every = [row for split in SPLITS for row in rows[split]]
    (beginning,) = {row["prompt"].rsplit("\n", 1)[0] for row in every}
    examples = {line.partition(" ->")[0] for line in beginning.splitlines()[1:]}
    assert examples and examples.isdisjoint(map(message, every))


def test_the_long_answers_are_still_there():
    for split, count in (("train", 240), ("test", 60)):
        pairs, report = to_conversational(load_pairs("demo-answers", split))
        assert len(pairs) == count and report.refused == {}
