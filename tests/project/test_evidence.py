"""The evidence: its page and figure are what the records say, its measures are right, and its programs run."""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.evidence import __main__ as program
from benchmarks.evidence import figure, larger, measures, once, runs, small, tables, text

from helpers.paths import ROOT

PAGE = ROOT / "docs" / "evidence.md"


def test_the_page_has_the_tables_of_the_records():
    written = PAGE.read_text(encoding="utf-8")
    assert len(tables.MARK.findall(written)) >= 4
    assert tables.filled(written, program.RECORDS) == written


def test_the_figure_is_drawn_from_the_records():
    assert PAGE.with_suffix(".svg").read_text(encoding="utf-8") == figure.figure(program.RECORDS)


def run_of(*points: tuple[float, float], arm: str = "dpo 1", seed: int = 1) -> dict:
    curve = [{"step": at, "test": {"kl": kl, "right": right}} for at, (kl, right) in enumerate(points)]
    return {"experiment": "decisions", "variant": "v", "arm": arm, "seed": seed, "curve": curve}


START = run_of((0.0, 0.5), arm="start")


@pytest.mark.parametrize(("level", "expected"), [(0.05, 0.55), (0.1, 0.6), (0.2, 0.7), (0.3, 0.8), (0.6, 0.8), (5.0, 0.8)])
def test_the_best_at_no_more_than_a_kl(level, expected):
    """From (0, 0.5) by (0.1, 0.6) and (0.3, 0.8) to (0.7, 0.4)."""
    run = run_of((0.1, 0.6), (0.3, 0.8), (0.7, 0.4))
    assert tables.within(run, START, level, "test", "right") == pytest.approx(expected)


def test_a_run_that_gets_worse_keeps_the_start():
    assert tables.within(run_of((0.1, 0.3)), START, 1.0, "test", "right") == 0.5


def test_differences_are_taken_seed_by_seed():
    """Seeds differ by far more than the methods do: the interval of the difference has to be the narrow one."""
    runs = [run_of((0.0, 0.5), arm="start", seed=seed) for seed in (1, 2, 3)]
    runs += [run_of((0.1, 0.6 + 0.1 * seed), seed=seed) for seed in (1, 2, 3)]
    runs += [run_of((0.1, 0.61 + 0.1 * seed), arm="clip 1", seed=seed) for seed in (1, 2, 3)]
    row = next(line for line in tables.final(runs, "decisions", "v").splitlines() if line.startswith("| clip 1"))
    assert row.split(" | ")[-1] == "+1.0 ± 0.0 |"


def test_an_interval_is_students():
    mean, half = tables.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-6))
    assert tables.interval([1.0, 2.0, 3.0], comparisons=2)[1] == pytest.approx(6.205347 / math.sqrt(3), rel=1e-6)
    assert math.isnan(tables.interval([1.0, 2.0])[1])


def test_the_figure_compares_the_same_seeds():
    """Seed 2 would lift DPO's start and end; clip has no such run."""
    runs = [run_of((0.0, 0.5 + seed), arm="start", seed=seed) for seed in (1, 2)]
    runs += [run_of((0.1, 0.6 + seed), seed=seed) for seed in (1, 2)] + [run_of((0.2, 1.7), arm="clip 1")]
    assert figure.curves(runs, "v", "right", ("dpo", "clip")) == {
        "dpo 1": [(0.0, 1.5), (0.1, 1.6)],
        "clip 1": [(0.0, 1.5), (0.2, 1.7)],
    }


@given(st.lists(st.booleans(), min_size=1))
def test_hits_are_read_as_they_were_written(hits):
    assert measures.from_bits(measures.bits(torch.tensor(hits))) == hits


@pytest.fixture(scope="module")
def models():
    made = [small.make_model(11, 32, 1, eos=1, pad=0).eval() for _ in range(2)]
    torch.manual_seed(3)
    for model in made:
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return made


