"""Every snippet of the README is run here, on stand-ins for what it would download."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import datasets
import pytest

from helpers.paths import ROOT
from helpers.tiny import hh_rows, pairs_dataset

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.strip().splitlines()]
TINY = ["--use_cpu", "--bf16", "False", "--max_steps", "1", "--max_length", "128", "--lora_target_modules"]
TINY += ["q_proj", "v_proj"]


def shell(command, cwd, **environment):
    done = subprocess.run(
        command,
        shell=True,
        executable="/bin/bash",
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **environment},
    )
    if done.returncode:
        pytest.fail(f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def test_nothing_in_the_readme_is_left_out():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "text"}
    assert len(PYTHON) == 2 and len(COMMANDS) == 5
    assert not re.search(r"@@|TBD", TEXT)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # a user's CPU, TRL's default
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python(number, tmp_path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pairs_dataset(8, conversational=True))
    code, count = re.subn(r'"Qwen/Qwen2.5-0.5B-Instruct"', repr(model_folder), PYTHON[number])
    assert count == 1
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    logs = scope["trainer"].state.log_history
    assert scope["trainer"].state.global_step > 0 and logs
    assert scope["trainer"].args.constraint != "none"


@pytest.mark.slow(75)
def test_the_demo(tmp_path, demo_cache):
    """The README's first command, cut to one step, from another folder."""
    command = COMMANDS[0].replace("run.sh", shlex.quote(str(ROOT / "run.sh")))
    assert command != COMMANDS[0]
    out = shell(
        f"{command} --max_steps 1 --max_train_pairs 4 --max_test_pairs 6 --per_device_train_batch_size 2"
        " --price_prompts 2 --price_tokens 8",
        # Two threads beside another test process on two cores would wait for each other most of the time.
        tmp_path,
        NO_INSTALL="1",
        VENV=sys.prefix,
        TRL_CPO_CACHE=demo_cache,
        THREADS="1",
    )
    assert "6 held-out pairs" in out
    (metrics,) = tmp_path.glob("outputs/*/metrics.json")
    record = json.loads(metrics.read_text())
    assert record["model"] == record["pairs"]["dataset_name"] == "demo"
    # The start is far from right: of the first six messages some are misaligned.
    assert record["before"]["eval_cpo/reference_misaligned"] > 0
    assert record["decisions"]["before"]["rows"] == record["decisions"]["after"]["rows"] == 6


@pytest.mark.slow(25)
def test_the_test_command(tmp_path):
    assert COMMANDS[1] == "bash run.sh test"
    out = shell(f"{COMMANDS[1]} tests/test_constraints.py -k golden", ROOT, NO_INSTALL="1", VENV=sys.prefix)
    assert "passed" in out
    out = shell(
        f"{COMMANDS[1]} --slow tests/engine tests/test_constraints.py --collect-only -n 0",
        ROOT,
        NO_INSTALL="1",
        VENV=sys.prefix,
    )
    assert "test_scaling.py" in out and "test_constraints.py" not in out
    # The longest first, by the seconds of their marks.
    places = [out.index(name) for name in ("test_qlora_trains", "[zero3]", "[fsdp2]", "[zero1]", "test_a_compiled_model")]
    assert places == sorted(places)
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text()


def test_the_install_command():
    """It is how the environment of these tests was made, or they would not see this folder."""
    assert COMMANDS[2] == "pip install -e ."
    # The folder's own egg-info is found as well, and does not say how it was installed.
    (origin,) = filter(None, (found.read_text("direct_url.json") for found in distributions(name="trl-cpo")))
    origin = json.loads(origin)
    assert origin["dir_info"]["editable"] and origin["url"] == ROOT.as_uri()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS[3:])
def test_the_script(command, tmp_path, model_folder):
    assert "examples/hh_rlhf.py" in command
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in hh_rows(10, 0)))
    tiny = shlex.join([*TINY, "--model_name_or_path", model_folder, "--dataset_name", str(data)])
    out = shell(f"{command.replace('examples/', str(ROOT / 'examples') + '/')} {tiny}", tmp_path)
    assert "1 held-out pairs" in out


def test_tables_name_what_the_code_names():
    from trl_cpo import CPOConstrainedConfig
    from trl_cpo.constraints import CONSTRAINTS
    from trl_cpo.metrics import METRICS

    constraints_doc = (ROOT / "docs" / "constraints.md").read_text()
    for name in CONSTRAINTS:
        assert f"| `{name}` |" in TEXT and f"| `{name}` |" in constraints_doc
    for name in METRICS:
        assert f"`cpo/{name}`" in TEXT
    for name in ("gamma", "tau", "alpha", "penalty_weight", "logps_reduction"):
        default = CPOConstrainedConfig.__dataclass_fields__[name].default
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        assert f"| `{name}` | {f'`{shown}`' if isinstance(default, str) else shown} |" in TEXT, name
