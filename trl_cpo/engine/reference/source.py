"""What gives a reference's log-probabilities: a trainer's model, or one that is only scored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..._trl.datasets import of_tokens_alone
from ..._trl.models import Reference, reference_engine, reference_of
from ..._trl.turns import of_assistant_turns


@dataclass(frozen=True)
class ReferenceSource:
    """A reference, and all that its log-probabilities depend on beside its weights and the token ids.

    Attributes:
        reference: the model, its adapters, and which of them is on.
        accelerator: of the processes that share the work.
        collator: forms a batch out of rows with token ids.
        engine: gives what `logps` takes as its model; asked for only where something is to be scored.
        logps: the summed log-probabilities of a batch under a model, chosen and rejected, (B,), nats.
        max_length, truncation_mode, ld_alpha: as in DPOConfig; the collator cuts and `logps` weighs accordingly.
        shows_progress: whether the main process shows a bar.
    """

    reference: Reference
    accelerator: Accelerator
    collator: Callable[[list[dict]], dict[str, Tensor]]
    engine: Callable[[], torch.nn.Module]
    logps: Callable[[torch.nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]
    max_length: int | None
    truncation_mode: str
    ld_alpha: float | None
    shows_progress: bool

    @classmethod
    def of_trainer(cls, trainer: Any) -> "ReferenceSource":
        """The reference of a trainer, by its `compute_ref_log_probs`."""
        collator = of_tokens_alone(trainer.data_collator)
        return cls(
            reference=reference_of(trainer),
            accelerator=trainer.accelerator,
            # DPOTrainer precomputes before its collator is ours.
            collator=of_assistant_turns(collator) if trainer.args.assistant_turns_only else collator,
            engine=lambda: reference_engine(trainer),
            logps=trainer.compute_ref_log_probs,
            max_length=trainer.args.max_length,
            truncation_mode=trainer.args.truncation_mode,
            ld_alpha=trainer.args.ld_alpha,
            shows_progress=not trainer.args.disable_tqdm,
        )

    @property
    def model(self) -> torch.nn.Module:
        """The model, without what wraps it for distributed training."""
        return self.accelerator.unwrap_model(self.reference.model)
