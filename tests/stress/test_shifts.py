"""Each shift by hand on literal pairs; of any pair: answers stay, the same seed gives the same, and Unicode stays whole."""

import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cpo.stress.shifts import BASE, EXCHANGE, SHIFTS, SYSTEMS, DoesNotApply, Options, _misspelt, with_typos


def turn(role, content):
    return {"role": role, "content": content}


ASKED = [turn("user", "Why rest?"), turn("assistant", "To heal."), turn("user", "How long?")]
PAIR = {"prompt": ASKED, "chosen": [turn("assistant", "Eight hours.")], "rejected": [turn("assistant", "No.")], "row": 7}
TEXT = {"prompt": "Which team? ->", "chosen": " Billing", "rejected": " Sales"}
BY_NAME = {shift.name: shift.apply for shift in SHIFTS}


def test_the_first_shift_changes_nothing():
    assert SHIFTS[0].name == BASE
    assert BY_NAME[BASE](PAIR, Options()) == PAIR and BY_NAME[BASE](TEXT, Options()) == TEXT


def test_system_prompt_by_hand():
    changed = BY_NAME["system prompt"](PAIR, Options(systems=("Be terse.",)))
    assert changed == {**PAIR, "prompt": [turn("system", "Be terse."), *ASKED]}
    again = BY_NAME["system prompt"](changed, Options(systems=("Be kind.",)))
    assert again["prompt"] == [turn("system", "Be kind."), *ASKED], "in place of the one that was there"
    prompts = [{**PAIR, "prompt": [turn("user", str(number))]} for number in range(30)]
    assert {BY_NAME["system prompt"](pair, Options())["prompt"][0]["content"] for pair in prompts} == set(SYSTEMS)


def test_no_template_by_hand():
    assert BY_NAME["no template"]({**PAIR, "chat_template_kwargs": {"a": 1}}, Options()) == {
        "prompt": "User: Why rest?\nAssistant: To heal.\nUser: How long?\nAssistant:",
        "chosen": " Eight hours.",
        "rejected": " No.",
        "row": 7,
    }
    several = {**PAIR, "chosen": [turn("assistant", "8."), turn("user", "Why?"), turn("assistant", "So.")]}
    assert BY_NAME["no template"](several, Options())["chosen"] == " 8.\nUser: Why?\nAssistant: So."


def test_longer_dialogue_by_hand():
    assert BY_NAME["longer dialogue"](PAIR, Options()) == {**PAIR, "prompt": [*EXCHANGE, *ASKED]}
    system = turn("system", "Be kind.")
    assert BY_NAME["longer dialogue"]({**PAIR, "prompt": [system, *ASKED]}, Options())["prompt"] == [system, *EXCHANGE, *ASKED]
    question, answer = (each["content"] for each in EXCHANGE)
    assert BY_NAME["longer dialogue"](TEXT, Options()) == {
        **TEXT,
        "prompt": f"User: {question}\nAssistant: {answer}\n\nWhich team? ->",
    }


def test_typos_touch_the_users_turns_alone():
    changed = BY_NAME["typos"](PAIR, Options(typo_rate=1.0))
    assert changed["prompt"][1] == ASKED[1] and {**changed, "prompt": ASKED} == PAIR
    for place in (0, 2):
        assert changed["prompt"][place]["content"] != ASKED[place]["content"]
    assert BY_NAME["typos"](TEXT, Options(typo_rate=1.0))["prompt"].endswith("? ->")
    parts = [{"type": "text", "text": "Why?"}]
    assert BY_NAME["typos"]({**PAIR, "prompt": [turn("user", parts)]}, Options(typo_rate=1.0))["prompt"][0]["content"] == parts


