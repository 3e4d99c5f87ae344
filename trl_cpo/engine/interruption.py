"""SIGTERM while training: the run finishes its step, all processes write a checkpoint together, and it exits."""

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
    """Raised when SIGTERM ended training, after a checkpoint; uncaught, it exits with status 143 (128 + 15).

    Attributes:
        step: the optimizer step after which the checkpoint was written.
        checkpoint: the folder of that checkpoint.
    """

    def __init__(self, step: int, checkpoint: str):
        super().__init__(128 + signal.SIGTERM)
        self.step, self.checkpoint = step, checkpoint


class Interruption(TrainerCallback):
    """Implements `enable_jit_checkpoint=True`, in place of transformers' own callback.

    transformers saves wherever the signal arrives, within a step, and each process by itself. Here the processes agree after
    each optimizer step (by gathering one float) whether any of them got the signal; the checkpoint is then an ordinary one.

    Args:
        accelerator: used to gather over processes.
        wanted: whether to handle the signal at all.
    """

    def __init__(self, accelerator: Accelerator, wanted: bool):
        self._accelerator, self._wanted = accelerator, wanted
        self._signalled = False
        #: Whether training must end with a checkpoint; decided after a step, the same on every process.
        self.due = False
        #: The folder of that checkpoint, once it is complete.
        self.checkpoint: str | None = None

    @contextmanager
    def listening(self, *, more_follows: bool) -> Iterator[None]:
        """Handles SIGTERM within the block; restores the previous handler afterwards.

        Args:
            more_follows: whether more trainings follow (a hyperparameter search). A signal that came too late for a checkpoint
                of this training then ends the process; otherwise the script continues, so that it can save its result.
        """
        self._signalled = self.due = False
        self.checkpoint = None
        if not self._wanted:
            yield
            return
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "enable_jit_checkpoint=True has no effect: train() was called outside the main thread, and only the main "
                "thread receives signals. SIGTERM will end this process at once. Call train() in the main thread.",
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
            # None means that the handler was not set from Python.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
            if self._signalled and self.checkpoint is None and more_follows:
                os.kill(os.getpid(), signal.SIGTERM)

    def _on_sigterm(self, *_: Any) -> None:
        # Launchers send several signals; only the first counts.
        if not self._signalled and self._accelerator.is_local_main_process:
            _say("\nSIGTERM: training ends after the current step, with a checkpoint.")
        self._signalled = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._wanted:
            told = torch.tensor([float(self._signalled)], device=self._accelerator.device)
            self.due |= bool(self._accelerator.gather(told).any())

    def saved(self, checkpoint: str) -> None:
        """Called by every process once a checkpoint is complete."""
        if self.due:
            self.checkpoint = checkpoint

    def end(self, step: int) -> None:
        """Raises `TrainingInterrupted` on all processes; call it once the checkpoint is written and all callbacks have run."""
        # Process 0 may still be uploading, and a launcher ends it soon after the others exit.
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            _say(f"Ended by SIGTERM after step {step}. Resume from {self.checkpoint}")
        raise TrainingInterrupted(step, self.checkpoint)


#: Ids of processes that handle SIGTERM: this one while it trains. A forked child inherits the set, but is not in it.
_listening: set[int] = set()


def _restore_default_handler() -> None:
    """Runs in a forked child (a data-loader worker): lets `terminate` end it, and keeps signals to the process group away."""
    if os.getppid() in _listening:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # torch 2.13's launcher signals the whole process group, and training fails when a worker dies.
        with suppress(OSError):
            os.setpgid(0, 0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_default_handler)


def _say(text: str) -> None:
    # Not print: the signal may interrupt a print, which is not reentrant. And the reader of stderr may be gone.
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


@contextmanager
def hide_jit_checkpoint(args: Any) -> Iterator[None]:
    """Within the block, hides `enable_jit_checkpoint` from transformers' `Trainer`, which would install its own handler."""
    wanted, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
    try:
        yield
    finally:
        args.enable_jit_checkpoint = wanted
