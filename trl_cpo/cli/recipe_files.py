"""The file behind `--config`. Imports nothing heavy, so that a misspelt name is answered at once."""

from pathlib import Path
from typing import Any

from ..recipes import names, recipe
from .errors import UserError, nearest
from .plain_yaml import YamlError, read_yaml


def config_file(name: str) -> Path:
    """The file that `--config NAME` means: the file NAME, else the recipe NAME."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in names():
        return recipe(name).file
    what = "is a folder" if path.is_dir() else "is neither a file nor a recipe"
    raise UserError(
        f"--config {name} {what}; the recipes are {', '.join(names())}.{nearest(name, names())}\nWhat they do: trl-cpo recipes"
    )


def read_config(name: str) -> dict[str, Any]:
    """The keys and values of a YAML file or recipe. Raises `UserError` if it is not YAML, or not a mapping."""
    file = config_file(name)
    try:
        values = read_yaml(file)
    except YamlError as error:
        raise UserError(f"{file} {error}.\nAn example: trl-cpo recipes copy demo") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.\nAn example: trl-cpo recipes copy demo") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{file} must hold 'option: value' lines; got {type(values).__name__}.\nAn example: trl-cpo recipes copy demo"
        )
    return values
