"""Pairs to token ids and log-probabilities, by the trainer that would train on them: its preparation, its forward."""

import gc
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from ..audit.preflight import TokenPairs, Truncation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

#: Columns that decide what the model sees; all others are put aside before the trainer is made.
_SEEN_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
#: The column that carries a pair's number in its source through the preparation.
ROW = "trl_cpo_row"


class AuditError(ValueError):
    """A model or set that cannot be audited: what was got, what is allowed, what to do."""


@dataclass(frozen=True)
class Scorer:
    """How pairs are tokenized and scored; the fields are CPOConstrainedConfig's, and decide what training would see too."""

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    dtype: str = "float32"
    prefix_sharing: bool | None = None
    batch_size: int = 8
    trust_remote_code: bool = False
    options: dict = field(default_factory=dict)

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.max_length, self.truncation_mode)

    def config(self, folder: str):
        """The trainer's configuration. The constraint does not change a log-probability, but is not "none", under which
        the trainer pads and batches as DPOTrainer does."""
        from ..config import CPOConstrainedConfig

        return CPOConstrainedConfig(
            folder,
            constraint="clip",
            max_length=self.max_length,
            truncation_mode=self.truncation_mode,
            prefix_sharing=self.prefix_sharing,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=self.batch_size,
            model_init_kwargs={"dtype": self.dtype},
            trust_remote_code=self.trust_remote_code,
            report_to="none",
            save_on_each_node=True,  # several processes need not have the same folder, which each makes for itself
            **self.options,
        )

    def tokenizer(self, model: str) -> "PreTrainedTokenizerBase":
        """The tokenizer that training would use. Raises `AuditError` if there is none, or a processor of images."""
        from transformers import PreTrainedTokenizerBase

        from .._trl.models import load_processing_class

        args = SimpleNamespace(model_init_kwargs=None, trust_remote_code=self.trust_remote_code)
        try:
            found = load_processing_class(model, args)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise AuditError(
                f"Cannot load a tokenizer for {model}: {reason} Give --model a folder written by save_pretrained (with its "
                "tokenizer), a name on the hub (needs a network or the local cache), or 'demo'."
            ) from error
        if not isinstance(found, PreTrainedTokenizerBase):
            raise AuditError(f"{model} reads more than text ({type(found).__name__}), and the audit is for text alone.")
        return found

    def prepare(self, pairs: "Dataset", tokenizer: "PreTrainedTokenizerBase", name: str) -> "PreparedPairs":
        """Token ids as DPOTrainer makes them; the pairs that it would drop are left out.

        Raises:
            ValueError: the pairs, or the tokenizer for them, lack something, or no pair is left.
        """
        from trl.data_utils import is_conversational

        from .._trl.datasets import TOKENIZED_COLUMNS, prompt_alone, tokenized
        from ..data import validation as checks

        checks.check_preference_dataset(pairs, name)
        checks.check_tokenizer(tokenizer, is_conversational(pairs[0]))
        seen = pairs.select_columns([column for column in (*_SEEN_COLUMNS, ROW) if column in pairs.column_names])
        with tempfile.TemporaryDirectory() as folder:
            prepared = tokenized(seen, tokenizer, self.config(folder), name)
        checks.check_not_all_dropped(prepared, name, self.max_length)
        ids = {column: prepared[column][:] for column in TOKENIZED_COLUMNS}
        tokens = TokenPairs(*ids.values(), rows=prepared[ROW][:])
        return PreparedPairs(
            given=len(pairs),
            seen=seen.remove_columns(ROW),
            tokens=tokens,
            row_of=prepared.__getitem__,
            prompt_alone=lambda at: prompt_alone(tokenizer, prepared[at]),
        )

    def score(
        self, model: str, sets: dict[str, "Dataset"], tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Summed log-probabilities in nats of the chosen and rejected answers of each set, in its order, (n,) each.

        As the trainer precomputes its reference: packed where that fits, shared by all processes, kept and found again.

        Raises:
            AuditError: there is no such model.
        """
        from ..trainer import CPOConstrainedTrainer

        first, *others = sets
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # What the trainer warns of in the pairs is in the preflight.
            warnings.filterwarnings("ignore", message="Of the .* pairs of the .* dataset")
            trainer = CPOConstrainedTrainer(
                model=self._loaded(model),
                args=self.config(folder),
                train_dataset=sets[first],
                eval_dataset={name: sets[name] for name in others} or None,
                processing_class=tokenizer,
            )
        scored = {first: trainer.train_dataset, **(trainer.eval_dataset or {})}
        columns = ("ref_chosen_logps", "ref_rejected_logps")
        logps = {
            name: tuple(np.asarray(pairs[column][:], dtype=np.float64) for column in columns) for name, pairs in scored.items()
        }
        # A second model is loaded next, and the two need not fit together.
        del trainer, scored
        gc.collect()
        return logps

    def check_same_vocabulary(self, model: str, ref_model: str) -> None:
        """Raises `ValueError` if the two models score different vocabularies."""
        from ..data import validation as checks

        checks.check_vocabularies(self._config_of(model), SimpleNamespace(config=self._config_of(ref_model)))

    def _config_of(self, model: str):
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(base_of_adapter(model) or model, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise AuditError(
                f"Cannot load the model {model}: {reason} Give a folder written by save_pretrained, a name on the hub (needs a "
                "network or the local cache), or 'demo'."
            ) from error

    def _loaded(self, model: str):
        """What the trainer is given as its model: the name itself, or an adapter on its base."""
        if base_of_adapter(model) is None:
            self._config_of(model)
            return model
        import torch
        from peft import AutoPeftModelForCausalLM

        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        return AutoPeftModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class PreparedPairs:
    """A set as the trainer would see it: how many pairs were given, the columns it reads, and the ids of those it keeps.

    `row_of` gives the columns of a kept pair, `prompt_alone` the ids of its prompt by itself.
    """

    given: int
    seen: "Dataset"
    tokens: TokenPairs
    row_of: Callable[[int], dict]
    prompt_alone: Callable[[int], list[int]]


def base_of_adapter(model: str) -> str | None:
    """The base model that a folder with a PEFT adapter names, or None where it is no such folder."""
    file = Path(model) / "adapter_config.json"
    if not file.is_file() or (Path(model) / "config.json").is_file():
        return None
    base = json.loads(file.read_text()).get("base_model_name_or_path")
    if not base:
        raise AuditError(f"{file} names no base model (base_model_name_or_path). Merge the adapter and audit the merged model.")
    return base


def end_tokens(model: str, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The ids that end an answer: the tokenizer's EOS, and those of the model's generation_config where there is one."""
    from transformers import GenerationConfig

    ends = [tokenizer.eos_token_id]
    try:
        known = GenerationConfig.from_pretrained(base_of_adapter(model) or model).eos_token_id
        ends += known if isinstance(known, list) else [known]
    except OSError:
        pass
    return {token for token in ends if token is not None}
