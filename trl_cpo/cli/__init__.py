"""The command line: `trl-cpo <command>`, also `python -m trl_cpo <command>`.

Each command is a module of this package, named in `COMMANDS` and imported only when it runs. It defines

- `HELP`: one line;
- `add_arguments(parser)`: imports nothing heavy, so that `--help` answers at once;
- `run(options) -> int`: returns the exit code or raises `UserError`;
- `PASSES_ON = True` if it hands options on to TRL's parser; arguments that `parser` does not know are then in
  `options.passed_on`.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec

from ..quoting import harmless
from .errors import UserError, nearest
from .output import safe_output, silence
from .parser import Parser
from .quiet import quiet

#: Each command and its module in this package, in the order of `trl-cpo --help`.
COMMANDS = {
    "train": "train",
    "recipes": "recipes",
    "plan": "plan",
    "audit": "audit",
    "votes": "votes",
    "certify": "certify",
    "stress": "stress",
    "report": "report",
}

#: Exit codes, as docs/cli.md lists them.
DONE, DOES_NOT_HOLD, WRONG_USE, UNEXPECTED, INTERRUPTED = 0, 1, 2, 3, 130

PROGRAM = "trl-cpo"


def available() -> list[str]:
    """The commands whose modules are installed."""
    return [name for name, module in COMMANDS.items() if find_spec(f"{__name__}.{module}")]


def overview() -> str:
    """What `trl-cpo --help` prints."""
    lines = [
        f"usage: {PROGRAM} COMMAND [options]",
        "",
        "DPO with a constraint on the preference gap: Constrained Preference Optimization (arXiv 2605.20834) for TRL.",
        "",
        "commands:",
    ]
    for name in available():
        told = import_module(f".{COMMANDS[name]}", __name__).HELP.rstrip(".")
        lines.append(f"  {name:<9} {told[0].lower()}{told[1:]}")
    lines += [
        "",
        f"  {PROGRAM} COMMAND --help   options of a command",
        f"  {PROGRAM} --version        this version",
        "",
        "exit codes: 0 done; 1 what was asked does not hold; 2 wrong usage or input; 3 unexpected error;",
        "            130 interrupted; 143 ended by SIGTERM",
    ]
    return "\n".join(lines)


def command_parser(name: str) -> Parser:
    """The parser of one command."""
    module = import_module(f".{COMMANDS[name]}", __name__)
    parser = Parser(prog=f"{PROGRAM} {name}", description=module.HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    parser.add_argument("--verbose", action="store_true", help="show what libraries print too: deprecations, progress bars")
    return parser


def _run(argv: Sequence[str]) -> int:
    if not argv:
        raise UserError(f"no command given; the commands are {', '.join(available())}.\nWhat they do: {PROGRAM} --help")
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(overview())
        return DONE
    if name == "--version":
        from .. import __version__

        print(f"{PROGRAM} {__version__}")
        return DONE
    if name not in available():
        kind = "option" if name.startswith("-") else "command"
        raise UserError(
            f"unknown {kind} {name}; the commands are {', '.join(available())}.{nearest(name, available())}\n"
            f"What they do: {PROGRAM} --help"
        )
    module, parser = import_module(f".{COMMANDS[name]}", __name__), command_parser(name)
    if getattr(module, "PASSES_ON", False):
        options, passed_on = parser.parse_known_args(rest)
        options.passed_on = passed_on
    else:
        options = parser.parse_args(rest)
    with nullcontext() if options.verbose else quiet(rest):
        return module.run(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 does not hold, 2 wrong use, 3 unexpected, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = f"{PROGRAM} {argv[0]}" if argv and argv[0] in COMMANDS else PROGRAM

    def tell(text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # stderr may be closed
            print(harmless(text), file=sys.stderr)

    with safe_output():
        try:
            code = _run(argv)
            sys.stdout.flush()
            return code
        except UserError as error:
            tell(f"{name}: {error}")
            return WRONG_USE
        except KeyboardInterrupt as stop:
            # With a message, it is a command's own and says what to do next.
            tell(f"{name}: interrupted" + (f". {stop}" if str(stop) else ""))
            return INTERRUPTED
        except BrokenPipeError:
            # The reader (head, less) has closed the pipe.
            silence(sys.stdout)
            return DONE
        except Exception:
            tell(f"{traceback.format_exc()}{name}: unexpected error; the traceback is above")
            return UNEXPECTED
