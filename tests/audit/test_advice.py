"""What the audit says, for numbers that call for it; and the text that it is part of."""

import json

import numpy as np
import pytest

from trl_cpo.audit.advice import DECISION, advise, interval, percent, times
from trl_cpo.audit.document import audited_set, last_words
from trl_cpo.audit.measures import Settings
from trl_cpo.audit.text import render
from trl_cpo.scoring.scored_pairs import ScoredPairs

CLEAN = {
    "given": 1000,
    "dropped": 0,
    "pairs": 1000,
    "max_length": 512,
    "truncation_mode": "keep_start",
    "bos_token": "<s>",
    "leading_bos": {"1": 1000},
    "end_tokens": ["</s>"],
    "ends_an_answer": {"1": 2000},
    "tokens": {name: {"median": 5, "longest": 9} for name in ("prompt", "chosen", "rejected")},
    "findings": [],
    "seen": [],
}


def pairs_of(ref_gap, chosen_tokens=None, rejected_tokens=None, **more) -> ScoredPairs:
    gap = np.asarray(ref_gap, dtype=np.float64)
    n = len(gap)
    rng = np.random.default_rng(0)
    chosen = rng.integers(20, 40, n) if chosen_tokens is None else np.asarray(chosen_tokens)
    rejected = chosen[::-1].copy() if rejected_tokens is None else np.asarray(rejected_tokens)
    base = np.full(n, -100.0)
    return ScoredPairs(base + gap, base, chosen, rejected, **more)


SETTINGS = Settings(0.1, 1.0)


def audited(pairs, settings=SETTINGS, preflight=CLEAN, **more):
    row = {"prompt": "Why?", "chosen": [{"role": "assistant", "content": "yes\x1b[31m"}], "rejected": "no"}
    return audited_set("train", pairs, settings, preflight=preflight, rows=range(len(pairs)), text_of=lambda at: row, **more)


def said(one) -> dict[str, str]:
    return {piece["case"]: piece["says"] for piece in one["advice"]}


def mixed(n=1000, misaligned=0.4, depth=50.0):
    """So many pairs at −depth, the others at +10."""
    low = round(n * misaligned)
    return np.r_[np.full(low, -depth), np.full(n - low, 10.0)]


def test_few_misaligned_pairs_mean_that_dpo_is_as_good():
    advice = said(audited(pairs_of(mixed(misaligned=0.02))))
    assert set(advice) == {"dpo_as_good"}
    assert "2.0 % [1.2 to 3.1]" in advice["dpo_as_good"] and "constraint='none'" in advice["dpo_as_good"]


def test_too_few_pairs_to_decide():
    """2 of 60 are below 5 %, and their interval is not."""
    advice = said(audited(pairs_of(mixed(n=60, misaligned=2 / 60))))
    assert "undecided" in advice and "3.3 % [0.4 to 11.5]" in advice["undecided"]
    assert "constrain" not in advice and "dpo_as_good" not in advice
    # 5 of 40: p = 0.268, the largest that the interval allows: 0.268 × 0.732 × (1.96/0.05)² = 301.
    assert "About 310 pairs" in said(audited(pairs_of(mixed(n=40, misaligned=0.125))))["few_pairs"]


def test_shallow_misalignment_means_that_dpo_is_as_fast():
    """βD = 0.2: DPO takes (0.2 + e^0.2 − 1)/(0.2 + e^−0.1 − e^−0.3) = 1.16 times as long as clip."""
    advice = said(audited(pairs_of(mixed(depth=2.0))))
    assert "constrain" not in advice and "takes about 1.2 times clip's time" in advice["dpo_as_fast"]
    assert "still prefer the rejected answer" in advice["dpo_as_fast"]


def test_deep_misalignment_calls_for_the_constraint():
    """βD = 5: (5 + e^5 − 1)/(5 + e^−0.1 − e^−5.1) = 25.8; DPO's pull at 0 is σ(−5) = 0.0067."""
    advice = said(audited(pairs_of(mixed())))
    assert "40.0 % [36.9 to 43.1]" in advice["constrain"] and "needs about 26 times as long" in advice["constrain"]
    assert "falls to 0.0067 β" in advice["constrain"] and "clip's is 0.52 β" in advice["constrain"]
    assert "constraint='clip', gamma=1" in advice["constrain"] and "60.0 % [56.9 to 63.1]" in advice["constrain"]
    assert "trusts every label" in advice["labels"] and "DPO puts 40.0 %" in advice["labels"]


