"""Other people's text, shown so that it can neither break a line nor drive a terminal."""

import json
import re
import unicodedata
from typing import Any


def escaped(text: str) -> str:
    r"""`text` on one line: control, format and lone surrogate characters as their escapes (`\n`, `\x1b`, `\u202e`)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def harmless(text: str) -> str:
    """`text` with its lines and its blanks as they are, and every other character that a terminal may act on escaped."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs" else escaped(c) for c in text)


def names(found: Any) -> str:
    """Names out of a file, listed on one line."""
    return ", ".join(escaped(str(name)) for name in found)


def as_json(document: Any) -> str:
    """`document` as JSON in which a terminal finds nothing to act on, and which says the same."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"[^\n -~]+", lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def trimmed(text: str, width: int, tail: int = 0) -> str:
    """At most `width` characters of an already escaped text: its beginning, and its last `tail` characters, `…` between."""
    if len(text) <= width:
        return text
    head = width - tail - 1
    return f"{text[:head]}…{text[-tail:] if tail else ''}"


def quoted(text: str, width: int, tail: int = 0) -> str:
    """`text` escaped and trimmed."""
    return trimmed(escaped(text), width, tail)
