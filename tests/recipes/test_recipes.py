"""A run's options from YAML and the command line, every recipe parsed, and two steps of each on a tiny model."""

import json
import math
import re
from dataclasses import fields

import pytest
import torch
import yaml

from trl_cpo.cli import main
from trl_cpo.cli.errors import UserError
from trl_cpo.cli.options import GROUPS, parse_run, read_config, run_parser
from trl_cpo.cli.train import command_line_names
from trl_cpo.files.atomic import strict, write_json
from trl_cpo.files.outputs import making
from trl_cpo.recipes import names, recipe

from helpers.tiny import hh_rows

#: What keeps a run on the CPU and small; a recipe's own values stand for all else.
ON_CPU = ["--use_cpu", "--bf16", "False"]


def written(tmp_path, text):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name", names())
def test_a_recipe_is_parsed_and_every_value_arrives(name):
    pairs, args, policy = parse_run(ON_CPU, name)
    for key, value in yaml.safe_load(recipe(name).file.read_text()).items():
        if key in ("bf16", "use_cpu"):
            continue
        (owner,) = [group for group in (pairs, args, policy) if key in {f.name for f in fields(group)}]
        assert getattr(owner, key) == value, key
    assert args.constraint in ("clip", "softplus") and args.gamma > 0
    assert args.form.beta > 0


def test_the_papers_setting():
    """method: softplus, beta 2.5, alpha 0.25, mean log-probs, learning rate 1e-6, full fine-tuning; 128 pairs on 8 GPUs."""
    pairs, args, policy = parse_run(ON_CPU, "llama3-8b-paper")
    assert (args.constraint, args.beta, args.alpha, args.logps_reduction) == ("softplus", 2.5, 0.25, "mean")
    assert args.loss_type == ["sigmoid_norm"] and args.learning_rate == 1e-6 and not policy.use_peft
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 128
    assert "has not been run here" in recipe("llama3-8b-paper").file.read_text()


def test_the_arithmetic_in_the_recipes():
    """The counts in the comments, from the published shapes: (hidden, MLP, blocks, key/value width, vocabulary, tied)."""

    def counts(h, m, blocks, kv, vocabulary, tied, biased):
        linear = blocks * (2 * h * h + 2 * h * kv + 3 * h * m)
        head = vocabulary * h
        return linear + blocks * (2 * h + (h + 2 * kv if biased else 0)) + h + head * (1 if tied else 2), linear, head

    def adapter(h, m, blocks, kv, rank):
        return rank * blocks * (2 * 2 * h + 2 * (h + kv) + 3 * (h + m))

    def said(name):
        # Comments run over lines.
        return re.sub(r"\s+", " ", re.sub(r"\n#", " ", recipe(name).file.read_text()))

    total, linear, head = counts(4096, 14336, 32, 1024, 128256, False, False)
    text = said("llama3-8b-paper")
    assert f"{total / 1e9:.2f}e9 parameters" in text and f"{head / 1e6:.0f}e6 x 2 B" in text
    assert f"= {16 * total / 1e9:.1f} GB, an eighth: {2 * total / 1e9:.1f} GB" in text
    assert f"x 2 B = {2 * total / 1e9:.1f} GB, an eighth {2 * total / 8e9:.1f} GB" in text
    assert f"32 layers x 217e3 B {2 * 3 * 1024 * 32 * 217e3 / 1e9:.0f} GB" in text
    assert f"two blocks of {linear / 32 / 1e6:.0f}e6 weights" in text
    assert f"{(2 * 2 * linear / 32 + 2 * head) / 1e9:.1f} GB" in text
    flop = 8 * (linear + head) * 62_000 * 1_100
    assert f"{(linear + head) / 1e9:.1f}e9 weights take part" in text and f"{8 * (linear + head) / 1e9:.0f} GFLOP" in text
    assert f"{flop / 1e18:.1f}e18 FLOP" in text
    assert f"that takes {flop / (0.4 * 8 * 989e12) / 60:.0f} minutes" in text
    assert f"(312 TFLOP/s), {flop / (0.4 * 8 * 312e12) / 60:.0f} minutes" in text

    total, linear, head = counts(3584, 18944, 28, 512, 152064, False, True)
    text = said("hh-rlhf-qlora-24gb")
    assert f"{total / 1e9:.2f}e9 parameters" in text and f"{linear / 1e9:.2f}e9 in linear layers" in text
    assert f"{0.516 * linear / 1e9:.1f} GB" in text and f"{2 * head / 1e9:.2f}e9 (embedding and head" in text
    lora = adapter(3584, 18944, 28, 512, 16)
    assert f"{lora / 1e6:.1f}e6 weights" in text and f"{8 * lora / 1e9:.1f} GB" in text
    assert f"{8 * 2 * 1024 * 28 * 3584 * 2 / 1e9:.1f} GB at most" in text
    text = said("full-zero3")
    assert f"= {16 * total / 1e9:.1f} GB, a quarter: {4 * total / 1e9:.1f} GB" in text

    total, linear, head = counts(1536, 8960, 28, 256, 151936, True, True)
    text = said("hh-rlhf-lora")
    assert f"{16 * 2 * 1024 * 28 * 1536 * 2 / 1e9:.1f} GB at most" in text
    assert f"{total / 1e9:.2f}e9 parameters" in text and f"{2 * total / 1e9:.1f} GB" in text
    lora = adapter(1536, 8960, 28, 256, 16)
    assert f"{lora / 1e6:.1f}e6 weights" in text and f"{16 * lora / 1e9:.1f} GB" in text


