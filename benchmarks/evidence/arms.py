"""The trainings that are compared: the package's forms through its trainer, TRL's own losses through the same or TRL's."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

#: Of the adapters that a training has where it has any.
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def device() -> torch.device:
    """Where models train and are measured: the GPU, if there is one (hide it with CUDA_VISIBLE_DEVICES="")."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Measured(TrainerCallback):
    """Calls `measure(step, model)` after some steps."""

    def __init__(self, steps: Sequence[int], measure: Callable[[int, Any], None]):
        self.steps, self.measure = steps, measure

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            model.eval()
            self.measure(state.global_step, model)
            model.train()


def train(
    settings: dict[str, Any],
    reference: str,
    tokenizer,
    rows: list[dict[str, Any]],
    *,
    batch: int,
    learning_rate: float,
    steps: Sequence[int],
    seed: int,
    measure: Callable[[int, Any], None],
    lora: bool = False,
) -> None:
    """Trains a copy of the reference on pairs, at a constant rate: what is measured after n steps is what a run of n gives.

    In float32. With `lora`, adapters on all linear layers are trained, else every weight.
    """
    with tempfile.TemporaryDirectory() as folder:
        usual = {
            "output_dir": folder,
            "per_device_train_batch_size": batch,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "constant",
            "max_steps": max(steps),
            "seed": seed,
            "save_strategy": "no",
            "logging_steps": max(steps),
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": device().type == "cpu",
            "bf16": False,
            "gradient_checkpointing": False,
            "beta": settings["beta"],
        }
        model = AutoModelForCausalLM.from_pretrained(reference)
        given = {"model": model, "processing_class": tokenizer, "callbacks": [_Measured(steps, measure)]}
        given["peft_config"] = LoraConfig(**LORA) if lora else None
        trainer = _simpo if settings.get("trainer") == "simpo" else _ours
        trainer(settings, usual, given, Dataset.from_list(rows)).train()


def _ours(settings: dict[str, Any], usual: dict[str, Any], given: dict[str, Any], rows: Dataset):
    """The package's trainer; with constraint "none" it is TRL's DPOTrainer, bit for bit."""
    from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

    # Faster, and the same up to rounding: the reference scored once; pairs packed. In float32 a GPU packs by segments, which
    # for answers as short as these starts more kernels than padding costs.
    same = {"precompute_ref_log_probs": True, "prefix_sharing": device().type == "cpu"}
    fields = {name: value for name, value in settings.items() if name != "trainer"}
    return CPOConstrainedTrainer(args=CPOConstrainedConfig(**{**usual, **same, **fields}), train_dataset=rows, **given)


def _simpo(settings: dict[str, Any], usual: dict[str, Any], given: dict[str, Any], rows: Dataset):
    """TRL's SimPO, which has no reference."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    fields = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": settings["margin"]}
    return CPOTrainer(args=CPOConfig(**usual, **fields), train_dataset=rows, **given)
