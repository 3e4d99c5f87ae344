"""Interrupted and resumed training is uninterrupted training: whole checkpoints, and all that a resume would lose."""

import json
import os
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors.torch import load_model, save_model
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from . import _trl, checkpoints

#: Options that a run's numbers depend on. Where one was changed, the resumed run is not the interrupted one.
SETTINGS = (
    "constraint", "gamma", "tau", "alpha", "penalty_weight", "epsilon", "dual_lr", "dual_max", "dual_warmup_steps",
    "dual_signal", "logps_reduction", "beta", "loss_type", "max_length", "learning_rate", "lr_scheduler_type", "optim",
    "max_grad_norm", "weight_decay", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed",
    "balance_tokens", "tokens_per_step",
)  # fmt: skip

_REFERENCE_FILE = "synchronised_reference.safetensors"


class Resumption(TrainerCallback):
    """Writes a trainer's checkpoints, and restores what transformers and TRL lose between one and the next `train`.

    That is: the loss, the metrics and the tokens counted since the last log; what the final summary is made of; the dual
    state; a reference that `sync_ref_model` moves. Everything else transformers restores.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self._state: dict[str, Any] | None = None
        self._folder: Path | None = None
        self._begun = 0.0
        self._put_off = False
        #: Seconds of training before this call of `train`, of the run that is resumed.
        self.earlier_seconds = 0.0

    # Before training

    def prepare(self, given: str | bool | None) -> str | None:
        """The checkpoint to resume from, looked at before the model is touched; None to train from the start.

        `True` asks for the newest whole one of the run.

        Raises:
            CheckpointError: it is not whole, or there is none, on one of the processes at least.
            ValueError: the dual state in it cannot be taken up.
        """
        self._state = self._folder = None
        if given is None or given is False:
            return None
        run_dir = self._trainer.args.output_dir
        # Of its own folder alone: in another one, a run may be writing.
        self._once_a_machine(lambda: checkpoints.settle(run_dir))
        if given is True:
            # Of disks that machines do not share, one may have a checkpoint that another was killed before it had.
            steps = set.intersection(*map(set, gather_object([list(checkpoints.whole_checkpoints(run_dir))])))
            if not steps:
                raise checkpoints.CheckpointError(
                    f"There is no whole checkpoint in {run_dir} to resume from. Set output_dir to the folder of the run, or "
                    "call train() without resume_from_checkpoint to start from the beginning."
                )
            given = os.path.join(run_dir, f"checkpoint-{max(steps)}")
        fault = next(filter(None, gather_object([checkpoints.fault_of(given)])), None)
        if fault is not None:
            raise checkpoints.refusal(given, fault)
        self._folder, self._state = Path(given), checkpoints.read_state(given)
        if self._dual is not None and self._state is not None and self._state["dual"] is not None:
            self._dual.load_state_dict(self._state["dual"])
        if self._trainer.args.process_index == 0:
            for note in self._cautions():
                warnings.warn(f"Resuming from {given}: {note}", stacklevel=3)
        return str(given)

    def _cautions(self) -> list[str]:
        state, notes = self._state, []
        if state is None:
            lost = "the loss, the metrics and num_tokens counted since its last log, and train_loss, start from zero"
            if self._dual is not None:
                lost += ", and the multiplier from dual_init"
            return [f"it was not written by trl-cpo. {lost[0].upper()}{lost[1:]}, as they do in TRL."]
        if not (self._folder / "scheduler.pt").exists() and not (self._folder / "latest").exists():
            notes.append("it holds weights alone (save_only_model). The optimizer and the schedule start anew.")
        now = self._settings()
        differ = [(name, was, now[name]) for name, was in state["settings"].items() if now.get(name, was) != was]
        changed = [f"{name} was {was!r} and is {given!r}" for name, was, given in differ]
        if changed:
            notes.append(f"{'; '.join(changed)}. Training goes on under the new settings; it is another run than before.")
        if self._dual is not None and state["dual"] is None:
            notes.append("it holds no multiplier, which starts from dual_init.")
        elif self._dual is None and state["dual"] is not None:
            notes.append(f"the multiplier in it ({state['dual']['multiplier']:g}) is not used.")
        if self._syncs_reference and not (self._folder / _REFERENCE_FILE).exists():
            notes.append("it holds no reference. The synchronised reference starts from the one given.")
        return notes

    def on_train_begin(self, args, state, control, **kwargs):
        """Restores the counters, which training has just set to zero, from the checkpoint."""
        self._begun, self.earlier_seconds, self._put_off = time.time(), 0.0, False
        trainer, saved = self._trainer, self._state
        trainer._ledgers["train"].clear()
        if saved is None:
            return
        _trl.load_loop_state(trainer, saved["processes"])
        self.earlier_seconds = saved["seconds"]
        trainer._ledgers["train"].load_state_dict(saved["metrics"])
        if self._dual is not None and saved["dual"] is not None:
            self._dual.load_state_dict(saved["dual"])
        if self._syncs_reference and (self._folder / _REFERENCE_FILE).exists():
            load_model(trainer.accelerator.unwrap_model(trainer.ref_model), self._folder / _REFERENCE_FILE)

    # While training

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Tells the data loader of a resumed epoch what the whole epoch's would know: how many pairs its last batch has.

        Accelerate's `skip_first_batches` loses that number, by which some of TRL's metrics leave repeated pairs out.
        """
        active = self._trainer.accelerator.gradient_state.active_dataloader
        if self._state is None or active is None or active is train_dataloader or active.remainder != -1:
            return
        with suppress(AttributeError, TypeError):  # a stream has no length
            if not train_dataloader._drop_last:
                active.remainder = len(train_dataloader.dataset) % train_dataloader.total_batch_size

    def on_step_end(self, args, state, control, **kwargs):
        """Puts a checkpoint of an epoch's last step off until the epoch's own log and evaluation are in it."""
        epoch_ends = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        if control.should_save and epoch_ends and IntervalStrategy.EPOCH in (args.logging_strategy, args.eval_strategy):
            control.should_save, self._put_off = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._put_off:
            control.should_save, self._put_off = True, False

    def save(self, save: Callable[[], None], trial: Any) -> None:
        """Has `save` write a checkpoint, adds what it lacks, and moves it into place once it is whole and on the disk."""
        trainer, args = self._trainer, self._trainer.args
        run_dir, name = _trl.run_dir(trainer, trial), f"checkpoint-{trainer.state.global_step}"
        final, staged = os.path.join(run_dir, name), checkpoints.staging(run_dir) / name
        self._once_a_machine(lambda: checkpoints.settle(run_dir))
        with _trl.saving_into(trainer, str(checkpoints.staging(run_dir))):
            save()
        states = gather_object([_trl.loop_state(trainer)])  # also waits until every process has written
        trainer.accelerator.wait_for_everyone()
        self._name_the_best(run_dir, staged)
        if args.should_save:
            if self._syncs_reference:
                save_model(trainer.accelerator.unwrap_model(trainer.ref_model), str(staged / _REFERENCE_FILE))
            checkpoints.write_state(
                staged,
                {
                    "format": 1,
                    "settings": self._settings(),
                    "dual": None if self._dual is None else self._dual.state_dict(),
                    "metrics": trainer._ledgers["train"].state_dict(),
                    "seconds": self.earlier_seconds + time.time() - self._begun,
                    "processes": states,
                },
            )
        self._once_a_machine(lambda: checkpoints.sync(staged))
        # Machines that share the disk find nothing left to move; those with disks of their own move their own files.
        if trainer.accelerator.is_main_process:
            checkpoints.publish(run_dir, name)
        trainer.accelerator.wait_for_everyone()
        self._once_a_machine(lambda: _publish_if_staged(run_dir, name))
        if args.push_to_hub:
            _trl.push_checkpoint(trainer, final)
        if args.should_save:
            for surplus in checkpoints.surplus(run_dir, args.save_total_limit, trainer.state.best_model_checkpoint):
                checkpoints.remove(surplus)

    def _name_the_best(self, run_dir: str, staged: Path) -> None:
        """Has the state, in memory and in the checkpoint, name the best checkpoint where it will be."""
        state = self._trainer.state
        if not state.best_global_step:
            return
        best = os.path.join(run_dir, f"checkpoint-{state.best_global_step}")
        if state.best_global_step == state.global_step or os.path.isdir(best):
            state.best_model_checkpoint = best
        if self._trainer.args.should_save:
            state.save_to_json(str(staged / checkpoints.TRAINER_STATE_FILE))

    @property
    def _dual(self):
        return self._trainer._dual

    @property
    def _syncs_reference(self) -> bool:
        # Of sharded weights no process has them all.
        sharded = self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled
        return self._trainer.args.sync_ref_model and not sharded

    def _settings(self) -> dict[str, Any]:
        every = json.loads(json.dumps(self._trainer.args.to_dict(), default=str))
        settings = {name: every[name] for name in SETTINGS if name in every}
        return {**settings, "processes": self._trainer.accelerator.num_processes}

    def _once_a_machine(self, action: Callable[[], Any]) -> None:
        if self._trainer.accelerator.is_local_main_process:
            action()
        self._trainer.accelerator.wait_for_everyone()


def _publish_if_staged(run_dir: str, name: str) -> None:
    if (checkpoints.staging(run_dir) / name).is_dir():
        with suppress(checkpoints.NotStaged):  # what this machine remembered of the disk was old
            checkpoints.publish(run_dir, name)
