"""What a run reads, runs and writes: no pickle, weights as safetensors, nobody else's code, nothing outside its folder."""

import ast
import json
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoConfig

import trl_cpo
from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.cli.plain_yaml import PlainLoader
from trl_cpo.recipes import recipe

from helpers.paths import ROOT
from helpers.tiny import make_model, pair_rows, pairs_dataset, training_options

SOURCES = [*Path(trl_cpo.__file__).parent.rglob("*.py"), *(ROOT / "examples").glob("*.py")]


def dotted(node) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_nothing_here_reads_pickles_or_runs_text():
    """No pickle, no torch.load, no eval, no shell; YAML through a loader that makes plain values alone."""
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "input"}
    modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & modules, path
            if isinstance(node, ast.Call):
                name = dotted(node.func)
                assert name not in forbidden and not name.startswith(tuple(f"{m}." for m in modules)), (path, name)
                # YAML is made into values in one place.
                assert not name.startswith("yaml.") or path.name == "plain_yaml.py", (path, name)
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                assert not getattr(given.get("shell"), "value", False), path
                assert not getattr(given.get("allow_pickle"), "value", False), path
    assert issubclass(PlainLoader, yaml.SafeLoader) and PlainLoader.yaml_constructors == yaml.SafeLoader.yaml_constructors


@pytest.fixture
def no_pickle(monkeypatch):
    """Makes every way of reading a pickle fail, and gives the files that torch.load was asked for, weights_only or not."""
    read = []

    def refused(*args, **kwargs):
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    load = torch.load

    def watched(file, *args, **kwargs):
        read.append((Path(str(file)).name, kwargs.get("weights_only")))
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    return read


#: What transformers writes with torch.save beside the weights: training state, and the arguments, which nothing reads.
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}


@pytest.mark.parametrize("lora", [False, True])
def test_no_pickle_is_read_in_a_run_and_its_resumption_and_weights_are_safetensors(
    tmp_path, tokenizer, model_folder, no_pickle, lora
):
    """Loading pairs, precomputing the reference, training, saving, resuming, the best model at the end."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(12)))

    def train(steps, resume):
        pairs = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "c"), split="train")
        options = training_options(
            tmp_path / "out",
            max_steps=steps,
            save_strategy="steps",
            save_steps=1,
            precompute_ref_log_probs=True,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            lr_scheduler_type="linear",
        )
        trainer = CPOConstrainedTrainer(
            model=model_folder,
            processing_class=tokenizer,
            train_dataset=pairs,
            eval_dataset=pairs.select(range(4)),
            args=CPOConstrainedConfig(**options, constraint="clip"),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None,
        )
        with pytest.warns(UserWarning, match="max_steps was 2 and is 3") if resume else nullcontext():
            trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()

    train(2, None)
    assert not [name for name, _ in no_pickle]
    train(3, str(tmp_path / "out" / "checkpoint-2"))
    assert {name for name, _ in no_pickle} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert all(weights_only is True for _, weights_only in no_pickle)
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        assert (folder / weights).exists()
    written = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")]
    assert {path.name for path in written} == STATE


EVIL = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = {model_type!r}
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(params=["llama", "evil"], ids=["a known architecture", "an unknown one"])
def evil_folder(request, tmp_path, tokenizer):
    """A model folder that asks for code of its own to be run, and the file which that code would write."""
    folder, marker = tmp_path / "evil", tmp_path / "marker"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker), model_type=request.param))
    for name, entries in (
        ("config.json", {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.EvilTokenizer"]}),
    ):
        content = json.loads((folder / name).read_text()) | {"auto_map": entries}
        if name == "config.json":
            content["model_type"] = request.param
        (folder / name).write_text(json.dumps(content))
    return folder, marker


def test_a_models_own_code_is_not_run_unless_trusted(evil_folder, tmp_path, monkeypatch):
    """By the trainer, and by `trl-cpo train`; with the trust that was asked for it is, or this test would show nothing."""
    folder, marker = evil_folder
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    args = CPOConstrainedConfig(**training_options(tmp_path / "out", max_steps=1))
    try:
        CPOConstrainedTrainer(model=str(folder), args=args, train_dataset=pairs_dataset(4)).train()
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
    assert not marker.exists()
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(8)))
    command = [
        sys.executable,
        str(ROOT / "examples" / "hh_rlhf.py"),
        "--model_name_or_path",
        str(folder),
        "--dataset_name",
        str(tmp_path / "pairs.jsonl"),
        "--output_dir",
        str(tmp_path / "run"),
        "--use_cpu",
        "--bf16",
        "False",
        "--max_steps",
        "1",
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HOME=str(tmp_path / "hf"), HF_MODULES_CACHE=str(tmp_path / "m"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL, env=environment)
    assert not marker.exists()
    assert done.returncode == 0 or "contains custom code" in done.stderr, done.stderr[-2000:]
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


RUNNER = """
import json, os, sys
opened = set()
def watch(event, args):
    if event == "open":
        path, mode, flags = args
        writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if isinstance(path, int) or not writes:
            return
        opened.add(os.path.abspath(os.fsdecode(path)))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.symlink", "os.link", "os.chmod", "shutil.rmtree"):
        opened.update(os.path.abspath(os.fsdecode(p)) for p in args[:2] if isinstance(p, (str, bytes)))
