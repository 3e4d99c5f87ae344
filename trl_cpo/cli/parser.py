"""argparse with this project's errors: `UserError`s that offer the nearest name and end with where to look."""

import argparse

from .errors import UserError, nearest


class ClearErrors(argparse.ArgumentParser):
    """A mixin for an `ArgumentParser`: raises `UserError`s and allows no abbreviated options."""

    def __init__(self, *args, **kwargs):
        # An abbreviation that works today may become ambiguous when an option is added.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(action, f"{error.message}.{nearest(value, map(str, action.choices))}") from None

    def error(self, message):
        end = "" if message.endswith((".", "?", "!")) else "."
        raise UserError(f"{message}{end}\nAll options: {self.prog} --help")


class Parser(ClearErrors):
    """The parser of one command."""

    def parse_args(self, args=None, namespace=None):
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error("\n".join(unknown_options(unknown, option_strings(self))))
        return options


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """Every option of a parser and of its subparsers."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found += option_strings(inner)
    return found


def unknown_options(unknown: list[str], known: list[str]) -> list[str]:
    """One sentence for each unknown option, with the nearest known one.

    What follows an unknown option counts as its value and is not reported. If no unknown argument is an option,
    the first one is reported.
    """
    options = [arg.partition("=")[0] for arg in unknown if arg.startswith("--") or (arg.startswith("-") and not _number(arg))]
    if not options:
        return [f"unknown argument {unknown[0]}."]
    return [f"unknown option {option}.{nearest(option, known)}" for option in dict.fromkeys(options)]


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
