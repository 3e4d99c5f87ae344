"""Each file of examples/ for two steps, launched as the line at its top says, on a tiny model and a local set."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.paths import ROOT
from helpers.tiny import make_model, pairs_dataset

EXAMPLES = ROOT / "examples"
TINY = "--use_cpu --bf16 False --dtype float32 --max_steps 2 --logging_steps 1 --report_to none --max_length 128"
LORA = "--lora_target_modules q_proj v_proj --lora_r 4"


@pytest.fixture(scope="module")
def places(tmp_path_factory, tokenizer_session) -> dict[str, str]:
    """What stands in the place of the hub's model and set, by their names in the examples."""
    folder = tmp_path_factory.mktemp("examples")
    # Rows of at least 64 inputs, the size of a block of nf4.
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder / "model")
    tokenizer_session.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split in ("train", "test"):
        pairs_dataset(8).to_json(folder / "data" / f"{split}.jsonl")
    names = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct")
    return {**dict.fromkeys(names, str(folder / "model")), "trl-lib/ultrafeedback_binarized": str(folder / "data")}


def launch_lines(example: str) -> list[str]:
    """The commands at the top of an example, each on one line."""
    top = (EXAMPLES / example).read_text().split('"""')[1]
    return re.findall(r"^(?:python|accelerate) .*$", top.replace("\\\n", " "), re.M)


def words_of(line: str, places: dict[str, str]) -> list[str]:
    """A launch line word by word, with what stands in for the hub, and with its files' whole paths."""
    words = [places.get(word, word) for word in shlex.split(line)]
    assert sum(word in places.values() for word in words) == 2
    return [str(ROOT / word) if word.startswith(("examples/", "deepspeed_configs/")) else word for word in words]


@pytest.fixture
def run(places, tmp_path, monkeypatch, capsys):
    """Runs a line that begins with `python` in this process; gives what was printed."""

    def run(line: str, *more: str) -> str:
        python, script, *options = words_of(line, places)
        assert python == "python"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *options, *TINY.split(), *more])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_drop_in(run, tmp_path):
    out = run(launch_lines("drop_in.py")[0])
    assert out.count("'cpo/gap'") == 2
    assert (tmp_path / "Qwen2.5-0.5B-CPO" / "model.safetensors").exists()


def test_drop_in_is_trl_with_four_lines_changed():
    """What stands after "was" gives the TRL script back."""
    lines = [line for line in (EXAMPLES / "drop_in.py").read_text().splitlines() if "# was: " in line]
    assert len(lines) == 4
    names = ("DPOConfig", "DPOTrainer", "DPOTrainer(", "DPOConfig")
    assert all(name in line.split("# was: ")[1] for line, name in zip(lines, names, strict=True))
    assert sum("CPOConstrained" in line.split("# was: ")[0] for line in lines) == 3


@pytest.mark.slow(25)
def test_drop_in_with_zero3(places, tmp_path):
    """Two processes, as the line says but for their number, and for an operator that DeepSpeed would compile on a CPU."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import runpy, sys, deepspeed\n"
        "deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False\n"
        "sys.argv.pop(0)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    line = launch_lines("drop_in.py")[1]
    assert "deepspeed_configs/zero3.yaml" in line
    words = words_of(line, places)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:script]]
    command += ["--num_processes", "2", "--main_process_port", "0", str(wrapper), *words[script:], *TINY.split()]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("'cpo/gap'") == 2, "one process logs"
    folder = tmp_path / "Qwen2.5-7B-CPO"
    # Whole weights, gathered, not shards.
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(places["Qwen/Qwen2.5-7B-Instruct"])
    for (name, ours), theirs in zip(trained.named_parameters(), start.parameters(), strict=True):
        assert ours.shape == theirs.shape, name
    assert any(not torch.equal(*pair) for pair in zip(trained.parameters(), start.parameters(), strict=True))


def moved_and_error(out: str) -> tuple[float, float]:
    return tuple(map(float, re.search(r"by up to (\S+); those of the merged model are off by up to (\S+)", out).groups()))


def test_lora_and_further(run, tmp_path):
    line, _, further = launch_lines("lora.py")
    line = line.replace("1e-5", "1e-2")
    moved, error = moved_and_error(run(line, *LORA.split()))
    assert moved > 1e-2 > 1e-4 > error
    folder = tmp_path / "Qwen-LoRA"
    assert (folder / "adapter_model.safetensors").exists() and (folder / "merged" / "model.safetensors").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    # The third line leaves out what it shares with the first.
    options = line[line.index("--dataset_name") : line.index("--constraint")]
    out = run(further.replace("...", options).replace("1e-6", "1e-2"))
    # From where the first one ended.
    assert moved_and_error(out)[0] != moved > 1e-4 > moved_and_error(out)[1]
    assert (tmp_path / "Qwen-LoRA-2" / "adapter_model.safetensors").exists()


def test_qlora(run, tmp_path):
    line = launch_lines("lora.py")[1].replace("1e-5", "1e-2")
    assert "--load_in_4bit" in line
    moved, error = moved_and_error(run(line, *LORA.split()))
    # Merged into the weights that it was trained on. On some CPUs the 4-bit layers compute in bfloat16; how exact merging is
    # stands in test_adapters.py.
    assert moved > 1e-2 and error < moved / 10
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "Qwen-QLoRA" / "merged")
    assert merged.dtype == torch.float32 and not hasattr(merged.config, "quantization_config")


def test_the_slurm_script_starts_a_launcher_on_each_machine(tmp_path):
    """With srun, scontrol and accelerate played by scripts: what each machine would run."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in {
        "scontrol": 'echo "north"; echo "south"',
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] || exit 3; shift\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'printf "%s\\n" "$*"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "20001",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    command = ["bash", str(EXAMPLES / "slurm.sh"), "examples/drop_in.py", "--run_name", "two words"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    common = "launch --config_file deepspeed_configs/zero3.yaml --num_machines 2 --machine_rank {} --num_processes 8 "
    common += "--main_process_ip north --main_process_port 20001 examples/drop_in.py --run_name two words"
    assert done.stdout.splitlines() == [common.format(0), common.format(1)]
