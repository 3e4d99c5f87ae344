"""The bound under soft labels, as docs/contributing/constraints.md tells of it: its votes, its measures, its record."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from trl_cpo.data.loading import load_pairs, to_conversational

from helpers.paths import ROOT


@pytest.fixture
def votes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import votes

    return votes


@pytest.fixture
def bound(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import bound

    return bound


def said(text):
    return [{"role": "assistant", "content": text}]


def pair(number, chosen, rejected):
    prompt = [{"role": "user", "content": f"Question {number}"}]
    return {"prompt": prompt, "chosen": said(chosen), "rejected": said(rejected)}


#: Of 4, 2, 4 and 3 words, 1, 1, 2 and 3 stand on one side only.
PAIRS = Dataset.from_list(
    [
        pair(0, "A red fox ran.", "a red fox, a red"),
        pair(1, "yes", "Yes!  no"),
        pair(2, "one two three four", "One two."),
        pair(3, "yes", "well no"),
    ]
)


def demo(split):
    return to_conversational(load_pairs("demo-answers", split))[0]


def test_strengths_follow_the_distance_of_the_words(votes):
    assert [votes.distance(row) for row in PAIRS] == [0.25, 0.5, 0.5, 1.0]
    assert votes.strengths(PAIRS) == [votes.STRONGEST * rank for rank in (1 / 8, 4 / 8, 4 / 8, 7 / 8)]


def test_certain_annotators_keep_the_labels_or_turn_them_all(votes, monkeypatch):
    for strongest, turned in ((400.0, False), (-400.0, True)):
        monkeypatch.setattr(votes, "STRONGEST", strongest)
        pairs, told = votes.voted(PAIRS, 5, seed=0)
        assert pairs["chosen_probs"] == [5.5 / 6] * 4
        assert pairs["chosen"] == PAIRS["rejected" if turned else "chosen"]
        assert pairs["rejected"] == PAIRS["chosen" if turned else "rejected"] and pairs["prompt"] == PAIRS["prompt"]
        assert told["turned"] == 4 * turned and told["contested"] == 0 and told["by_votes"] == {"5": 4}
        assert told["certainty"] == pytest.approx(2 / 3 + 1 / 6)


def test_the_probability_is_jeffreys_of_the_majoritys_votes(votes):
    pairs, told = votes.voted(demo("train"), 5, seed=0)
    assert pairs["chosen_probs"] == [(k + 0.5) / 6 for k in pairs["votes_chosen"]]
    assert set(pairs["votes"]) == {5} and set(pairs["votes_chosen"]) == {3, 4, 5}
    assert sum(told["by_votes"].values()) == told["pairs"] == 240 and told["contested"] == 240 - told["by_votes"]["5"]


def test_annotators_agree_less_where_answers_are_close(votes):
    rows = demo("train")
    strengths, (pairs, _) = votes.strengths(rows), votes.voted(rows, 5, seed=0)
    middle = votes.STRONGEST / 2
    close, far = ([k for k, s in zip(pairs["votes_chosen"], strengths, strict=True) if (s > middle) == side] for side in (0, 1))
    assert close.count(5) / len(close) + 0.2 < far.count(5) / len(far)


def test_pairs_that_would_be_counted_as_one_are_refused(votes):
    with pytest.raises(ValueError, match="2 pairs became 1"):
        votes.voted(Dataset.from_list([PAIRS[0], PAIRS[0]]), 5, seed=0)


def test_a_violation_weighs_what_the_label_is_sure_of(bound):
    gaps = torch.tensor([-9.0, -9.0, 3.0, -4.0])
    trainer = SimpleNamespace(args=SimpleNamespace(gamma=1.0), evaluated_pairs={"eval_test": SimpleNamespace(gap=gaps)})
    assert bound.weighed_violation(trainer, "test", [1.0, 0.75, 1.0, 0.25]) == (10 + 0.5 * 10) / 4


def test_the_curve_has_what_moved_the_multiplier(bound):
    history = [{"step": 1, "cpo/violation": 8.0, "cpo/lambda": 0.5, "cpo/slack": -2.0}, {"step": 2, "loss": 1.0}]
    assert bound.curve(history, 4.0) == [{"step": 1, "violation": 8.0, "lambda": 0.5, "bounded": 6.0}]
    assert bound.curve([{"step": 1, "cpo/violation": 8.0}], 0.0) == [{"step": 1, "violation": 8.0}]


def test_what_is_measured_is_what_moves_the_multiplier(votes, bound, model_folder):
    """Of weights that stay: the mean over an epoch's steps is the mean over the evaluated pairs, each with its own p."""
    pairs, _ = votes.voted(demo("train").select(range(8)), 5, seed=0)
    assert len(set(pairs["chosen_probs"])) > 1
    options = {"constraint": "lagrangian", "epsilon": 5.0, "probability_column": "chosen_probs", "learning_rate": 0.0}
    trainer = bound.trained(model_folder, pairs, pairs.select(range(4)), 1.0, 0, target_modules="all-linear", **options)
    record = bound.measured(trainer, {"train": pairs, "test": pairs.select(range(4))})
    steps = [point["bounded"] for point in record["curve"]]
    assert len(steps) == 2 and sum(steps) / 2 == pytest.approx(record["train_weighed_violation"], rel=1e-4)
    assert record["train_weighed_violation"] < 0.9 * record["train_violation"]