@pytest.mark.parametrize(
    ("name", "pair", "why"),
    [
        ("system prompt", TEXT, "plain text has no system message"),
        ("no template", TEXT, "plain text has no chat template"),
        ("no template", {**PAIR, "tools": [{"name": "f"}]}, "tools"),
        ("no template", {**PAIR, "prompt": [turn("tool", "5"), *ASKED]}, "more than text"),
        ("no template", {**PAIR, "prompt": [turn("user", [{"type": "image"}])]}, "more than text"),
        ("no template", {**PAIR, "chosen": [turn("user", "a")]}, "assistant's turn"),
        ("longer dialogue", {**PAIR, "prompt": [turn("assistant", "Hello.")]}, "user's turn"),
        ("longer dialogue", {**PAIR, "prompt": [turn("system", "Be kind.")]}, "user's turn"),
    ],
)
def test_a_shift_that_makes_no_sense_says_why(name, pair, why):
    with pytest.raises(DoesNotApply, match=why):
        BY_NAME[name](pair, Options())


class Drawn(random.Random):
    """Draws what it is told to: how, and then where."""

    def __init__(self, how, at):
        super().__init__()
        self.how, self.at = how, at

    def choice(self, options):
        return self.how if self.how in options else self.at

    def randrange(self, count):
        return self.at


@pytest.mark.parametrize(
    ("word", "how", "at", "found"),
    [
        ("rest", "swap", 1, "rset"),
        ("rest", "drop", 0, "est"),
        ("rest", "double", 3, "restt"),
        ("aa", "swap", 0, "aaa"),  # nothing to swap
        ("ab", "drop", 1, "a"),
    ],
)
def test_a_typo_by_hand(word, how, at, found):
    assert "".join(_misspelt(list(word), Drawn(how, at))) == found


def test_the_rate_is_that_of_the_words():
    text = " ".join(["word"] * 4000)
    share = sum(word != "word" for word in with_typos(text, 0.05, 0).split()) / 4000
    assert 0.035 < share < 0.065
    assert with_typos(text, 0.05, 0) == with_typos(text, 0.05, 0) != with_typos(text, 0.05, 1)


def test_numbers_signs_and_single_letters_stay():
    text = "I x 3.14 <|42|> -> {} 日 !\n\t"
    assert with_typos(text, 1.0, 0) == text


def test_marks_stay_on_their_letters():
    word = "re\u0301sume\u0301"  # combining accents
    for seed in range(40):
        typo = with_typos(word, 1.0, seed)
        assert typo != word and not unicodedata.combining(typo[0])
        assert all(typo[at - 1] == "e" for at, char in enumerate(typo) if char == "\u0301")


TURNS = st.lists(
    st.builds(turn, st.sampled_from(["user", "assistant", "system"]), st.text(max_size=30)), min_size=1, max_size=4
)
ANSWER = st.builds(turn, st.just("assistant"), st.text(max_size=30)).map(lambda one: [one])
PAIRS = st.one_of(
    st.fixed_dictionaries({"prompt": TURNS, "chosen": ANSWER, "rejected": ANSWER}),
    st.fixed_dictionaries({"prompt": st.text(max_size=60), "chosen": st.text(max_size=30), "rejected": st.text(max_size=30)}),
)


@settings(max_examples=150, deadline=None)
@given(PAIRS, st.integers(0, 3), st.sampled_from([0.05, 0.5, 1.0]))
def test_of_any_pair_answers_stay_and_draws_repeat(pair, seed, rate):
    options, before = Options(typo_rate=rate, seed=seed), repr(pair)
    for shift in SHIFTS:
        try:
            changed = shift.apply(pair, options)
        except DoesNotApply:
            continue
        assert changed == shift.apply(pair, options) and repr(pair) == before
        for side in ("chosen", "rejected"):
            if shift.name == "no template":
                assert changed[side] == f" {pair[side][0]['content']}"
            else:
                assert changed[side] == pair[side]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80), st.integers(0, 5))
def test_typos_move_characters_and_make_none(text, seed):
    typo = with_typos(text, 1.0, seed)
    assert set(typo) <= set(text)
    typo.encode("utf-8")
