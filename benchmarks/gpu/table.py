"""The table of measured rows, beside what was predicted."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any

from .rows import ROWS, SEGMENTS, TRIAL, TRL, VARLEN, Row


def ms(record: dict[str, Any] | None, key: str = "new_s") -> float | None:
    """Milliseconds a micro-batch: the mean at new lengths, the median where lengths come again; None: not measured."""
    if record is None or key not in record:
        return None
    return 1000 * (mean if key == "new_s" else median)(record[key])


def speedup(records: dict[str, dict], arm: str = VARLEN, key: str = "new_s") -> float | None:
    """How many times DPOTrainer's speed an arm has; None where one of them was not measured."""
    theirs, ours = ms(records.get(TRL), key), ms(records.get(arm), key)
    return None if theirs is None or ours is None else theirs / ours


def _by_row(records: Sequence[dict[str, Any]]) -> list[tuple[Row, dict[str, dict], dict | None]]:
    """Rows as `rows` lists them, the records of each by arm, and DPOTrainer with checkpointing where it has none without.

    Records stand in the order in which they were measured: of a row and arm that was measured again, the last one counts.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["row"], {})[record["arm"]] = record
    rows = []
    for row in (*ROWS, *TRIAL):
        if row.name in found:
            beside = found.get(replace(row, checkpointing=True).name, {}).get(TRL)
            rows.append((row, found[row.name], None if TRL in found[row.name] else beside))
    return rows


def _on_two_machines(arms: dict[str, dict[str, Any]]) -> bool:
    """Whether DPOTrainer and varlen were measured on two machines: their ratio is then less certain."""
    return len({arms[arm].get("machine") for arm in (TRL, VARLEN) if arm in arms}) > 1


def short_table(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table for users: rows where both arms were measured; lengths that come again."""
    lines = [
        "| model | training | micro-batch | gradient checkpointing | DPOTrainer | packed | times DPOTrainer's speed | "
        "peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, arms, beside in _by_row(records):
        compared = arms if beside is None else {**arms, TRL: beside}
        faster = speedup(compared, key="again_s")
        if faster is None:
            continue
        both = [compared[arm] for arm in (TRL, VARLEN)]
        times = [f"{ms(record, 'again_s'):.0f} ms" for record in both]
        memory = " → ".join(f"{record['peak_bytes'] / 1e9:.0f}" for record in both)
        kept = "yes" if row.checkpointing else "no" if beside is None else "DPOTrainer's alone"
        batch = f"{row.pairs} pairs" + ("" if row.data == "hh" else f" of {row.data.replace('+', ' + ')}")
        training = {"lora": "LoRA", "qlora": "QLoRA"}.get(row.training, row.training)
        ratio = f"{faster:.1f}×" + (" ‡" if _on_two_machines(compared) else "")
        cells = [row.size.upper(), training, batch, kept, *times, ratio]
        lines.append("| " + " | ".join([*cells, f"{memory} GB"]) + " |")
    return "\n".join(lines)


def table(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a row a setting; times at lengths never seen before, in brackets where they come again."""
    lines = [
        "| setting | TRL, ms | varlen, ms | segments, ms | times TRL's speed | device busy, ms: TRL, varlen | useful TFLOP/s | "
        "memory, GB | predicted, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_line(*found) for found in _by_row(records)])


def _line(row: Row, arms: dict[str, dict], beside: dict | None) -> str:
    """A row of the table. `beside` is DPOTrainer with checkpointing, where it was not measured without."""
    cells = [row.name]
    for arm in (TRL, VARLEN, SEGMENTS):
        record = arms.get(arm)
        new, again = ms(record), ms(record, "again_s")
        cells.append((record or {}).get("failed", "")[:40] if new is None else f"{new:.0f} ({again:.0f})")
    compared = arms if beside is None else {**arms, TRL: beside}
    new, again = speedup(compared), speedup(compared, key="again_s")
    marks = ("" if beside is None else " †") + (" ‡" if _on_two_machines(compared) else "")
    cells.append("" if new is None else f"{new:.2f}× ({again:.2f}×){marks}")
    cells.append(", ".join(f"{1000 * arms[arm]['busy_s']:.0f}" for arm in (TRL, VARLEN) if "busy_s" in arms.get(arm, {})))
    ours = arms.get(VARLEN, {})
    again = ms(ours, "again_s")
    cells.append("" if again is None else f"{ours['useful_operations'] / again / 1e9:.0f}")
    cells.append(" → ".join(f"{(arms[arm]['peak_bytes']) / 1e9:.0f}" for arm in (TRL, VARLEN) if "new_s" in arms.get(arm, {})))
    cells.append(", ".join(f"{arm} {row.predicted[arm]:.0f}" for arm in (TRL, VARLEN) if arm in row.predicted))
    return "| " + " | ".join(cells) + " |"
