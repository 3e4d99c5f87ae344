"""Constrained Preference Optimization for TRL: DPOTrainer with a constraint on the preference gap.

Importing this package imports neither torch nor TRL: the public names are looked up when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import CPOConstrainedConfig
    from .monitor import PairMonitor
    from .trainer import CPOConstrainedTrainer

__version__ = "0.1.0"

_HOME = {
    "CPOConstrainedConfig": "config",
    "CPOConstrainedTrainer": "trainer",
    "PairMonitor": "monitor",
}

__all__ = ["CPOConstrainedConfig", "CPOConstrainedTrainer", "PairMonitor", "__version__"]


if not TYPE_CHECKING:  # a type checker that saw it would take every name for one of this package

    def __getattr__(name: str):
        if name in _HOME:
            return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(set(globals()) | set(_HOME))
