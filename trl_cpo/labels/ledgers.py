"""The metrics of all pairs, and of each group of pairs."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..metrics import MetricLedger


class GroupLedgers:
    """A ledger for all pairs, and one for each group.

    Args:
        names: of the metrics.
        groups: their names, in the order of their indices.
    """

    def __init__(self, names: Sequence[str], groups: Sequence[str]):
        self._ledgers = {group: MetricLedger(names, group) for group in ("", *groups)}

    def add(self, rows: Tensor, group: Tensor | None, left_out: Mapping[str, int]) -> None:
        """Adds a batch: the metrics of each pair, the index of its group, and how many pairs were left out, by reason."""
        for index, (name, ledger) in enumerate(self._ledgers.items(), start=-1):
            ledger.add(rows[group == index] if name else rows)
        self._ledgers[""].left_out.update(left_out)

    def flush(self, prefix: str = "") -> dict[str, float]:
        """The means since the last flush."""
        return {name: value for ledger in self._ledgers.values() for name, value in ledger.flush(prefix).items()}

    def counts(self, prefix: str = "") -> dict[str, int]:
        """The number of pairs since the last flush, of all and of each group; without those that have none."""
        counts = {f"{group}/" if group else "": ledger.count for group, ledger in self._ledgers.items()}
        return {f"{prefix}cpo/{group}pairs": count for group, count in counts.items() if count}

    def clear(self) -> None:
        """Drops everything added."""
        for ledger in self._ledgers.values():
            ledger.clear()

    def stateful(self) -> dict[str, MetricLedger]:
        """Every ledger, as a checkpoint knows it."""
        return {f"metrics:{group}" if group else "metrics": ledger for group, ledger in self._ledgers.items()}
