"""An option that needs a package which is not installed ends in one line, before anything is imported."""

import tomllib

import pytest

from trl_cpo.cli import main, needs
from trl_cpo.cli.recipe_files import read_config
from trl_cpo.recipes import names

from helpers.paths import ROOT


@pytest.fixture
def nothing_installed(monkeypatch):
    """As where no optional package is installed; reading pairs would be the first thing that a run does."""
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    monkeypatch.setattr("trl_cpo.run.training.load_sets", lambda *_: pytest.fail("the run has begun"))
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["--load_in_4bit"],
            "--load_in_4bit needs bitsandbytes, which is not installed.\nInstall it: pip install 'trl-cpo[qlora]'",
        ),
        (["--load-in-8bit", "true"], "--load_in_8bit needs bitsandbytes"),
        (["--optim=paged_adamw_8bit"], "--optim paged_adamw_8bit needs bitsandbytes"),
        (["--report_to", "tensorboard"], "--report_to tensorboard needs tensorboard, which is not installed.\n"),
        (["--report_to", "tensorboard"], "Install it: pip install 'trl-cpo[tensorboard]'"),
        (["--report_to", "none", "--report_to", "wandb", "tensorboard"], "--report_to wandb needs wandb"),
        (["--report_to", "comet_ml"], "pip install comet-ml"),
        (["--deepspeed", "zero2.json"], "--deepspeed needs deepspeed"),
        (["--deepspeed", "zero2.json"], "pip install 'trl-cpo[deepspeed]'"),
        (["--config", "hh-rlhf-qlora-24gb"], "--load_in_4bit needs bitsandbytes"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(nothing_installed, capsys, arguments, said):
    assert main(["train", "--dataset_name", "p.jsonl", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("trl-cpo train: ") and said in told and len(told.splitlines()) == 2


def test_deepspeed_of_a_launcher(nothing_installed, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert main(["train", "--dataset_name", "p.jsonl"]) == 2
    assert "Accelerate's configuration with DeepSpeed needs deepspeed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, recipe",
    [
        ([], {}),
        (["--load_in_4bit", "False", "--optim", "adamw_torch_8bit", "--report_to", "none"], {}),
        (["--load_in_4bit=no"], {"load_in_4bit": True}),
        (["--report_to", "all", "--beta", "-1"], {"optim": "adamw_torch", "deepspeed": None, "load_in_8bit": False}),
    ],
)
def test_nothing_else_needs_a_package(arguments, recipe, nothing_installed):
    needs.refuse_missing(arguments, recipe)


def test_one_of_two_packages_is_enough(monkeypatch):
    monkeypatch.setattr(needs, "find_spec", lambda name: name if name == "tensorboardX" else None)
    needs.refuse_missing(["--report_to", "tensorboard"], {})


def test_the_extras_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for module, extra in needs.EXTRAS.items():
        assert any(one.startswith(module) for one in project["optional-dependencies"][extra])


@pytest.mark.parametrize("name", names())
def test_what_the_recipes_need(name):
    found = [modules for _, modules in needs.needed(read_config(name))]
    assert found == ([("bitsandbytes",)] if "qlora" in name else [])


def test_the_optimizers_that_need_bitsandbytes():
    from transformers.training_args import OptimizerNames

    found = {each.value for each in OptimizerNames if list(needs.needed({"optim": each.value}))}
    assert {"adamw_bnb_8bit", "adamw_8bit", "lion_8bit", "rmsprop_bnb", "paged_lion_32bit", "paged_adamw_8bit"} <= found
    assert not found & {"adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_torch_4bit", "adafactor", "sgd"}
