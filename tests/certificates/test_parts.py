"""A certificate for each group of pairs: by hand, together with 95 % confidence, and nothing that can be changed unseen."""

import copy
import json
import random

import pytest
from scipy.stats import beta as beta_distribution

from trl_cpo.certificates import CertificateError, certify_parts, certify_run, check
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
    for document in certify_parts(run, "topic"):
        assert check(document) == [] and check(document, run) == []
        alone = copy.deepcopy(document)
        alone["subject"]["part"]["of"] = 1  # as if nothing else had been looked at
        assert check(alone, run)
        other = copy.deepcopy(document)
        other["subject"]["part"]["value"] = "helpful" if document["subject"]["part"]["value"] == "harmless" else "harmless"
        assert check(other, run) and check(other)
        more = copy.deepcopy(document)
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