@pytest.mark.parametrize("name", names())
@pytest.mark.filterwarnings("ignore::UserWarning")  # about what a CPU lacks, and about hyperparameters
def test_two_steps_of_each_recipe(name, tmp_path, model_folder, monkeypatch, capsys):
    """Its own options, but for model, pairs, device and sizes."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 8), ("test", 3)):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hh_rows(count, count)))
    small = ["--model_name_or_path", model_folder, "--dataset_name", str(data), "--max_length", "64", "--max_steps", "2"]
    small += ["--dtype", "float32", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    small += ["--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "True", "--dataloader_pin_memory", "False"]
    assert main(["train", "--config", name, *ON_CPU, *small]) == 0, capsys.readouterr().err
    (folder,) = (tmp_path / "outputs").iterdir()
    record = json.loads((folder / "metrics.json").read_text())
    assert record["config"]["beta"] == read_config(name)["beta"] and record["held_out_pairs"] == 3
    assert math.isfinite(record["after"]["eval_loss"])
    weights = "adapter_model.safetensors" if read_config(name).get("use_peft") else "model.safetensors"
    assert (folder / weights).is_file() and (folder / "pairs.json").is_file()
    assert "[end, step 2] " in capsys.readouterr().out


def test_the_command_line_wins_over_the_recipe(tmp_path):
    file = written(tmp_path, "beta: 0.3\ngamma: 1\nlora_target_modules: [q_proj, v_proj]\nlearning_rate: 1e-6\n")
    _, args, policy = parse_run([*ON_CPU, "--beta", "0.7"], file)
    assert (args.beta, args.gamma, args.learning_rate) == (0.7, 1.0, 1e-6)
    assert isinstance(args.gamma, float) and policy.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("recipes", "arguments", "taken", "said"),
    [
        ("sum", ["--logps_reduction", "mean"], (2.5, 0.05), "beta=0.2 and gamma=1 of the recipe are for logps_reduction='sum'"),
        ("sum", ["--logps-reduction=mean", "--beta", "3"], (3.0, 0.05), "gamma=1 of the recipe are for logps_reduction='sum'"),
        ("mean", ["--logps_reduction", "sum"], (0.1, 0.0), "beta=0.2 and gamma=1 of the recipe are for logps_reduction='mean'"),
        ("mean", [], (0.2, 1.0), None),
        ("mean", ["--logps_reduction", "mean"], (0.2, 1.0), None),
        ("sum", [], (0.2, 1.0), None),
    ],
)
def test_beta_and_gamma_of_a_recipe_hold_for_its_reduction(tmp_path, recipes, arguments, taken, said):
    file = written(tmp_path, f"constraint: clip\nbeta: 0.2\ngamma: 1.0\nlogps_reduction: {recipes}\n")
    _, args, _ = parse_run([*ON_CPU, *arguments], file)
    assert (args.beta, args.gamma) == taken
    assert args.follows() is None if said is None else said in args.follows()


def test_environment_and_empty_values(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_CPO_TEST_NAME", "before")
    file = written(tmp_path, "env: {TRL_CPO_TEST_NAME: 3}\nmax_test_pairs: null\nmodel_init_kwargs: {use_cache: false}\n")
    pairs, args, _ = parse_run(ON_CPU, file)
    import os

    assert os.environ["TRL_CPO_TEST_NAME"] == "3" and pairs.max_test_pairs is None
    assert args.model_init_kwargs == {"use_cache": False}


@pytest.mark.parametrize(
    "text, said",
    [
        ("gammma: 2.0\n", "unknown key 'gammma'. Did you mean gamma?"),
        ("learning-rate: 1\n", "unknown key 'learning-rate'. Did you mean learning_rate?"),
        ("help: true\n", "unknown key 'help'"),
        ("gamma: [1, 2]\n", "gamma: must be one value; got the list [1, 2]"),
        ("gamma: {a: 1}\n", "gamma: must be one value"),
        ("gamma: much\n", "gamma: must be a number; got 'much'"),
        ("gamma:\n", "gamma: needs a value; got none"),
        ("max_steps: 2.5\n", "max_steps: must be a whole number; got 2.5"),
        ("max_steps: true\n", "max_steps: must be a whole number; got True"),
        ("use_peft: maybe\n", "use_peft: must be true or false; got 'maybe'"),
        ("save_strategy: no\n", "save_strategy: must be text; YAML reads no"),
        ("constraint: clipp\n", "constraint: must be one of none, clip"),
        ("constraint: clipp\n", "got 'clipp'. Did you mean clip?"),
        ("gamma: 1\ngamma: 2\n", "the key 'gamma' is given twice"),
        ("- gamma\n", "must hold 'option: value' lines; got list"),
        ("gamma: [1\n", "is not YAML"),
        ("", "got NoneType"),
        ("env: 3\n", "env must map names to values"),
        ("gamma: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("gamma: -1\n", "gamma must be a finite number ≥ 0; got -1.0"),
    ],
)
def test_a_fault_in_a_recipe_ends_in_a_sentence(tmp_path, text, said):
    with pytest.raises(UserError) as error:
        parse_run(ON_CPU, written(tmp_path, text))
    assert said in str(error.value) and re.search(r"\n.*: trl-cpo \w+", str(error.value))


def test_all_faults_of_a_recipe_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        parse_run(ON_CPU, written(tmp_path, "gammma: 1\nbeta: x\nmax_stepz: 3\n"))
    assert all(name in str(error.value) for name in ("gammma", "beta", "max_stepz"))


@pytest.mark.parametrize(
    "config, said",
    [("dmo", "Did you mean demo?"), ("../recipes/demo", "is neither a file nor a recipe"), (".", "is a folder")],
)
def test_a_config_that_is_not_there(config, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse_run(ON_CPU, config)


def test_a_file_comes_before_a_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("beta: 0.9\n")
    assert parse_run(ON_CPU, "demo")[1].beta == 0.9


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--gama", "1"], "unknown option --gama. Did you mean --gamma?"),
        (["--gam", "1"], "unknown option --gam."),
        (["clip"], "unknown argument clip"),
        (["--constraint", "clipp"], "Did you mean clip?"),
        (["--gamma"], "--gamma"),
        (["--gamma", "much"], "invalid float value: 'much'"),
        (["--load_in_4bit"], "load_in_4bit loads weights that cannot be trained: train an adapter on them, with --use_peft"),
        (["--load_in_8bit", "True"], "load_in_8bit loads weights that cannot be trained"),
    ],
)
def test_a_fault_on_the_command_line(arguments, said):
    with pytest.raises(UserError) as error:
        parse_run([*ON_CPU, *arguments], None)
    assert said in str(error.value) and str(error.value).endswith("All options: trl-cpo train --help")


def test_the_short_help_names_real_options():
    known = {string for action in run_parser("x")._actions for string in action.option_strings}
    shown = command_line_names()
    assert len(shown) > 20 and shown <= known | {"--help-all", "--config"}


def test_no_option_of_trl_is_hidden_by_ours():
    """A field of two groups would be set from one option in both; `config` would be eaten."""
    every = [field.name for group in GROUPS for field in fields(group)]
    assert len(every) == len(set(every)) and "config" not in every


def test_json_is_strict(tmp_path):
    document = {"a": [1.5, math.nan, math.inf], 3: (True, None), "t": torch.float32, "n": {"x": -math.inf}}
    assert strict(document) == {"a": [1.5, None, None], "3": [True, None], "t": "torch.float32", "n": {"x": None}}
    write_json(tmp_path / "f.json", document)
    assert json.loads((tmp_path / "f.json").read_text()) == strict(document)


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "f.json"
    write_json(file, {"a": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["f.json"]


def test_a_folder_that_was_made_for_nothing_is_taken_away(tmp_path):
    """Only what was made, only where it is still empty; a run that goes well, or was killed, keeps it."""

    def fail_while_making(folder, *files):
        with making(folder):
            assert folder.is_dir()
            for file in files:
                file.write_text("x")
            raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        fail_while_making(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="on the way"):
        fail_while_making(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
    with pytest.raises(ValueError, match="on the way"):
        fail_while_making(tmp_path / "c" / "d", tmp_path / "c" / "kept")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["kept"]
    with making(tmp_path / "e"):
        pass
    assert (tmp_path / "e").is_dir()


@pytest.mark.parametrize(
    "options, said",
    [
        (["--model_name_or_path", "./nowhere"], "Cannot load the model ./nowhere"),
        (["--output_dir", "taken"], "already holds files"),
        (["--output_dir", "new", "--resume_from_checkpoint", "latest"], "there is no whole checkpoint-* folder in new"),
    ],
)
def test_what_is_found_wrong_once_the_options_are_right(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hh_rows(6, 0)))
    assert main(["train", "--dataset_name", "pairs.jsonl", *ON_CPU, *options]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and err.endswith("\nAll options: trl-cpo train --help\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "taken"]
