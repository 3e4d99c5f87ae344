"""The `rewards/*` that DPOTrainer logs, put right where the loss ran at a moved target.

It relies on `_metrics[mode]`, as `loss` does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from trl import DPOTrainer


@dataclass(frozen=True)
class MovedRewards:
    """The `rewards/*` that DPOTrainer logged at a moved target, and DPO's.

    Attributes:
        numbers: mean rejected reward, accuracy and mean margin, (3,), on the device.
        logged: the list that each stands in, in that order.
        place: their index there.
    """

    numbers: Tensor
    logged: tuple[list[float], ...]
    place: int

    @classmethod
    def of(cls, trainer: DPOTrainer, log_ratios: Tensor) -> "MovedRewards":
        """DPO's rewards, β (s_θ − s_ref), over all processes, from (B, 2) log-ratios; waits for nothing."""
        chosen, rejected = trainer.accelerator.gather(trainer.beta * log_ratios).unbind(dim=1)
        numbers = torch.stack([rejected.mean(), (chosen > rejected).float().mean(), (chosen - rejected).mean()])
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        logged = tuple(metrics[f"rewards/{name}"] for name in ("rejected", "accuracies", "margins"))
        return cls(numbers, logged, len(logged[0]) - 1)

    def restore(self, numbers: list[float]) -> None:
        """Puts `numbers`, copied from the device, in place of what was logged."""
        for logged, number in zip(self.logged, numbers, strict=True):
            logged[self.place] = number
