"""The document by hand: a model that fails under a shift is found, one that holds is not; intervals and pairs left out."""

import numpy as np
import pytest

from trl_cpo.intervals import clopper_pearson, paired_difference, student
from trl_cpo.scoring.scorer import PreparedPairs, Scorer
from trl_cpo.scoring.token_pairs import TokenPairs
from trl_cpo.stress.document import SHARES, document, of_shift
from trl_cpo.stress.measure import Gaps, Measured, _lost, _usable
from trl_cpo.stress.recorded import Recorded
from trl_cpo.stress.shifts import Options
from trl_cpo.stress.text import render


def gaps(gap, ref_gap, at=None, **more):
    return Gaps(np.arange(len(gap)) if at is None else np.array(at), np.array(gap), np.array(ref_gap), **more)


#: Five pairs at γ = 1: preferences of 3, one pair in U, three violations.
BASE = gaps([2.0, 1.5, 0.5, -1.0, -3.0], [1.0, -1.0, -1.0, -2.0, -1.0])


def test_numbers_by_hand():
    found = of_shift(BASE, BASE, np.ones(5))
    assert (found["pairs"], found["changed"], found["left_out"], found["difference"]) == (5, 0, {}, None)
    for name, count in zip(SHARES, (3, 1, 3), strict=True):
        low, high = clopper_pearson(count, 5)
        assert found[name] == {"value": count / 5, "low": low, "high": high}, name
    assert found["gap"]["value"] == 0.0 and (found["gap"]["low"], found["gap"]["high"]) == student(BASE.gap.tolist())
    # The policy prefers chosen on pairs 0, 1 and 2, the reference on 0.
    low, high = paired_difference(2, 0, 5)
    assert found["gain"] == {"value": 0.4, "low": low, "high": high}


def test_violations_are_of_each_pairs_own_gamma():
    assert of_shift(BASE, BASE, np.array([3.0, 1.0, 0.0, -2.0, -4.0]))["violations"]["value"] == 0.2


def test_differences_are_of_the_pairs_that_both_have():
    """Pairs 1, 3 and 4: of these the base prefers chosen on 1, the shift on none; 0 and 2 do not count."""
    found = of_shift(gaps([-0.5, 0.0, -4.0], [-1.0, 0.0, 0.0], at=[1, 3, 4], left_out={"why": 2}), BASE, np.ones(5))
    apart, (low, high) = found["difference"], paired_difference(0, 1, 3)
    assert apart["pairs"] == 3 and apart["prefers_chosen"] == {"value": -1 / 3, "low": low, "high": high}
    # In U: the base on pair 3, the shift on pair 1.
    assert apart["in_undesirable_region"]["value"] == 0.0 and apart["violations"]["value"] == pytest.approx(1 / 3)
    assert apart["gap"]["value"] == pytest.approx(np.mean([-2.0, 1.0, -1.0]))
    assert found["left_out"] == {"why": 2}
    # γ of the pairs 1, 3 and 4; of those by place it would be 1/3.
    assert of_shift(gaps([-0.5, 0.0, -4.0], [0, 0, 0], at=[1, 3, 4]), BASE, np.array([1, -1, 1, 1, -5.0]))["violations"][
        "value"
    ] == pytest.approx(1 / 3)


def test_a_pair_of_which_more_is_cut_than_before_is_left_out():
    """At 6 tokens: of pair 4 as much is cut as before, of 5 one more of the rejected answer, and 6 has no answer left."""
    prompts, answers = [[1, 2], [1, 2, 3], [1] * 6], ([[7] * 5, [7], [7]], [[8] * 4, [8] * 4, [8]])
    prepared = PreparedPairs(3, None, TokenPairs(prompts, *answers, rows=[4, 5, 6]), None, None)
    scorer = Scorer(max_length=6)
    lost = _lost(prepared, scorer)
    assert lost == {4: (1, 0), 5: (0, 1), 6: (1, 1)}
    before = {4: (1, 0), 5: (0, 0), 6: (1, 1)}
    assert _usable(prepared, scorer, lost, before).tolist() == [True, False, False]
    assert _usable(prepared, scorer, lost, lost).tolist() == [True, True, False]


def test_no_pair_is_no_number():
    found = of_shift(gaps([], [], at=np.array([], dtype=int)), BASE, np.ones(5))
    nothing = {"value": None, "low": None, "high": None}
    assert all(found[name] == nothing for name in (*SHARES, "gap", "gain"))
    assert all(found["difference"][name] == nothing for name in (*SHARES, "gap"))
    one = of_shift(gaps([1.0], [1.0], at=[2]), BASE, np.ones(5))
    assert one["gap"] == {"value": 1.0, "low": None, "high": None}


def run(folder, count, gamma=1.0):
    return Recorded(folder, "m", "d", "test", {}, {}, "sum", gamma, np.zeros((count, 4)), None, 0)


def test_a_model_that_fails_under_a_shift_is_found(tmp_path):
    """Planted: a policy that learned 60 of 80 pairs, and under typos falls back to its reference; it holds elsewhere."""
    rng = np.random.default_rng(0)
    ref = rng.normal(-1.0, 1.0, 80)
    learned = np.where(np.arange(80) < 60, np.abs(ref) + 2.0, ref)
    shifts = {
        "as it was": gaps(learned, ref),
        "system prompt": gaps(learned + rng.normal(0, 0.1, 80), ref, changed=80),
        "typos": gaps(ref + rng.normal(0, 0.1, 80), ref, changed=61),
    }
    found = document(run(tmp_path, 80), Measured(np.ones(80), shifts, {"no template": "text"}, 0.0, True), Options())
    as_it_was, system, typos = found["shifts"]
    assert as_it_was["gain"]["low"] > 0.3 and system["gain"]["low"] > 0.3
    assert typos["gain"]["low"] < 0 < typos["gain"]["high"]
    assert typos["difference"]["prefers_chosen"]["high"] < -0.3
    assert system["difference"]["prefers_chosen"]["low"] < 0 < system["difference"]["prefers_chosen"]["high"]
    text = render(found)
    assert "typos: fewer pairs prefer the chosen answer than as it was; 61 prompts changed" in text
    assert "system prompt: no change of preferences beyond chance" in text
    assert "no template: left out; text." in text and "Not measured: " in text
    assert "within rounding" in text and "WARNING" not in text


def test_numbers_that_did_not_come_again_are_told(tmp_path):
    measured = Measured(np.ones(5), {"as it was": BASE}, {}, 0.37, False)
    found = document(run(tmp_path, 5), measured, Options())
    assert found["reproduced"] == {"holds": False, "largest_difference": 0.37}
    words = " ".join(render(found).split())
    assert "the scores are NOT those of pairs.json" in words and "0.37 nats" in words


def test_rounding_is_that_of_the_runs_precision(tmp_path):
    recorded = np.array([-100.0, -1.0])
    full = run(tmp_path, 2)
    assert full.close(recorded + 1e-3, recorded).all() and not full.close(recorded + [0.0, 0.01], recorded).all()
    half = Recorded(tmp_path, "m", "d", "test", {}, {"bf16": True}, "sum", 0.0, np.zeros((2, 4)), None, 0)
    assert half.close(recorded + [0.3, 0.02], recorded).all() and not half.close(recorded + [2.0, 0.0], recorded).all()


def test_students_interval_by_hand():
    low, high = student([1.0, 2.0, 3.0])
    assert (low, high) == (pytest.approx(2 - 4.302653 / 3**0.5), pytest.approx(2 + 4.302653 / 3**0.5))
    assert student([1.0]) is None and student([]) is None
