"""`trl-cpo stress` on runs that `trl-cpo train` has made: their numbers come again, shifts change them, mistakes are told."""

import json
import shutil
from types import SimpleNamespace

import pytest

from trl_cpo.cli import main
from trl_cpo.stress.recorded import read_recorded

from helpers.tiny import hh_rows, make_tokenizer, pair_rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of what a user's CPU lacks
#: For a tokenizer that knows no system role, as Gemma's.
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_model):
    """Two runs: an adapter on dialogues by sums, and a whole model on text by means, some of whose pairs are twins."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hh_rows(24)))
    rows = pair_rows(24, seed=1)
    for row in rows[::4]:
        row["rejected"] = row["chosen"]  # compares no two answers
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1], rows[2]]))
    common = ["--use_cpu", "--bf16", "False", "--max_steps", "2", "--max_length", "256", "--report_to", "none"]
    common += ["--price", "False", "--learning_rate", "1e-2", "--constraint", "clip", "--model_name_or_path", small_model]
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    for name, more in {"hh": ["--gamma", "0.5", *lora], "text": ["--logps_reduction", "mean", "--max_test_pairs", "6"]}.items():
        out = ["--dataset_name", str(folder / f"{name}.jsonl"), "--output_dir", str(folder / name), "--held_out", "9"]
        assert main(["train", *common, *out, *more]) == 0
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the first run, to be spoilt."""
    return shutil.copytree(runs / "hh", tmp_path / "run", ignore=shutil.ignore_patterns("stress.json"))


@pytest.fixture
def stress(capsys):
    def stress(*arguments, json_out=True):
        capsys.readouterr()
        code = main(["stress", *map(str, arguments), *(["--json"] if json_out else [])])
        said = capsys.readouterr()
        return SimpleNamespace(
            code=code, out=said.out, err=said.err, document=json.loads(said.out) if code < 2 and json_out else None
        )

    return stress


