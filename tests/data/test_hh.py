"""HH-RLHF text: turns, pairs, reasons for refusal, and the exact way back."""

import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cpo.data.hh import (
    DialogueError,
    Reason,
    RowReport,
    Turn,
    parse_dialogue,
    split_pair,
)

from helpers.hh_text import render_dialogue

CHOSEN = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Which bread? \n\nAssistant: Rye, it keeps.\n"
REJECTED = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Which bread? \n\nAssistant: Rye."

# The same examples in every run, and no deadline: the machine may be busy.
reproducible = settings(derandomize=True, deadline=None, max_examples=200)

# Pieces that delimiters are made of, so that near misses and real delimiters both come up.
text = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(["\n", "\n\n", "Human", "Assistant", "Human: ", "Assistant:", ":", " ", "a", "\r"])).map("".join),
)
content = text.filter(lambda s: s.strip() and "\n\nHuman:" not in s and "\n\nAssistant:" not in s)
dialogue = st.lists(st.tuples(content, content), min_size=1, max_size=4).map(
    lambda pairs: [turn for user, answer in pairs for turn in (Turn("user", user), Turn("assistant", answer))]
)


def test_split_pair_keeps_every_byte_of_every_turn():
    assert split_pair(CHOSEN, REJECTED) == {
        "prompt": [
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Which bread? "},
        ],
        "chosen": [{"role": "assistant", "content": "Rye, it keeps.\n"}],
        "rejected": [{"role": "assistant", "content": "Rye."}],
    }


def test_answers_that_begin_alike_stay_whole():
    pair = split_pair("\n\nHuman: Q\n\nAssistant: I think yes", "\n\nHuman: Q\n\nAssistant: I think no")
    assert pair["chosen"][0]["content"] == "I think yes"
    assert pair["rejected"][0]["content"] == "I think no"


def test_only_the_whole_delimiter_starts_a_turn():
    user = " a\nHuman: b\n \nAssistant: c\n\nhuman: d\n\n Human: e Assistant: f\n"
    assert parse_dialogue(f"\n\nHuman: {user}\n\nAssistant: Human: g") == [
        Turn("user", user),
        Turn("assistant", "Human: g"),
    ]


GOOD = "\n\nHuman: Q\n\nAssistant: A"
REFUSED = [
    ({"chosen": GOOD, "rejected": None}, Reason.NOT_A_STRING),
    ({"chosen": [{"role": "user", "content": "Q"}], "rejected": GOOD}, Reason.NOT_A_STRING),
    ({"chosen": "", "rejected": GOOD}, Reason.NOT_A_DIALOGUE),
    ({"chosen": "Just text", "rejected": GOOD}, Reason.NOT_A_DIALOGUE),
    ({"chosen": GOOD, "rejected": " " + GOOD}, Reason.NOT_A_DIALOGUE),
    ({"chosen": GOOD, "rejected": "\n\nHuman:Q\n\nAssistant: A"}, Reason.NOT_A_DIALOGUE),
    ({"chosen": GOOD, "rejected": "\n\nHuman: Q\n\nAssistant:A"}, Reason.UNCLEAR_TURN),
    ({"chosen": GOOD + "\n\nHuman:", "rejected": GOOD}, Reason.UNCLEAR_TURN),
    ({"chosen": "\n\nHuman: Q", "rejected": GOOD}, Reason.ROLE_ORDER),
    ({"chosen": "\n\nAssistant: A", "rejected": GOOD}, Reason.ROLE_ORDER),
    ({"chosen": "\n\nAssistant: A\n\nHuman: Q", "rejected": GOOD}, Reason.ROLE_ORDER),
    ({"chosen": GOOD + "\n\nAssistant: more", "rejected": GOOD}, Reason.ROLE_ORDER),
    ({"chosen": GOOD + "\n\nHuman: thanks", "rejected": GOOD}, Reason.ROLE_ORDER),
    ({"chosen": "\n\nHuman: Q\n\nHuman: Q\n\nAssistant: A\n\nAssistant: A", "rejected": GOOD}, Reason.ROLE_ORDER),
    ({"chosen": "\n\nHuman: \n\nAssistant: A", "rejected": GOOD}, Reason.EMPTY_TURN),
    ({"chosen": GOOD, "rejected": "\n\nHuman: \t\n\n\n\nAssistant: A"}, Reason.EMPTY_TURN),
    ({"chosen": "\n\nHuman: Q\n\nAssistant: ", "rejected": GOOD}, Reason.EMPTY_ANSWER),
    ({"chosen": "\n\nHuman: Q\n\nAssistant:", "rejected": GOOD}, Reason.EMPTY_ANSWER),
    ({"chosen": GOOD, "rejected": "\n\nHuman: Q\n\nAssistant:  \n"}, Reason.EMPTY_ANSWER),
    ({"chosen": GOOD, "rejected": "\n\nHuman: Q?\n\nAssistant: B"}, Reason.NO_COMMON_PROMPT),
    ({"chosen": GOOD, "rejected": "\n\nHuman: Q \n\nAssistant: B"}, Reason.NO_COMMON_PROMPT),
    ({"chosen": GOOD, "rejected": GOOD + "\n\nHuman: Q\n\nAssistant: A"}, Reason.NO_COMMON_PROMPT),
    ({"chosen": GOOD, "rejected": GOOD}, Reason.IDENTICAL_ANSWERS),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED)
