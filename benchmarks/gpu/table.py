"""The table of measured rows, beside what was predicted."""

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from .rows import ROWS, SEGMENTS, TRIAL, TRL, VARLEN, Row

#: bfloat16 matrix products of an H200, dense, as measured; an H100's are about the same.
TFLOPS = 788.0


def ms(record: dict[str, Any] | None, key: str = "new_s") -> float | None:
    """Milliseconds a micro-batch: the mean at new lengths, the median where lengths come again; None: not measured."""
    if record is None or key not in record:
        return None
    return 1000 * (mean if key == "new_s" else median)(record[key])


def speedup(records: dict[str, dict], arm: str = VARLEN, key: str = "new_s") -> float | None:
    """How many times DPOTrainer's speed an arm has; None where one of them was not measured."""
    theirs, ours = ms(records.get(TRL), key), ms(records.get(arm), key)
    return None if theirs is None or ours is None else theirs / ours


def table(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a row a setting; times at lengths never seen before, in brackets where they come again."""
    by_row: dict[str, dict[str, dict]] = {}
    for record in records:
        by_row.setdefault(record["row"], {})[record["arm"]] = record
    known = {row.name: row for row in (*ROWS, *TRIAL)}
    lines = [
        "| setting | TRL, ms | varlen, ms | segments, ms | times TRL's speed | device busy, ms: TRL, varlen | TFLOP/s | "
        "memory, GB | predicted, ms: TRL, varlen |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_line(known[name], arms) for name, arms in by_row.items()])


def _line(row: Row, arms: dict[str, dict]) -> str:
    cells = [row.name]
    for arm in (TRL, VARLEN, SEGMENTS):
        record = arms.get(arm)
        new, again = ms(record), ms(record, "again_s")
        cells.append((record or {}).get("failed", "")[:40] if new is None else f"{new:.0f} ({again:.0f})")
    new, again = speedup(arms), speedup(arms, key="again_s")
    cells.append("" if new is None else f"{new:.2f}× ({again:.2f}×)")
    cells.append(", ".join(f"{1000 * arms[arm]['busy_s']:.0f}" for arm in (TRL, VARLEN) if "busy_s" in arms.get(arm, {})))
    ours = arms.get(VARLEN, {})
    again = ms(ours, "again_s")
    cells.append("" if again is None else f"{ours['useful_operations'] / again / 1e9:.0f}")
    cells.append(" → ".join(f"{(arms[arm]['peak_bytes']) / 1e9:.0f}" for arm in (TRL, VARLEN) if "new_s" in arms.get(arm, {})))
    cells.append(", ".join(f"{row.predicted[arm]:.0f}" for arm in (TRL, VARLEN) if arm in row.predicted))
    return "| " + " | ".join(cells) + " |"
