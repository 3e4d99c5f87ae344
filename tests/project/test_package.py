"""The package as a whole: import cost, import directions, the TRL that it supports, model cards, the script TRL ships."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import trl

import trl_cpo
from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo._trl.upstream import SUPPORTED_TRL

from helpers.tiny import make_model, pairs_dataset, training_options

PACKAGE = Path(trl_cpo.__file__).parent


def in_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_import_is_light():
    """Under 0.1 s (the best of five, on a machine that may be busy), and without torch, trl or transformers."""
    code = (
        "import sys, time; start = time.perf_counter(); import trl_cpo; took = time.perf_counter() - start\n"
        "print(took, [m for m in ('torch', 'trl', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    outputs = [in_fresh_process(code).split(maxsplit=1) for _ in range(5)]
    assert min(float(took) for took, _ in outputs) < 0.1
    assert all(heavy.strip() == "[]" for _, heavy in outputs)


def test_public_names():
    code = (
        "import trl; from trl_cpo import CPOConstrainedTrainer, CPOConstrainedConfig\n"
        "print(issubclass(CPOConstrainedTrainer, trl.DPOTrainer), issubclass(CPOConstrainedConfig, trl.DPOConfig))"
    )
    assert in_fresh_process(code).strip() == "True True"
    assert set(trl_cpo.__all__) <= set(dir(trl_cpo))
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = trl_cpo.nothing_here


def test_constraints_know_neither_each_other_nor_config_nor_trl():
    for path in (PACKAGE / "constraints").glob("*.py"):
        if path.name != "__init__.py":
            text = path.read_text()
            modules = set(re.findall(r"^from (\S+) import", text, re.M)) | set(re.findall(r"^import (\S+)", text, re.M))
            own = {".base", ".dual_rule", "..hyperparameters", "..pairs"}
            assert modules <= own | {"torch", "dataclasses", "math", "typing"}, path.name


def test_packaging_and_seam_agree_on_trl():
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    bounds = re.search(r'"trl([<>=][^"]+)"', text).group(1)
    assert set(bounds.split(",")) == set(str(SUPPORTED_TRL).split(","))


def test_model_card_cites_the_constrained_paper(tmp_path, tokenizer):
    trainer = CPOConstrainedTrainer(
        model=make_model(),
        ref_model=make_model(1),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
        args=CPOConstrainedConfig(**training_options(tmp_path), constraint="clip"),
    )
    trainer.create_model_card(model_name="m")
    card = (tmp_path / "README.md").read_text()
    assert "2605.20834" in card and "Conditional Equivalence of DPO and RLHF" in card
    assert "Zhiqin Yang" in card and "Constrained Preference Optimization" in card
    assert "2401.08417" not in card and "ontrastive" not in card
    tags = set(re.findall(r"^- (\S+)$", card, re.M))
    assert {"trl", "dpo", "trl-cpo", "constrained-preference-optimization"} <= tags and "cpo" not in tags


def test_the_script_that_trl_installs_runs_with_three_words_changed(tmp_path, model_folder):
    """The import and the two names, in TRL's own file as it is installed."""
    source = (Path(trl.__file__).parent / "scripts" / "dpo.py").read_text()
    for old, new in (("DPOTrainer", "CPOConstrainedTrainer"), ("DPOConfig", "CPOConstrainedConfig")):
        source, count = re.subn(
            rf"from trl import (.*?)\b{old}, ", rf"from trl_cpo import {new}\n    from trl import \1", source
        )
        assert count == 1
        source = source.replace(old, new)
    script = tmp_path / "dpo.py"
    script.write_text(source)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        pairs_dataset(8).to_json(data / f"{split}.jsonl")
    options = [
        "--dataset_name",
        str(data),
        "--model_name_or_path",
        model_folder,
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
        "--bf16",
        "False",
        "--dtype",
        "float32",
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
        "--report_to",
        "none",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--constraint",
        "clip",
        "--use_peft",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
    ]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cpo/gap" in done.stdout and "eval_cpo/gap" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "2605.20834" in (tmp_path / "out" / "README.md").read_text()
