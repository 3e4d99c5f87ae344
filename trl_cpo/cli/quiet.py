"""Holds back what libraries print that is neither ours nor the user's business; `--verbose` and a failure show it."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ..quoting import harmless
from .errors import UserError

#: Python hides the first two by default and shows the third; with all of them, a library tells of its own future.
DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
#: By logger, how a message begins that says nothing about a run.
MESSAGES = {
    # Each import of bitsandbytes says it on a CPU, whether or not anything is loaded in 4 bits.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    "bitsandbytes.cextension": ("The installed version of bitsandbytes was compiled without GPU support",),
    # Goes to stdout, where DeepSpeed is installed, used or not.
    "DeepSpeed": ("Setting accelerator to CPU", "Setting ds_accelerator to"),
}
#: They are read when tqdm, datasets and huggingface_hub are imported.
NO_BARS = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")


@contextmanager
def quiet(given: Sequence[str] = ()) -> Iterator[None]:
    """Holds back deprecations and the messages above; without a terminal at stderr, progress bars too.

    A deprecation is shown if it names an option that was given. What the user set in the environment or with `python -W`
    stays. If the block raises anything but a `UserError`, all that was held back is printed before it is raised.

    Args:
        given: the words of the command line.
    """
    held: dict[str, None] = {}
    options = {word[2:].partition("=")[0].replace("-", "_") for word in given if word.startswith("--")}
    filters = [(logging.getLogger(name), _Filter(begins, held)) for name, begins in MESSAGES.items()]
    bars = [] if _is_terminal(sys.stderr) else [name for name in NO_BARS if name not in os.environ]
    os.environ.update(dict.fromkeys(bars, "1"))
    for logger, one in filters:
        logger.addFilter(one)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.showwarning = _show(warnings.showwarning, options, held)
            yield
    except UserError:
        raise
    except Exception:
        with suppress(OSError, ValueError, AttributeError):  # stderr may be closed
            sys.stderr.write("".join(f"{harmless(text)}\n" for text in held))
        raise
    finally:
        for logger, one in filters:
            logger.removeFilter(one)
        for name in bars:
            os.environ.pop(name, None)


class _Filter(logging.Filter):
    def __init__(self, begins: tuple[str, ...], held: dict[str, None]):
        super().__init__()
        self._begins, self._held = begins, held

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith(self._begins):
            return True
        self._held[text] = None
        return False


def _show(before: Any, options: set[str], held: dict[str, None]) -> Any:
    def show(message, category, filename, lineno, file=None, line=None):
        names = set(re.findall(r"\w+", str(message)))
        if file is None and issubclass(category, DEPRECATIONS) and not names & options:
            held[warnings.formatwarning(message, category, filename, lineno, line).rstrip()] = None
        else:
            before(message, category, filename, lineno, file, line)

    return show


def _is_terminal(stream: Any) -> bool:
    with suppress(AttributeError, ValueError, OSError):
        return bool(stream.isatty())
    return False
