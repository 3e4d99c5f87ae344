"""DPOTrainer whose interrupted and resumed training is the uninterrupted one."""

from collections.abc import Mapping

import trl

from ..._trl.models import release_reference_engine
from ..._trl.training_loop import saving_weights_on_each_node
from ..config import DPOConfig
from ..guards import FiniteWeights
from ..interruption import Interruption, hide_jit_checkpoint
from .resumption import Resumption, Stateful


class ResumableTrainer(trl.DPOTrainer):
    """TRL's DPOTrainer with whole checkpoints, exact resume, and SIGTERM answered by a checkpoint.

    What it overrides of transformers, and why, is listed in `trl_cpo._trl.upstream`.
    """

    def __init__(self, *, args: DPOConfig, **others):
        with hide_jit_checkpoint(args):
            super().__init__(args=args, **others)
        self._interruption = Interruption(self.accelerator, args.enable_jit_checkpoint)
        self._resumption = Resumption(self, self.stateful())
        self._finite_weights = FiniteWeights(self.accelerator.gather, self.accelerator.device)
        for callback in (self._interruption, self._resumption, self._finite_weights):
            self.add_callback(callback)

    def stateful(self) -> Mapping[str, Stateful]:
        """What a checkpoint holds besides what training itself counts, by its key there; asked for once, at the start."""
        return {}

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """TRL's training. Resumed from a checkpoint of this trainer it is, number for number, what was interrupted.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or `True` for the newest whole one in `args.output_dir`.
            trial, ignore_keys_for_eval: as in [`~transformers.Trainer.train`].

        Raises:
            CheckpointError: the checkpoint is not whole, or there is none; before the model is touched.
            TrainingInterrupted: SIGTERM came, under `enable_jit_checkpoint`, and a checkpoint was written.
        """
        checkpoint = self._resumption.prepare(resume_from_checkpoint)
        release_reference_engine(self)
        with self._interruption.listening(more_follows=trial is not None):
            return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _save_checkpoint(self, model, trial):
        # Not in a callback: an epoch's end, or a best evaluation, asks for a checkpoint after those of the step have run.
        if self._resumption.postpones():
            return
        self._finite_weights.before_saving(model, self.state.global_step)
        checkpoint = self._resumption.save(lambda: super(ResumableTrainer, self)._save_checkpoint(model, trial), trial)
        self._interruption.saved(checkpoint)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if not self._interruption.due:
            return
        # Not asked for in a callback: under save_strategy="best" an evaluation has the last word there.
        if self._interruption.checkpoint is None and not self._resumption.postpones():
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        # Stopped early, the training is over; resumed, it would forget that and go on.
        stopped_early = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        if self._interruption.checkpoint is not None and not stopped_early:
            self._interruption.end(self.state.global_step)

    def _save(self, output_dir=None, state_dict=None):
        with saving_weights_on_each_node(self):
            super()._save(output_dir, state_dict)

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
        # Skips the scheduler at the start of `train` alone; a resumed run was evaluated there before it was interrupted.
        if skip_scheduler and self.state.global_step > 0:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)

    def _finalize_training(self, trial, num_train_samples, start_time):
        # The summary is of the whole run, and so is its time.
        return super()._finalize_training(trial, num_train_samples, start_time - self._resumption.earlier_seconds)
