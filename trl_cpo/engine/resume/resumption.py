"""Exact resume: complete checkpoints, including all state that transformers and TRL would lose."""

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
from ...files.masking import masked
from . import checkpoints
from .settings import data_facts, settings_of

_REFERENCE_FILE = "synchronised_reference.safetensors"

#: The state file's own keys; every other key belongs to a `Stateful`.
_OWN_KEYS = frozenset("format run order evaluations_without_gain settings data stream seconds processes files".split())


class Stateful(Protocol):
    """State that changes during training and is restored on resume; if it has a true `ended`, the run is over."""

    #: What happens if a checkpoint does not hold this state, as a clause for a warning; empty for no warning.
    starts_anew: str

    def begin(self) -> None:
        """Start of training: drops values left from a run interrupted mid-step."""

    def reset(self) -> None:
        """Returns to the initial state of a run."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step or log depends on, as plain numbers that JSON stores exactly."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`. Raises `ValueError` if that is impossible."""


class Resumption(TrainerCallback):
    """Writes a trainer's checkpoints, and restores the state that transformers and TRL lose on resume.

    That state is: loss, metrics and tokens counted since the last log; the numbers behind the final summary; a reference
    moved by `sync_ref_model`; and the trainer's `stateful`. transformers restores everything else.
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
        #: Seconds that the resumed run trained before this call of `train`.
        self.earlier_seconds = 0.0

    # Before training

    def prepare(self, given: str | bool | None) -> str | None:
        """Finds and checks the checkpoint to resume from, before the model is changed; None to train from the start.

        Args:
            given: a checkpoint's folder; `True`, "latest" or "true" (unless a folder has that name) for the newest complete
                one of the run; `None` or `False` for none.

        Raises:
            CheckpointError: on at least one process the checkpoint is incomplete or missing, or the processes would resume
                from different steps.
            ValueError: the state of a `Stateful` in it cannot be restored.
        """
        self._state = self._folder = None
        if given is None or given is False:
            return None
        if str(given).lower() in ("latest", "true") and (given is True or not os.path.isdir(given)):
            given = True
        run_dir = self._trainer.args.output_dir
        # Only the run's own folder: another run may be writing into any other.
        self._once_per_machine(lambda: checkpoints.clean_up(run_dir))
        if given is True:
            newest = newest_everywhere(run_dir)
            if newest is None:
                raise checkpoints.CheckpointError(
                    f"There is no complete checkpoint in {run_dir} to resume from. Set output_dir to the run's folder, or call "
                    "train() without resume_from_checkpoint to start from the beginning."
                )
            given = str(newest)
        found = gather_object([(given, checkpoints.fault_of(given), checkpoints.step_of(given))])
        for folder, fault, _ in found:
            if fault is not None:
                raise checkpoints.refusal(folder, fault)
        if len({step for *_, step in found}) > 1:
            chosen = "; ".join(f"process {rank}: {folder} (step {step})" for rank, (folder, _, step) in enumerate(found))
            raise checkpoints.CheckpointError(
                f"The processes would resume from different steps. {chosen}. Give all of them the checkpoint of one step, or "
                "set resume_from_checkpoint=True for the newest one that all of them have."
            )
        self._folder, self._state = Path(given), checkpoints.read_state(given)
        # Loaded now as well as at the start of training, so that a failure is raised before the model is changed.
        self._load_stateful()
        if self._trainer.args.process_index == 0:
            for note in self._cautions():
                warnings.warn(f"Resuming from {given}: {note}", stacklevel=3)
        return str(given)

    def _cautions(self) -> list[str]:
        state, notes = self._state, []
        if state is None:
            lost = "As in TRL, train_loss and the loss, metrics and num_tokens since the last log start from zero"
            lost += "".join(f", and {own.starts_anew}" for own in self._stateful.values() if own.starts_anew)
            return [f"it was not written by trl-cpo. {lost}."]
        if not (self._folder / "scheduler.pt").exists() and not (self._folder / "latest").exists():
            notes.append("it holds only weights (save_only_model). The optimizer and the schedule start from scratch.")
        now = self._settings()
        differ = [(name, was, now[name]) for name, was in masked(state["settings"]).items() if now.get(name, was) != was]
        data = self._data_facts() if state.get("data") else state.get("data")
        if data != state.get("data"):
            notes.append(
                f"the training pairs have changed: in number ({state['data']['pairs']} then, {data['pairs']} now), text or "
                "order. This is no longer the same run."
            )
        changed = [f"{name} was {was!r} and is {given!r}" for name, was, given in differ]
        if changed:
            notes.append(f"{'; '.join(changed)}. Training uses the new settings; this is no longer the same run.")
        for name, own in self._stateful.items():
            if state.get(name) is None and own.starts_anew:
                notes.append(f"it holds no {name} state: {own.starts_anew}.")
                own.reset()
        for name in sorted(state.keys() - _OWN_KEYS - self._stateful.keys()):
            if state[name] is not None:
                notes.append(f"its {name} state is not used.")
        if self._syncs_reference and not (self._folder / _REFERENCE_FILE).exists():
            notes.append("it holds no synchronised reference. The reference starts as it was given.")
        return notes

    def on_train_begin(self, args, state, control, **kwargs):
        """Restores the counters from the checkpoint; training has just zeroed them."""
        self._begun, self.earlier_seconds = time.monotonic(), 0.0
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

    @property
    def seconds(self) -> float:
        """How long the run has trained, the time before an interruption included; a clock that is set plays no part."""
        return self.earlier_seconds + time.monotonic() - self._begun

    @staticmethod
    def _warn_of_an_earlier_run(run_dir: str) -> None:
        newest = checkpoints.newest_checkpoint(run_dir)
        if newest is not None:
            warnings.warn(
                f"{run_dir} holds checkpoints of an earlier run (the newest is {newest.name}), but this run starts from the "
                "beginning. It replaces checkpoints of the same step, and save_total_limit counts the others. Use another "
                "output_dir to keep them, or train(resume_from_checkpoint=True) to continue the earlier run.",
                stacklevel=2,
            )

    def is_over(self) -> bool:
        """Whether there is nothing left to train: the last step was made, or the resumed run had stopped early."""
        state = self._trainer.state
        ended = any(getattr(own, "ended", False) for own in self._stateful.values())
        return self._stopped_early or ended or state.global_step >= state.max_steps

    def _early_stops(self) -> list[EarlyStoppingCallback]:
        return [each for each in self._trainer.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]

    def place_in_stream(self, epochs: int, batches: int) -> tuple[int, int]:
        """Corrects where a resumed training starts: (completed passes, batches to skip), from transformers' own counts.

        For a stream without a length, transformers counts all batches so far as part of the first pass.
        """
        place = None if self._state is None else self._state.get("stream")
        return (epochs, batches) if place is None or self._trainer.args.ignore_data_skip else tuple(place)

    def _stream_place(self) -> tuple[int, int] | None:
        trainer, state = self._trainer, self._trainer.state
        if has_length(trainer.train_dataset) or not state.epoch:
            return None
        # A step never spans two passes, so the current pass is the last one begun.
        passes = max(math.ceil(state.epoch) - 1, 0)
        of_a_pass = state.max_steps * trainer.args.gradient_accumulation_steps
        return passes, round((state.epoch - passes) * of_a_pass)

    # While training

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Tells the data loader of a resumed epoch how many pairs the epoch's last batch has.

        Accelerate's `skip_first_batches` loses that number; some of TRL's metrics need it to leave repeated pairs out.
        """
        self._within_epoch = True
        active = self._trainer.accelerator.gradient_state.active_dataloader
        if self._state is None or active is None or active is train_dataloader or active.remainder != -1:
            return
        with suppress(AttributeError, TypeError):  # a stream has no length
            if not train_dataloader._drop_last:
                active.remainder = len(train_dataloader.dataset) % train_dataloader.total_batch_size

    def on_step_end(self, args, state, control, **kwargs):
        """Postpones a checkpoint at an epoch's last step, so that it includes the epoch's log and evaluation."""
        if control.should_save and self.postpones():
            control.should_save = False

    def postpones(self) -> bool:
        """Whether a checkpoint requested now must wait for the end of the epoch; it is then written there."""
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
        """Writes a checkpoint with `save`, adds the missing state, and moves it into place once it is complete and on disk.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: on one of the processes the checkpoint is incomplete.
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
                    "seconds": self.seconds,
                    "processes": states,
                },
            )
        self._check_written(name, staged)
        self._once_per_machine(lambda: checkpoints.sync(staged))
        # Process 0 moves the folder. Machines that share its disk then find nothing staged; others move their own folder.
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
        """Raises `CheckpointError` on all processes if the checkpoint that one of them wrote is incomplete."""
        mine = checkpoints.fault_within(staged) if self._trainer.args.should_save else None
        for rank, fault in enumerate(gather_object([mine])):
            if fault is not None:
                raise checkpoints.CheckpointError(
                    f"{name} was just written but could not be resumed from: on process {rank}, {fault}. It stays in {staged}. "
                    "If the disk is full, free space. To train without checkpoints, set save_strategy='no'."
                )

    def _record_best(self, run_dir: str, staged: Path) -> None:
        """Sets the best checkpoint's final path in the trainer state, in memory and in the staged checkpoint."""
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
        # No process holds all weights of a sharded model.
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
    """The newest complete checkpoint of a run that every process sees, or None; every process must call it.

    If machines have separate disks, one of them may have been killed before it had a checkpoint that others have.
    """
    steps = set.intersection(*map(set, gather_object([list(checkpoints.of_last_run(run_dir))])))
    return Path(run_dir) / f"checkpoint-{max(steps)}" if steps else None


def _publish_if_staged(run_dir: str, name: str) -> None:
    if (checkpoints.staging(run_dir) / name).is_dir():
        with suppress(checkpoints.NotStaged):  # this machine's view of a shared disk was stale
            checkpoints.publish(run_dir, name)
