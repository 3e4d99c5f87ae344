"""Reads pairs.json: log-probabilities of single held-out pairs, tokens of their answers, and columns to slice them by."""

import math

import numpy as np

from ..files.run_files import KNOWN_COLUMNS, METRICS, PAIR_COLUMNS, PAIRS, TOKEN_COLUMNS
from .numbers import number
from .run import HeldOut, Run

#: More columns to slice by than this are left out.
_MOST_COLUMNS = 6


def read_pairs(run: Run, table: dict) -> None:
    """Takes the held-out pairs from what pairs.json holds; what it should not hold becomes a note."""
    columns, rows = table.get("columns"), table.get("rows")
    if not isinstance(columns, list) or not isinstance(rows, list) or not set(KNOWN_COLUMNS) <= set(map(str, columns)):
        run.notes.append(f"{PAIRS} lacks rows or one of the columns {', '.join(KNOWN_COLUMNS)}: no pictures of single pairs.")
        return
    places = {name: columns.index(name) for name in (*PAIR_COLUMNS, *TOKEN_COLUMNS) if name in columns}

    def cell(row, name: str) -> float:
        value = number(row[places[name]]) if name in places and places[name] < len(row) else None
        return math.nan if value is None else value

    def read(names: tuple[str, ...]) -> np.ndarray:
        cells = [[cell(row if isinstance(row, list) else [], name) for name in names] for row in rows]
        return np.array(cells, dtype=float).reshape(-1, len(names))

    values = read(PAIR_COLUMNS)
    # Beyond this, differences of log-probabilities are meaningless and cannot be drawn.
    values[np.abs(values) > 1e12] = np.nan
    whole, run.pairs_in_file = np.isfinite(values[:, :4]).all(axis=1), len(rows)
    if len(rows) > whole.sum():
        run.notes.append(
            f"{PAIRS}: {len(rows) - whole.sum()} of {len(rows)} pairs lack a finite log-probability. The pictures of single "
            "pairs leave them out."
        )
    if whole.any():
        tokens = _tokens(run, read(TOKEN_COLUMNS), whole) if set(TOKEN_COLUMNS) <= places.keys() else None
        run.held_out = HeldOut(values[whole], tokens, _slices(run, table.get("slices"), whole))
        if not np.isfinite(run.held_out.start_gap).all():
            run.notes.append(f"{PAIRS}: the gap before training is not known for every pair.")
    elif not rows:
        run.notes.append(f"{PAIRS} holds no pairs.")
    for setting, key in (
        ("logps_reduction", "reduction"),
        ("gamma", "gamma"),
        ("beta", "beta"),
        ("constraint", "constraint"),
    ):
        if key in table:
            known = run.settings.setdefault(setting, table[key])
            if known != table[key]:
                run.notes.append(
                    f"{PAIRS} says {key} = {table[key]!r}, but {METRICS} says {known!r}: they may be from different runs."
                )


def _tokens(run: Run, counts: np.ndarray, whole: np.ndarray) -> np.ndarray | None:
    """Tokens of the answers of the pairs that are whole, (n, 2); None, with a note, unless all are counts."""
    counts = counts[whole]
    if np.isfinite(counts).all() and (counts >= 1).all() and (counts == np.floor(counts)).all() and (counts < 1e9).all():
        return counts
    wrong = ", ".join(TOKEN_COLUMNS)
    run.notes.append(f"{PAIRS}: {wrong} must be whole numbers of 1 or more in every row; lengths are not known.")
    return None


def _slices(run: Run, got, whole: np.ndarray) -> dict[str, np.ndarray]:
    """The columns to slice by of the pairs that are whole, (n,) each; a note on those that are no such columns."""
    if got is None:
        return {}
    if not isinstance(got, dict):
        run.notes.append(f"{PAIRS}: slices must be an object of columns; got a {type(got).__name__}. It is left out.")
        return {}
    found = {}
    for name, values in list(got.items())[:_MOST_COLUMNS]:
        scalars = isinstance(values, list) and all(value is None or isinstance(value, (str, int, float)) for value in values)
        if not scalars or len(values) != len(whole):
            run.notes.append(f"{PAIRS}: the slices {name[:40]!r} must be one text or number for each of {len(whole)} rows.")
            continue
        column = np.empty(len(values), dtype=object)
        column[:] = [_within_float(value) for value in values]
        found[name] = column[whole]
    return found


def _within_float(value):
    """A value of the file, where a number is too large for a float, or infinite, as unknown."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        as_float = number(value)
        return value if as_float is not None and abs(as_float) < 1e15 else None
    return value
