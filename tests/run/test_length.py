"""Sums beside means: written out by hand, and against scipy."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from trl_cpo.run.length import by_length, in_words

COLUMNS = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens"]


def document(rows, reduction="sum"):
    return {"reduction": reduction, "columns": COLUMNS, "rows": rows}


def test_by_hand():
    # By sums the first pair is preferred and the second is not; by means the other way round.
    rows = [[-4.0, -6.0, 0, 0, 2, 6], [-6.0, -4.0, 0, 0, 6, 2], [-1.0, -2.0, 0, 0, 1, 1]]
    found = by_length(document(rows))
    assert found["sum"] == {"prefers_chosen": pytest.approx(2 / 3), "correlation": pytest.approx(-1.0)}
    assert found["mean"]["prefers_chosen"] == pytest.approx(2 / 3)
    assert in_words(found).startswith("by sums the policy prefers chosen on 67 % (its gap's rank correlation with")


def test_sums_and_means_are_the_same_pairs_however_they_are_stored():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 30, (40, 2))
    sums = -rng.gamma(2.0, 3.0, (40, 2)) * tokens
    stored = {
        "sum": [[*row, 0, 0, *count] for row, count in zip(sums, tokens, strict=True)],
        "mean": [[*row, 0, 0, *count] for row, count in zip(sums / tokens, tokens, strict=True)],
    }
    one, other = (by_length(document(rows, reduction)) for reduction, rows in stored.items())
    for reduction in ("sum", "mean"):
        assert one[reduction] == pytest.approx(other[reduction])
    gap, longer = sums[:, 0] - sums[:, 1], tokens[:, 0] - tokens[:, 1]
    assert one["sum"]["correlation"] == pytest.approx(spearmanr(gap, longer).statistic)


@pytest.mark.parametrize(
    "pairs",
    [document([]), {**document([[1, 2, 3, 4]]), "columns": COLUMNS[:4]}, document([[-1.0, -2.0, 0, 0, 0, 3]])],
)
def test_without_lengths_there_is_nothing_to_say(pairs):
    assert by_length(pairs) is None


def test_of_equal_lengths_there_is_no_correlation():
    found = by_length(document([[-1.0, -2.0, 0, 0, 3, 3]] * 4))
    assert found["sum"]["correlation"] is None and "correlation" not in in_words(found)
