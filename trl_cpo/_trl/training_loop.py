"""What the training loop counts and where it saves, as transformers and TRL keep them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trl import DPOTrainer


def run_folder(trainer: DPOTrainer, trial: Any = None) -> str:
    """The folder of a run's checkpoints: `args.output_dir`, or a trial's folder in it."""
    return trainer._get_output_dir(trial)


@contextmanager
def saving_into(trainer: DPOTrainer, folder: str) -> Iterator[None]:
    """Has `_save_checkpoint` write into `folder` in place of the run's own, and push nothing to the hub."""
    trainer._get_output_dir = lambda trial: folder
    trainer._push_from_checkpoint = lambda checkpoint: None
    try:
        yield
    finally:
        del trainer._get_output_dir, trainer._push_from_checkpoint


@contextmanager
def saving_weights_on_each_node(trainer: DPOTrainer) -> Iterator[None]:
    """Has a model that is whole on every process write its weights wherever `args.save_on_each_node` asks for them.

    `save_pretrained` leaves them out on all processes but the very first, and writes the rest.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if sharded or not trainer.args.save_on_each_node or not hasattr(model, "should_save_on_this_rank"):
        yield
        return
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def push_checkpoint(trainer: DPOTrainer, folder: str) -> None:
    """Uploads a checkpoint as `args.hub_strategy` says."""
    trainer._push_from_checkpoint(folder)


def loop_state(trainer: DPOTrainer) -> dict[str, Any]:
    """What training has counted on this process and no checkpoint of transformers or TRL holds, as exact plain numbers."""
    return {
        "loss": trainer._tr_loss.item(),
        "loss_logged": trainer._total_loss_scalar,
        "last_logged_step": trainer._globalstep_last_logged,
        "first_step": trainer._initial_global_step,
        "tokens": trainer._total_train_tokens,
        "training": trainer.model.training,
        "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
    }


def load_loop_state(trainer: DPOTrainer, states: Sequence[dict[str, Any]]) -> None:
    """Takes up what `loop_state` gave on each of the processes, once training has set its counters to zero.

    With another number of processes than there were, each takes the mean of the losses and the first one's metrics.
    """
    index, same = trainer.accelerator.process_index, len(states) == trainer.accelerator.num_processes
    mine = states[index if same else 0]
    losses = [mine["loss"]] if same else [state["loss"] for state in states]
    trainer._tr_loss.fill_(sum(losses) / len(losses))
    trainer._total_loss_scalar = mine["loss_logged"]
    trainer._globalstep_last_logged = mine["last_logged_step"]
    trainer._initial_global_step = mine["first_step"]
    trainer._total_train_tokens = mine["tokens"]
    # Which metrics are logged goes by the model's mode, which no step sets where none is left to train.
    trainer.model.train(mine["training"])
    trainer._metrics["train"].clear()
    trainer._metrics["train"].update({name: list(values) for name, values in mine["metrics"].items()})
