"""examples/hh_rlhf.py as a user runs it, on a tiny model and a local file in HH-RLHF's form."""

import gzip
import json
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from trl_cpo.certificates import certify_run
from trl_cpo.cli import main
from trl_cpo.cli.train import _without
from trl_cpo.logs.run_log import read_log
from trl_cpo.run.arguments import PairArguments, PolicyConfig

from helpers.paths import ROOT
from helpers.tiny import hh_rows

SCRIPT = ROOT / "examples" / "hh_rlhf.py"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of what a user's CPU lacks, and of knobs
TINY = ["--use_cpu", "--bf16", "False", "--max_steps", "2", "--logging_steps", "1", "--max_length", "128"]


@pytest.fixture(scope="module")
def hh_file(tmp_path_factory):
    """24 pairs and two rows that cannot be parsed."""
    rows = hh_rows(24, 0)
    rows[3] = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b"}
    rows[9] = {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: b"}
    path = tmp_path_factory.mktemp("hh") / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """What the script calls, in this process: starting Python and its libraries is most of the time of a launch."""
    monkeypatch.chdir(tmp_path)

    def run(*options, check=True):
        code = main(["train", *map(str, options)])
        said = capsys.readouterr()
        if check:
            assert code == 0, said.err[-4000:]
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return run


def launched(cwd, *options, processes=0, program=(str(SCRIPT),), check=True):
    """The script, in `processes` of accelerate's or in one of its own."""
    head = [sys.executable]
    if processes:
        head += ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
        head += ["--mixed_precision", "no", "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
    done = subprocess.run(
        [*head, *program, *map(str, options)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.slow(25)
def test_accelerate_launch_with_lora_twice(tmp_path, model_folder, hh_file):
    """Progress, a report of refused rows, a summary, files where it says; a second run goes beside the first."""
    options = ["--model_name_or_path", model_folder, "--dataset_name", hh_file, "--use_peft", *TINY]
    options += ["--lora_target_modules", "q_proj", "v_proj", "--constraint", "softplus", "--gamma", "0.5"]
    done = launched(tmp_path, *options, processes=1)
    out = done.stdout
    for words in (
        "[1/4]",
        "[4/4]",
        "24 rows: 22 kept, 2 refused",
        "1 identical_answers",
        "1 empty_answer",
        "2 held-out pairs",
        "prefers chosen itself",
        "undesirable region",
        "violations",
        "mean reference gap",
        "reward accuracy",
        "chosen log-prob moved by",
        "step     2/2 train",
        "outputs/pairs-softplus/metrics.json",
    ):
        assert words in out, words
    folder = tmp_path / "outputs" / "pairs-softplus"
    record = json.loads((folder / "metrics.json").read_text())
    assert record["config"]["constraint"] == "softplus" and record["held_out_pairs"] == 2
    assert record["before"]["eval_cpo/gap"] == pytest.approx(record["before"]["eval_cpo/ref_gap"], abs=1e-5)
    assert record["after"]["eval_cpo/gap"] != record["before"]["eval_cpo/gap"]
    assert record["data"]["train"]["refused"] == {"empty_answer": 1, "identical_answers": 1}
    pairs = json.loads((folder / "pairs.json").read_text())
    assert {k: pairs[k] for k in ("reduction", "gamma", "constraint")} == {
        "reduction": "sum",
        "gamma": 0.5,
        "constraint": "softplus",
    }
    assert len(pairs["rows"]) == 2 and all(row[4:6] == row[2:4] for row in pairs["rows"])
    assert sum(row[0] - row[1] for row in pairs["rows"]) / 2 == pytest.approx(record["after"]["eval_cpo/gap"], abs=1e-4)
    assert sum(row[2] - row[3] for row in pairs["rows"]) / 2 == pytest.approx(record["before"]["eval_cpo/gap"], abs=1e-4)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "loss" in r] == [1, 2]
    assert (folder / "adapter_model.safetensors").exists() and "2605.20834" in (folder / "README.md").read_text()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    # The second as `trl-cpo train`, in two processes: one folder, each held-out pair once, every line said once.
    out = launched(tmp_path, *options, processes=2, program=("-m", "trl_cpo", "train")).stdout
    assert out.count("outputs/pairs-softplus-2/metrics.json") == out.count("[4/4]") == out.count("[end, step 2]") == 1
    record = json.loads((tmp_path / "outputs" / "pairs-softplus-2" / "metrics.json").read_text())
    pairs = json.loads((tmp_path / "outputs" / "pairs-softplus-2" / "pairs.json").read_text())
    assert len(pairs["rows"]) == record["held_out_pairs"] == 2
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["pairs-softplus", "pairs-softplus-2"]
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_full_fine_tuning_with_precomputed_reference_and_plain_dpo(run, tmp_path, model_folder, hh_file):
    test_file = tmp_path / "data"
    test_file.mkdir()
    for split, seed in (("train", 1), ("test", 2)):
        (test_file / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in hh_rows(9, seed)))
    options = ["--model_name_or_path", model_folder, "--dataset_name", test_file, "--constraint", "none", *TINY]
    options += ["--precompute_ref_log_probs", "--logps_reduction", "mean", "--output_dir", "mine"]
    options += ["--per_device_train_batch_size", "4", "--max_test_pairs", "5"]
    out = run(*options).stdout
    assert "5 held-out pairs, constraint none" in out and "nats per token" in out
    assert (tmp_path / "mine" / "model.safetensors").exists()
    done = run(*options, check=False)
    assert done.returncode != 0 and "already holds files" in done.stderr and "mine-2 is free" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_goes_on_from_its_latest_checkpoint(run, tmp_path, model_folder, hh_file):
    """Stopped after one step of two, and killed while it saved the final model; before both, before its first checkpoint."""
    options = ["--model_name_or_path", model_folder, "--dataset_name", hh_file, "--constraint", "clip", *TINY]
    options += ["--output_dir", "mine", "--per_device_train_batch_size", "4", "--save_strategy", "steps", "--save_steps", "1"]
    mine = tmp_path / "mine"
    (mine / "_unfinished" / "checkpoint-1").mkdir(parents=True)
    (mine / "log.jsonl").write_text('{"step": 0, "eval_lo')
    out = run(*options, "--max_steps", "1", "--resume_from_checkpoint", "latest").stdout
    assert "holds no whole checkpoint yet: starting from the beginning" in out and "step     1/1 train" in out
    (mine / "checkpoint-2").mkdir()  # half-written, as plain TRL leaves them
    out = run(*options, "--resume_from_checkpoint", "latest").stdout
    assert "step     2/2 train" in out and "step     1/2 train" not in out and "eval" in out
    assert json.loads((tmp_path / "mine" / "metrics.json").read_text())["before"]["step"] == 0
    weights, log = (mine / "model.safetensors").read_bytes(), read_log(mine / "log.jsonl")
    record = json.loads((mine / "metrics.json").read_text())
    assert [line["step"] for line in log if "loss" in line] == [1, 2] and len(log) == 7  # the first run ended, at step 1
    (mine / "metrics.json").unlink()
    (mine / "model.safetensors").write_bytes(weights[:1000])
    run(*options, "--resume_from_checkpoint", "latest")
    assert (mine / "model.safetensors").read_bytes() == weights

    def numbers(line):
        return {k: v for k, v in line.items() if not k.endswith(("_runtime", "_per_second"))}

    again = json.loads((mine / "metrics.json").read_text())
    assert numbers(again["after"]) == numbers(record["after"]) and numbers(again["before"]) == numbers(record["before"])
    assert list(map(numbers, read_log(mine / "log.jsonl"))) == list(map(numbers, log))
    done = run(*TINY, "--output_dir", "other", "--resume_from_checkpoint", "latest", check=False)
    assert "no whole checkpoint-* folder in other" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_prints_the_command_that_goes_on(run, tmp_path, model_folder, hh_file, monkeypatch):
    """Stopped at the second log, after the first checkpoint; then the command as it was printed."""
    from trl_cpo.logs.run_log import RunLog

    stops, log = [2], RunLog.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        if stops and state.global_step == stops[0]:
            stops.clear()
            raise KeyboardInterrupt
        return log(self, args, state, control, logs=logs, **kwargs)

    monkeypatch.setattr(RunLog, "on_log", on_log)
    (tmp_path / "my recipe.yaml").write_text("constraint: clip\ngamma: 1.0\n")
    options = ["--config", "my recipe.yaml", "--model_name_or_path", model_folder, "--dataset_name", hh_file, *TINY]
    options += ["--output-dir=mine", "--no_price"]
    options += ["--per_device_train_batch_size", "4", "--save_strategy", "steps", "--save_steps", "1"]
    done = run(*options, check=False)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    *_, said, command = done.stderr.strip().splitlines()
    assert said.endswith("interrupted. mine/checkpoint-1 is the last checkpoint. To go on from there:")
    assert command.endswith("--output_dir mine --resume_from_checkpoint latest") and command.count("mine") == 1
    assert command.startswith("trl-cpo train --config 'my recipe.yaml'")
    out = run(*shlex.split(command)[2:]).stdout
    assert "step     2/2 train" in out and "step     1/2 train" not in out


def test_ctrl_c_before_a_checkpoint_says_so(run, tmp_path, model_folder, hh_file, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    options = ["--model_name_or_path", model_folder, "--dataset_name", hh_file, *TINY, "--no_price"]
    with monkeypatch.context() as patch:
        patch.setattr("trl_cpo.run.training.load_sets", stop)
        done = run(*options, check=False)
        assert done.returncode == 130 and "No checkpoint was written" in done.stderr
        command = done.stderr.rstrip().splitlines()[-1]
        assert command.endswith("--output_dir outputs/pairs-clip --resume_from_checkpoint latest")
        patch.setenv("RANK", "1")
        assert run(*options, "--output_dir", "other", check=False).stderr.rstrip().endswith("interrupted")
    out = run(*shlex.split(command)[2:]).stdout
    assert "holds no whole checkpoint yet: starting from the beginning" in out and "step     2/2 train" in out


def test_options_are_taken_out_with_their_values():
    words = ["--output_dir", "a", "--beta", "-1", "--resume-from-checkpoint=b", "--targets", "q", "v", "--output-dir", "c"]
    assert _without(words, ("output_dir", "resume_from_checkpoint")) == ["--beta", "-1", "--targets", "q", "v"]


def test_a_resumed_run_keeps_beta_and_gamma_that_nobody_gave(run, tmp_path, model_folder, hh_file):
    """Earlier versions trained means with the defaults of sums. Whoever resumes such a run gives the command of then."""
    options = [
        "--model_name_or_path",
        model_folder,
        "--dataset_name",
        hh_file,
        *TINY,
        "--logps_reduction",
        "mean",
        "--no_price",
    ]
    options += ["--output_dir", "mine", "--save_strategy", "steps", "--save_steps", "1"]
    run(*options, "--max_steps", "1", "--beta", "0.1", "--gamma", "0")
    done = run(*options, "--resume_from_checkpoint", "latest")
    assert "beta=0.1 and gamma=0, as in mine/checkpoint-1: not given here" in done.stdout
    config = json.loads((tmp_path / "mine" / "metrics.json").read_text())["config"]
    assert (config["beta"], config["gamma"]) == (0.1, 0.0)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "None" not in card and f"| base model | {model_folder} |" in card
    assert all(f"| {row} |" in card for row in ("constraint | clip", "gamma | 0.0", "beta | 0.1"))
    assert f"{len(json.loads((tmp_path / 'mine' / 'pairs.json').read_text())['rows'])} held-out pairs" in card
    assert "no longer the same run" not in done.stderr


def test_a_stream_is_counted_as_it_is_read(run, tmp_path, model_folder, hh_file):
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 12), ("test", 7)):
        rows = hh_rows(count, count) + [{"chosen": "no dialogue", "rejected": "none"}]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run("--model_name_or_path", model_folder, "--dataset_name", data, "--dataset_streaming", *TINY).stdout
    assert "7 held-out pairs" in out and "test: 8 rows: 7 kept, 1 refused" in out


def test_a_misspelt_split_is_not_replaced_by_training_pairs(run, model_folder, hh_file):
    options = ["--model_name_or_path", model_folder, "--dataset_name", hh_file, *TINY]
    done = run(*options, "--dataset_test_split", "validaton", check=False)
    assert done.returncode != 0 and "has no split 'validaton'" in done.stderr


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--gama", "1.0"], "--gama"),
        (["--gamma", "-1"], "gamma must be a finite number ≥ 0; got -1.0"),
        (["--constraint", "clipp"], "invalid choice: 'clipp'"),
        (["--constraint", "inverse_prob"], "needs logps_reduction='mean'"),
        (["--dataset_name", "./nothing.jsonl"], "There is no file or folder ./nothing.jsonl"),
    ],
)
def test_mistakes_end_in_a_sentence(tmp_path, options, expected, monkeypatch, capsys):
    """Before any model is loaded: the model's name, of a hub that cannot be reached, is never looked at.

    What the script calls, in this process: starting Python is most of the time.
    """
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, *options]) == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said
    assert not (tmp_path / "outputs").exists()


