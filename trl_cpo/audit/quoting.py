"""Other people's text, quoted so that it can neither break a line nor drive a terminal."""


def escaped(text: str) -> str:
    r"""`text` on one line: control, format and lone surrogate characters as their escapes (`\n`, `\x1b`, `\u202e`)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def trimmed(text: str, width: int, tail: int = 0) -> str:
    """At most `width` characters of an already escaped text: its beginning, and its last `tail` characters, `…` between."""
    if len(text) <= width:
        return text
    head = width - tail - 1
    return f"{text[:head]}…{text[-tail:] if tail else ''}"


def quoted(text: str, width: int, tail: int = 0) -> str:
    """`text` escaped and trimmed."""
    return trimmed(escaped(text), width, tail)
