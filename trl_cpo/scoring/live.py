"""Scores pairs with a model that is being trained, by any trainer, and leaves it as it was."""

from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .._trl.reference import adapts_the_head, fused_head, policy_summed_logps
from ..engine.forward.sharing import PrefixSharing
from ..engine.model_state import evaluation_mode, keep_trainable
from .scorer import PreparedPairs, Scorer
from .token_pairs import answer_tokens


def unable_to_score(trainer: Any) -> str | None:
    """Why a trainer's model cannot be scored; None: it can."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
        kind = "FSDP" if trainer.is_fsdp_enabled else "ZeRO-3"
        return f"the model is sharded ({kind}), so that no process holds it whole"
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        return f"{type(model).__name__} gives no probabilities of tokens: it is no causal language model"
    if adapts_the_head(model):
        return "an adapter changes lm_head, and log-probabilities are computed from its weight alone"
    return None


class LiveScorer:
    """Log-probabilities of a set of pairs under a trainer's model as it is at each call.

    Args:
        trainer: any trainer of a causal language model.
        prepared: the pairs.
        scorer: how they were prepared.
    """

    def __init__(self, trainer: Any, prepared: PreparedPairs, scorer: Scorer):
        self._trainer, self._rows = trainer, prepared.dataset
        self._collator = scorer.collator(trainer.processing_class, scorer.cut())
        self._sharing = PrefixSharing(scorer.prefix_sharing, scorer.max_length, verbose=trainer.is_world_process_zero())
        self._batch_size = scorer.batch_size
        chosen, rejected, degenerate = answer_tokens(prepared.tokens, scorer.truncation)
        #: Tokens of the chosen and rejected answers, (n, 2), and which pairs compare no two answers, (n,).
        self.tokens = torch.from_numpy(chosen), torch.from_numpy(rejected)
        self.degenerate = torch.from_numpy(degenerate)

    def score(self, reduction: str) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the chosen and rejected answers, (n,) each, nats, on the CPU. All processes call it.

        Args:
            reduction: "sum", or "mean" over an answer's tokens.
        """
        trainer, accelerator = self._trainer, self._trainer.accelerator
        model = accelerator.unwrap_model(trainer.model)
        keep_trainable(model)
        # Neighbours in length share a batch, so that little is padded.
        order = sorted(range(len(self._rows)), key=lambda at: sum(len(self._rows[at][name]) for name in _IDS), reverse=True)
        batches = [order[at : at + self._batch_size] for at in range(0, len(order), self._batch_size)]
        found: list[tuple[int, float, float]] = []
        args = SimpleNamespace(gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs)
        with evaluation_mode(model), fused_head(model):
            forward = self._sharing.of(model)
            for rows in batches[accelerator.process_index :: accelerator.num_processes]:
                batch = self._collator([self._rows[at] for at in rows])
                batch = {name: value.to(accelerator.device) for name, value in batch.items()}
                chosen, rejected = policy_summed_logps(model, forward, batch, args, accelerator)
                found += zip(rows, chosen.tolist(), rejected.tolist(), strict=True)
        every = sorted(gather_object(found) if accelerator.num_processes > 1 else found)
        chosen, rejected = (torch.tensor([row[side] for row in every], dtype=torch.float64) for side in (1, 2))
        if reduction == "mean":
            return chosen / self.tokens[0].clamp(min=1), rejected / self.tokens[1].clamp(min=1)
        return chosen, rejected


_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
