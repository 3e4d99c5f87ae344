"""A run as data: its settings, curves, evaluations and held-out pairs, as far as known."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files.run_files import PAIR_COLUMNS
from ..units import UNITS
from .numbers import number
from .price import Measurement
from .shifts import Shifted


@dataclass(frozen=True)
class HeldOut:
    """n held-out pairs.

    Attributes:
        rows: log-probabilities, (n, 6), nats, columns as in `PAIR_COLUMNS`; NaN where the start is not known.
        tokens: of the chosen and the rejected answers, (n, 2); None: not known.
        slices: columns to part the pairs by, (n,) each, of texts and numbers.
    """

    rows: np.ndarray
    tokens: np.ndarray | None = None
    slices: dict[str, np.ndarray] = field(default_factory=dict)

    def column(self, name: str) -> np.ndarray:
        """A column of `PAIR_COLUMNS`, (n,)."""
        return self.rows[:, PAIR_COLUMNS.index(name)]

    def _gap(self, which: str) -> np.ndarray:
        return self.column(f"{which}_chosen") - self.column(f"{which}_rejected")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def gap(self) -> np.ndarray:
        """δ_θ of each pair after training, (n,)."""
        return self._gap("policy")

    @property
    def ref_gap(self) -> np.ndarray:
        """δ_ref of each pair, (n,)."""
        return self._gap("ref")

    @property
    def start_gap(self) -> np.ndarray:
        """The policy's gap before training, (n,), NaN where not known."""
        return self._gap("start")

    @property
    def reference(self) -> np.ndarray:
        """The reference's log-probabilities, (n, 2): chosen and rejected."""
        return np.stack([self.column("ref_chosen"), self.column("ref_rejected")], axis=1)

    @property
    def starts_at_reference(self) -> bool:
        """Whether the policy started as the reference, to a thousandth of a nat, wherever its start is known."""
        known = np.isfinite(self.start_gap)
        return bool(known.any() and np.all(np.abs(self.start_gap - self.ref_gap)[known] <= 1e-3))

    def shift(self, side: str) -> np.ndarray:
        """s_θ − s_ref of the "chosen" or "rejected" responses after training, (n,), nats."""
        return self.column(f"policy_{side}") - self.column(f"ref_{side}")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the held-out pairs: its step, metrics without their prefix, and number of pairs; None: not known."""

    step: int | None
    values: dict[str, float]
    pairs: int | None


@dataclass
class Run:
    """One run. `notes` says what is missing, broken or surprising."""

    folder: Path
    letter: str = "A"
    name: str = ""
    record: dict = field(default_factory=dict)
    training: dict[int, dict[str, float]] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    before: Evaluation | None = None
    after: Evaluation | None = None
    held_out: HeldOut | None = None
    pairs_in_file: int = 0
    prices: list[Measurement] = field(default_factory=list)
    shifts: list[Shifted] = field(default_factory=list)
    settings: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def reduction(self) -> str | None:
        """ "sum" or "mean"; None if no file says."""
        got = self.settings.get("logps_reduction")
        return got if isinstance(got, str) and got in UNITS else None

    @property
    def unit(self) -> str:
        return UNITS[self.reduction] if self.reduction else "nats"

    @property
    def pairs(self) -> HeldOut:
        """The held-out pairs. Raises `ValueError` if the run has none."""
        if self.held_out is None:
            raise ValueError(f"{self.folder} has no held-out pairs. Check `held_out` first.")
        return self.held_out

    @property
    def gamma(self) -> float | None:
        return number(self.settings.get("gamma"))

    @property
    def constraint(self) -> str:
        return str(self.settings.get("constraint", "not known"))


def by_unit(runs: list[Run]) -> list[list[Run]]:
    """The runs grouped by the unit of their gaps: only runs of one group share axes in nats."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.unit, []).append(run)
    return list(found.values())