def test_unknown_key_in_a_config_file(run, tmp_path):
    (tmp_path / "c.yaml").write_text("gamma: 1.0\ngammma: 2.0\n")
    done = run("--config", "c.yaml", check=False)
    assert done.returncode != 0 and "gammma" in done.stderr


def test_plain_defaults_are_the_real_thing():
    assert PairArguments().dataset_name == "Anthropic/hh-rlhf"
    assert PolicyConfig().model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_help_is_there(tmp_path):
    out = launched(tmp_path, "--help").stdout
    for option in ("--constraint", "--gamma", "--logps_reduction", "--use_peft", "--precompute_ref_log_probs"):
        assert option in out


@pytest.mark.parametrize("given", [False, True])
def test_a_run_that_starts_beside_another_leaves_its_folder_alone(run, tmp_path, monkeypatch, hh_file, given):
    """The second is started while the first reads its pairs: its folder is empty, and claimed."""
    from trl_cpo.run import training

    options = ["--dataset_name", hh_file, *TINY, *(["--output_dir", "mine"] if given else [])]
    folder, seen = "mine" if given else "outputs/pairs-clip", []

    def load(arguments, real=training.load_sets):
        seen.append(sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("_claim.json")))
        if len(seen) == 1:
            seen.append(run(*options, check=False).stderr)
        arguments.dataset_name = "nowhere.jsonl"
        return real(arguments)

    monkeypatch.setattr(training, "load_sets", load)
    assert run(*options, check=False).returncode == 2
    if given:
        claims, said = seen
        assert claims == ["mine"] and "mine is in use by another run" in said and "mine-2 is free" in said
        assert len(said.splitlines()) == 2
    else:
        assert [seen[0], seen[1]] == [[folder], [folder, f"{folder}-2"]] and "nowhere.jsonl" in seen[2]
    assert list(tmp_path.iterdir()) == [], "neither leaves a folder behind"


