"""Models by the names that users give: a name on the hub, a folder (an adapter's too), or "demo"."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .demo import DEMO

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class ModelError(ValueError):
    """A model that cannot be used: what was got, what is allowed, what to do."""


def source_of(name: str) -> str:
    """What `from_pretrained` loads the model called `name` from: the demo's folder, made if need be, or the name itself."""
    if name != DEMO:
        return name
    from .demo.model import demo_model_folder

    return str(demo_model_folder())


def read_config(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False, option: str = "--model"
) -> "PretrainedConfig":
    """The config of a model; no weights are looked for.

    Args:
        option: the command-line option that takes the model, for the message.

    Raises:
        ModelError: there is no model of that name or in that folder, or an adapter alone.
    """
    from transformers import AutoConfig

    refuse_adapter(source)
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"Cannot load the model {source}: {first_line(error)} Give {option} a folder written by save_pretrained, a name "
            f"on the hub (needs a network or the local cache), or {DEMO!r}."
        ) from error


def base_of_adapter(source: str) -> str | None:
    """The base model that a folder with a PEFT adapter names, or None where it is no such folder.

    Raises:
        ModelError: the adapter names no base model.
    """
    file = Path(source) / "adapter_config.json"
    if not file.is_file() or (Path(source) / "config.json").is_file():
        return None
    base = json.loads(file.read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{file} names no base model (base_model_name_or_path). Merge the adapter and give the merged model.")
    return base


def refuse_adapter(source: str) -> None:
    """Raises `ModelError` if a folder holds an adapter alone, which is no model to train or to measure."""
    base = base_of_adapter(source)
    if base is not None:
        raise ModelError(
            f"{source} is an adapter on {base}, not a model. Merge it into its base and give the folder of the merged model: "
            f"AutoPeftModelForCausalLM.from_pretrained({source!r}).merge_and_unload().save_pretrained(FOLDER), and the "
            "tokenizer with it. To train the adapter itself further, pass the trainer a model in Python: "
            f"AutoPeftModelForCausalLM.from_pretrained({source!r}, is_trainable=True)."
        )


def end_tokens(source: str, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The ids that end an answer: the tokenizer's EOS, and those of the model's generation_config where there is one."""
    from transformers import GenerationConfig

    ends = [tokenizer.eos_token_id]
    try:
        known = GenerationConfig.from_pretrained(base_of_adapter(source) or source).eos_token_id
        ends += known if isinstance(known, list) else [known]
    except OSError:
        pass
    return {token for token in ends if token is not None}


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
