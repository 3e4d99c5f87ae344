"""DPOTrainer with exact resume."""

import time
from collections.abc import Mapping

import trl

from ..._trl.models import release_reference_engine
from ..._trl.training_loop import saving_weights_on_each_node
from ..config import DPOConfig
from ..guards import FiniteWeights
from ..interruption import Interruption, hide_jit_checkpoint
from .resumption import Resumption, Stateful
from .weights import load_as_saved, not_loaded


class ResumableTrainer(trl.DPOTrainer):
    """TRL's DPOTrainer with atomic checkpoints, exact resume, and a checkpoint on SIGTERM.

    `trl_cpo._trl.upstream` lists what is overridden of transformers, and why.
    """

    #: The checkpoint whose weights are being loaded.
    _loading_from: str | None = None

    def __init__(self, *, args: DPOConfig, **others):
        with hide_jit_checkpoint(args):
            super().__init__(args=args, **others)
        self._interruption = Interruption(self.accelerator, args.enable_jit_checkpoint)
        self._resumption = Resumption(self, self.stateful())
        self._finite_weights = FiniteWeights(self.accelerator.gather, self.accelerator.device)
        for callback in (self._interruption, self._resumption, self._finite_weights):
            self.add_callback(callback)

    def stateful(self) -> Mapping[str, Stateful]:
        """Objects whose state goes into checkpoints, by key; called once, at construction."""
        return {}

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """Trains as TRL does; resumed from a checkpoint of this trainer, with exactly the numbers of an uninterrupted run.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or `True` for the newest complete one in `args.output_dir`.
            trial, ignore_keys_for_eval: as in [`~transformers.Trainer.train`].

        Raises:
            CheckpointError: the checkpoint is incomplete, or there is none; raised before the model is changed.
            TrainingInterrupted: SIGTERM arrived under `enable_jit_checkpoint`, and a checkpoint was written.
        """
        checkpoint = self._resumption.prepare(resume_from_checkpoint)
        release_reference_engine(self)
        with self._interruption.listening(more_follows=trial is not None):
            return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _save_checkpoint(self, model, trial):
        # Not in a callback: the end of an epoch, or a best evaluation, requests a checkpoint after the step's callbacks.
        if self._resumption.postpones():
            return
        self._finite_weights.before_saving(model, self.state.global_step)
        checkpoint = self._resumption.save(lambda: super(ResumableTrainer, self)._save_checkpoint(model, trial), trial)
        self._interruption.saved(checkpoint)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if not self._interruption.due:
            return
        # Not requested in a callback: under save_strategy="best" the evaluation overrules callbacks.
        if self._interruption.checkpoint is None and not self._resumption.postpones():
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        # A training that stopped early is over: it must end normally, or a resume would continue it.
        stopped_early = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        if self._interruption.checkpoint is not None and not stopped_early:
            self._interruption.end(self.state.global_step)

    def _save(self, output_dir=None, state_dict=None):
        with saving_weights_on_each_node(self):
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._loading_from = resume_from_checkpoint
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model=model)
        finally:
            self._loading_from = None

    def _issue_warnings_after_load(self, load_result):
        # transformers warns where weights were not found, and trains on.
        if not not_loaded(self.model, load_result.missing_keys):
            return super()._issue_warnings_after_load(load_result)
        load_as_saved(self.model, self._loading_from or self.state.best_model_checkpoint)

    def _init_training_state(self, *args, **kwargs):
        return self._resumption.place_in_stream(*super()._init_training_state(*args, **kwargs))

    def _run_epoch(self, *args, **kwargs):
        # Resumed from a run's last checkpoint, transformers would train a step too many in the middle of an epoch, and go on
        # after an early stop.
        if self._resumption.is_over():
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        # skip_scheduler is set only for the evaluation at the start of `train`; a resumed run has had that one.
        if skip_scheduler and self.state.global_step > 0:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)

    def _finalize_training(self, trial, num_train_samples, start_time):
        # The summary covers the whole run, including the time before the interruption. The clock may have been set since.
        return super()._finalize_training(trial, num_train_samples, time.time() - self._resumption.seconds)

    def log(self, logs, start_time=None):
        """TRL's log, without the times of an evaluation in which the clock was set back."""
        for name in [name for name, value in logs.items() if name.endswith("_runtime") and value < 0]:
            start = name.removesuffix("runtime")
            for impossible in (name, f"{start}samples_per_second", f"{start}steps_per_second"):
                logs.pop(impossible, None)
        super().log(logs, start_time)