def test_the_record_is_of_these_votes(votes):
    records = json.loads((ROOT / "benchmarks" / "bound-votes.json").read_text(encoding="utf-8"))
    told = {split: votes.voted(demo(split), 5, seed)[1] for seed, split in enumerate(("train", "test"))}
    for record in records:
        assert record["settings"]["probability_column"] == "chosen_probs" and record["votes"] == told
        assert len(record["curve"]) == 120


def tens(record, key, first):
    """The mean over ten steps from `first` on."""
    return sum(point[key] for point in record["curve"][first - 1 : first + 9]) / 10


def test_what_the_page_reads_from_the_curves_is_there():
    records = json.loads((ROOT / "benchmarks" / "bound-votes.json").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "docs" / "contributing" / "constraints.md").read_text(encoding="utf-8").split())
    none, penalty = (next(r for r in records if r["settings"]["constraint"] == name) for name in ("none", "penalty"))
    bound, looser = (next(r for r in records if r["settings"].get("epsilon") == epsilon) for epsilon in (18, 24))
    late = [point["lambda"] for point in looser["curve"][60:]]
    votes, turned = (bound["votes"]["train"][key] for key in ("by_votes", "turned"))
    multipliers = [point["lambda"] for point in bound["curve"]]
    cap, zero = max(multipliers), multipliers.index(0.0)
    again = multipliers.index(cap, zero)
    dip = min(range(again, 120), key=multipliers.__getitem__)
    middle = [tens(bound, "bounded", first) for first in range(61, 121, 10)]
    shares = {
        name: [tens(run, "violation", first) / tens(none, "violation", first) for first in (61, 91, 111)]
        for name, run in (("bound", bound), ("penalty", penalty))
    }
    for said in (
        f"λ is between {min(late):g} and {max(late):.3f} in the second half, below its cap",
        f"λ is between {min(multipliers[3:60]):.3f} and its cap, {cap:g}, from step 4 to 60",
        f"λ is down to 0 at step {zero + 1}, back at its cap at step {again + 1}, and at {multipliers[dip]:.3f} once more",
        f"at step {dip + 1}",
        f"lies between {min(middle):.1f} and {max(middle):.1f}; its mean is {sum(middle) / 6:.1f}.",
        "is {:.2f} of that of `none` in steps 61 to 70, {:.2f} in steps 91 to 100, after λ was low, and {:.2f} in the".format(
            *shares["bound"]
        ),
        "goes from {:.2f} to {:.2f} and {:.2f}".format(*shares["penalty"]),
        f"goes on to {penalty['train_weighed_violation']:.1f}, for a KL of {penalty['kl']:.1f} instead of {bound['kl']:.1f}",
        "swings between {:.0f} and {:.0f}".format(*(end(p["bounded"] for p in bound["curve"]) for end in (min, max))),
        f"{votes['5']} have all five votes for one answer, {votes['4']} four and {votes['3']} three; in {turned} the majority",
    ):
        assert said in text, said
    ends = [run["train_weighed_violation"] for run in (bound, none, penalty)]
    short = " ".join((ROOT / "docs" / "constraints.md").read_text(encoding="utf-8").split())
    assert "ends at {:.1f} ({:.1f} without a bound)".format(*ends) in short
    assert f"goes on to {ends[2]:.1f}, for {100 * penalty['kl'] / bound['kl'] - 100:.0f} % more KL" in short
