"""The table of a reference: what it is keyed by, found if it is there, scored where it is not."""

import dataclasses
import logging
import os
import time
from typing import Any

import numpy as np
import torch
import transformers
import trl
from accelerate.utils import DistributedType, send_to_device
from datasets import Dataset
from datasets.fingerprint import Hasher

from ..._trl.datasets import TOKENIZED_COLUMNS, is_its_collator
from ..._trl.models import model_id
from ..._trl.turns import AssistantTurns
from ...data.rows import TURN_MASKS
from ...files.cache import ForeignCache, cache_folder, cache_root
from ..model_state import evaluation_mode
from ..precision import float32_products
from .digests import text_digest, tokens_digest, weights_digest
from .filling import agreed, as_columns, fill, from_main, stored
from .layout import Layout
from .source import ReferenceSource
from .store import ScoreStore, ScoreTable

logger = logging.getLogger(__name__)

#: Raised when what is stored, or how it is computed, changes: tables written before are then not found.
FORMAT = 1
# What a config says about where a model came from, and not about what it computes.
_ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
_ADAPTER_ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
_SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


class ReferenceTables:
    """The tables of one reference, by the name of their dataset.

    They are scored in evaluation mode, whatever the model's is: with dropout on, a log-probability is a random number.
    """

    def __init__(self):
        self.tables: dict[str, ScoreTable] = {}
        self._weights: str | None = None
        self._weights_rest = True

    def weights_may_change(self) -> None:
        """From here on the weights are looked at each time, and no longer once for all datasets."""
        self._weights, self._weights_rest = None, False

    def table(self, trainer, dataset: Dataset, name: str, batch_size: int, *, packed: bool, as_dpo_trainer: bool) -> ScoreTable:
        """The log-probabilities of a prepared dataset under a trainer's reference; see `of_source`."""
        return self.of_source(
            ReferenceSource.of_trainer(trainer), dataset, name, batch_size, packed=packed, as_dpo_trainer=as_dpo_trainer
        )

    def of_source(
        self,
        source: ReferenceSource,
        dataset: Dataset,
        name: str,
        batch_size: int,
        *,
        packed: bool,
        as_dpo_trainer: bool = False,
    ) -> ScoreTable:
        """The log-probabilities of a prepared dataset; scores what is not stored. Called by every process.

        Args:
            source: what gives them.
            dataset: with token ids.
            name: of the dataset, for people and `table_of`.
            batch_size: pairs in a forward of one process.
            packed: whether forwards go through the packed forward, where the model allows it.
            as_dpo_trainer: form DPOTrainer's batches, whose rounding is to be repeated; else batches of like lengths.

        Raises:
            BadScores: the reference gives NaN, infinities or zeros.
            OSError: the cache folder cannot be written, or is another user's.
        """
        accelerator, reference = source.accelerator, source.reference
        weights = self._weights or agreed(
            accelerator, weights_digest(source.model, adapters=reference.adapters, keep=reference.adapter)
        )
        if self._weights_rest:
            self._weights = weights
        tokens, lengths = tokens_digest(dataset, tokens_and_masks(dataset))
        if as_dpo_trainer:
            layout = Layout.as_dpo_trainer(len(dataset), batch_size, accelerator.num_processes)
        else:
            layout = Layout.by_length(_row_tokens(lengths, source.max_length), batch_size)
        parts = key_parts(source, dataset, packed)
        parts |= {"weights": weights, "tokens": agreed(accelerator, tokens), "pairs": len(dataset), "order": layout.order}
        key = text_digest(parts)
        store = ScoreStore(cache_root() / "scores" / key, layout.shards)
        about = {"key": parts, "dataset": name, "model": model_id(source.model)}
        found, missing = from_main(accelerator, lambda: _stored(key, store, layout, about))
        if missing:
            self._score(source, dataset, found, missing, store, layout, name)
        elif accelerator.is_main_process:
            logger.info("All %d reference log-probabilities of the %s dataset are in %s", len(found), name, store.folder)
        self.tables[name] = found
        return found

    @staticmethod
    def _score(source, dataset, table, missing, store, layout, name) -> None:
        accelerator, model = source.accelerator, source.engine()
        todo, started = sum(len(layout.shards[shard]) for shard in missing), time.perf_counter()
        if accelerator.is_main_process:
            logger.info("Scoring %d of %d pairs of the %s dataset into %s", todo, len(table), name, store.folder)

        def forward(rows: tuple[int, ...]) -> torch.Tensor:
            batch = send_to_device(source.collator(dataset.__getitems__(list(rows))), accelerator.device)
            return as_columns(*source.logps(model, batch), batch["completion_mask"])

        shows_progress = source.shows_progress and not os.environ.get("TQDM_DISABLE")
        with evaluation_mode(model):
            fill(table, missing, store, layout, forward, accelerator, name=name, shows_progress=bool(shows_progress))
        if accelerator.is_main_process:
            seconds = time.perf_counter() - started
            logger.info("Scored %d pairs of the %s dataset in %.1f s, %.2f a second", todo, name, seconds, todo / seconds)


