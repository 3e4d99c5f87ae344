"""Certificates: none is violated, all can be recomputed, tampering shows, and what proves nothing is refused."""

import copy
import dataclasses
import json
import math
import random
import shutil
import warnings
from fractions import Fraction

import pytest
import torch
from constraint_cases import case_of
from datasets import Dataset

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.certificates import CertificateError, certify_run, check, document, read_json
from trl_cpo.certificates.evidence import read_evidence
from trl_cpo.cli import main
from trl_cpo.constraints import CONSTRAINTS
from trl_cpo.data.identity import pair_digests
from trl_cpo.data.reading import read_pairs
from trl_cpo.files.run_files import PAIR_COLUMNS
from trl_cpo.run.record import pairs_document

from helpers.paths import TESTS
from helpers.tiny import hh_rows, make_model, pair_rows, pairs_dataset, training_options

CONFIG = {
    "constraint": "clip",
    "beta": 0.5,
    "gamma": 1.0,
    "logps_reduction": "sum",
    "loss_type": ["sigmoid"],
    "tau": 2.0,
    "alpha": 1.0,
    "label_smoothing": 0.0,
    "use_weighting": False,
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
}


def contents(rows, *, split="test", after=None, **config):
    """What pairs.json and metrics.json hold for these rows (policy and reference, chosen and rejected) and configuration."""
    config = {**CONFIG, **config}
    told = {name: config[name] for name in ("beta", "gamma", "constraint")}
    rows = [[*row, None, None] for row in rows]
    pairs = {"reduction": config["logps_reduction"], "split": split, "columns": list(PAIR_COLUMNS), "rows": rows, **told}
    return pairs, {"config": config, "after": after or {}, "model": "m", "pairs": {"dataset_name": "d"}}


def write_run(folder, rows, *, pairs=True, metrics=True, **settings):
    folder.mkdir(exist_ok=True)
    made = dict(zip(("pairs.json", "metrics.json"), contents(rows, **settings), strict=True))
    for name in ["pairs.json"] * pairs + ["metrics.json"] * metrics:
        (folder / name).write_text(json.dumps(made[name]))
    return folder


#: Four pairs at β = 1/2, γ = 1: gaps 3, 1, 0.5, −2; reference gaps 2, −1, −1, 0; clip's targets 2, 1, 1, 1.
ROWS = [[-1, -4, -1, -3], [-2, -3, -3, -2], [-2, -2.5, -3, -2], [-5, -3, -1, -1]]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", ROWS)


def test_by_hand(run):
    held_out = certify_run(run)
    assert held_out["evidence"]["numbers"] == {"pairs": 4, "meeting": 2}
    # P(at least 2 of 4 | p) = 0.05 at p = 0.0976.
    share = held_out["certified_share"]
    assert 1 - (1 - share) ** 4 - 4 * share * (1 - share) ** 3 == pytest.approx(0.05, abs=1e-12)
    assert held_out["statement"] == (
        "2 of 4 held-out pairs have a preference gap δ_θ of at least 1 nats per response. With 95 % confidence, at least "
        "9.76 % of the pairs of their population have."
    )
    assert held_out["holds"] and held_out["slack"] == share
    assert not certify_run(run, at_least=0.1)["holds"] and certify_run(run, at_least=0.09)["holds"]


