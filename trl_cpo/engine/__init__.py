"""DPOTrainer with exact resume, a packed forward and guards: an engine that knows no constraint.

dpo_trainer   DPOTrainer, built on resume.trainer
config        DPOConfig
preflight     checks before anything is loaded
processes     checks that all processes agree
guards        checks on every batch: finite numbers, comparable answers
start_check   check that a run starts at its reference
batching      which pairs share a micro-batch
forward       packed forward: each prompt once, no padding
reference     tables of reference log-probabilities
resume        checkpoints and exact resume
interruption  checkpoint on SIGTERM
shutdown      workaround for a crash at exit
model_state   running a model without side effects
precision     precision of matrix products
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import DPOConfig
    from .dpo_trainer import DPOTrainer

__all__ = ["DPOConfig", "DPOTrainer"]

if not TYPE_CHECKING:

    def __getattr__(name: str):
        # Imported on first use: the forward and the reference tables also work without a trainer.
        homes = {"DPOConfig": "config", "DPOTrainer": "dpo_trainer"}
        if name in homes:
            return getattr(import_module(f"{__name__}.{homes[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
