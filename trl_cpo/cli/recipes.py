"""`trl-cpo recipes`: the training recipes that ship with the package."""

import argparse
import json
from pathlib import Path

from ..recipes import names, recipe
from .errors import UserError, nearest

HELP = "List the training recipes, or copy one to change it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "trl-cpo recipes                       list them\n"
        "trl-cpo recipes copy demo             write demo.yaml here\n"
        "trl-cpo recipes copy demo mine.yaml   write mine.yaml\n"
        "trl-cpo train --config demo           run one as it is"
    )
    parser.add_argument("--json", action="store_true", help="list them as one JSON document")
    verbs = parser.add_subparsers(dest="verb", metavar="copy", title="verbs")
    copy = verbs.add_parser("copy", help="copy a recipe to a new file", allow_abbrev=False)
    copy.add_argument("name", metavar="NAME", help="a recipe's name")
    copy.add_argument("file", metavar="FILE", nargs="?", help="new file (default: NAME.yaml in this folder)")


def run(options: argparse.Namespace) -> int:
    if options.verb == "copy":
        print(copied(options.name, options.file))
        return 0
    recipes = [recipe(name) for name in names()]
    if options.json:
        print(json.dumps([{"name": r.name, "title": r.title, "needs": r.needs, "file": str(r.file)} for r in recipes]))
        return 0
    for each in recipes:
        print(f"{each.name}\n    {each.title}\n    needs {each.needs}")
    print("\nRun one: trl-cpo train --config NAME [options]; change one: trl-cpo recipes copy NAME")
    return 0


def copied(name: str, to: str | None) -> Path:
    """Copies a recipe to a file that does not exist yet and returns its path. Raises `UserError` if it exists."""
    if name not in names():
        raise UserError(
            f"no recipe {name}; the recipes are {', '.join(names())}.{nearest(name, names())}\nWhat they do: trl-cpo recipes"
        )
    target = Path(to or f"{name}.yaml").expanduser()
    if target.is_dir():
        target = target / f"{name}.yaml"
    text = recipe(name).file.read_text(encoding="utf-8")
    try:
        # "x" creates the file or fails, even if another program creates it at the same moment.
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(
            f"{target} exists and is not overwritten.\nUse another name: trl-cpo recipes copy {name} my-{name}.yaml"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror}.\nWrite it elsewhere: trl-cpo recipes copy {name} FILE"
        ) from None
    return target