def random_run(rng):
    """Rows and configuration of a random case: ordinary, extreme, and on the boundary by construction."""
    gamma = rng.choice([0.0, 1.0, rng.uniform(0, 5), 1e-300, 0.1, 1e6])
    config = {
        "constraint": rng.choice(list(CONSTRAINTS)),
        "beta": rng.choice([0.1, 2.5, rng.uniform(1e-4, 30)]),
        "gamma": gamma,
        "tau": rng.uniform(0.1, 50),
        "alpha": rng.choice([1.0, 0.25, 3.0]),
        "logps_reduction": "mean",
        "loss_type": ["sigmoid_norm"],
    }
    scale = rng.choice([1e-9, 0.1, 1.0, 10.0, 1e4])
    rows = []
    for _ in range(rng.randint(1, 9)):
        row = [-abs(rng.gauss(0, scale)) for _ in range(4)]
        kind = rng.randrange(6)
        if kind == 0:  # the start of training: δ = δ_ref
            row[:2] = row[2:]
        elif kind == 1:  # at γ, or a hair from it
            row[0] = row[1] + gamma + rng.choice([0.0, 0.0, 1e-16, -1e-16, 1e-9, -1e-9])
        elif kind == 2:  # well past any target
            row[0], row[1] = 0.0, -rng.choice([50.0, 1e5])
        rows.append(row)
    bar = rng.choice([None, None, gamma, rng.gauss(0, 2), -1e3, 1e9])
    return rows, config, bar


def test_no_certificate_is_violated(tmp_path):
    """3,400 random runs, some of them through files: each count against the pairs themselves, in exact arithmetic."""
    rng = random.Random(0)
    folder, held = tmp_path / "run", 0
    for case in range(3_400):
        rows, config, bar = random_run(rng)
        made = document(kind="held_out", at_least=0.0, files={}, **read_evidence(*contents(rows, **config), bar))
        gamma, numbers, count = made["asked"]["gamma"], made["evidence"]["numbers"], len(rows)
        gaps = [Fraction(row[0]) - Fraction(row[1]) for row in rows]
        meeting = sum(gap >= Fraction(gamma) for gap in gaps)
        assert numbers == {"pairs": count, "meeting": meeting}
        assert made["certified_share"] <= meeting / count and made["holds"] == (meeting > 0)
        held += made["holds"]
        if case % 10 == 0:
            assert check(made) == []
        if case % 100 == 0:
            stored = json.loads(json.dumps(certify_run(write_run(folder, rows, **config), gamma=bar)))
            assert stored["statement"] == made["statement"] and check(stored, folder) == []
    assert 100 < held < 3_300  # the cases are not all trivial


def test_the_population_is_covered():
    """For every n ≤ 30 and p the certified share exceeds p with a probability of at most 5 %: summed, not drawn."""
    for count in (1, 2, 5, 13, 30):
        shares = [
            document(
                kind="held_out",
                gamma=0.0,
                at_least=0.0,
                subject={"reduction": "sum"},
                numbers={"pairs": count, "meeting": meeting},
                files={},
            )["certified_share"]
            for meeting in range(count + 1)
        ]
        assert shares[0] == 0 and shares == sorted(shares)
        assert shares[-1] == pytest.approx(0.05 ** (1 / count), rel=1e-12)
        for p in [step / 200 for step in range(1, 200)] + [share - 1e-9 for share in shares[1:]]:
            chances = [math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(count + 1)]
            assert sum(chance for chance, share in zip(chances, shares, strict=True) if share > p) <= 0.05 + 1e-9
    # And not by giving away more than it must: just below a share the chance is all but 5 %.
    assert sum(math.comb(30, k) * shares[20] ** k * (1 - shares[20]) ** (30 - k) for k in range(20, 31)) == pytest.approx(0.05)


def leaves(value, path=()):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from leaves(inner, (*path, place))
    else:
        yield path, value


def altered(value):
    if isinstance(value, bool):
        return not value
    return value + (1 if isinstance(value, int) else 0.01) if isinstance(value, (int, float)) else f"{value}!"


def test_tampering_with_any_field_shows(run):
    """Each field changed by itself, or taken out: against the files always, by itself wherever it follows from another."""
    made = certify_run(run, gamma=0.5)
    said = {"statement", "holds", "certified_share", "slack", "assumptions"}
    changed = 0
    for path, value in leaves(made):
        forged = copy.deepcopy(made)
        place = forged
        for name in path[:-1]:
            place = place[name]
        for forge in ("alter", "remove"):
            if forge == "alter":
                place[path[-1]] = altered(value)
            else:
                del place[path[-1]]
            for folder in (run, None) if path[0] in said else (run,):
                try:
                    differences = check(forged, folder)
                except CertificateError:
                    continue
                if path[0] == "kind" or path == ("asked", "gamma") or path == ("asked", "at_least"):
                    assert differences
                else:
                    top = path[0] if path[0] != "evidence" else "evidence.numbers" if path[1] == "numbers" else "evidence.files"
                    assert any(line.startswith(top) for line in differences), (path, forge, differences)
            changed += 1
    assert changed > 30
    assert check(made) == [] and check(made, run) == []


