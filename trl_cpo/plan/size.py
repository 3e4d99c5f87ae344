"""Reads and writes amounts of memory, such as 24GB."""

import re

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: str) -> float:
    """Bytes of "24GB", "24 GiB" or "80g" (GB). Raises `ValueError` for anything else, also a number without a unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else ""
    unit = f"{unit}b" if unit in ("k", "m", "g", "t") else unit
    if match is None or unit not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"must be an amount of memory above 0 with its unit, such as 24GB, 80GiB or 512MB; got {text!r}.")
    return float(match[1]) * _UNITS[unit]


def shown(amount: float) -> str:
    """Bytes in GB (one decimal) or MB (none)."""
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.0f} MB"