sys.addaudithook(watch)
from trl_cpo.cli import main
code = main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump(sorted(opened), file)
sys.exit(code)
"""


def everything_in(*folders):
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def test_a_run_writes_into_its_folder_and_the_caches_alone(tmp_path, model_folder):
    """Home, temporary folder, working folder, model and data, compared before and after a whole run.

    Python's own audit events tell what it opened to write anywhere else; libraries in C and Rust do not report theirs.
    """
    places = {name: tmp_path / name for name in ("home", "tmp", "cwd", "data", "out")}
    for place in places.values():
        place.mkdir()
    (places["data"] / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(12)))
    (tmp_path / "runner.py").write_text(RUNNER)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_", "TORCH", "TRL_"))}
    environment |= {
        "HOME": str(places["home"]),
        "TMPDIR": str(places["tmp"]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    untouched = (model_folder, places["data"], places["cwd"])
    before = everything_in(*untouched)
    options = [
        "train",
        "--model_name_or_path",
        model_folder,
        "--dataset_name",
        str(places["data"] / "pairs.jsonl"),
        "--output_dir",
        str(places["out"] / "run"),
        "--use_cpu",
        "--bf16",
        "False",
        "--max_steps",
        "2",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--precompute_ref_log_probs",
        "--constraint",
        "clip",
        "--report_to",
        "none",
    ]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "runner.py"), str(tmp_path / "opened.json"), *options],
        cwd=places["cwd"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (places["out"] / "run" / "model.safetensors").exists()
    assert everything_in(*untouched) == before
    caches = places["home"] / ".cache"
    assert all(Path(path).is_relative_to(caches) for path in everything_in(places["home"]))
    assert not [path for path in everything_in(places["tmp"]) if "torchinductor" not in path]
    allowed = (str(places["out"] / "run"), str(caches), str(places["tmp"]), "/dev/", "/proc/")
    allowed += (str(tmp_path / "opened.json"),)
    opened = json.loads((tmp_path / "opened.json").read_text())
    outside = [path for path in opened if not path.startswith(allowed) and path != str(places["home"])]
    assert str(places["out"] / "run" / "log.jsonl") in opened  # the watch works
    assert not outside


@pytest.mark.parametrize("name", ["../demo", "/etc/passwd", "../../pyproject", "demo/../demo", "demo.yaml", "", ".", "demo\0"])
def test_a_recipes_name_is_looked_up_and_never_a_path(name, tmp_path, monkeypatch):
    from trl_cpo.cli import main

    with pytest.raises(KeyError):
        recipe(name)
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", name]) == 2
    assert not list(tmp_path.rglob("*"))


def test_an_evaluation_sets_name_is_no_path(tmp_path, tokenizer, model_folder):
    """Names of sets come into names of files where log-probabilities are kept."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(8)))
    pairs = load_dataset(
        "json", data_files=str(tmp_path / "data" / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    trainer = CPOConstrainedTrainer(
        model=model_folder,
        processing_class=tokenizer,
        train_dataset=pairs,
        eval_dataset={"../../../evil": pairs.select(range(4)), "/evil": pairs.select(range(2))},
        args=CPOConstrainedConfig(**training_options(tmp_path / "out", precompute_ref_log_probs=True, max_steps=1)),
    )
    trainer.train()
    assert not list(tmp_path.rglob("*evil*")) and not list(tmp_path.parent.glob("*evil*"))
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "cache", "out"}
