"""Pairs to token ids and log-probabilities, as training would have them: without a trainer, tokenized once."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from ..data.models import ModelError, base_of_adapter, first_line, read_config
from .token_pairs import TokenPairs, Truncation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..engine.reference import ScoreTable

#: Columns that decide what the model sees; all others are put aside before the pairs are tokenized.
_SEEN_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
#: The column that carries a pair's number in its source through the preparation.
ROW = "trl_cpo_row"


@dataclass(frozen=True)
class PreparedPairs:
    """A set as training would see it.

    Attributes:
        given: how many pairs it had before those were dropped whose prompt fills max_length.
        dataset: those that are left, tokenized.
        tokens: their token ids.
        prompt_alone: position of a pair to the ids of its prompt by itself.
        tokens_of_others: position of a pair to the tokens of its two answers that are in turns not the assistant's.
    """

    given: int
    dataset: "Dataset"
    tokens: TokenPairs
    prompt_alone: Callable[[int], list[int]]
    tokens_of_others: Callable[[int], tuple[int, ...]]


@dataclass(frozen=True)
class Scorer:
    """How pairs are tokenized and scored; the fields are CPOConstrainedConfig's, and decide what training would see too.

    `options` are further fields of it.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    dtype: str = "float32"
    prefix_sharing: bool | None = None
    batch_size: int = 8
    trust_remote_code: bool = False
    assistant_turns_only: bool = False
    options: dict = field(default_factory=dict)

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.max_length, self.truncation_mode)

    def config(self):
        """The configuration that training would have: of the processes, their precision, and how rows are cut."""
        from ..config import CPOConstrainedConfig
        from ..engine.config import has_bf16

        own = dict(self.options)
        if own.get("bf16") is None and not own.get("fp16") and not has_bf16(own.get("use_cpu", False)):
            own["bf16"] = False  # as training, which would say so
        return CPOConstrainedConfig(
            max_length=self.max_length,
            truncation_mode=self.truncation_mode,
            prefix_sharing=self.prefix_sharing,
            model_init_kwargs={"dtype": self.dtype},
            trust_remote_code=self.trust_remote_code,
            assistant_turns_only=self.assistant_turns_only,
            report_to="none",
            **own,
        )

    def cut(self) -> SimpleNamespace:
        """What of `config` decides over tokens and batches. Makes no configuration, which would reset Accelerate's state."""
        own = self.options
        return SimpleNamespace(
            max_length=self.max_length,
            truncation_mode=self.truncation_mode,
            dataset_num_proc=own.get("dataset_num_proc"),
            pad_to_multiple_of=own.get("pad_to_multiple_of"),
        )

    def tokenizer(self, source: str) -> "PreTrainedTokenizerBase":
        """The tokenizer that training would use. Raises `ModelError` if there is none, or a processor of images."""
        from transformers import PreTrainedTokenizerBase

        from .._trl.models import load_processing_class

        args = SimpleNamespace(model_init_kwargs=None, trust_remote_code=self.trust_remote_code)
        try:
            found = load_processing_class(source, args)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"Cannot load a tokenizer for {source}: {first_line(error)} Give --model a folder written by save_pretrained "
                "(with its tokenizer), a name on the hub (needs a network or the local cache), or 'demo'."
            ) from error
        if not isinstance(found, PreTrainedTokenizerBase):
            raise ModelError(f"{source} reads more than text ({type(found).__name__}), and only text can be scored.")
        return found

    def prepare(self, pairs: "Dataset", tokenizer: "PreTrainedTokenizerBase", name: str) -> PreparedPairs:
        """Token ids as DPOTrainer makes them; the pairs that it would drop are left out.

        Args:
            pairs: with their numbers in the column `ROW`.
            name: of the set, for people.

        Raises:
            ValueError: the pairs, or the tokenizer for them, lack something, or no pair is left.
        """
        from .._trl.datasets import TOKENIZED_COLUMNS, holds_messages, prompt_alone, tokenized, tokens_of_other_turns
        from .._trl.turns import with_turn_masks
        from ..data import validation as checks
        from ..data.rows import TURN_MASKS

        checks.check_preference_dataset(pairs, name)
        checks.check_tokenizer(tokenizer, holds_messages(pairs[0]))
        seen = pairs.select_columns([column for column in (*_SEEN_COLUMNS, ROW) if column in pairs.column_names])
        if self.assistant_turns_only:
            checks.check_has_turns(pairs, name)
        prepared = tokenized(seen, tokenizer, self.cut(), name)
        checks.check_not_all_dropped(prepared, name, self.max_length)
        if self.assistant_turns_only:
            prepared = with_turn_masks(prepared, tokenizer, name)
        holes = all(column in prepared.column_names for column in TURN_MASKS)
        masks = (prepared[TURN_MASKS[0]][:], prepared[TURN_MASKS[1]][:]) if holes else None
        prompt, chosen, rejected = (prepared[column][:] for column in TOKENIZED_COLUMNS)
        text = prepared.select_columns([column for column in _SEEN_COLUMNS if column in prepared.column_names])
        return PreparedPairs(
            given=len(pairs),
            dataset=prepared,
            tokens=TokenPairs(prompt, chosen, rejected, prepared[ROW][:], masks),
            prompt_alone=lambda at: prompt_alone(tokenizer, prepared[at]),
            tokens_of_others=lambda at: tuple(
                tokens_of_other_turns(tokenizer, text[at], side) for side in ("chosen", "rejected")
            ),
        )

    def score(
        self, source: str, sets: dict[str, PreparedPairs], tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Summed log-probabilities in nats of the chosen and rejected answers of each set, in its order, (n,) each.

        As training precomputes its reference: packed where that fits, shared by all processes, kept and found again. Every
        process calls it.

        Raises:
            ModelError: there is no such model, or it cannot be scored.
            ProcessesDisagree: the processes were started with other settings or pairs.
        """
        from ..data import validation as checks
        from ..engine import processes
        from ..engine.shutdown import pause_at_exit

        args = self.config()
        processes.check_launch(args)
        fit = checks.VocabularyFit(tokenizer, self._config_of(source))
        fit.check_padding()
        datasets = {name: fit.checked(prepared.dataset, name) for name, prepared in sets.items()}
        configs = {"model": lambda: self._config_of(source)}
        processes.check_agreement(lambda: processes.facts_of(args, configs=configs, datasets=datasets))
        pause_at_exit()
        tables = self._tables(source, datasets, tokenizer, args)
        # A second model may be loaded next, and the two need not fit together.
        gc.collect()
        return {
            name: (table.chosen_logps.astype(np.float64), table.rejected_logps.astype(np.float64))
            for name, table in tables.items()
        }

    def _tables(self, source: str, datasets: "dict[str, Dataset]", tokenizer, args) -> "dict[str, ScoreTable]":
        from .._trl import reference as seam
        from ..engine.forward.sharing import PrefixSharing
        from ..engine.model_state import keep_trainable
        from ..engine.reference import ReferenceSource, ReferenceTables

        collator, model = self.collator(tokenizer, args), self._load(source, args)
        keep_trainable(model)
        accelerator = seam.accelerator_of(args)
        reference = seam.prepare_reference(model, tokenizer.pad_token_id, args, accelerator)
        sharing = PrefixSharing(self.prefix_sharing, args.max_length, verbose=args.process_index == 0)
        with seam.engine_of(reference, accelerator) as engine:
            tables = ReferenceTables()
            scored = ReferenceSource(
                reference=reference,
                accelerator=accelerator,
                collator=collator,
                engine=engine,
                logps=lambda model, batch: seam.summed_logps(reference, sharing.of(model), batch, args, accelerator),
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                ld_alpha=args.ld_alpha,
                shows_progress=not args.disable_tqdm,
            )
            packed = self.prefix_sharing is not False
            return {
                name: tables.of_source(scored, dataset, name, self.batch_size, packed=packed)
                for name, dataset in datasets.items()
            }

    def collator(self, tokenizer: "PreTrainedTokenizerBase", args):
        """DPOTrainer's collator; it scores what training would score."""
        from .._trl.reference import collator_of
        from .._trl.turns import of_assistant_turns

        own = collator_of(tokenizer, args)
        return of_assistant_turns(own) if self.assistant_turns_only else own

    def check_same_vocabulary(self, source: str, ref_source: str) -> None:
        """Raises `ValueError` if the two models score different vocabularies."""
        from ..data import validation as checks

        checks.check_vocabularies(self._config_of(source), SimpleNamespace(config=self._config_of(ref_source)))

    def _config_of(self, source: str):
        return read_config(base_of_adapter(source) or source, trust_remote_code=self.trust_remote_code)

    def _load(self, source: str, args):
        """The model, or an adapter on its base."""
        from .._trl import reference as seam

        if base_of_adapter(source) is None:
            self._config_of(source)
            return seam.load_model(source, args)
        model = seam.load_adapted_model(source, args)
        if seam.adapts_the_head(model):
            raise ModelError(
                f"The adapter {source} changes lm_head, whose weight log-probabilities are computed from: the adapter would "
                "not be seen. Merge it into its base (merge_and_unload) and give the merged model."
            )
        return model
