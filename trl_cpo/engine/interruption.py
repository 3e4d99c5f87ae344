"""SIGTERM while training: the step in work is finished, a checkpoint written by all processes together, and the run ends."""

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        self._signalled = False
        #: Whether a checkpoint is due that ends the training: known after a step, the same on every process.
        self.due = False
        #: Its folder, once it is in its place.
        self.checkpoint: str | None = None

    @contextmanager
    def listening(self, *, more_follows: bool) -> Iterator[None]:
        """Catches SIGTERM while a training runs; what it did before is put back.

        Args:
            more_follows: whether other trainings come after this one (a search). A signal that came too late for a checkpoint
                of this one then ends the process; else the script is let go on, to save what was trained.
        """
        self._signalled = self.due = False
        self.checkpoint = None
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
        before = signal.signal(signal.SIGTERM, self._on_sigterm)
        _listening.add(os.getpid())
        try:
            yield
        finally:
            _listening.discard(os.getpid())
            # None stands for a handler that was not set from Python.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
            if self._signalled and self.checkpoint is None and more_follows:
                os.kill(os.getpid(), signal.SIGTERM)

    def _on_sigterm(self, *_: Any) -> None:
        # A second signal changes nothing: launchers send several.
        if not self._signalled and self._accelerator.is_local_main_process:
            _say("\nSIGTERM: training ends after the step in work, with a checkpoint.")
        self._signalled = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._wanted:
            told = torch.tensor([float(self._signalled)], device=self._accelerator.device)
            self.due |= bool(self._accelerator.gather(told).any())

    def saved(self, checkpoint: str) -> None:
        """Called by every process once a checkpoint is in its place."""
        if self.due:
            self.checkpoint = checkpoint

    def end(self, step: int) -> None:
        """Raises `TrainingInterrupted`, on all processes, once what was due is written and every callback has seen it."""
        # The first process may still be uploading, and a launcher ends it soon after the others are gone.
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            _say(f"Ended by SIGTERM after step {step}. Go on from {self.checkpoint}")
        raise TrainingInterrupted(step, self.checkpoint)


#: Ids of processes that listen: this one, and never a child of it, which inherits the set and the handler.
_listening: set[int] = set()


def _restore_default_handler() -> None:
    """In a forked child (a data loader's worker): signals to the process's group end it no more, and `terminate` does."""
    if os.getppid() in _listening:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # torch 2.13's launcher signals the whole group, and training ends with an error when a worker dies.
        with suppress(OSError):
            os.setpgid(0, 0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_default_handler)


def _say(text: str) -> None:
    # A signal may come in the middle of a print, which cannot be begun again there; and nobody may be reading any more.
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


@contextmanager
def hide_jit_checkpoint(args: Any) -> Iterator[None]:
    """Hides `enable_jit_checkpoint` from transformers' `Trainer`, which would put its own handler in place."""
    wanted, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
    try:
        yield
    finally:
        args.enable_jit_checkpoint = wanted
