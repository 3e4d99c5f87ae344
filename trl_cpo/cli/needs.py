"""Packages that some options need beside those that are always installed: missed before anything is imported or loaded."""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from .errors import UserError

#: Trackers of `--report_to`, and the modules of which each needs one.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "swanlab": ("swanlab",),
}
#: The extra of this package that brings a module.
EXTRAS = {"bitsandbytes": "qlora", "deepspeed": "deepspeed", "tensorboard": "tensorboard"}


def refuse_missing(arguments: Sequence[str], recipe: Mapping[str, Any]) -> None:
    """Raises `UserError` if an option of a run needs a package that is not installed, with the command that installs it.

    Args:
        arguments: the command line.
        recipe: its keys and values; the command line overrides them.
    """
    for option, modules in needed({**recipe, **given_options(arguments)}):
        if not any(map(_is_installed, modules)):
            name = modules[0]
            package = f"'trl-cpo[{EXTRAS[name]}]'" if name in EXTRAS else name.replace("_", "-")
            raise UserError(f"{option} needs {name}, which is not installed.\nInstall it: pip install {package}")


def needed(options: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each option that needs a package, as a user would write it, and the modules of which one is enough."""
    for name in ("load_in_4bit", "load_in_8bit"):
        if is_true(options.get(name)):
            yield f"--{name}", ("bitsandbytes",)
    optim = " ".join(_words(options.get("optim")))
    if any(part in optim for part in ("8bit", "paged", "bnb")) and not optim.startswith("adamw_torch"):
        yield f"--optim {optim}", ("bitsandbytes",)
    for tracker in _words(options.get("report_to")):
        if tracker in TRACKERS:
            yield f"--report_to {tracker}", TRACKERS[tracker]
    if options.get("deepspeed"):
        yield "--deepspeed", ("deepspeed",)
    elif is_true(os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        yield "Accelerate's configuration with DeepSpeed", ("deepspeed",)


def given_options(arguments: Sequence[str]) -> dict[str, list[str]]:
    """The options of a command line and their values, unchecked: names without dashes, as in a recipe; the last one counts."""
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = given[name.replace("-", "_")] = [value] if equals else []
        else:
            values.append(word)
    return given


def _words(value: Any) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else [] if value is None else [str(value)]


def is_true(value: Any) -> bool:
    """Whether an option is on: given alone, or with a word for true."""
    if isinstance(value, list):
        value = value[0] if value else True
    return str(value).lower() in ("true", "1", "yes", "y", "t", "on")


def _is_installed(module: str) -> bool:
    return find_spec(module) is not None