def test_kl_is_that_of_whole_answers(models):
    """The mean over samples comes to the sum over every answer of two tokens, p(y) log(p(y) / q(y))."""
    policy, reference = models
    prompt = [3, 4, 5]

    def logps(model, answer):
        with torch.no_grad():
            found = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return [found[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer)]

    exact = 0.0
    for first in range(11):
        answers = [[first]] if first == 1 else [[first, second] for second in range(11)]
        for answer in answers:
            own, other = sum(logps(policy, answer)), sum(logps(reference, answer))
            exact += math.exp(own) * (own - other)
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 1})
    answers = measures.sampled(policy, [prompt] * 3000, tokenizer, 2, seed=0)
    sums, tokens = measures.kl(policy, reference, [prompt] * 3000, answers, pad=0)
    assert tokens.tolist() == [len(answer) for answer in answers]
    assert sums.mean().item() == pytest.approx(exact, abs=4 * sums.std().item() / math.sqrt(3000))
    # Prompts of other lengths beside it change nothing.
    mixed, answers = [prompt, [7] * 9, [2]], [[3, 1], [4], [5, 6]]
    together, _ = measures.kl(policy, reference, mixed, answers, pad=0)
    alone = [measures.kl(policy, reference, [one], [a], pad=0)[0].item() for one, a in zip(mixed, answers, strict=True)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_parts_do_not_share_a_text(tmp_path):
    chance = random.Random(0)
    words = ["kettle", "window", "garden", "letter", "bottle", "please", "mending", "quickly"]

    def sentence():
        return " ".join(chance.choices(words, k=6)).capitalize() + "."

    with (tmp_path / "pairs.jsonl").open("w") as file:
        for _ in range(60):
            begin = f"\n\nHuman: {sentence()}\n\nAssistant: "
            file.write(json.dumps({"chosen": begin + sentence(), "rejected": begin + sentence()}) + "\n")
    found = text.read_texts(str(tmp_path / "pairs.jsonl"), 140)
    parts = [set(turns) for turns in found.turns.values()]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    asked = [{question for question, _ in exchanges} for exchanges in found.exchanges.values()]
    assert all(asked) and not (asked[0] & asked[1] or asked[0] & asked[2] or asked[1] & asked[2])


def test_gaps_are_those_of_each_pair_alone(models):
    """Against log-probs read off a forward of prompt, answer and end, without padding."""
    model = models[0]
    rows = [{"prompt": "3 4", "chosen": "5", "rejected": "6 7 8"}, {"prompt": "9 2 3 4", "chosen": "5 6", "rejected": "7"}]

    class Tokenizer:
        pad_token_id, eos_token_id = 0, 1

        def __call__(self, text):
            return {"input_ids": [int(word) for word in text.split()]}

    def logps(prompt, answer):
        ids = [int(word) for word in (prompt + " " + answer).split()] + [1]
        with torch.no_grad():
            found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(prompt.split())
        return [found[at - 1, ids[at]].item() for at in range(first, len(ids))]

    sums, means = measures.gaps(model, Tokenizer(), rows, count=2)
    for at, row in enumerate(rows):
        chosen, rejected = logps(row["prompt"], row["chosen"]), logps(row["prompt"], row["rejected"])
        assert sums[at].item() == pytest.approx(sum(chosen) - sum(rejected), abs=1e-5)
        expected = sum(chosen) / len(chosen) - sum(rejected) / len(rejected)
        assert means[at].item() == pytest.approx(expected, abs=1e-5)


def test_tuning_is_of_the_variant_that_has_its_own():
    def tuned(variant, arm, right):
        return {**run_of((0.1, right), arm=arm, seed=0), "variant": variant}

    runs = [tuned("v", "start", 0.5), tuned("w", "start", 0.5), tuned("v", "dpo 1", 0.6), tuned("v", "dpo 3", 0.7)]
    runs += [tuned("w", "dpo 1", 0.8), tuned("w", "dpo 3", 0.6)]
    for run in runs:
        run["curve"] = [{"step": each["step"], "validation": each["test"]} for each in run["curve"]]
    assert [tables.best_arms(runs, "decisions", variant) for variant in "vwx"] == [
        {"dpo": "dpo 3"},
        {"dpo": "dpo 1"},
        {"dpo": "dpo 3"},
    ]


def test_what_is_shared_is_made_once_and_never_half(tmp_path):
    made = []

    def fails(place):
        place.mkdir()
        (place / "config.json").write_text("{}")
        raise RuntimeError("cut off")

    def make(place):
        place.mkdir()
        made.append(place)

    with pytest.raises(RuntimeError):
        once.made(tmp_path / "work" / "model", fails)
    assert not (tmp_path / "work" / "model").exists()
    for _ in range(2):
        assert list(once.made(tmp_path / "work" / "model", make).iterdir()) == []
    assert len(made) == 1


def test_routes_part_the_messages_and_mislead_two_teams():
    class Tokenizer:
        eos_token_id = 1

    task = larger.routes(Tokenizer())
    prompts = {part: {row["prompt"] for row in rows} for part, rows in task.rows.items()}
    assert {part: len(rows) for part, rows in task.rows.items()} == {"train": 256, "validation": 56, "test": 104}
    assert not (prompts["train"] & prompts["validation"] or prompts["train"] & prompts["test"])
    assert {prompt for prompt, _ in task.taught} == prompts["train"]
    for row, pair in zip(task.rows["train"], task.pairs(3), strict=True):
        changed = row["right"] in (" Returns", " Account")
        assert (row["was"] != row["right"]) == changed and pair["chosen"] == row["right"]
        assert pair["rejected"] == row["was"] if changed else pair["rejected"] in set(row["options"]) - {row["right"]}


def test_a_run_that_fails_stops_no_other(monkeypatch):
    """Side by side; here in threads, which need no start."""
    threads = lambda count, context, **begin: ThreadPoolExecutor(count, **begin)  # noqa: E731
    monkeypatch.setattr(runs, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(runs, "run_of", lambda job, bench: 1 / job["n"])
    found = []
    with pytest.raises(ExceptionGroup, match="1 of 3 runs failed"):
        found.extend(runs.done(None, [{"n": 0}, {"n": 1}, {"n": 2}], processes=2))
    assert sorted(found) == [0.5, 1.0]


@pytest.mark.slow
def test_every_experiment_runs(tmp_path, capsys):
    """On a model of 20,000 weights: each kind of arm, twice, of which the second finds it done; then the tables."""
    work = ["--small", "--work", str(tmp_path), "--records", str(tmp_path / "records")]
    arms = {
        "decisions": ["dpo 1", "clip 1", "simpo 1", "bound 0.1", "lagrangian 1"],
        "sampled": ["dpo 0.1", "clip 0.1 reach 10", "dpo means 2.5"],
        "misaligned": ["dpo 0.1", "clip 1"],
        "larger": ["dpo 1", "simpo 1", "clip slow 1"],
        "real": ["clip means 2.5"],
    }
    for experiment, some in arms.items():
        one_seed = ["--seeds", "1"] if experiment == "real" else []
        for _ in range(2):
            program.main([experiment, *work, "--arms", *some, *one_seed])
        lines = (tmp_path / "records" / f"{experiment}.jsonl").read_text().splitlines()
        assert [json.loads(line)["arm"] for line in lines] == ["start", *some]
    program.main(["larger", *work, "--variant", "tone", "--arms", "clip 1", "--seeds", "1", "2", "--processes", "2"])
    program.main(["decisions", *work, "--arms", "clip 1", "--seeds", "1", "2"])
    program.main(["tables", "--records", str(tmp_path / "records")])
    shown = capsys.readouterr().out
    assert "<!-- decisions: 1 token -->" in shown and "<!-- misaligned -->" in shown and "<!-- larger: tone -->" in shown


def test_without_a_text_it_says_what_to_give(capsys, tmp_path):
    with pytest.raises(SystemExit):
        program.main(["decisions", "--work", str(tmp_path)])
    assert "--text is missing: pairs as HH-RLHF writes them, or --small" in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())