def test_what_was_added_shows(run):
    forged = {**certify_run(run), "approved_by": "nobody"}
    forged["evidence"]["files"]["more.json"] = {"bytes": 1}
    assert set(check(forged, run)) == {f"{name}: there should be none" for name in ("evidence.files.more.json", "approved_by")}
    assert check(forged) == ["approved_by: there should be none"]


def test_numbers_that_contradict_each_other_show(run):
    forged = certify_run(run)
    forged["evidence"]["numbers"]["meeting"] += 1
    assert any("statement" in line for line in check(forged))


def test_another_runs_files_show(run, tmp_path):
    other = write_run(tmp_path / "other", [[-1, -5, -1, -3], *ROWS[1:]])
    assert [line.split(":")[0] for line in check(certify_run(run), other)] == ["evidence.files.pairs.json.blake2b"]


def test_counts_in_metrics_are_enough_for_the_runs_gamma(run, tmp_path):
    """The same certificate from metrics.json alone; pairs with nothing to compare count as below γ, NaN is refused."""
    after = {"eval_cpo/pairs": 4, "eval_cpo/violation_rate": 0.5}
    alone = write_run(tmp_path / "alone", [], pairs=False, after=after)
    made = certify_run(alone)
    assert made["statement"] == certify_run(run)["statement"] and list(made["evidence"]["files"]) == ["metrics.json"]
    fewer = write_run(tmp_path / "fewer", [], pairs=False, after={**after, "eval_cpo/incomparable_pairs": 3})
    assert certify_run(fewer)["evidence"]["numbers"] == {"pairs": 7, "meeting": 2}
    broken = write_run(tmp_path / "broken", [], pairs=False, after={**after, "eval_cpo/nonfinite_pairs": 3})
    with pytest.raises(CertificateError, match="3 pairs have log-probabilities that are none"):
        certify_run(broken)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_runs_that_differ_in_one_hyperparameter_have_certificates_that_differ(tmp_path, name):
    """Of each form, in each of its hyperparameters: the subject names it. What the form does not read makes no difference."""
    form = case_of(name).form
    config = {each.name: getattr(form, each.name) for each in dataclasses.fields(form)} | {"constraint": name}

    def subject(**changed):
        folder = write_run(tmp_path / "run", ROWS, **{**config, **changed})
        made = certify_run(folder)
        assert check(made, folder) == check(made) == []
        return made["subject"]

    for field, declared in form.hyperparameters().items():
        value = getattr(form, field)
        other = declared.metadata["choices"][-1] if declared.metadata["choices"] else (value or 0) + 1
        assert subject() != subject(**{field: other}), field
    assert subject() == subject(of_another_form=3)


def test_a_form_that_this_version_does_not_know_is_certified_all_the_same(tmp_path):
    made = certify_run(write_run(tmp_path / "run", ROWS, constraint="from the future", sharpness=3.0))
    assert made["subject"]["constraint"] == "from the future" and made["evidence"]["numbers"]["meeting"] == 2


def test_a_certificate_of_format_1_is_still_true():
    """Made by version 0.1.0 before hyperparameters were named; its files and itself, as they were written."""
    folder = TESTS / "golden" / "certificate_format_1"
    made = read_json(folder / "certificate.json")
    assert made["format"] == 1 and "hyperparameters" not in made["subject"]
    assert check(made) == [] and check(made, folder) == []
    assert check({**made, "slack": 0.5}, folder) == [f"slack: 0.5 in the certificate, {made['slack']!r} recomputed"]
    # Relabelled, neither format passes for the other.
    assert check({**certify_run(folder), "format": 1}) == ["subject.hyperparameters: there should be none"]
    assert check({**made, "format": 2}, folder) == ["subject.hyperparameters: missing"]


