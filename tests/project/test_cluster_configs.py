"""The files of deepspeed_configs/, read by the libraries they are for. test_scaling.py trains with them."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

from helpers.paths import ROOT
from helpers.tiny import make_model

FOLDER = ROOT / "deepspeed_configs"
JSON = sorted(path.name for path in FOLDER.glob("*.json"))
YAML = sorted(path.name for path in FOLDER.glob("*.yaml"))


def test_the_folder_is_whole():
    stages = ["zero1", "zero2", "zero3", "zero3_offload"]
    assert [f"{name}.json" for name in stages] == JSON
    assert sorted(f"{name}.yaml" for name in ["ddp", "fsdp2", *stages]) == YAML
    text = (FOLDER / "README.md").read_text()
    for name in JSON + YAML:
        assert f"`{name}`" in text, name


def written(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


def launched_with(name: str) -> tuple[object, dict[str, str]]:
    """What accelerate launch makes of a file: its options, and the environment of the processes."""
    with patch.dict("os.environ"):
        options = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "train.py"])
        options, _, _ = _validate_launch_command(options)
        if options.use_deepspeed:
            # As `launch_command` does: what was read from the file.
            options.deepspeed_fields_from_accelerate_config = ",".join(written(name).get("deepspeed_config", {}))
            _, environment = prepare_deepspeed_cmd_env(options)
        else:
            environment = prepare_multi_gpu_env(options)
    return options, environment


# Another test, in a process of its own, may be using the default port.
@pytest.mark.filterwarnings("ignore:Port .* is already in use")
@pytest.mark.parametrize("name", YAML)
def test_accelerate_reads_every_key(name):
    """Accelerate refuses unknown keys at the top; inside `deepspeed_config` and `fsdp_config` it takes any."""
    assert isinstance(load_config_from_file(str(FOLDER / name)), ClusterConfig)
    options, environment = launched_with(name)
    for part in ("deepspeed_config", "fsdp_config"):
        for key, value in written(name).get(part, {}).items():
            assert getattr(options, key) == value
            known = {action.dest for action in launch_command_parser()._actions}
            assert key in known, key
    # What the trainer decides is not decided here.
    assert options.mixed_precision == environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "deepspeed_config_file" not in str(written(name)), "nothing names a file, so that it works from every folder"
    expected = {"ddp": (True, False, False), "fsdp2": (False, True, False)}.get(Path(name).stem, (False, False, True))
    assert (bool(options.multi_gpu), bool(options.use_fsdp), bool(options.use_deepspeed)) == expected


def test_fsdp2_is_version_two():
    _, environment = launched_with("fsdp2.yaml")
    assert environment["FSDP_VERSION"] == "2" and environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.fixture
def forgotten():
    """transformers keeps the latest DeepSpeed configuration for the whole process."""
    yield
    unset_hf_deepspeed_config()


def arguments(**more) -> SimpleNamespace:
    return SimpleNamespace(
        world_size=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        max_grad_norm=0.7,
        learning_rate=1e-6,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        save_on_each_node=False,
        fp16=False,
        fp16_full_eval=False,
        bf16=True,
        bf16_full_eval=False,
        get_warmup_steps=lambda steps: 0,
        **more,
    )


@pytest.mark.parametrize("name", JSON)
def test_the_trainer_fills_in_every_auto_and_deepspeed_takes_it(name, forgotten):
    from deepspeed.runtime.config import DeepSpeedConfig

    written = json.loads((FOLDER / name).read_text())
    config = HfTrainerDeepSpeedConfig(str(FOLDER / name))
    config.trainer_config_process(arguments())
    config.trainer_config_finalize(arguments(), make_model(), num_training_steps=10)
    filled = config.config
    assert '"auto"' in json.dumps(written) and '"auto"' not in json.dumps(filled)
    assert filled["train_batch_size"] == 30 and filled["gradient_clipping"] == 0.7 and filled["bf16"]["enabled"] is True
    assert filled["zero_optimization"]["reduce_bucket_size"] == 32 * 32
    # DeepSpeed refuses keys that it does not know. Without a process group it counts one process.
    read = DeepSpeedConfig({**filled, "train_batch_size": 15})
    assert read.zero_config.stage == int(name[4])


@pytest.mark.parametrize("name", JSON)
def test_the_yaml_file_means_what_the_json_file_means(name, forgotten):
    """Stage, offload, gathering, and what is left to the trainer; buckets are sized by the JSON files alone."""
    _, environment = launched_with(name.replace(".json", ".yaml"))
    with patch.dict("os.environ", environment):
        ours = DeepSpeedPlugin().deepspeed_config
    theirs = json.loads((FOLDER / name).read_text())
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"):
        assert ours[key] == theirs[key] == "auto"

    def device(config, what):
        return config["zero_optimization"].get(what, {}).get("device", "none")

    for what in ("offload_optimizer", "offload_param"):
        assert device(ours, what) == device(theirs, what) == ("cpu" if "offload" in name else "none")
    ours, theirs = ours["zero_optimization"], theirs["zero_optimization"]
    assert ours["stage"] == theirs["stage"] == int(name[4])
    key = "stage3_gather_16bit_weights_on_model_save"
    assert ours[key] == theirs.get(key, False) == ("zero3" in name)