@pytest.mark.parametrize(("tokens", "case"), [(2, "decisions"), (DECISION, "decisions"), (DECISION + 1, "constrain")])
def test_short_answers_are_decisions(tokens, case):
    """However shallow or deep, at any β that the audit was asked for: β is what a constraint sets free."""
    lengths = np.full(1000, tokens)
    advice = said(audited(pairs_of(mixed(), lengths, lengths)))
    assert {"decisions", "constrain"} & set(advice) == {case}
    if case == "decisions":
        assert f"median {tokens} tokens" in advice[case] and "beta 1 and gamma 1" in advice[case]
        shallow = said(audited(pairs_of(mixed(depth=2.0), lengths, lengths), Settings(0.004, 1.0)))
        assert "decisions" in shallow and "dpo_as_fast" not in shallow


def test_the_same_pairs_at_a_small_beta_are_dpos():
    """βD is what counts: at β = 0.004 the pairs at −50 are as shallow as those at −2 were."""
    assert "dpo_as_fast" in said(audited(pairs_of(mixed()), Settings(0.004, 1.0)))


def test_length_alone_is_not_to_be_constrained_by_sums():
    """One nat a token: by sums half of the pairs are misaligned, each because its chosen answer is longer."""
    rng = np.random.default_rng(1)
    chosen, rejected = rng.integers(5, 200, 800), rng.integers(5, 200, 800)
    noise = rng.normal(0, 1, 800)
    pairs = ScoredPairs(-chosen + noise, -rejected * 1.0, chosen, rejected)
    advice = said(audited(pairs))
    assert "constrain" not in advice and "Do not constrain here" in advice["length_not_preference"]
    assert "does not show it" in advice["length"]
    by_means = said(audited(pairs, Settings(2.5, 0.05, "mean")))
    assert "length_not_preference" not in by_means and "length" not in by_means


def test_means_are_advised_on_by_means():
    """By sums every fifth pair is misaligned, by means every second: the numbers quoted are those of the loss asked for."""
    sums = np.tile([-50.0, 10.0, 10.0, 10.0, 10.0, 10.0], 20)
    chosen, rejected = np.full(120, 30), np.full(120, 30)
    base = np.full(120, -100.0)
    # Row 1 of six has longer rejected answers: −90/30 = −3.0 against −100/60 = −1.67.
    rejected[1::6] = 60
    pairs = ScoredPairs(base + sums, base, chosen, rejected)
    advice = said(audited(pairs, Settings(10.0, 0.5, "mean")))
    assert "33.3 % [25.0 to 42.5]" in advice["constrain"] and "25.0 % to 42.5 %" in advice["few_pairs"]
    assert "gamma=0.5, logps_reduction='mean', beta=10" in advice["constrain"]
    assert "16.7 %" in said(audited(pairs))["constrain"]


def test_equal_lengths_say_nothing_of_length():
    assert "length" not in said(audited(pairs_of(mixed(), np.full(1000, 20), np.full(1000, 20))))


def test_a_policy_in_the_region_and_one_out_of_it():
    ref_gap = mixed()
    base = np.full(1000, -100.0)
    in_region = np.where(ref_gap < 0, -10.0, 20.0)
    advice = said(audited(pairs_of(ref_gap, policy_chosen=base + in_region, policy_rejected=base)))
    assert "40.0 % [36.9 to 43.1] of pairs are in U" in advice["in_region"]
    assert "reward accuracy of 100.0 % goes with preferring the chosen answer on 60.0 %" in advice["in_region"]
    advice = said(audited(pairs_of(ref_gap, policy_chosen=base + 5, policy_rejected=base)))
    assert "nothing_to_escape" in advice and "0.0 % [0.0 to 0.4]" in advice["out_of_region"]


def test_scores_against_labels():
    reward = np.where(np.arange(1000) < 100, -1.0, 2.0)
    assert "10.0 % [8.2 to 12.0]" in said(audited(pairs_of(mixed(), reward_gap=reward)))["scores"]
    assert "scores" not in said(audited(pairs_of(mixed(), reward_gap=np.abs(reward))))


def test_slices_that_stand_out_and_slices_that_do_not():
    kind = np.where(np.arange(1000) < 400, "deep", "fine").astype(object)
    other = np.array(["x", "y"] * 500, dtype=object)
    one = audited(pairs_of(mixed(), slices={"kind": kind, "other": other}))
    assert "By kind, 2 of 2 slices differ" in said(one)["slices"]
    assert "deep 100.0 %" in said(one)["slices"] and "other" not in said(one)["slices"]