def _stored(key: str, store: ScoreStore, layout: Layout, about: dict[str, Any]) -> tuple[ScoreTable, list[int]]:
    """What is stored, in a folder of this user's."""
    try:
        cache_folder("scores", key)
    except ForeignCache:
        raise
    except OSError:
        pass  # said when the store is opened
    return stored(store, layout, about)


def tokens_and_masks(dataset: Dataset) -> tuple[str, ...]:
    """The columns that say which tokens there are and, where that is not all of the answers, which are scored."""
    return (*TOKENIZED_COLUMNS, *(name for name in TURN_MASKS if name in dataset.column_names))


def _row_tokens(lengths: dict[str, np.ndarray], max_length: int | None) -> np.ndarray:
    prompt, chosen, rejected = (lengths[column] for column in TOKENIZED_COLUMNS)
    return sum(np.minimum(prompt + answer, max_length or np.inf) for answer in (chosen, rejected))


def key_parts(source: ReferenceSource, dataset: Dataset, packed: bool) -> dict[str, Any]:
    """What changes a reference's log-probabilities beside its weights and the token ids, in readable form."""
    accelerator, reference, model = source.accelerator, source.reference, source.model
    kind = type(model.get_base_model() if reference.adapters else model)
    config = {name: value for name, value in model.config.to_dict().items() if name not in _ORIGIN}
    sharded = accelerator.distributed_type in _SHARDED
    stage = getattr(accelerator.state.deepspeed_plugin, "zero_stage", "") if sharded else ""
    return {
        "format": FORMAT,
        "model": f"{kind.__module__}.{kind.__qualname__}",
        "config": text_digest(config),
        "attention": getattr(model.config, "_attn_implementation", None),
        "quantization": text_digest(config["quantization_config"]) if config.get("quantization_config") else None,
        "adapter": _adapter(model, reference.adapter),
        "dtype": str(model.dtype),
        "autocast": accelerator.mixed_precision,
        "float32_products": float32_products(accelerator.device.type),
        "device": accelerator.device.type,
        "sharded": f"{accelerator.distributed_type.value} {stage}".strip() if sharded else None,
        "forward": "packed" if packed else "padded",
        "ld_alpha": source.ld_alpha,
        "max_length": source.max_length,
        "truncation_mode": source.truncation_mode,
        "collator": _collator(source.collator, dataset),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
    }


def _adapter(model, name: str | None) -> str | None:
    if name is None:
        return None
    return text_digest({k: v for k, v in model.peft_config[name].to_dict().items() if k not in _ADAPTER_ORIGIN})


def _collator(collator: Any, dataset: Dataset) -> Any:
    if isinstance(collator, AssistantTurns):
        collator = collator.collator  # what it leaves out is among the tokens
    kind = f"{type(collator).__module__}.{type(collator).__qualname__}"
    if is_its_collator(collator):
        return {"kind": kind, **dataclasses.asdict(collator)}
    # One's own may read other columns than the token ids.
    return {"kind": kind, "contents": Hasher.hash(collator), "dataset": dataset._fingerprint}


def table_of(trainer, name: str = "train") -> ScoreTable:
    """The reference's log-probabilities of a trainer's dataset, in the order of its prepared dataset, summed, in nats.

    Args:
        trainer: a [`CPOConstrainedTrainer`] made with `precompute_ref_log_probs=True`.
        name: "train", "eval", or the name of one of several evaluation sets.

    Raises:
        KeyError: there is no such table.
    """
    tables = trainer.reference_tables.tables
    if name not in tables:
        raise KeyError(
            f"The trainer has no table of {name!r}; it has {sorted(tables)}. Tables are made with "
            "precompute_ref_log_probs=True, for the datasets given to the trainer."
        )
    return tables[name]
