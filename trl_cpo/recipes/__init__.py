"""Training recipes: the YAML files of this folder. The file name is the recipe's; its first lines say what it needs."""

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """A recipe: its name, a one-line title, what it needs, and its file."""

    name: str
    title: str
    needs: str
    file: Path


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe(name: str) -> Recipe:
    """The recipe of that name; paths are not accepted.

    A recipe's file begins with `# <title>` and `# Needs: <needs>`.

    Raises:
        KeyError: there is no such recipe.
        ValueError: the file does not begin with title and needs.
    """
    if name not in names():
        raise KeyError(name)
    file = _FOLDER / f"{name}.yaml"
    title, needs = file.read_text(encoding="utf-8").splitlines()[:2]
    if not title.startswith("# ") or not needs.startswith("# Needs: "):
        raise ValueError(f"{file.name} must begin with '# title' and '# Needs: ...'; got {title!r}, {needs!r}.")
    return Recipe(name, title.removeprefix("# "), needs.removeprefix("# Needs: "), file)