def test_refused_with_its_reason(row, reason):
    with pytest.raises(DialogueError) as caught:
        split_pair(**row)
    assert caught.value.reason is reason
    assert reason.sentence in str(caught.value)


def test_every_reason_has_a_case_and_a_sentence():
    # Of messages: tests/data/test_loading.py.
    assert {reason for _, reason in REFUSED} == set(Reason) - {Reason.EMPTY_MESSAGE}
    assert len({reason.sentence for reason in Reason}) == len(Reason)


def test_error_survives_pickling():
    assert pickle.loads(pickle.dumps(DialogueError(Reason.ROLE_ORDER))).reason is Reason.ROLE_ORDER


@reproducible
@given(dialogue)
def test_rendered_turns_parse_back(turns):
    assert parse_dialogue(render_dialogue(turns)) == turns


@reproducible
@given(text)
def test_any_text_is_refused_or_rendered_back_exactly(raw):
    for candidate in (raw, "\n\nHuman: " + raw, f"\n\nHuman: {raw}\n\nAssistant: {raw}"):
        try:
            turns = parse_dialogue(candidate)
        except DialogueError:
            continue
        assert render_dialogue(turns) == candidate


@reproducible
@given(dialogue, content, content)
def test_pairs_are_put_together_again(history, first, second):
    chosen, rejected = ([*history, Turn("user", "Q"), Turn("assistant", answer)] for answer in (first, second))
    if first == second:
        with pytest.raises(DialogueError, match=Reason.IDENTICAL_ANSWERS.value):
            split_pair(render_dialogue(chosen), render_dialogue(rejected))
        return
    pair = split_pair(render_dialogue(chosen), render_dialogue(rejected))
    assert pair["prompt"] + pair["chosen"] == [turn.message() for turn in chosen]
    assert pair["prompt"] + pair["rejected"] == [turn.message() for turn in rejected]


def test_report_counts_and_remembers_the_first_rows():
    report = RowReport()
    for number, reason in enumerate([None, "role_order", *["identical_answers"] * 7, None]):
        report.count(number, reason)
    assert report.to_dict() == {
        "total": 10,
        "kept": 2,
        "refused": {"role_order": 1, "identical_answers": 7},
        "first_rows": {"role_order": [1], "identical_answers": [2, 3, 4, 5, 6]},
    }
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert str(report).splitlines() == [
        "10 rows: 2 kept, 8 refused",
        "  1 role_order: the turns do not alternate, starting with Human and ending with Assistant (row 1)",
        "  7 identical_answers: `chosen` and `rejected` have the same answer (row 2, 3, 4, 5, 6, ...)",
    ]


def test_report_refuses_an_unknown_reason_and_forgets():
    report = RowReport()
    with pytest.raises(ValueError, match="no_such_reason"):
        report.count(0, "no_such_reason")
    report.count(0, "role_order")
    report.clear()
    assert report == RowReport()


def test_imports_neither_torch_nor_datasets():
    code = "import sys, trl_cpo.data.hh; print(sorted({'torch', 'datasets', 'trl', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
