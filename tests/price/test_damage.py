"""The verdict and its words, from runs that were measured: docs/price.md shows them."""

import pytest

from trl_cpo.price.damage import in_words, verdict
from trl_cpo.price.document import Estimate, SetPrice


def price(kl=0.0, repetition=0.1, width=0.1):
    one = Estimate(1.0, 1.0, 1.0)
    return SetPrice(12, Estimate(kl, kl * (1 - width), kl * (1 + width)), one, Estimate(repetition, 0, 1), one, one, [])


BEFORE = {"general": price(), "pairs": price(repetition=0.05)}


@pytest.mark.parametrize(
    ("kl", "repetition", "damaged"),
    [(0.0, 0.1, 0), (0.06, 0.07, 0), (0.26, 0.1, 0), (0.347, 0.294, 2), (0.403, 0.161, 1), (0.725, 0.293, 2), (0.1, 0.26, 1)],
)
def test_what_is_called_damaged(kl, repetition, damaged):
    """Of a KL its interval's lower end counts; of repetition the rise."""
    assert len(verdict({"general": price(kl, repetition)}, BEFORE)) == damaged


def test_general_prompts_count_and_the_pairs_only_without_them():
    broken, sound = price(1.0, 0.5), price(0.01, 0.1)
    assert not verdict({"general": sound, "pairs": broken}, BEFORE)
    assert len(verdict({"pairs": broken}, BEFORE)) == 2
    assert "on the pairs' prompts" in verdict({"pairs": broken}, BEFORE)[0]
    assert len(verdict({"general": broken}, {})) == 1, "without a start, repetition has not risen"
    assert verdict({}, BEFORE) == []


def test_in_words():
    now = {"general": price(1.139, 0.446), "pairs": price(1.035, 0.546)}
    words = in_words(now, BEFORE, verdict(now, BEFORE))
    assert words.startswith(
        "the price: 1.1 nats a token from the reference on general prompts (3-grams repeated: 45 %, 10 % before)"
    )
    assert "This model is damaged: KL to the reference is 1.1 nats a token on general prompts, beyond 0.25; greedy" in words
    assert words.endswith("Lower the learning rate, train for fewer steps, or set max_kl")
    sound = {"general": price(0.01)}
    assert "damaged" not in in_words(sound, BEFORE, verdict(sound, BEFORE))
    assert in_words({}, {}, []) is None
