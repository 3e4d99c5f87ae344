"""The files that a run leaves beside its model: metrics.json and pairs.json, each written whole or not at all."""

import json
import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..pairs import PairLogps

#: The columns of pairs.json: log-probabilities in nats of the policy after training, the reference, the policy before.
COLUMNS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "start_chosen", "start_rejected")


def strict(value: Any) -> Any:
    """`value` as JSON can hold it: null for NaN and infinities, which JSON has no word for, text for unknown objects."""
    if isinstance(value, dict):
        return {str(key): strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_json(file: Path, document: dict[str, Any]) -> None:
    """Writes `document` under a name of its own beside `file`, and puts it in `file`'s place in one step.

    Killed at any moment, `file` is what it was before or the whole new document.
    """
    text = json.dumps(strict(document), indent=1, ensure_ascii=False, allow_nan=False)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            stream.write(text + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def pairs_document(
    pairs: "PairLogps",
    *,
    reduction: str,
    gamma: float,
    beta: float,
    constraint: str,
    split: str,
    start_is_reference: bool,
    degenerate: "Tensor | None" = None,
) -> dict[str, Any]:
    """What pairs.json holds: one row a held-out pair, in dataset order, its log-probabilities in nats.

    Pairs that compare no two answers have no row; where there are any, `left_out` is their number.

    Args:
        pairs: the held-out pairs as the trained policy and the reference score them, (n,) each.
        reduction: "sum" (nats per response) or "mean" (nats per token).
        gamma, beta, constraint, split: of the run.
        start_is_reference: whether the policy before training was the reference; otherwise its columns are null.
        degenerate: (n,), bool, pairs that compare no two answers; None: none is.
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
        "columns": list(COLUMNS),
        "rows": rows,
    }


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    from importlib.metadata import version

    names = ("trl-cpo", "trl", "transformers", "torch", "peft", "accelerate", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
