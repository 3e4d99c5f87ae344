"""Reads a run's options from a recipe and the command line, with TRL's parser and option names; refuses unknown ones."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from trl import TrlParser

from ..files.schema import shown
from ..run.arguments import PairArguments, PolicyConfig, RunConfig
from .errors import UserError, nearest
from .parser import ClearErrors, hint, option_strings, unknown_options
from .recipe_files import read_config

GROUPS = (PairArguments, RunConfig, PolicyConfig)


class RunParser(ClearErrors, TrlParser):
    """TRL's parser of a run's options, with this project's errors."""


def run_parser(program: str) -> RunParser:
    """The parser of all options of a run."""
    return RunParser(GROUPS, prog=program)


def parse_run(
    arguments: Sequence[str], config: str | None, program: str = "trl-cpo train"
) -> tuple[PairArguments, RunConfig, PolicyConfig]:
    """The options of a run: those of the recipe, if any, overridden by the command line.

    Args:
        arguments: the command line, without `--config`.
        config: a YAML file or a recipe's name.
        program: its name in error messages.

    Raises:
        UserError: an option or a key of the recipe is unknown, given twice, or has an invalid value.
    """
    parser = run_parser(program)
    not_taken: dict[str, float] = {}
    if config is not None:
        values = read_config(config)
        environment = _environment(values.pop("env", None), f"{config}: env", program)
        values = checked(values, parser, config)
        not_taken = _of_another_reduction(values, parser, arguments)
        parser.set_defaults_with_config(**{name: value for name, value in values.items() if name not in not_taken})
        os.environ.update(environment)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            list(arguments), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError, OSError, OverflowError) as error:
        # The dataclasses check themselves; their messages say what is wrong.
        raise UserError(f"{error}\nAll options: {program} --help") from error
    if unknown:
        parser.error("\n".join(unknown_options(unknown, [*option_strings(parser), "--config"])))
    pairs, args, policy = parsed
    args.not_taken = not_taken
    return pairs, args, policy


def _of_another_reduction(values: dict[str, Any], parser: RunParser, arguments: Sequence[str]) -> dict[str, float]:
    """β and γ of a recipe whose unit the command line changes: nats per response and per token differ a hundredfold."""
    recipes = values.get("logps_reduction", RunConfig.logps_reduction)
    parser.set_defaults_with_config(logps_reduction=recipes)
    runs = parser.parse_known_args(list(arguments))[0].logps_reduction
    return {} if runs == recipes else {name: values[name] for name in ("beta", "gamma") if name in values}


def _environment(given: Any, where: str, program: str) -> dict[str, str]:
    """Names and values that the environment takes. A value may be a secret: none is in the message."""
    faults = []
    if not isinstance(given or {}, dict):
        faults.append(f"must map names to values; got a {type(given).__name__}")
        given = {}
    for name, value in (given or {}).items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            faults.append(f"names are letters, digits and _; got {shown(name)}")
        elif not isinstance(value, (str, int, float)) or "\0" in str(value):
            faults.append(f"value of {name} must be a text or a number; got a {type(value).__name__}")
    if faults:
        raise UserError(f"{where} {'; '.join(faults)}.\nAll options: {program} --help")
    return {name: str(value) for name, value in (given or {}).items()}


def checked(values: dict[str, Any], parser: argparse.ArgumentParser, config: str) -> dict[str, Any]:
    """The values, converted as TRL's parser converts those of the command line.

    TrlParser takes YAML's values unchecked: `save_strategy: no`, which YAML reads as false, or `learning_rate: fast` would
    fail much later or never. Raises one `UserError` that lists every unknown key and bad value.
    """
    hints = {name: hint for group in GROUPS for name, hint in get_type_hints(group).items()}
    known = [field.name for group in GROUPS for field in fields(group) if field.init]
    actions = {action.dest: action for action in reversed(parser._actions)}
    taken, faults = {}, []
    for key, value in values.items():
        if key not in known:
            faults.append(f"unknown key {shown(key)}.{hint(str(key), known)}")
            continue
        try:
            taken[key] = _value(value, actions[key], hints[key])
        except ValueError as error:
            faults.append(f"{key}: {error}")
    if faults:
        raise UserError(f"{config}: " + "\n".join(faults) + "\nAll options: trl-cpo train --help-all")
    return taken


def _value(value: Any, action: argparse.Action, hint: Any) -> Any:
    kinds = {getattr(kind, "__origin__", kind) for kind in (get_args(hint) or (hint,))}
    if value is None:
        if type(None) not in kinds:
            raise ValueError("needs a value; got none")
        return None
    if isinstance(value, dict):
        if dict not in kinds and str not in kinds:
            raise ValueError(f"must be one value; got {shown(value)}")
        return value
    if isinstance(value, list):
        if action.nargs == "+":
            return [_scalar(each, action, kinds) for each in value]
        if list not in kinds:
            raise ValueError(f"must be one value; got the list {shown(value)}")
        return value
    scalar = _scalar(value, action, kinds)
    if isinstance(value, str) and "\0" in value:
        raise ValueError("holds the character NUL, which no option takes")
    return [scalar] if action.nargs == "+" else scalar


def _scalar(value: Any, action: argparse.Action, kinds: set) -> Any:
    if isinstance(value, bool) and bool in kinds:
        return value
    if isinstance(value, bool) and str in kinds:
        words = "no, off and False" if value is False else "yes, on and True"
        raise ValueError(f"must be text; YAML reads {words} as true or false: put the word in quotes")
    if isinstance(value, int) and abs(value) > 2**64:
        raise ValueError(f"is too large for any option; got {shown(value)}")
    try:
        converted = action.type(str(value)) if action.type else value
    except (ValueError, TypeError, OverflowError, argparse.ArgumentTypeError):
        name = getattr(action.type, "__name__", "value")
        wanted = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}.get(name, name)
        raise ValueError(f"must be {wanted}; got {shown(value)}") from None
    if action.choices is not None and converted not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise ValueError(f"must be one of {', '.join(choices)}; got {shown(value)}.{nearest(value, choices)}")
    return converted
