"""Errors that the user can mend: `UserError`, the nearest valid name, and which other exceptions count as such."""

import difflib
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


class UserError(Exception):
    """A wrong command, option or input.

    The message says what was got and what is allowed, and ends with the next command. `trl-cpo` prints it without a
    traceback and exits with 2.
    """


# As gloo and NCCL say that the process at the other end is gone.
_LOST = re.compile(r"[Cc]onnection (closed|reset) by peer|remote process exited|remote worker crashing")


def lost_process(error: BaseException) -> bool:
    """Whether an error only says that another process of a launch has ended."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def nearest(got: str, allowed: Iterable[str]) -> str:
    """Returns ` Did you mean X?` with the nearest allowed name, or an empty string if none is near."""
    close = difflib.get_close_matches(str(got), list(allowed), n=1)
    return f" Did you mean {close[0]}?" if close else ""


@contextmanager
def user_errors(next_command: str) -> Iterator[None]:
    """Turns this package's own refusals into `UserError`s that end with `next_command`; lets other errors pass.

    A refusal is a `DemoModelError`, or a `ValueError`, `TypeError`, `ImportError`, `OSError` or `FloatingPointError` raised
    by a module of this package. The same types raised by a library keep their traceback: the user may be unable to mend
    them.
    """
    from ..data.demo.model import DemoModelError

    try:
        yield
    except DemoModelError as error:
        raise UserError(f"{error}\n{next_command}") from error
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.is_relative_to(_PACKAGE) or isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"{error}\n{next_command}") from error
