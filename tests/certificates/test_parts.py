"""A certificate for each group of pairs: by hand, together with 95 % confidence, and nothing that can be changed unseen."""

import copy
import functools
import json
import math
import random
from fractions import Fraction

import pytest
from scipy.stats import beta as beta_distribution

from trl_cpo.certificates import CertificateError, certify_parts, certify_run, check
from trl_cpo.certificates.evidence import Part, read_evidence
from trl_cpo.certificates.statement import document, joint_confidence
from trl_cpo.cli import main
from trl_cpo.files.run_files import PAIR_COLUMNS

GAPS = {"helpful": [3.0, 1.0, 0.5, -2.0, 4.0], "harmless": [2.5, 2.0, 3.0]}


def write_run(folder, gaps=None, *, left_out=0, **config):
    gaps = GAPS if gaps is None else gaps
    rows, topics = [], []
    for topic, values in gaps.items():
        rows += [[value - 5.0, -5.0, -4.0, -4.0, None, None] for value in values]
        topics += [topic] * len(values)
    told = {"beta": 0.5, "gamma": 1.0, "constraint": "clip"}
    config = {**told, "logps_reduction": "sum", "loss_type": ["sigmoid"], **config}
    pairs = {"reduction": "sum", "split": "test", "columns": list(PAIR_COLUMNS), "rows": rows, **told}
    pairs |= {"slices": {"topic": topics}, "left_out": left_out}
    folder.mkdir(exist_ok=True)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    metrics = {"config": config, "after": {}, "model": "m", "pairs": {"dataset_name": "d"}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_by_hand(tmp_path):
    """3 of 3 and 3 of 5 pairs reach γ = 1, each at 97.5 %."""
    harmless, helpful = certify_parts(write_run(tmp_path / "run"), "topic")
    assert [each["subject"]["part"]["value"] for each in (harmless, helpful)] == ["harmless", "helpful"]
    assert harmless["certified_share"] == pytest.approx(0.025 ** (1 / 3))
    assert helpful["certified_share"] == pytest.approx(beta_distribution.ppf(0.025, 3, 3))
    assert harmless["asked"]["confidence"] == 0.975
    assert harmless["statement"].startswith(
        "3 of 3 held-out pairs with topic=harmless have a preference gap δ_θ of at least 1 "
    )
    assert harmless["statement"].endswith("all 2 values of topic are true together with 95 % confidence.")


def test_a_group_has_its_own_gamma(tmp_path):
    run = write_run(tmp_path / "run", group_column="topic", gamma_by_group={"harmless": 2.2})
    harmless, helpful = certify_parts(run, "topic")
    assert (harmless["asked"]["gamma"], harmless["evidence"]["numbers"]) == (2.2, {"pairs": 3, "meeting": 2})
    assert (helpful["asked"]["gamma"], helpful["evidence"]["numbers"]) == (1.0, {"pairs": 5, "meeting": 3})
    assert [each["asked"]["gamma"] for each in certify_parts(run, "topic", gamma=0.0)] == [0.0, 0.0]


def test_counts_at_the_groups_gammas_certify_no_other(tmp_path):
    """metrics.json counts each pair at its group's γ; at the run's γ that would be another claim."""
    run = write_run(tmp_path / "run", group_column="topic", gamma_by_group={"harmless": 0.0})
    (run / "pairs.json").unlink()
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["after"] = {"eval_cpo/pairs": 8, "eval_cpo/violation_rate": 0.25}
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(CertificateError, match="at the γ of their groups"):
        certify_run(run)


def test_pairs_without_numbers_miss_gamma_in_every_part(tmp_path):
    documents = certify_parts(write_run(tmp_path / "run", left_out=2), "topic")
    assert [each["evidence"]["numbers"] for each in documents] == [{"pairs": 5, "meeting": 3}, {"pairs": 7, "meeting": 3}]


def test_checked_from_itself_and_from_the_files(tmp_path):
    run = write_run(tmp_path / "run")
    for found in certify_parts(run, "topic"):
        assert check(found) == [] and check(found, run) == []
        alone = copy.deepcopy(found)
        alone["subject"]["part"]["of"] = 1  # as if nothing else had been looked at
        assert check(alone, run)
        other = copy.deepcopy(found)
        other["subject"]["part"]["value"] = "helpful" if found["subject"]["part"]["value"] == "harmless" else "harmless"
        assert check(other, run) and check(other)
        more = copy.deepcopy(found)
        more["asked"]["confidence"] = 0.95
        assert check(more, run)


def test_all_hold_together(tmp_path):
    """Populations of known shares: of 2,000 runs with three groups, at most 5 % (and 3 deviations) have a false one."""
    rng, false = random.Random(1), 0
    shares, counts = {"a": 0.5, "b": 0.8, "c": 0.95}, {"a": 8, "b": 12, "c": 30}
    from trl_cpo.intervals import lower_bound

    for _ in range(2_000):
        met = {name: sum(rng.random() < shares[name] for _ in range(counts[name])) for name in shares}
        false += any(lower_bound(met[name], counts[name], 1 - 0.05 / 3) > shares[name] for name in shares)
    assert false / 2_000 <= 0.05 + 3 * (0.05 * 0.95 / 2_000) ** 0.5


def test_what_cannot_be_parted(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(CertificateError, match="no column 'rule' to part its pairs by, only topic"):
        certify_parts(run, "rule")
    (run / "pairs.json").unlink()
    with pytest.raises(CertificateError, match="holds no pairs.json, whose columns part the pairs"):
        certify_parts(run, "topic")


def test_the_command(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "c.json"
    assert main(["certify", str(run), "--by", "topic", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "topic=harmless" in said and "topic=helpful" in said
    assert main(["certify", "--check", str(out), "--evidence", str(run)]) == 0
    documents = json.loads(out.read_text())
    documents[1]["evidence"]["numbers"]["meeting"] = 5
    out.write_text(json.dumps(documents))
    capsys.readouterr()
    assert main(["certify", "--check", str(out)]) == 1
    assert "certificate 1: " in capsys.readouterr().out
    assert main(["certify", str(run), "--by", "topic", "--at-least", "0.2"]) == 1  # one of them does not hold


def contents(rows, topics, gammas, left_out):
    """pairs.json and metrics.json of a run with groups, in memory."""
    config = {"beta": 0.5, "gamma": 1.0, "constraint": "clip", "logps_reduction": "sum", "loss_type": ["sigmoid"]}
    config |= {"group_column": "topic", "gamma_by_group": gammas}
    pairs = {"reduction": "sum", "split": "test", "columns": list(PAIR_COLUMNS), "rows": rows, "left_out": left_out}
    pairs |= {"slices": {"topic": topics}, "beta": 0.5, "gamma": 1.0, "constraint": "clip"}
    return pairs, {"config": config, "after": {}, "model": "m", "pairs": {"dataset_name": "d"}}


def test_no_certificate_of_a_group_is_violated():
    """Over 10,000 of them, from 3,400 random runs: each count against the group's pairs themselves, in exact arithmetic."""
    rng, made, held = random.Random(0), 0, 0
    for _ in range(3_400):
        names = "abcde"[: rng.randint(1, 5)]
        gammas = {name: rng.choice([0.0, 0.5, rng.gauss(0, 2), 1e3]) for name in names if rng.random() < 0.7}
        topics = [*names, *rng.choices(names, k=rng.randrange(8))]
        rows = []
        for topic in topics:
            chosen, rejected = -abs(rng.gauss(0, 3)), -abs(rng.gauss(0, 3))
            if rng.random() < 0.4:  # at the group's γ, or a hair from it
                chosen = rejected + gammas.get(topic, 1.0) + rng.choice([0.0, 0.0, 1e-16, -1e-16, 1e-9, -1e-9])
            rows.append([chosen, rejected, -4.0, -4.0, None, None])
        left_out = rng.choice([0, 0, 2])
        pairs, metrics = contents(rows, topics, gammas, left_out)
        for name in names:
            evidence = read_evidence(pairs, metrics, None, Part("topic", name))
            gamma = Fraction(gammas.get(name, 1.0))
            gaps = [Fraction(row[0]) - Fraction(row[1]) for row, topic in zip(rows, topics, strict=True) if topic == name]
            meeting, count = sum(gap >= gamma for gap in gaps), len(gaps) + left_out
            assert evidence["numbers"] == {"pairs": count, "meeting": meeting}
            assert evidence["subject"]["part"] == {"column": "topic", "value": name, "of": len(names)}
            share = share_of(meeting, count, len(names))
            assert share <= meeting / count
            made, held = made + 1, held + (share > 0)
    assert made > 10_000 and 1_000 < held < made - 1_000


@functools.cache
def share_of(meeting: int, count: int, groups: int) -> float:
    """The certified share of one among so many groups, from the document itself."""
    subject = {"reduction": "sum", "part": {"column": "topic", "value": "a", "of": groups}}
    numbers = {"pairs": count, "meeting": meeting}
    confidence = joint_confidence(subject)
    given = dict(kind="held_out", gamma=0.0, at_least=0.0, files={})
    return document(**given, confidence=confidence, subject=subject, numbers=numbers)["certified_share"]


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_all_groups_are_covered_together(groups):
    """Some group's certified share exceeds its truth with a probability of at most 5 %: summed, not drawn."""
    counts, worst = [4, 9, 20, 30, 60][:groups], 0.0

    def missed(count, truth):
        shares = [share_of(meeting, count, groups) for meeting in range(count + 1)]
        chances = [math.comb(count, k) * truth**k * (1 - truth) ** (count - k) for k in range(count + 1)]
        return sum(chance for chance, share in zip(chances, shares, strict=True) if share > truth)

    for step in range(1, 100):
        truth = step / 100
        worst = max(worst, 1 - math.prod(1 - missed(count, truth) for count in counts))
    # Where every group's truth is the one that its own certificate covers worst.
    just_below = [max(missed(count, share_of(k, count, groups) - 1e-9) for k in range(1, count + 1)) for count in counts]
    assert max(worst, 1 - math.prod(1 - each for each in just_below)) <= 0.05 + 1e-9
    assert 1 - math.prod(1 - each for each in just_below) > 0.045  # and not by giving away more than it must
