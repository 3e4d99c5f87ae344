"""What a run records beside its model: the document of pairs.json, and the versions in metrics.json."""

import platform
from typing import TYPE_CHECKING, Any

from ..files.run_files import PAIR_COLUMNS

if TYPE_CHECKING:
    from torch import Tensor

    from ..pairs import PairLogps


def pairs_document(
    pairs: "PairLogps",
    *,
    reduction: str,
    gamma: float,
    beta: float | None,
    constraint: str | None,
    split: str,
    start_is_reference: bool,
    degenerate: "Tensor | None" = None,
    trained_on: int | None = 0,
) -> dict[str, Any]:
    """What pairs.json holds: one row a held-out pair, in dataset order, its log-probabilities in nats.

    Pairs that compare no two answers have no row; where there are any, `left_out` is their number. `trained_on_left_out` is
    the number of pairs that were left out because they were trained on, where there are any.

    Args:
        pairs: the held-out pairs as the trained policy and the reference score them, (n,) each.
        reduction: "sum" (nats per response) or "mean" (nats per token).
        gamma, beta, constraint, split: of the run; β and constraint None where its loss has none.
        start_is_reference: whether the policy before training was the reference; otherwise its columns are null.
        degenerate: (n,), bool, pairs that compare no two answers; None: none is.
        trained_on: pairs of the split that were trained on, and are not among `pairs`; None: not known.
    """
    kept = pairs.rows() if degenerate is None else pairs.rows()[~degenerate]
    left_out = len(pairs.gap) - len(kept)
    rows = [[*row, *(row[2:] if start_is_reference else (None, None))] for row in kept.double().cpu().tolist()]
    return {
        "reduction": reduction,
        "gamma": gamma,
        "beta": beta,
        "constraint": constraint,
        "split": split,
        **({"left_out": left_out} if left_out else {}),
        **({"trained_on_left_out": trained_on} if trained_on else {}),
        "columns": list(PAIR_COLUMNS),
        "rows": rows,
    }


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    from importlib.metadata import version

    names = ("trl-cpo", "trl", "transformers", "torch", "peft", "accelerate", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