def edit(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def test_dialogues_come_again_and_shift(runs, stress):
    found = stress(runs / "hh", "--typos", "0.5", "--batch-size", "3")
    assert found.code == 0, found.err
    written = json.loads((runs / "hh" / "stress.json").read_text())
    assert written == found.document and written["made_by"] == "trl-cpo stress"
    record = json.loads((runs / "hh" / "metrics.json").read_text())["after"]
    base, *others = written["shifts"]
    assert written["reproduced"]["holds"] and written["reproduced"]["largest_difference"] < 1e-3
    for name, metric in {
        "prefers_chosen": "prefers_chosen",
        "in_undesirable_region": "in_undesirable_region",
        "violations": "violation_rate",
        "gap": "gap",
    }.items():
        assert base[name]["value"] == pytest.approx(record[f"eval_cpo/{metric}"], abs=1e-4), name
    assert [one["name"] for one in others] == ["system prompt", "no template", "typos", "longer dialogue"]
    for one in others:
        assert one["pairs"] == one["difference"]["pairs"] == 9 and one["changed"] > 0 and one["left_out"] == {}
        assert one["gap"]["value"] != base["gap"]["value"]
        # On all the same pairs, the difference of the means is the mean difference.
        apart = one["gap"]["value"] - base["gap"]["value"]
        assert one["difference"]["gap"]["value"] == pytest.approx(apart, abs=1e-6)


def test_text_by_means_comes_again_with_the_shifts_that_make_sense(runs, stress):
    """Its held-out pairs lack those that are trained on too, and those that compare no two answers."""
    pairs = json.loads((runs / "text" / "pairs.json").read_text())
    assert pairs["left_out"] > 0 and pairs["trained_on_left_out"] > 0 and pairs["reduction"] == "mean"
    assert len(pairs["rows"]) + pairs["left_out"] == 6 < 9 - pairs["trained_on_left_out"], "the first of those held out"
    found = stress(runs / "text", json_out=False)
    assert found.code == 0, found.err
    document = json.loads((runs / "text" / "stress.json").read_text())
    assert document["reproduced"]["largest_difference"] < 1e-4
    assert [one["name"] for one in document["shifts"]] == ["as it was", "typos", "longer dialogue"]
    assert document["shifts"][0]["pairs"] == len(pairs["rows"])
    assert "no template: left out; plain text has no chat template." in found.out
    assert "Not measured: what the model itself answers" in found.out and "within rounding" in found.out


def test_some_pairs_one_shift_and_a_system_of_ones_own(runs, stress):
    found = stress(runs / "hh", "--max-pairs", "4", "--only", "system-prompt", "--system", "Rhyme.").document
    assert [(one["name"], one["pairs"]) for one in found["shifts"]] == [("as it was", 4), ("system prompt", 4)]
    assert found["systems"] == ["Rhyme."] and found["reproduced"]["holds"] and found["held_out_pairs"] == 9


def test_a_template_without_a_system_role_leaves_that_shift_out(run, stress):
    """And the run's numbers, which are of another template, do not come again: exit code 1."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = STRICT
    tokenizer.save_pretrained(run)
    (run / "chat_template.jinja").write_text(STRICT)
    edit(
        run / "pairs.json",
        lambda pairs: (pairs["columns"].__delitem__(slice(6, 8)), [row.__delitem__(slice(6, 8)) for row in pairs["rows"]]),
    )
    found = stress(run, "--only", "system-prompt", "typos")
    assert found.document["not_applied"] == [{"name": "system prompt", "why": "the chat template has no system role"}]
    assert [one["name"] for one in found.document["shifts"]] == ["as it was", "typos"]
    assert found.code == 1 and not found.document["reproduced"]["holds"]


def test_weights_that_are_not_the_runs_are_told(run, stress, runs):
    edit(run / "pairs.json", lambda pairs: pairs["rows"][3].__setitem__(0, pairs["rows"][3][0] + 0.5))
    found = stress(run, "--only", "as-it-was", json_out=False)
    words = " ".join(found.out.split())
    assert found.code == 1 and "NOT those of pairs.json" in words and "log-probability is 0.5 nats" in words


def test_answers_that_would_be_cut_are_left_out(run, stress):
    """With no room for a longer prompt, no pair is compared on less of its answers than before."""
    rows = json.loads((run / "pairs.json").read_text())["rows"]
    edit(run / "metrics.json", lambda record: record["config"].update(max_length=60))
    found = stress(run, "--only", "longer-dialogue", json_out=True)
    assert found.code == 0, found.err
    told = json.dumps([found.document["shifts"][1:], found.document["not_applied"]])
    assert "max_length" in told and found.document["shifts"][0]["pairs"] == len(rows)


def test_anothers_file_is_not_overwritten(run, stress):
    for content in ('{"mine": 1}', "no json", "[]"):
        (run / "stress.json").write_text(content)
        found = stress(run)
        assert found.code == 2 and "Nothing is overwritten" in found.err and found.out == ""
        assert (run / "stress.json").read_text() == content


def spoil(change, name="metrics.json"):
    return lambda run: edit(run / name, change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: shutil.rmtree(run), "There is no folder"),
        (lambda run: (run / "metrics.json").unlink(), "no finished run of trl-cpo train: it has no metrics.json"),
        (lambda run: (run / "pairs.json").unlink(), "it has no pairs.json"),
        (lambda run: (run / "pairs.json").write_text("{"), "cannot be read"),
        (lambda run: (run / "adapter_config.json").unlink(), "holds no model"),
        (spoil(lambda pairs: pairs.update(rows=[]), "pairs.json"), "holds no held-out pair"),
        (spoil(lambda pairs: pairs["rows"][0].__setitem__(0, None), "pairs.json"), "log-probabilities that are none"),
        (spoil(lambda pairs: pairs["rows"].pop(), "pairs.json"), "has 8 pairs, metrics.json 9"),
        (spoil(lambda record: record["pairs"].update(held_out=5)), "are not those that the run was evaluated on: 5 of 5"),
        (spoil(lambda pairs: pairs["rows"][0].__setitem__(6, 77), "pairs.json"), "the lengths of their answers differ"),
        (spoil(lambda record: record["versions"].update({"trl-cpo": "99.0"})), "is of trl-cpo 99.0"),
        (spoil(lambda record: record["config"].update(sync_ref_model=True)), "sync_ref_model"),
        (spoil(lambda record: record["pairs"].update(dataset_name="gone.jsonl")), "give --dataset"),
        (spoil(lambda record: record.update(model="gone")), "is elsewhere now, give --ref-model"),
        (lambda run: (run / "adapter_model.safetensors").unlink(), "holds no weights"),
        (lambda run: [(run / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "cannot be loaded"),
        (spoil(lambda record: record.update(model=None)), "names no model or no pairs"),
        (spoil(lambda record: record["config"].update(max_length=-3)), "max_length"),
    ],
)
def test_wrong_input_is_one_clear_message_before_anything_is_scored(run, stress, monkeypatch, change, said):
    def scored(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("trl_cpo.stress.measure.score_roles", scored)
    change(run)
    found = stress(run)
    assert found.code == 2 and said in found.err and "Traceback" not in found.err and found.out == "", found.err
    assert not (run / "stress.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "typo"], "Did you mean typos?"),
        (["--typos", "0"], "--typos must be above 0"),
        (["--system", " "], "--system must be a text"),
        (["--max-pairs", "0"], "--max-pairs must be >= 1"),
        (["--batch-size", "-1"], "--batch-size must be >= 1"),
    ],
)
def test_wrong_options(stress, arguments, said):
    found = stress("run", *arguments)
    assert found.code == 2 and said in found.err and found.err.strip().endswith("trl-cpo stress --help")


def test_pairs_that_were_moved_and_a_run_of_before_are_read(runs, run, stress, tmp_path):
    """An earlier version recorded neither how many were held out nor more; what was not trained on tells it."""
    moved = shutil.copy(runs / "hh.jsonl", tmp_path / "moved.jsonl")

    def forget(record):
        record["pairs"] = {name: record["pairs"][name] for name in ("train_split", "test_split", "digests")}
        record["pairs"]["dataset_name"] = "gone.jsonl"

    edit(run / "metrics.json", forget)
    found = stress(run, "--dataset", moved, "--only", "as-it-was")
    assert found.code == 0 and found.document["shifts"][0]["pairs"] == 9, found.err


def test_gamma_of_a_group_is_that_of_its_pairs(runs):
    from datasets import Dataset

    from trl_cpo.stress.recorded import gammas

    recorded = read_recorded(runs / "hh")
    recorded.settings.update(group_column="team", gamma_by_group={"a": 2.0, "7": 3})
    assert gammas(recorded, Dataset.from_dict({"team": ["a", "b", "7"]})).tolist() == [2.0, 0.5, 3.0]
    assert gammas(recorded, Dataset.from_dict({"other": ["a"]})).tolist() == [0.5]
