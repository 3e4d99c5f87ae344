"""Configs of the recipes' models that ship with the package, so that their plans need no network."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FOLDER = Path(__file__).parent / "configs"


def known_models() -> list[str]:
    """The names, on the hub, of the models whose config ships."""
    return sorted(path.stem.replace("--", "/") for path in _FOLDER.glob("*.json"))


def known_config(name: str) -> "PretrainedConfig | None":
    """The config of a model by its name on the hub, or None if none ships. It has what decides over the model's size."""
    from transformers import AutoConfig

    if name not in known_models():
        return None
    return AutoConfig.from_pretrained(_FOLDER / f"{name.replace('/', '--')}.json")