def test_pairs_that_are_trained_on_are_not_evaluated_as_held_out(run, tmp_path, model_folder):
    rows = hh_rows(12, 1)
    (tmp_path / "pairs").mkdir()
    for split, part in (("train", rows[:8]), ("test", [*rows[8:], rows[0], {**rows[1], "note": "the same pair"}])):
        (tmp_path / "pairs" / f"{split}.jsonl").write_text("".join(json.dumps({"note": "", **row}) + "\n" for row in part))
    options = ["--model_name_or_path", model_folder, "--dataset_name", "pairs", *TINY, "--output_dir", "mine"]
    for train in ("test", "train+test"):
        done = run(*options, "--dataset_train_split", train, check=False)
        assert done.returncode == 2 and "are all trained on" in done.stderr and not (tmp_path / "mine").exists()
    out = run(*options).stdout
    assert "left 2 evaluation pairs out, which are trained on too" in out and "4 held-out pairs" in out
    assert "2 evaluation pairs were trained on, and are not counted" in out
    record, pairs = (json.loads((tmp_path / "mine" / name).read_text()) for name in ("metrics.json", "pairs.json"))
    assert len(pairs["rows"]) == record["held_out_pairs"] == 4 and pairs["trained_on_left_out"] == 2
    said = record["pairs"]
    assert (said["train_split"], said["test_split"], said["trained_on_left_out"]) == ("train", "test", 2)
    assert len(said["digests"]) == 8 * 16
    assert certify_run("mine")["evidence"]["numbers"]["trained_on_left_out"] == 2
