"""What goes wrong by the user's hand: one exception, the nearest right name, and which other exceptions count as that."""

import difflib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


class UserError(Exception):
    """A wrong command, option or input: its message says what was got, what is allowed, and ends with the next command.

    `trl-cpo` prints the message without a traceback and exits with 2.
    """


def nearest(got: str, allowed: Iterable[str]) -> str:
    """` Did you mean X?` with the nearest of the allowed names, or the empty string where none is near."""
    close = difflib.get_close_matches(str(got), list(allowed), n=1)
    return f" Did you mean {close[0]}?" if close else ""


@contextmanager
def user_errors(next_command: str) -> Iterator[None]:
    """Turns this package's own refusals into `UserError`s that end with `next_command`; other errors pass as they are.

    A refusal is a `ValueError`, `TypeError`, `ImportError`, `OSError` or `FloatingPointError` that a module of this package
    raised itself, with a sentence for people, or an error of the embedded model. The same types out of a library are not
    for the user alone to mend, and keep their traceback.
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
