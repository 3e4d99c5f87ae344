"""What a command prints: nothing in it drives a terminal, and no failing output fails a training."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..quoting import harmless


class Output:
    """A text stream that shows control characters as their escapes, and characters that it cannot encode too.

    Once `patient`, it goes silent where the stream fails (closed, a full disk, a reader that went away).
    """

    def __init__(self, stream: Any):
        self._stream, self.patient = stream, False
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(harmless(text)))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, output: Any) -> None:
        try:
            output()
        except (OSError, ValueError):
            if not self.patient:
                raise
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_output() -> Iterator[None]:
    """Has everything that is printed pass through an `Output`; a stdout that is closed from the start takes all, silently."""
    before = sys.stdout
    if before is None:
        _open_missing()
    sys.stdout = Output(open(os.devnull, "w", encoding="utf-8") if before is None else before)  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout = before


def _open_missing() -> None:
    # The next file that is opened would get the number of a standard stream that is closed, and take its output.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


@contextmanager
def patient_output() -> Iterator[None]:
    """What is printed may fail: the work that it tells of goes on."""
    out = sys.stdout
    if not isinstance(out, Output):
        yield
        return
    out.patient = True
    try:
        yield
    finally:
        out.flush()
        out.patient = False


def silence(stream: Any) -> None:
    """Has what is still to be written go nowhere: Python flushes stdout once more at exit, and that must not fail."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