def test_repeated_prompts_make_intervals_too_narrow():
    assert "500 distinct prompts" in said(audited(pairs_of(mixed(), prompt_of=np.arange(1000) // 2)))["repeated_prompts"]
    assert "repeated_prompts" not in said(audited(pairs_of(mixed(), prompt_of=np.arange(1000))))


def test_faults_and_cuts_come_first():
    findings = [
        {"finding": "double_bos", "fault": True, "count": 9, "of": 1000, "rows": [1], "says": "begin twice: why"},
        {"finding": "cut_chosen", "fault": False, "count": 300, "of": 1000, "rows": [1], "says": "are cut"},
    ]
    one = audited(pairs_of(mixed()), preflight={**CLEAN, "findings": findings})
    assert [piece["case"] for piece in one["advice"]][:2] == ["faults", "cut"]
    assert "9 of 1000 pairs begin twice." in said(one)["faults"] and "cuts 30.0 % of the chosen" in said(one)["cut"]


def test_the_worst_pairs_are_the_lowest_and_only_misaligned_ones():
    one = audited(pairs_of([5.0, -3.0, 8.0, -40.0]), worst=3)
    assert [pair["row"] for pair in one["worst"]] == [3, 1]
    assert one["worst"][0]["chosen"] == "yes\\x1b[31m" and one["worst"][0]["ref_gap"]["sum"] == -40.0
    assert audited(pairs_of([5.0, -3.0]), worst=0)["worst"] == []


def test_numbers_as_people_read_them():
    assert [times(x) for x in (1.04, 9.94, 9.96, 12.34, 99.4, 99.7, 123.4, 12345.0, 177_252.0, 3.2e7, 1e300)] == [
        "1.0",
        "9.9",
        "10",
        "12",
        "99",
        "100",
        "120",
        "12,000",
        "180,000",
        "10^7",
        "10^300",
    ]
    assert percent(0.1234) == "12.3 %" and interval({"value": None, "low": None, "high": None}) == "-"
    assert last_words([]) == "" and last_words([{"role": "user", "content": [{"type": "text"}]}]) == "[{'type': 'text'}]"


@pytest.mark.parametrize("scores", [False, True])
def test_text_is_rendered_from_json_and_short(scores):
    """Every number of the text comes out of the document, so it is the same after a way through JSON."""
    rng = np.random.default_rng(2)
    n = 400
    base = np.full(n, -100.0)
    more = {"reward_gap": rng.normal(1, 1, n)} if scores else {}
    pairs = pairs_of(
        rng.normal(-5, 40, n),
        policy_chosen=base + rng.normal(0, 40, n),
        policy_rejected=base,
        prompt_of=np.arange(n),
        slices={"kind": rng.choice(["a", "b"], n).astype(object)},
        **more,
    )
    document = {
        "format": 1,
        "model": "M",
        "ref_model": "R",
        "dataset": "D",
        "seed": 0,
        "settings": vars(Settings(0.1, 1.0)),
        "sets": [{"rows": 2000, "refused": 3, **audited(pairs)}],
    }
    text = render(document)
    assert text == render(json.loads(json.dumps(document, allow_nan=False)))
    lines = text.splitlines()
    assert len(lines) <= 85 and max(map(len, lines)) <= 118, (len(lines), max(map(len, lines)))
    assert "1000 of 2000 pairs, drawn at random with seed 0; 3 rows refused" in text
    for heading in ("What the model sees", "Where the reference stands", "Length", "Slices", "The worst pairs", "Advice"):
        assert heading in text
    assert interval(document["sets"][0]["all"]["misaligned"]["sum"]) in text
    assert ("Δr from the scores" in text) == scores and ("β = 0.01" in text) != scores


def test_groups_as_people_read_them():
    """The most misaligned first; a bad name cannot drive a terminal; a long list is cut."""
    names = np.array(["fine\x1b[31m"] * 500 + ["deep"] * 400 + [f"small {n}" for n in range(20)] * 5)
    gaps = np.r_[np.full(500, 5.0), np.full(400, -30.0), np.full(100, 0.5)]
    one = audited(pairs_of(gaps, np.full(1000, 20), np.full(1000, 20)), by=("topic", names))
    assert [each["group"] for each in one["groups"]["each"]][:2] == ["deep", "fine\\x1b[31m"]
    text = render(
        {
            "model": "M",
            "ref_model": None,
            "dataset": "D",
            "seed": 0,
            "settings": vars(SETTINGS),
            "sets": [{"rows": 1000, "refused": 0, **json.loads(json.dumps(one, allow_nan=False))}],
        }
    )
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("Groups by topic (deficit: median of γ - δ_ref"))
    assert lines[at + 2].split()[:3] == ["deep", "400", "100.0"] and lines[at + 2].endswith(" 31 [31 to 31]")
    assert lines[at + 3].split()[0] == "fine\\x1b[31m" and lines[at + 3].endswith(" -")
    assert lines[at + 4].endswith("0.5 [? to ?]") and lines[at + 14] == "  … and 10 more with --json"
    assert max(map(len, lines[at : at + 15])) <= 118
    assert audited(pairs_of(gaps))["groups"] is None


def test_advice_reads_the_document_alone():
    one = json.loads(json.dumps(audited(pairs_of(mixed()))))
    assert advise(one, vars(Settings(0.1, 1.0))) == one["advice"]
