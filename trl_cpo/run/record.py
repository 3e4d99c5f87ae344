"""What a run records beside its model: the document of pairs.json, and the versions in metrics.json."""

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..files.run_files import PAIR_COLUMNS, TOKEN_COLUMNS

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
    tokens: tuple[Sequence[int], Sequence[int]] | None = None,
    slices: Mapping[str, Sequence[Any]] | None = None,
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
        tokens: of the chosen and the rejected answers, n each; None: not known.
        slices: columns of the pairs that the report parts them by, n values each.
    """
    count = len(pairs.gap)
    kept_rows = [at for at in range(count) if degenerate is None or not degenerate[at]]
    # Of another number of pairs, it is not known which value is whose.
    counts = tokens if tokens is not None and all(len(side) == count for side in tokens) else None
    columns = {name: values for name, values in (slices or {}).items() if len(values) == count}
    kept = pairs.rows() if degenerate is None else pairs.rows()[~degenerate]
    left_out = len(pairs.gap) - len(kept)
    rows = [[*row, *(row[2:] if start_is_reference else (None, None))] for row in kept.double().cpu().tolist()]
    if counts is not None:
        rows = [[*row, *(int(side[at]) for side in counts)] for row, at in zip(rows, kept_rows, strict=True)]
    return {
        "reduction": reduction,
        "gamma": gamma,
        "beta": beta,
        "constraint": constraint,
        "split": split,
        **({"left_out": left_out} if left_out else {}),
        **({"trained_on_left_out": trained_on} if trained_on else {}),
        **({"slices": {name: [values[at] for at in kept_rows] for name, values in columns.items()}} if columns else {}),
        "columns": [*PAIR_COLUMNS, *(TOKEN_COLUMNS if counts is not None else ())],
        "rows": rows,
    }


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    from importlib.metadata import version

    from .. import __version__

    names = ("trl", "transformers", "torch", "peft", "accelerate", "datasets")
    # Ours from the package, which may be run from a checkout that was never installed.
    return {"python": platform.python_version(), "trl-cpo": __version__, **{name: version(name) for name in names}}
