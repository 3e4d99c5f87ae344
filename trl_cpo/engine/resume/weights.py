"""The weights of a checkpoint, in a model whose files name them otherwise than the model does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoints import CheckpointError


def not_loaded(model: torch.nn.Module, missing: Sequence[str]) -> list[str]:
    """Of the names that loading missed, those of weights that are now not the checkpoint's.

    A tied weight is stored under one of its names, and names that the model leaves out on purpose are no loss.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    gone = set(missing) - ignored
    names: dict[int, list[str]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
    alone = [name for tied in names.values() if gone.issuperset(tied) for name in tied]
    known = {name for tied in names.values() for name in tied}
    return sorted({*alone, *(gone - known)})


def load_as_saved(model: Any, folder: str | Path) -> None:
    """Loads a checkpoint's weights through the model's class, which knows the names that it saves under.

    transformers saves some models (Llava, for one) under the names of an earlier layout, and its trainer loads a checkpoint by
    the present names: nothing is loaded, and only a warning says so. Weights are read in float32 and become what they were,
    to the bit.

    Raises:
        CheckpointError: some weights are still not there.
    """
    loaded, about = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    # What it does not find it makes up.
    missing = not_loaded(loaded, sorted(about["missing_keys"]))
    if not missing:
        missing = not_loaded(model, model.load_state_dict(loaded.state_dict(), strict=False).missing_keys)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{folder} holds no weights for {', '.join(missing[:3])}{more}, which the model has: going on would train from "
            "other weights than were saved. It is of another model; resume with the model that wrote it."
        )
