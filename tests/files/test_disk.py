"""What a disk refuses is told from other errors, whichever library says it."""

import errno
import os

import pytest
from safetensors import SafetensorError

from trl_cpo.files.disk import refusal

LINES = {
    "Error while serializing: I/O error: No space left on device (os error 28)": "No space left on device",
    "Error while serializing: I/O error: File too large (os error 27)": "File too large",
    "Error while serializing: I/O error: Disk quota exceeded (os error 122)": "Disk quota exceeded",
    "I/O error: Read-only file system (os error 30)": "Read-only file system",
}


@pytest.mark.parametrize("line", LINES)
def test_a_library_written_in_rust_says_it_with_a_number(line):
    assert refusal(SafetensorError(line)) == f"A file cannot be written: {LINES[line]}."


def test_other_numbers_are_other_errors():
    assert refusal(SafetensorError("I/O error: No such file or directory (os error 2)")) is None


def test_pyarrow_says_it_with_a_code():
    assert refusal(OSError(errno.ENOSPC, "No space", "/a/file")) == f"/a/file cannot be used: {os.strerror(errno.ENOSPC)}."
