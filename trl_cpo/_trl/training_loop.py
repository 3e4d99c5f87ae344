"""The training loop's counters and save locations, as transformers and TRL keep them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trl import DPOTrainer


def run_folder(trainer: DPOTrainer, trial: Any = None) -> str:
    """The folder of a run's checkpoints: `args.output_dir`, or a trial's folder in it."""
    return trainer._get_output_dir(trial)


@contextmanager
def saving_into(trainer: DPOTrainer, folder: str) -> Iterator[None]:
    """Within the block, `_save_checkpoint` writes into `folder` instead of the run's folder and pushes nothing."""
    trainer._get_output_dir = lambda trial: folder
    trainer._push_from_checkpoint = lambda checkpoint: None
    try:
        yield
    finally:
        del trainer._get_output_dir, trainer._push_from_checkpoint


@contextmanager
def saving_weights_on_each_node(trainer: DPOTrainer) -> Iterator[None]:
    """Within the block, an unsharded model saves its weights on every node if `args.save_on_each_node` asks for that.

    By default `save_pretrained` writes the weights on the very first process only, and everything else on each node.
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
    """Uploads a checkpoint according to `args.hub_strategy`."""
    trainer._push_from_checkpoint(folder)


def loop_state(trainer: DPOTrainer) -> dict[str, Any]:
    """This process's counters that no checkpoint of transformers or TRL contains, as exact plain numbers."""
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
    """Restores the counters saved by `loop_state` on each process; call it after training has zeroed them.

    If the number of processes has changed, every process takes the mean of the losses and process 0's metrics.
    """
    index, same = trainer.accelerator.process_index, len(states) == trainer.accelerator.num_processes
    mine = states[index if same else 0]
    losses = [mine["loss"]] if same else [state["loss"] for state in states]
    trainer._tr_loss.fill_(sum(losses) / len(losses))
    trainer._total_loss_scalar = mine["loss_logged"]
    trainer._globalstep_last_logged = mine["last_logged_step"]
    trainer._initial_global_step = mine["first_step"]
    trainer._total_train_tokens = mine["tokens"]
    # The model's mode decides which metrics are logged. If no step is left to train, nothing else sets it.
    trainer.model.train(mine["training"])
    trainer._metrics["train"].clear()
    trainer._metrics["train"].update({name: list(values) for name, values in mine["metrics"].items()})
