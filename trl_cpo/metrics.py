"""The `cpo/*` metrics: a literal table of names and formulas, and sums that average correctly over batches."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gaps import in_undesirable_region
from .pairs import PairLogps


@dataclass(frozen=True)
class PairView:
    """A batch of pairs as the metrics see it: log-probabilities, target margins (B,) in nats, and γ in nats, or (B,)."""

    pairs: PairLogps
    target: Tensor
    gamma: float | Tensor


#: Metric name (logged as `cpo/<name>`) to (formula as text, function giving one value per pair, (B,)). What is logged is
#: the mean over all pairs seen since the last log, on all processes.
METRICS: dict[str, tuple[str, Callable[[PairView], Tensor]]] = {
    "gap": ("δ_θ = s_θ(chosen) − s_θ(rejected)", lambda v: v.pairs.gap),
    "ref_gap": ("δ_ref = s_ref(chosen) − s_ref(rejected)", lambda v: v.pairs.ref_gap),
    "target": ("t, the target margin of the loss; δ_ref unless the constraint moves it", lambda v: v.target),
    "prefers_chosen": ("[δ_θ > 0]", lambda v: v.pairs.gap > 0),
    "beats_reference": ("[δ_θ > δ_ref]: the reward accuracy", lambda v: v.pairs.gap > v.pairs.ref_gap),
    "in_undesirable_region": (
        "[δ_θ < 0 and δ_θ > δ_ref]: the loss has fallen, but the policy still prefers the rejected response",
        lambda v: in_undesirable_region(v.pairs.gap, v.pairs.ref_gap),
    ),
    "violation": ("max(0, γ − δ_θ)", lambda v: torch.relu(v.gamma - v.pairs.gap)),
    "violation_rate": ("[δ_θ < γ]", lambda v: v.pairs.gap < v.gamma),
    "reference_misaligned": ("[δ_ref < 0]", lambda v: v.pairs.ref_gap < 0),
    "escaped": (
        "[δ_ref < 0 and δ_θ > 0]: the reference prefers the rejected response, the policy the chosen one",
        lambda v: (v.pairs.ref_gap < 0) & (v.pairs.gap > 0),
    ),
    "chosen_logps_shift": (
        "s_θ(chosen) − s_ref(chosen)",
        lambda v: v.pairs.policy_chosen - v.pairs.ref_chosen,
    ),
    "rejected_logps_shift": (
        "s_θ(rejected) − s_ref(rejected)",
        lambda v: v.pairs.policy_rejected - v.pairs.ref_rejected,
    ),
}

#: Of every `cpo/*` name that an evaluation logs: whether more of it is better; None where it says nothing of the policy.
MORE_IS_BETTER: dict[str, bool | None] = {
    "gap": True,
    "ref_gap": None,
    "target": None,
    "prefers_chosen": True,
    "beats_reference": True,
    "in_undesirable_region": False,
    "violation": False,
    "violation_rate": False,
    "reference_misaligned": None,
    "escaped": True,
    "chosen_logps_shift": True,
    "rejected_logps_shift": False,
    "within_reach": None,
    "violation_within_reach": False,
    "violation_rate_within_reach": False,
    "chosen_floor_violation": False,
    "chosen_floor_slack": True,
    "chosen_floor_holds": True,
    "slack": True,
    "holds": True,
    "pairs": None,
    "incomparable_pairs": None,
    "nonfinite_pairs": False,
}

#: The column of each metric in the result of `per_pair`.
COLUMNS = {name: column for column, name in enumerate(METRICS)}


def per_pair(view: PairView) -> Tensor:
    """Every metric of every pair, (B, len(METRICS)); columns in the order of the table, conditions as 0 or 1."""
    with torch.no_grad():
        columns = [value(view) for _, value in METRICS.values()]
        return torch.stack([column.to(view.pairs.gap.dtype) for column in columns], dim=1)


class MetricLedger:
    """Sums of per-pair metrics: a mean over several batches weighs every pair equally, whatever the batch sizes.

    Sums stay on the device until `flush`, so adding a batch does not wait for it.

    Args:
        names: of the columns; those of `per_pair` unless said otherwise.
        group: of the pairs that are added: the metrics are logged as `cpo/<group>/<name>`. Empty: all pairs.
    """

    #: Empty: the warning about a checkpoint of another trainer already mentions the metrics.
    starts_anew = ""

    def __init__(self, names: Sequence[str] = tuple(METRICS), group: str = ""):
        self.names, self._place = tuple(names), f"cpo/{group}/" if group else "cpo/"
        self._sums: list[Tensor] = []
        # Sums counted before the interruption of a resumed run, (batches, metrics), float64.
        self._resumed = torch.zeros(0, len(self.names), dtype=torch.float64)
        #: Pairs added since the last flush.
        self.count = 0
        #: Pairs left out of the means since the last flush, by reason (`trl_cpo.engine.guards`).
        self.left_out: Counter[str] = Counter()

    def add(self, rows: Tensor) -> None:
        """Adds one batch: a column for each name, (B, K)."""
        self._sums.append(rows.sum(dim=0))
        self.count += len(rows)

    def flush(self, prefix: str = "") -> dict[str, float]:
        """Returns the mean of each metric since the last flush, as `<prefix>cpo/<name>`, and clears the sums.

        Also returns how many pairs were left out, by reason. Without pairs there are no means.
        """
        left_out = {f"{prefix}{self._place}{reason}": number for reason, number in self.left_out.items()}
        self.left_out.clear()
        if not self.count:
            return left_out
        totals = self._rows().sum(dim=0)
        means = {
            f"{prefix}{self._place}{name}": total / self.count for name, total in zip(self.names, totals.tolist(), strict=True)
        }
        self.clear()
        return means | left_out

    def _rows(self) -> Tensor:
        # float64 for exact sums; on the CPU, because not every device supports it.
        return torch.cat([self._resumed, torch.stack(self._sums).cpu().double()]) if self._sums else self._resumed

    def state_dict(self) -> dict[str, Any]:
        """Everything added since the last flush, as exact plain numbers: the count, and each metric's sum per batch."""
        sums = dict(zip(self.names, self._rows().T.tolist(), strict=True))
        return {"count": self.count, "left_out": dict(self.left_out), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the sums with those of a `state_dict`. Raises `ValueError` if it holds other metrics."""
        if state["sums"].keys() != set(self.names):
            other = sorted(state["sums"].keys() ^ set(self.names))
            raise ValueError(
                f"The saved metrics are not this version's: {', '.join(other)} on one side only. Resume with `reach` and "
                "`chosen_floor` on or off as they were, and with the version of trl-cpo that wrote the checkpoint."
            )
        self.clear()
        self._resumed = torch.tensor([state["sums"][name] for name in self.names], dtype=torch.float64).T.contiguous()
        self.count = int(state["count"])
        self.left_out.update(state["left_out"])

    def begin(self) -> None:
        """Start of training: drops pairs left over from an earlier run."""
        self.clear()

    reset = begin

    def clear(self) -> None:
        """Drops everything added."""
        self._sums, self._resumed, self.count = [], self._resumed[:0], 0
        self.left_out.clear()
