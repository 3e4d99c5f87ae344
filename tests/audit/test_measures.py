"""The audit's numbers on arrays whose answers are known in closed form."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from trl_cpo.audit.measures import Settings, assumption, escape, gradient, groups, length, measure, misaligned, policy
from trl_cpo.audit.uncertainty import fraction, quantile, rank_correlation, shares
from trl_cpo.scoring.scored_pairs import ScoredPairs
from trl_cpo.slices import MOST_SLICES, OTHERS, slices_of


def pairs_of(ref_gap, **more) -> ScoredPairs:
    """Pairs with these reference gaps, one token an answer unless told, so that sums are means."""
    gap = np.asarray(ref_gap, dtype=np.float64)
    ones = np.ones(len(gap), dtype=np.int64)
    fields = dict(ref_chosen=gap - 100.0, ref_rejected=np.full(len(gap), -100.0), chosen_tokens=ones, rejected_tokens=ones)
    return ScoredPairs(**{**fields, **more})


def test_misaligned_by_sum_by_mean_and_by_both():
    """Sums −10 and −6: misaligned. Means −10/10 and −6/2: aligned. The third is so by both, the fourth by neither."""
    pairs = ScoredPairs([-10, -6, -9, -1], [-6, -10, -1, -9], [10, 2, 3, 1], [2, 10, 1, 3])
    # By hand: sums −4, +4, −8, +8; means −1+3, −3+1, −3+1, −1+3.
    found = misaligned(pairs)
    assert [found[name]["k"] for name in ("sum", "mean", "both")] == [2, 2, 1]
    assert found["sum"]["n"] == 4 and found["sum"]["value"] == 0.5


def test_groups_by_hand():
    """γ = 1. Of a: −3 and 0.5 lie 4 and 0.5 below, the lower median is 0.5; of b nothing lies below."""
    pairs, names = pairs_of([-3.0, 2.0, 0.5, 1.0]), np.array(["a", "b", "a", "b"])
    first, second = groups(pairs, names, Settings(0.1, 1.0))
    assert (first["group"], first["pairs"], second["group"], second["pairs"]) == ("a", 2, "b", 2)
    assert first["misaligned"]["sum"] == fraction(np.array([True, False])) and second["misaligned"]["sum"]["k"] == 0
    assert (first["deficit"]["50%"]["n"], first["deficit"]["50%"]["value"]) == (2, 0.5)
    assert second["deficit"]["50%"] == {"n": 0, "value": None, "low": None, "high": None}


def test_the_deficit_is_in_nats_of_the_reduction_with_its_interval():
    gap = -np.arange(1.0, 101.0)
    tens = np.full(100, 10)
    for reduction, per in (("sum", 1.0), ("mean", 10.0)):
        pairs = pairs_of(gap, chosen_tokens=tens, rejected_tokens=tens)
        (one,) = groups(pairs, np.full(100, "g"), Settings(0.1, 0.5, reduction))
        found = one["deficit"]["50%"]
        assert found["value"] == pytest.approx(0.5 + 50 / per)
        assert found["low"] < found["value"] < found["high"] and one["misaligned"][reduction]["value"] == 1.0


def test_a_gap_of_zero_is_not_misaligned():
    assert misaligned(pairs_of([0.0, 0.0]))["sum"]["k"] == 0


def test_assumption_from_scores_pair_by_pair():
    """δ_ref = −10, β = 0.1: Δr = 1 lies on the bound and violates (δ* = 0), 1.01 does not; NaN is no score."""
    found = assumption(
        np.array([-10.0, -10.0, -10.0, 5.0, 5.0]), Settings(0.1, 1.0), np.array([1.0, 1.01, math.nan, -1.0, 0.0])
    )
    assert (found["violated"]["k"], found["violated"]["n"]) == (2, 4)  # the first, and 5 − 10 < 0
    assert found["contradict_label"]["k"] == 1 and found["tied"]["k"] == 1


def test_assumption_on_the_grid_is_that_of_the_ratio_alone():
    rng = np.random.default_rng(0)
    ref_gap = rng.normal(-5, 30, 500)
    found = assumption(ref_gap, Settings(0.2, 1.0))
    assert 0.2 in found["betas"] and len(found["cells"]) == len(found["betas"]) * len(found["reward_gaps"])
    for cell in found["cells"]:
        assert cell["k"] == sum(gap <= -cell["reward_gap"] / cell["beta"] for gap in ref_gap.tolist())
    cells = {(cell["reward_gap"], cell["beta"]): cell["k"] for cell in found["cells"]}
    assert cells[0.5, 0.05] == cells[1.0, 0.1] and cells[0.5, 0.1] == cells[1.0, 0.2]
    assert assumption(ref_gap, Settings(0.2, 1.0), np.full(500, math.nan))["from"] == "grid"


def test_gradient_at_the_reference_and_at_zero():
    """DPO pulls with β/2 everywhere at its reference; misaligned pairs that reach 0 are pulled with β σ(βδ_ref) (Prop. 3.4)."""
    ref_gap = np.array([-20.0, -10.0, 3.0, 0.5] * 5)
    found = gradient(ref_gap, ref_gap, Settings(beta=0.1, gamma=1.0))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    now, zero = found["dpo"]["now"], found["dpo"]["at_zero"]
    assert now["misaligned_pull"] == now["other_pull"] == 0.5 and now["misaligned_share"]["value"] == 0.5
    arrived = (sigmoid(-2.0) + sigmoid(-1.0)) / 2
    assert zero["misaligned_pull"] == pytest.approx(arrived, rel=1e-12) and zero["other_pull"] == 0.5
    assert zero["misaligned_share"]["value"] == pytest.approx(arrived / (arrived + 0.5), rel=1e-12)
    clip = found["clip"]
    assert clip["now"]["misaligned_pull"] == pytest.approx((sigmoid(2.1) + sigmoid(1.1)) / 2, rel=1e-12)
    # δ_ref = 3 keeps DPO's target; 0.5 lies below γ and is asked for 1.
    assert clip["now"]["other_pull"] == pytest.approx((0.5 + sigmoid(0.05)) / 2, rel=1e-12)
    assert clip["at_zero"]["misaligned_pull"] == pytest.approx(sigmoid(0.1), rel=1e-12)


def test_gradient_is_autograd_of_the_loss():
    from trl_cpo.objective import pair_loss

    rng = np.random.default_rng(1)
    ref_gap, gap = rng.normal(0, 20, 40), rng.normal(0, 20, 40)
    found = gradient(ref_gap, gap, Settings(beta=0.3, gamma=2.0))
    for name, target in (("dpo", ref_gap), ("clip", np.maximum(ref_gap, 2.0))):
        at = torch.tensor(gap, requires_grad=True)
        pair_loss(at, torch.from_numpy(target), beta=0.3).sum().backward()
        pull = -at.grad.numpy() / 0.3
        low = ref_gap < 0
        assert found[name]["now"]["misaligned_pull"] == pytest.approx(pull[low].mean(), rel=1e-9)
        assert found[name]["now"]["misaligned_share"]["value"] == pytest.approx(pull[low].sum() / pull.sum(), rel=1e-9)


def test_a_policy_past_zero_is_not_brought_back_to_it():
    ref_gap, gap = np.array([-5.0, -5.0, 1.0]), np.array([4.0, -4.0, 1.0])
    found = gradient(ref_gap, gap, Settings(beta=1.0, gamma=0.0))["dpo"]["at_zero"]["misaligned_pull"]
    assert found == pytest.approx((1 / (1 + math.exp(9)) + 1 / (1 + math.exp(5))) / 2, rel=1e-12)


def test_escape_times_by_the_formula():
    """method: DPO D/β + (e^{βD} − 1)/β², clip D/β + (e^{−βγ} − e^{−β(D+γ)})/β²; D = 30, β = 0.1, γ = 1."""
    found = escape(np.array([-30.0, 2.0, 0.0]), np.array([-30.0, 2.0, 0.0]), Settings(beta=0.1, gamma=1.0))
    dpo = 300 + (math.exp(3.0) - 1) * 100
    clip = 300 + (math.exp(-0.1) - math.exp(-3.1)) * 100
    assert found["pairs"] == 1 and found["ratio"]["50%"]["value"] == pytest.approx(dpo / clip, rel=1e-12)
    assert found["beta_depth"]["50%"]["value"] == pytest.approx(3.0)
    assert [one["k"] for one in found["longer"]] == [1, 0, 0]


def test_escape_starts_where_the_policy_stands():
    """A policy half-way needs the rest of the way; one at δ > 0 needs none and is not counted."""
    ref_gap, gap = np.array([-30.0, -30.0]), np.array([-15.0, 1.0])
    found = escape(ref_gap, gap, Settings(beta=0.1, gamma=0.0))
    dpo = 150 + (math.exp(3.0) - math.exp(1.5)) * 100
    clip = 150 + (1 - math.exp(-1.5)) * 100
    assert found["pairs"] == 1 and found["ratio"]["50%"]["value"] == pytest.approx(dpo / clip, rel=1e-12)


def test_escape_is_integrated_numerically():
    """The same ratio by integrating dδ/ds = β σ(−β(δ − t)) over δ: s = ∫ dδ / (β σ(−β(δ − t)))."""
    from scipy.integrate import quad

    beta, gamma, depth = 0.25, 0.7, 9.0
    times = [quad(lambda gap, t=t: (1 + math.exp(beta * (gap - t))) / beta, -depth, 0)[0] for t in (-depth, gamma)]
    found = escape(np.array([-depth]), np.array([-depth]), Settings(beta=beta, gamma=gamma))
    assert found["ratio"]["90%"]["value"] == pytest.approx(times[0] / times[1], rel=1e-9)


def test_a_time_beyond_any_float_is_written_as_a_number():
    document = measure(pairs_of([-1e6, 5.0]), Settings(beta=1.0, gamma=0.0))
    assert document["escape"]["ratio"]["50%"]["value"] == 1e300
    json.dumps(document, allow_nan=False)


def test_length_groups_and_correlation():
    """Every token costs one nat, so sums follow length exactly and means not at all."""
    chosen, rejected = np.array([12, 3, 7, 9, 1, 8, 20, 4, 6, 5, 2]), np.full(11, 6)
    found = length(ScoredPairs(-chosen * 1.0, -rejected * 1.0, chosen, rejected))
    assert found["sum"]["correlation"]["value"] == pytest.approx(-1.0)
    assert found["mean"]["correlation"]["value"] is None  # all equal
    groups = found["sum"]["misaligned_where_chosen_is"]
    assert [(groups[name]["k"], groups[name]["n"]) for name in ("longer", "same", "shorter")] == [(5, 5), (0, 1), (0, 5)]
    assert all(one["k"] == 0 for one in found["mean"]["misaligned_where_chosen_is"].values())


def test_policy_counts_by_hand():
    """δ_ref −4 everywhere; δ −2 (U), −5 (worse), 3 (escaped), 0 (on the border: neither)."""
    tokens = np.full(4, 2)
    pairs = ScoredPairs(np.full(4, -12.0), np.full(4, -8.0), tokens, tokens, np.array([-10.0, -13, -5, -8]), np.full(4, -8.0))
    found = policy(pairs, Settings(beta=0.1, gamma=1.0))
    counts = {name: one["k"] for name, one in found.items() if isinstance(one, dict)}
    assert counts == {
        "prefers_chosen": 1,
        "beats_reference": 3,
        "in_undesirable_region": 1,
        "escaped": 1,
        "violation_rate": 3,
    }
    assert found["gap"] == pytest.approx(-1.0) and found["chosen_logps_shift"] == pytest.approx(3.0)
    per_token = policy(pairs, Settings(beta=0.1, gamma=1.0, reduction="mean"))
    assert per_token["gap"] == pytest.approx(-0.5) and per_token["chosen_logps_shift"] == pytest.approx(1.5)


def test_measure_is_json_and_slices_are_the_pairs_alone():
    rng = np.random.default_rng(3)
    n = 60
    pairs = ScoredPairs(
        rng.normal(-50, 9, n),
        rng.normal(-50, 9, n),
        rng.integers(1, 30, n),
        rng.integers(1, 30, n),
        policy_chosen=rng.normal(-50, 9, n),
        policy_rejected=rng.normal(-50, 9, n),
        prompt_of=np.arange(n) // 2,
        reward_gap=rng.normal(1, 1, n),
        slices={"kind": np.array(["a", "b", "b"] * 20, dtype=object)},
    )
    whole = measure(pairs, Settings(0.1, 1.0))
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert whole["distinct_prompts"] == 30
    parts = [measure(pairs.take(mask), Settings(0.1, 1.0)) for _, mask in slices_of(pairs.slices["kind"])]
    for key in (("misaligned", "sum"), ("policy", "in_undesirable_region"), ("assumption", "violated")):
        assert sum(part[key[0]][key[1]]["k"] for part in parts) == whole[key[0]][key[1]]["k"]
    assert [part["pairs"] for part in parts] == [40, 20]


def test_means_need_tokens_and_finite_numbers():
    with pytest.raises(ValueError, match="at least 1"):
        ScoredPairs([-1.0], [-1.0], [0], [1])
    with pytest.raises(ValueError, match="ref_rejected is not finite in 1 of 2 pairs, the first of them at position 1"):
        ScoredPairs([-1.0, -1.0], [-1.0, math.nan], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="one value a pair"):
        ScoredPairs([-1.0, -2.0], [-1.0], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="both or neither"):
        ScoredPairs([-1.0], [-1.0], [1], [1], policy_chosen=[-1.0])
    with pytest.raises(ValueError, match="no pair"):
        measure(pairs_of([]), Settings(0.1, 1.0))


def test_intervals_of_fractions_are_exact():
    """Clopper and Pearson against the binomial tails that define them."""
    found = fraction(np.arange(20) < 7)
    assert stats.binom.sf(6, 20, found["low"]) == pytest.approx(0.025, rel=1e-6)
    assert stats.binom.cdf(7, 20, found["high"]) == pytest.approx(0.025, rel=1e-6)
    assert fraction(np.zeros(0, dtype=bool)) == {"k": 0, "n": 0, "value": None, "low": None, "high": None}


def test_quantile_interval_covers_by_the_binomial():
    """[X_(l), X_(u)] covers the q-quantile with P(l ≤ Bin(n, q) ≤ u − 1), at least 95 %, and less if either end moves in."""
    for n, q in ((20, 0.5), (100, 0.9), (57, 0.5), (200, 0.9)):
        found = quantile(np.arange(1, n + 1), q)  # a value is its rank
        low, high = int(found["low"]), int(found["high"])
        assert stats.binom.cdf(high - 1, n, q) - stats.binom.cdf(low - 1, n, q) >= 0.95
        assert stats.binom.cdf(low, n, q) > 0.025 and stats.binom.sf(high - 2, n, q) > 0.025
        assert found["value"] == math.ceil(q * n)
    assert quantile(np.array([3.0]), 0.9) == {"n": 1, "value": 3.0, "low": None, "high": None}


def share(weights, inside):
    (one,) = shares(weights[:, None], inside)
    return one


def test_share_interval_is_that_of_a_fraction_where_weights_are_equal():
    """With equal weights the share is k/n, and the bootstrap's spread is the binomial's."""
    inside = np.arange(400) < 120
    found = share(np.full(400, 0.25), inside)
    deviation = math.sqrt(0.3 * 0.7 / 400)
    assert found["value"] == pytest.approx(0.3)
    assert found["low"] == pytest.approx(0.3 - 1.96 * deviation, abs=0.008)
    assert found["high"] == pytest.approx(0.3 + 1.96 * deviation, abs=0.008)
    assert share(np.full(400, 0.25), inside) == found  # the seed is fixed
    assert share(np.ones(400), np.arange(400) < 4)["low"] is None
    assert share(np.zeros(400), inside) == {"value": None, "low": None, "high": None}
    assert shares(np.stack([np.full(400, 0.25), np.ones(400)], axis=1), inside) == [found, found]


def test_share_resamples_weight_and_group_together():
    """One pair with all the weight: its side has about 1 − e^{−1} chance to be drawn, so the interval is all of [0, 1]."""
    weights = np.full(50, 1e-9)
    weights[0] = 1.0
    found = share(weights, np.arange(50) < 10)
    assert found["value"] == pytest.approx(1.0, abs=1e-6) and found["low"] < 0.5
    assert found["high"] <= 1.0  # a heavy pair drawn twice is twice in both sums


def test_rank_correlation_and_its_interval():
    rng = np.random.default_rng(5)
    x = rng.normal(size=80)
    y = x + rng.normal(size=80)
    found = rank_correlation(x, y)
    assert found["value"] == pytest.approx(stats.spearmanr(x, y).statistic)
    half = 1.959964 * math.sqrt((1 + found["value"] ** 2 / 2) / 77)
    assert math.atanh(found["high"]) - math.atanh(found["value"]) == pytest.approx(half, rel=1e-5)
    assert math.atanh(found["value"]) - math.atanh(found["low"]) == pytest.approx(half, rel=1e-5)
    assert rank_correlation(x, np.zeros(80))["value"] is None
    assert rank_correlation(x[:5], y[:5])["low"] is None
    assert rank_correlation(x, 2 * x)["low"] == pytest.approx(1.0)


def test_slices_by_value_by_quartile_and_the_rest():
    names = np.array(["b"] * 3 + ["a"] * 3 + ["c"] + [None], dtype=object)
    found = dict(slices_of(names))
    assert list(found) == ["a", "b", "c", "(missing)"] and found["b"].tolist() == [True] * 3 + [False] * 5
    numbers = np.array([*range(100), math.nan], dtype=object)
    quarters = dict(slices_of(numbers))
    assert [int(mask.sum()) for mask in quarters.values()] == [25, 25, 25, 25, 1]
    assert list(quarters)[0] == "0 to below 24.75" and list(quarters)[-1] == "(missing)"
    few = dict(slices_of(np.array([2, 1, 2], dtype=object)))
    assert list(few) == ["1", "2"] and few["2"].tolist() == [True, False, True]
    many = dict(slices_of(np.array([f"v{i:03}" for i in range(50)], dtype=object)))
    assert len(many) == MOST_SLICES + 1 and many[OTHERS].sum() == 50 - MOST_SLICES
    assert [name for name, _ in slices_of(np.array([True, False, True], dtype=object))] == ["True", "False"]


values = st.lists(st.one_of(st.none(), st.integers(-5, 5), st.text(max_size=3), st.floats(-1e9, 1e9)), min_size=1, max_size=60)


@given(values)
@settings(max_examples=80, deadline=None)
@example(list(range(13)))  # the quartiles are values
@example(["\x00", "(missing)", None, "(others)"])
def test_slices_hold_every_pair_once(column):
    masks = [mask for _, mask in slices_of(np.array(column, dtype=object))]
    assert np.stack(masks).sum(axis=0).tolist() == [1] * len(column)


finite = st.floats(-1e7, 1e7)


@given(
    st.lists(st.tuples(finite, finite, st.integers(1, 5000), st.integers(1, 5000), finite, finite), min_size=1, max_size=12),
    st.floats(1e-4, 50),
    st.floats(0, 1e4),
    st.sampled_from(["sum", "mean"]),
)
@settings(max_examples=50, deadline=None)
def test_every_measure_is_json_and_in_range_at_extremes(rows, beta, gamma, reduction):
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    pairs = ScoredPairs(*columns[:4], policy_chosen=columns[4], policy_rejected=columns[5])
    document = measure(pairs, Settings(beta, gamma, reduction))
    json.dumps(document, allow_nan=False)
    for one in (document["misaligned"]["sum"], document["same_target"], document["policy"]["violation_rate"]):
        assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1
    for name in ("dpo", "clip"):
        value = document["gradient"][name]["now"]["misaligned_share"]["value"]
        assert value is None or 0 <= value <= 1
    ratio = document["escape"]["ratio"]["50%"]["value"]
    assert ratio is None or ratio >= 1 - 1e-9  # a target at or above 0 is never slower than one below