def test_loss_certificates_are_refused_in_words(run, tmp_path, capsys):
    why = "no longer made or read.*no more of these pairs than their count.*kind 'held_out'"
    with pytest.raises(CertificateError, match=why):
        certify_run(run, kind="loss")
    with pytest.raises(CertificateError, match=why):
        check({**certify_run(run), "kind": "loss"})
    for more in ([str(run)], ["--model", "nowhere", "--dataset", "d", "--gamma", "1", "--scores", str(tmp_path / "scores")]):
        assert main(["certify", *more, "--kind", "loss"]) == 2
        assert "than their count" in capsys.readouterr().err and not (tmp_path / "scores").exists()
    assert main(["certify", str(run), "--kind", "held_out"]) == 0


REFUSED = {
    "nan": (dict(rows=[[math.nan, -1, -1, -1]]), "holds NaN, which is no number"),
    "null": (dict(rows=[ROWS[0], [None, -1, -1, -1]]), r"1 pairs have log-probabilities that are none, the first in row 1"),
    "huge": (dict(rows=[[-1e300, -1, -1, -1]]), "that are none"),
    "text": (dict(rows=[["-1", -1, -1, -1]]), "that are none"),
    "no pairs": (dict(rows=[]), "holds no pair"),
    "trained on": (dict(split="train"), "trained on say nothing of others"),
    "trained on in part": (dict(split="test+train"), "trained on say nothing of others"),
    "a slice trained on": (dict(split="train[:10%]"), "trained on say nothing of others"),
    "stale": (dict(after={"eval_cpo/gap": 40.0}), r"mean gap is 0.625 nats in pairs.json and 40 in metrics.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    settings, message = REFUSED[name]
    folder = write_run(tmp_path / "run", **{"rows": ROWS, **settings})
    with pytest.raises(CertificateError, match=message):
        certify_run(folder)


def test_missing_and_torn_files_are_refused(tmp_path, run):
    with pytest.raises(CertificateError, match="There is no folder"):
        certify_run(tmp_path / "nowhere")
    with pytest.raises(CertificateError, match="neither pairs.json nor metrics.json.*Training losses"):
        certify_run(tmp_path)
    with pytest.raises(CertificateError, match="kind must be one of held_out; got 'proof'"):
        certify_run(run, kind="proof")
    for gamma, at_least, message in ((math.nan, 0.0, "gamma must be"), (1.0, 1.5, r"at_least must lie in \[0, 1\]")):
        with pytest.raises(CertificateError, match=message):
            certify_run(run, gamma=gamma, at_least=at_least)
    pairs = (run / "pairs.json").read_text()
    for text, message in ((pairs[:50], "not the JSON"), ("[]", "lacks"), ('{"a": 1, "a": 2}', "a key twice")):
        (run / "pairs.json").write_text(text)
        with pytest.raises(CertificateError, match=message):
            certify_run(run)
    (run / "pairs.json").write_text(pairs.replace('"beta": 0.5', '"beta": 0.6'))
    with pytest.raises(CertificateError, match="disagree on beta: .*0.6.*0.5"):
        certify_run(run)


@pytest.mark.parametrize(
    "after, options, message",
    [
        ({"eval_cpo/pairs": 4, "eval_cpo/violation_rate": 0.3}, {}, "no whole number of pairs"),
        ({"eval_cpo/pairs": 0, "eval_cpo/violation_rate": 0.5}, {}, "on how many pairs"),
        ({"eval_cpo/pairs": 4, "eval_cpo/violation_rate": None}, {}, "on how many pairs"),
        ({"eval_cpo/pairs": 4, "eval_cpo/violation_rate": 0.5}, {"gamma": 2.0}, "γ = 1 alone; γ = 2.0 needs pairs.json"),
    ],
)
def test_metrics_that_prove_nothing_are_refused(tmp_path, after, options, message):
    with pytest.raises(CertificateError, match=message):
        certify_run(write_run(tmp_path / "run", [], pairs=False, after=after), **options)


def test_what_is_no_certificate_is_refused(run):
    made = certify_run(run)
    for forged, message in (
        ([], "no certificate"),
        ({}, "no certificate"),
        ({**made, "format": 3}, "format 3; this version reads formats 1 and 2"),
        ({**made, "asked": {}}, "lacks gamma, at_least, confidence"),
        ({**made, "evidence": 3}, "lacks numbers, files"),
        ({**made, "kind": "none"}, "kind must be one of"),
    ):
        with pytest.raises(CertificateError, match=message):
            check(forged)


@pytest.mark.parametrize(
    "settings",
    [dict(constraint="clip", gamma=1.0), dict(constraint="softplus", gamma=0.3, tau=3.0, alpha=0.5, logps_reduction="mean")],
)
def test_the_count_is_the_trainers_own(tmp_path, tokenizer, settings):
    """The count certified is the metric of the trainer's evaluation."""
    trainer = CPOConstrainedTrainer(
        model=make_model(),
        ref_model=make_model(7),
        processing_class=tokenizer,
        args=CPOConstrainedConfig(**training_options(tmp_path / "out"), **settings),
        train_dataset=pairs_dataset(8),
        eval_dataset=pairs_dataset(8, seed=1),
    )
    after = trainer.evaluate()
    config = trainer.args.to_dict()
    told = {name: config[name] for name in ("gamma", "beta", "constraint")}
    made = pairs_document(
        trainer.evaluated_pairs["eval"], reduction=config["logps_reduction"], split="test", start_is_reference=False, **told
    )
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "pairs.json").write_text(json.dumps(made))
    (folder / "metrics.json").write_text(json.dumps({"config": config, "after": after}, default=str))
    count = certify_run(folder)
    assert count["evidence"]["numbers"]["meeting"] == round(8 * (1 - after["eval_cpo/violation_rate"]))
    assert 0 < count["evidence"]["numbers"]["meeting"] < 8
    (folder / "pairs.json").unlink()
    assert certify_run(folder)["statement"] == count["statement"]


def test_pairs_that_compare_no_two_answers_do_not_meet_gamma(tmp_path, tokenizer):
    """The gap of two equal answers is 0, which is no less than γ = 0; both files must count it the same."""
    rows = pairs_dataset(6, seed=1).to_list()
    rows[1] = {**rows[1], "rejected": rows[1]["chosen"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of these very rows
        trainer = CPOConstrainedTrainer(
            model=make_model(),
            ref_model=make_model(7),
            processing_class=tokenizer,
            args=CPOConstrainedConfig(**training_options(tmp_path / "out"), constraint="clip"),
            train_dataset=pairs_dataset(8),
            eval_dataset=Dataset.from_list(rows),
        )
    after = trainer.evaluate()
    config = trainer.args.to_dict()
    told = {name: config[name] for name in ("gamma", "beta", "constraint")}
    made = pairs_document(
        trainer.evaluated_pairs["eval"],
        degenerate=trainer.evaluated_degenerate["eval"],
        reduction="sum",
        split="test",
        start_is_reference=False,
        **told,
    )
    assert after["eval_cpo/incomparable_pairs"] == 1 and len(made["rows"]) == 5 and made["left_out"] == 1
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "pairs.json").write_text(json.dumps(made))
    (folder / "metrics.json").write_text(json.dumps({"config": config, "after": after}, default=str))
    by_rows = certify_run(folder)["evidence"]["numbers"]
    (folder / "pairs.json").unlink()
    assert by_rows == certify_run(folder)["evidence"]["numbers"] and by_rows["pairs"] == 6


def test_the_command(run, tmp_path, capsys):
    out = str(tmp_path / "c.json")
    assert main(["certify", str(run), "--out", out]) == 0
    said = capsys.readouterr().out
    assert "2 of 4 held-out pairs" in said and "holds: certified share 0.0976" in said and f"--check {out}" in said
    assert read_json(out) == certify_run(run)
    assert main(["certify", "--check", out]) == 0 and "its own numbers" in capsys.readouterr().out
    assert main(["certify", "--check", out, "--evidence", str(run)]) == 0 and "the files in" in capsys.readouterr().out
    assert main(["certify", str(run), "--at-least", "0.5", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == certify_run(run, at_least=0.5)
    assert main(["certify", str(run), "--at-least", "0.5"]) == 1 and "does NOT hold" in capsys.readouterr().out
    # What is there is not written over.
    before = (tmp_path / "c.json").read_text()
    assert main(["certify", str(run), "--gamma", "0", "--out", out]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err and (tmp_path / "c.json").read_text() == before
    forged = read_json(out)
    forged["evidence"]["numbers"]["meeting"] = 4
    (tmp_path / "forged.json").write_text(json.dumps(forged))
    assert main(["certify", "--check", str(tmp_path / "forged.json"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["true"] and not told["holds"] and any(line.startswith("certified_share") for line in told["differences"])
    # A certificate that says of itself that it does not hold is true, and does not hold.
    (tmp_path / "weak.json").write_text(json.dumps(certify_run(run, at_least=0.5)))
    assert main(["certify", "--check", str(tmp_path / "weak.json"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"true": True, "holds": False, "differences": []}


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "give exactly one of RUN, --model and --check; got none"),
        (["RUN", "--check", "c.json"], "got RUN and --check"),
        (["--check", "c.json", "--gamma", "1"], "--gamma is for making a certificate"),
        (["RUN", "--evidence", "RUN"], "--evidence needs --check"),
        (["RUN", "--dataset", "d", "--batch-size", "2"], "--dataset needs --model; --batch-size needs --model"),
        (["--model", "m"], "--model needs --dataset; --model needs --gamma; --model needs --scores"),
        (
            ["--model", "m", "--dataset", "d", "--gamma", "1", "--scores", "s", "--max-pairs", "0"],
            "--max-pairs must be >= 1; got 0",
        ),
        (["--check", "nowhere.json"], "cannot be read"),
        (["RUN", "--gamma", "nan"], "gamma must be a finite number"),
        (["RUN", "--out", "nowhere/c.json"], "is in a folder that does not exist"),
    ],
)
def test_wrong_use_ends_with_the_next_command(run, capsys, options, message):
    assert main(["certify", *(str(run) if option == "RUN" else option for option in options)]) == 2
    said = capsys.readouterr().err
    assert message in said and "trl-cpo certify" in said.splitlines()[-1]


def test_a_model_on_held_out_pairs(tmp_path, capsys, model_folder, ref_model_folder):
    """Scored into a folder that is its evidence: the gaps are the trainer's own, and certifying again gives the same."""
    pairs, scores = tmp_path / "pairs.jsonl", tmp_path / "scores"
    same = {"prompt": "why?", "chosen": " tea", "rejected": " tea"}  # no pair to compare: counts as below γ
    pairs.write_text("\n".join(json.dumps(row) for row in [*pair_rows(10), same]))
    options = ["--model", model_folder, "--dataset", str(pairs), "--gamma", "0.5", "--scores", str(scores), "--json"]
    assert main(["certify", *options]) == 2  # a file has the split train alone
    assert "train" in capsys.readouterr().err and not scores.exists()
    code = main(["certify", *options, "--split", "train", "--ref-model", ref_model_folder, "--logps-reduction", "mean"])
    made = json.loads(capsys.readouterr().out)
    assert code == (0 if made["holds"] else 1) and check(made, scores) == []
    assert made["subject"]["split"] == "named as held out: train" and made["subject"]["model"] == model_folder
    rows = torch.tensor([row[:4] for row in read_json(scores / "pairs.json")["rows"]], dtype=torch.float64)
    expected = gaps_of(model_folder, pair_rows(10)), gaps_of(ref_model_folder, pair_rows(10))
    for column, gaps in zip((0, 2), expected, strict=True):
        assert torch.allclose(rows[:, column] - rows[:, column + 1], gaps, atol=1e-4)
    assert len(rows) == 10 and made["evidence"]["numbers"] == {"pairs": 11, "meeting": int((expected[0] >= 0.5).sum())}
    assert main(["certify", *options, "--split", "train"]) == 2
    assert "already holds files" in capsys.readouterr().err


def gaps_of(folder, rows):
    """The preference gaps of plain-text pairs by means, from transformers alone, one sequence at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def score(prompt, answer):
        before = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(logps[at - 1, ids[at]].item() for at in range(len(before), len(ids))) / (len(ids) - len(before))

    return torch.tensor(
        [score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"]) for row in rows], dtype=torch.float64
    )


def test_pairs_left_out_do_not_meet_gamma(run):
    made = read_json(run / "pairs.json")
    (run / "pairs.json").write_text(json.dumps({**made, "left_out": 6}))
    assert certify_run(run)["evidence"]["numbers"] == {"pairs": 10, "meeting": 2}
    (run / "pairs.json").write_text(json.dumps({**made, "left_out": -1}))
    with pytest.raises(CertificateError, match="left_out must be a whole number"):
        certify_run(run)


def learned(run, *, pairs=0, **said):
    """Has the run's files say what was trained on."""
    for name, more in (
        ("metrics.json", {"pairs": {"dataset_name": "d", **said}}),
        ("pairs.json", {"trained_on_left_out": pairs}),
    ):
        (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | more))
    return run


def test_pairs_that_were_trained_on_are_not_held_out(run):
    """By the names of the splits where the pairs' contents are not known, by their contents where they are."""
    for train in ("test", "train+test", "test[:10%]"):
        with pytest.raises(CertificateError, match="trained on say nothing of others"):
            certify_run(learned(run, train_split=train, digests=None))
    made = certify_run(learned(run, pairs=3, train_split="train+test", digests="0" * 32, trained_on_left_out=3))
    assert made["evidence"]["numbers"] == {"pairs": 4, "meeting": 2, "trained_on_left_out": 3}
    assert made["statement"].endswith(" 3 more pairs were trained on, and are not counted.")
    assert check(made, run) == check(made) == []
    del made["evidence"]["numbers"]["trained_on_left_out"]
    assert [line.partition(":")[0] for line in check(made)] == ["statement"]
    for pairs, metrics, message in (
        (3, 2, "disagree on trained_on_left_out"),
        (-1, 0, "must be a whole number"),
        (0, 1.0, "must be a count"),
    ):
        with pytest.raises(CertificateError, match=message):
            certify_run(learned(run, pairs=pairs, train_split="train", digests="", trained_on_left_out=metrics))


def test_a_model_is_not_certified_on_pairs_that_its_run_was_trained_on(tmp_path, capsys, model_folder):
    rows = hh_rows(6, 0)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    digests = pair_digests(read_pairs(str(file), "train")[0])
    options = ["--model", str(folder), "--dataset", str(file), "--split", "train", "--gamma", "0", "--json"]
    (folder / "metrics.json").write_text(json.dumps({"pairs": {"digests": "".join(digests[:2])}}))
    main(["certify", *options, "--scores", str(tmp_path / "scores")])
    numbers = json.loads(capsys.readouterr().out)["evidence"]["numbers"]
    assert numbers["pairs"] == 4 and numbers["trained_on_left_out"] == 2
    (folder / "metrics.json").write_text(json.dumps({"pairs": {"digests": "".join(digests)}}))
    assert main(["certify", *options, "--scores", str(tmp_path / "others")]) == 2
    assert "All 6 pairs were trained on" in capsys.readouterr().err
