"""One row a pair: what the audit knows of each, for a notebook or a filter of the data."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ..scoring.scored_pairs import ScoredPairs
from ..units import REDUCTIONS


def pair_rows(name: str, pairs: ScoredPairs, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Each scored pair of a set as JSON values, in its order; log-probabilities are sums, in nats.

    Args:
        name: of the set.
        rows: (n,), the number of each pair in its source, from 0.
    """
    ref_gaps = {reduction: pairs.ref_gap(reduction) for reduction in REDUCTIONS}
    gaps = {reduction: pairs.gap(reduction) for reduction in REDUCTIONS}
    for at, row in enumerate(rows):
        known: dict[str, Any] = {
            "set": name,
            "row": int(row),
            "chosen_tokens": int(pairs.chosen_tokens[at]),
            "rejected_tokens": int(pairs.rejected_tokens[at]),
            "ref_chosen": float(pairs.ref_chosen[at]),
            "ref_rejected": float(pairs.ref_rejected[at]),
            "ref_gap": {reduction: float(values[at]) for reduction, values in ref_gaps.items()},
            "misaligned": {reduction: bool(values[at] < 0) for reduction, values in ref_gaps.items()},
        }
        if pairs.policy_chosen is not None and pairs.policy_rejected is not None:
            known["policy_chosen"], known["policy_rejected"] = float(pairs.policy_chosen[at]), float(pairs.policy_rejected[at])
            known["gap"] = {reduction: float(values[at]) for reduction, values in gaps.items()}
            known["in_undesirable_region"] = {
                reduction: bool(ref_gaps[reduction][at] < gaps[reduction][at] < 0) for reduction in REDUCTIONS
            }
        if pairs.reward_gap is not None:
            value = float(pairs.reward_gap[at])
            known["reward_gap"] = value if math.isfinite(value) else None
        if pairs.prompt_of is not None:
            known["prompt"] = int(pairs.prompt_of[at])
        if pairs.slices:
            known["slices"] = {column: _plain(values[at]) for column, values in pairs.slices.items()}
        yield known


def _plain(value: Any) -> Any:
    """A column's value as JSON has it; as text, what JSON has not."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)
