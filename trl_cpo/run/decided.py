"""Counts decisions on a run's held-out rows, where they list their options. Never ends a run: it says what is missing."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..decisions import OPTIONS, Decision, decide, document

if TYPE_CHECKING:
    from trl import DPOTrainer

#: Rows that are counted at most; of more, so many evenly spaced ones.
_MOST = 512


class Decided:
    """Counts at the start and at the end of a run.

    Args:
        rows: the held-out pairs. Without a column of options, nothing is counted or said.
        say: told once why decisions are not counted.
    """

    def __init__(self, trainer: "DPOTrainer", rows: Any, say: Callable[[str], None]):
        self._trainer, self._say = trainer, say
        self._rows: list[dict[str, Any]] | None = None
        self._before: list[Decision] | None = None
        if OPTIONS not in (getattr(rows, "column_names", None) or ()):
            return
        if not hasattr(rows, "__len__"):
            self._not("the held-out pairs are streamed")
        elif trainer.accelerator.num_processes > 1:
            self._not("a run of several processes does not count them")
        else:
            self._rows = [rows[at] for at in range(0, len(rows), -(-len(rows) // _MOST))]

    def count_start(self) -> None:
        """Counts the decisions of the model before training."""
        self._before = self._count()

    def document(self) -> dict[str, Any] | None:
        """The decisions before and after training; None where they cannot be counted."""
        after = self._count()
        return None if after is None else document(self._before, after)

    def _count(self) -> list[Decision] | None:
        if self._rows is None:
            return None
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        try:
            return decide(model, self._trainer.processing_class, self._rows)
        # Tokenizers and models of users raise what they like, and a count must not end a training.
        except Exception as error:
            self._not(f"{type(error).__name__}: {error}".split("\n")[0][:300])
            return None

    def _not(self, reason: str) -> None:
        self._rows = None
        self._say(f"      decisions are not counted: {reason}")
