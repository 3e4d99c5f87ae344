"""SIGTERM while training: the step in work is finished, a checkpoint written by all processes together, and the run ends."""

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback


class TrainingInterrupted(SystemExit):
    """Training was ended by SIGTERM after a checkpoint; not caught, it ends the script with exit status 143 (128 + 15).

    Attributes:
        step: the optimizer step after which the checkpoint was written.
        checkpoint: its folder.
    """

    def __init__(self, step: int, checkpoint: str):
        super().__init__(128 + signal.SIGTERM)
        self.step, self.checkpoint = step, checkpoint


class Interruption(TrainerCallback):
    """What `enable_jit_checkpoint=True` does here, in place of transformers' callback of that name.

    That one saves where the signal finds it, within a step, and each process by itself. Here the processes agree after each
    optimizer step (one float is gathered) on whether any of them was told to end; the checkpoint is then an ordinary one.

    Args:
        accelerator: asked for how many processes there are, and for what all of them say.
        wanted: whether to listen at all.
    """

    def __init__(self, accelerator: Accelerator, wanted: bool):
        self._accelerator, self._wanted = accelerator, wanted
        self._told = False
        #: Whether a checkpoint is due that ends the training: known after a step, the same on every process.
        self.due = False
        self._checkpoint: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches SIGTERM while a training runs; what it did before is put back."""
        self._told = self.due = False
        self._checkpoint = None
        if not self._wanted:
            yield
            return
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "enable_jit_checkpoint=True has no effect: signals reach the main thread alone, and train() was called in "
                "another one. SIGTERM ends this process at once.",
                stacklevel=4,
            )
            yield
            return
        before = signal.signal(signal.SIGTERM, self._tell)
        try:
            yield
        finally:
            # None stands for a handler that was not set from Python.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _tell(self, *_: Any) -> None:
        # May come in the middle of a print, so not by print. A second signal changes nothing: launchers send several.
        if not self._told and self._accelerator.is_local_main_process:
            os.write(2, b"\nSIGTERM: training ends after the step in work, with a checkpoint.\n")
        self._told = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._wanted:
            told = torch.tensor([float(self._told)], device=self._accelerator.device)
            self.due |= bool(self._accelerator.gather(told).any())

    def saved(self, checkpoint: str) -> None:
        """Called by every process once a checkpoint is in its place."""
        if self.due:
            self._checkpoint = checkpoint

    def on_save(self, args, state, control, **kwargs):
        """Raises `TrainingInterrupted`, on all processes, if the checkpoint just written was due."""
        if self._checkpoint is not None:
            if self._accelerator.is_main_process:
                text = f"Ended by SIGTERM after step {state.global_step}. Go on from {self._checkpoint}\n"
                os.write(2, text.encode())
            raise TrainingInterrupted(state.global_step, self._checkpoint)


@contextmanager
def left_to_us(args: Any) -> Iterator[None]:
    """Hides `enable_jit_checkpoint` from transformers' `Trainer`, which would put its own handler in place."""
    wanted, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
    try:
        yield
    finally:
        args.enable_jit_checkpoint = wanted
