"""Interrupted and resumed training is uninterrupted training: whole checkpoints, and all that a resume would lose."""

import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import trl
from accelerate.utils import gather_object
from safetensors.torch import load_model, save_model
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length

from ..._trl.training_loop import load_loop_state, loop_state, push_checkpoint, run_folder, saving_into
from . import checkpoints
from .settings import data_facts, settings_of

_REFERENCE_FILE = "synchronised_reference.safetensors"


#: What a checkpoint's state file holds by itself; every other key is something stateful.
_OWN_KEYS = {
    "format",
    "run",
    "order",
    "evaluations_without_gain",
    "settings",
    "data",
    "stream",
    "seconds",
    "processes",
    "files",
}


class Stateful(Protocol):
    """Something that counts while training, and that a resumed training takes up where it was."""

    #: What happens to it where a checkpoint does not hold it, in words for a warning; empty to say nothing.
    starts_anew: str

    def begin(self) -> None:
        """Start of training: drop what a run interrupted mid-step left."""

    def reset(self) -> None:
        """Back to the start of a run."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next step or log depends on, as plain numbers that JSON holds exactly."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave. Raises `ValueError` where that cannot be."""


class Resumption(TrainerCallback):
    """Writes a trainer's checkpoints, and restores what transformers and TRL lose between one and the next `train`.

    That is: the loss, the metrics and the tokens counted since the last log; what the final summary is made of; a reference
    that `sync_ref_model` moves; and what the trainer's `stateful` gives. Everything else transformers restores.
    """

    def __init__(self, trainer: trl.DPOTrainer, stateful: Mapping[str, "Stateful"]):
        self._trainer = trainer
        self._stateful = dict(stateful)
        self._state: dict[str, Any] | None = None
        self._folder: Path | None = None
        self._begun = 0.0
        self._postponed = self._within_epoch = False
        self._run: str | None = None
        self._data: tuple[Any, dict[str, Any] | None] | None = None
        self._stopped_early = False
        #: Seconds of training before this call of `train`, of the run that is resumed.
        self.earlier_seconds = 0.0

    # Before training

    def prepare(self, given: str | bool | None) -> str | None:
        """The checkpoint to resume from, looked at before the model is touched; None to train from the start.

        `True`, or the word "latest" or "true" where no folder has that name, asks for the newest whole one of the run.

        Raises:
            CheckpointError: it is not whole, there is none, or it is another one, on one of the processes at least.
            ValueError: something of `stateful` in it cannot be taken up.
        """
        self._state = self._folder = None
        if given is None or given is False:
            return None
        if str(given).lower() in ("latest", "true") and (given is True or not os.path.isdir(given)):
            given = True
        run_dir = self._trainer.args.output_dir
        # Of its own folder alone: in another one, a run may be writing.
        self._once_per_machine(lambda: checkpoints.clean_up(run_dir))
        if given is True:
            newest = newest_everywhere(run_dir)
            if newest is None:
                raise checkpoints.CheckpointError(
                    f"There is no whole checkpoint in {run_dir} to resume from. Set output_dir to the folder of the run, or "
                    "call train() without resume_from_checkpoint to start from the beginning."
                )
            given = str(newest)
        found = gather_object([(given, checkpoints.fault_of(given), checkpoints.step_of(given))])
        for folder, fault, _ in found:
            if fault is not None:
                raise checkpoints.refusal(folder, fault)
        if len({step for *_, step in found}) > 1:
            chosen = "; ".join(f"process {rank}: {folder} (step {step})" for rank, (folder, _, step) in enumerate(found))
            raise checkpoints.CheckpointError(
                f"The processes would resume from different steps. {chosen}. Give all the checkpoint of one step, or "
                "resume_from_checkpoint=True for the newest that all of them have."
            )
        self._folder, self._state = Path(given), checkpoints.read_state(given)
        # Also said now, before the model is touched, where one of these cannot be taken up.
        self._load_stateful()
        if self._trainer.args.process_index == 0:
            for note in self._cautions():
                warnings.warn(f"Resuming from {given}: {note}", stacklevel=3)
        return str(given)

    def _cautions(self) -> list[str]:
        state, notes = self._state, []
        if state is None:
            lost = "the loss, the metrics and num_tokens counted since its last log, and train_loss, start from zero"
            lost += "".join(f", and {own.starts_anew}" for own in self._stateful.values() if own.starts_anew)
            return [f"it was not written by trl-cpo. {lost[0].upper()}{lost[1:]}, as they do in TRL."]
        if not (self._folder / "scheduler.pt").exists() and not (self._folder / "latest").exists():
            notes.append("it holds weights alone (save_only_model). The optimizer and the schedule start anew.")
        now = self._settings()
        differ = [(name, was, now[name]) for name, was in state["settings"].items() if now.get(name, was) != was]
        data = self._data_facts() if state.get("data") else state.get("data")
        if data != state.get("data"):
            notes.append(
                f"the training pairs are not those that it was trained on ({state['data']['pairs']} then, {data['pairs']} "
                "now, or other texts, or in another order). It is another run than before."
            )
        changed = [f"{name} was {was!r} and is {given!r}" for name, was, given in differ]
        if changed:
            notes.append(f"{'; '.join(changed)}. Training goes on under the new settings; it is another run than before.")
        for name, own in self._stateful.items():
            if state.get(name) is None and own.starts_anew:
                notes.append(f"it holds no {name} state: {own.starts_anew}.")
                own.reset()
        for name in sorted(state.keys() - _OWN_KEYS - self._stateful.keys()):
            if state[name] is not None:
                notes.append(f"the {name} state in it is not used.")
        if self._syncs_reference and not (self._folder / _REFERENCE_FILE).exists():
            notes.append("it holds no reference. The synchronised reference starts from the one given.")
        return notes

    def on_train_begin(self, args, state, control, **kwargs):
        """Restores the counters, which training has just set to zero, from the checkpoint."""
        self._begun, self.earlier_seconds = time.time(), 0.0
        self._postponed = self._within_epoch = self._stopped_early = False
        trainer, saved = self._trainer, self._state
        for own in self._stateful.values():
            own.begin()
        self._run = (saved or {}).get("run") or gather_object([uuid.uuid4().hex])[0]
        if saved is None:
            saves = args.save_strategy != SaveStrategy.NO or args.enable_jit_checkpoint
            if self._folder is None and args.process_index == 0 and saves:
                self._warn_of_an_earlier_run(args.output_dir)
            return
        load_loop_state(trainer, saved["processes"])
        self.earlier_seconds = saved["seconds"]
        counts = saved.get("evaluations_without_gain", [])
        for stop, count in zip(self._early_stops(), counts, strict=False):
            # transformers restores it only with all callbacks (restore_callback_states_from_checkpoint).
            stop.early_stopping_patience_counter = count
            self._stopped_early |= count >= stop.early_stopping_patience
        self._load_stateful()
        if self._syncs_reference and (self._folder / _REFERENCE_FILE).exists():
            load_model(trainer.accelerator.unwrap_model(trainer.ref_model), self._folder / _REFERENCE_FILE)

    @staticmethod
    def _warn_of_an_earlier_run(run_dir: str) -> None:
        newest = checkpoints.newest_checkpoint(run_dir)
        if newest is not None:
            warnings.warn(
                f"{run_dir} holds checkpoints of an earlier run (the newest is {newest.name}), and this one starts from the "
                "beginning. It replaces those of its own steps, and save_total_limit counts the others. Use another "
                "output_dir to keep them, or train(resume_from_checkpoint=True) to go on with them.",
                stacklevel=2,
            )

    def is_over(self) -> bool:
        """Whether there is nothing left to train: the last step was made, or the resumed run had stopped early."""
        state = self._trainer.state
        return self._stopped_early or state.global_step >= state.max_steps

    def _early_stops(self) -> list[EarlyStoppingCallback]:
        return [each for each in self._trainer.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]

    def place_in_stream(self, epochs: int, batches: int) -> tuple[int, int]:
        """Where a resumed training begins, as passes gone through and batches to skip, given what transformers says.

        Of a stream that has no length, transformers counts all batches so far as those of a first pass.
        """
        place = None if self._state is None else self._state.get("stream")
        return (epochs, batches) if place is None or self._trainer.args.ignore_data_skip else tuple(place)

    def _stream_place(self) -> tuple[int, int] | None:
        trainer, state = self._trainer, self._trainer.state
        if has_length(trainer.train_dataset) or not state.epoch:
            return None
        # A step is made within a pass, so that no batch of it is not one of the next.
        passes = max(math.ceil(state.epoch) - 1, 0)
        of_a_pass = state.max_steps * trainer.args.gradient_accumulation_steps
        return passes, round((state.epoch - passes) * of_a_pass)

    # While training

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Tells the data loader of a resumed epoch what the whole epoch's would know: how many pairs its last batch has.

        Accelerate's `skip_first_batches` loses that number, by which some of TRL's metrics leave repeated pairs out.
        """
        self._within_epoch = True
        active = self._trainer.accelerator.gradient_state.active_dataloader
        if self._state is None or active is None or active is train_dataloader or active.remainder != -1:
            return
        with suppress(AttributeError, TypeError):  # a stream has no length
            if not train_dataloader._drop_last:
                active.remainder = len(train_dataloader.dataset) % train_dataloader.total_batch_size

    def on_step_end(self, args, state, control, **kwargs):
        """Puts a checkpoint of an epoch's last step off until the epoch's own log and evaluation are in it."""
        if control.should_save and self.postpones():
            control.should_save = False

    def postpones(self) -> bool:
        """Whether a checkpoint that is asked for now has to wait for the end of the epoch; it is then made there."""
        args, state = self._trainer.args, self._trainer.state
        if not self._within_epoch:
            return False
        epoch_ends = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        by_epoch = IntervalStrategy.EPOCH in (args.logging_strategy, args.eval_strategy)
        self._postponed |= epoch_ends and by_epoch
        return self._postponed

    def on_epoch_end(self, args, state, control, **kwargs):
        self._within_epoch = False
        if self._postponed:
            control.should_save, self._postponed = True, False

    def save(self, save: Callable[[], None], trial: Any) -> str:
        """Has `save` write a checkpoint, adds what it lacks, and moves it into place once it is whole and on the disk.

        Gives its folder.
        """
        trainer, args = self._trainer, self._trainer.args
        run_dir, name = run_folder(trainer, trial), f"checkpoint-{trainer.state.global_step}"
        final, staged = os.path.join(run_dir, name), checkpoints.staging(run_dir) / name
        self._once_per_machine(lambda: checkpoints.clean_up(run_dir))
        with saving_into(trainer, str(checkpoints.staging(run_dir))):
            save()
        states = gather_object([loop_state(trainer)])  # also waits until every process has written
        trainer.accelerator.wait_for_everyone()
        self._record_best(run_dir, staged)
        if args.should_save:
            if self._syncs_reference:
                save_model(trainer.accelerator.unwrap_model(trainer.ref_model), str(staged / _REFERENCE_FILE))
            checkpoints.write_state(
                staged,
                {
                    "format": checkpoints.FORMAT,
                    "run": self._run,
                    "order": checkpoints.next_order(run_dir),
                    "evaluations_without_gain": [each.early_stopping_patience_counter for each in self._early_stops()],
                    "settings": self._settings(),
                    "data": self._data_facts(),
                    "stream": self._stream_place(),
                    **{name: own.state_dict() for name, own in self._stateful.items()},
                    "seconds": self.earlier_seconds + time.time() - self._begun,
                    "processes": states,
                },
            )
        self._check_written(name, staged)
        self._once_per_machine(lambda: checkpoints.sync(staged))
        # Machines that share the disk find nothing left to move; those with disks of their own move their own files.
        if trainer.accelerator.is_main_process:
            checkpoints.publish(run_dir, name)
        trainer.accelerator.wait_for_everyone()
        self._once_per_machine(lambda: _publish_if_staged(run_dir, name))
        if args.push_to_hub:
            push_checkpoint(trainer, final)
        if args.should_save:
            for excess in checkpoints.excess_checkpoints(run_dir, args.save_total_limit, trainer.state.best_model_checkpoint):
                checkpoints.remove(excess)
        return final

    def _check_written(self, name: str, staged: Path) -> None:
        """Raises `CheckpointError`, on all processes, if what was written on one of them could not be resumed from."""
        mine = checkpoints.fault_within(staged) if self._trainer.args.should_save else None
        for rank, fault in enumerate(gather_object([mine])):
            if fault is not None:
                raise checkpoints.CheckpointError(
                    f"{name} was written, and could not be resumed from: on process {rank}, {fault}. It is left in {staged}. "
                    "Free the disk if it is full; save_strategy='no' trains without checkpoints."
                )

    def _record_best(self, run_dir: str, staged: Path) -> None:
        """Has the state, in memory and in the checkpoint, name the best checkpoint where it will be."""
        state = self._trainer.state
        if not state.best_global_step:
            return
        best = os.path.join(run_dir, f"checkpoint-{state.best_global_step}")
        if state.best_global_step == state.global_step or os.path.isdir(best):
            state.best_model_checkpoint = best
        if self._trainer.args.should_save:
            state.save_to_json(str(staged / checkpoints.TRAINER_STATE_FILE))

    def _load_stateful(self) -> None:
        for name, own in self._stateful.items():
            saved = None if self._state is None else self._state.get(name)
            if saved is not None:
                own.load_state_dict(saved)

    @property
    def _syncs_reference(self) -> bool:
        # Of sharded weights no process has them all.
        sharded = self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled
        return self._trainer.args.sync_ref_model and not sharded

    def _settings(self) -> dict[str, Any]:
        return settings_of(self._trainer.args, self._trainer.accelerator.num_processes)

    def _data_facts(self) -> dict[str, Any] | None:
        dataset = self._trainer.train_dataset
        if self._data is None or self._data[0] is not dataset:
            self._data = dataset, data_facts(dataset)
        return self._data[1]

    def _once_per_machine(self, action: Callable[[], Any]) -> None:
        if self._trainer.accelerator.is_local_main_process:
            action()
        self._trainer.accelerator.wait_for_everyone()


def newest_everywhere(run_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run that every process sees, or None; all processes have to call this.

    Of disks that machines do not share, one may have a checkpoint that another was killed before it had.
    """
    steps = set.intersection(*map(set, gather_object([list(checkpoints.of_last_run(run_dir))])))
    return Path(run_dir) / f"checkpoint-{max(steps)}" if steps else None


def _publish_if_staged(run_dir: str, name: str) -> None:
    if (checkpoints.staging(run_dir) / name).is_dir():
        with suppress(checkpoints.NotStaged):  # what this machine remembered of the disk was old
            checkpoints.publish(run_dir, name)
