"""DPOTrainer with exact resume, a packed forward and guards: an engine that knows no constraint.

dpo_trainer  DPOTrainer, on top of resume.trainer   config     DPOConfig
preflight    what is wrong before anything loads    processes  processes that disagree
guards       what a batch's numbers must be         start_check  whether a run starts at its reference
batching     which pairs share a micro-batch        forward    each prompt once, no padding
reference    tables of log-probabilities            resume     checkpoints, exact resume
interruption SIGTERM                                shutdown   the end of a process
model_state  looking without a trace                precision  how many digits a product has
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import DPOConfig
    from .dpo_trainer import DPOTrainer

__all__ = ["DPOConfig", "DPOTrainer"]

if not TYPE_CHECKING:

    def __getattr__(name: str):
        # Looked up when first used: the forward and the reference tables are used without a trainer too.
        homes = {"DPOConfig": "config", "DPOTrainer": "dpo_trainer"}
        if name in homes:
            return getattr(import_module(f"{__name__}.{homes[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
