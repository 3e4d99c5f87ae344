"""The model at the start of training, as reference: its trainable weights, kept on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Start:
    """The trainable weights of a model as they are now, to be put back for a moment later.

    With LoRA these are the adapter's, and little; in full fine-tuning it is the whole model, in the CPU's memory.
    """

    def __init__(self, model: torch.nn.Module):
        self._weights = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}

    @property
    def bytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights.values())

    @contextmanager
    def put_back(self, model: torch.nn.Module) -> Iterator[None]:
        """The model as it was at the start; afterwards its weights are again what they were before, bit for bit."""
        found = dict(model.named_parameters())
        now = {name: found[name].detach().to("cpu", copy=True) for name in self._weights}
        try:
            self._load(found, self._weights)
            yield
        finally:
            self._load(found, now)

    @staticmethod
    @torch.no_grad()
    def _load(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            parameters[name].data.copy_(weight)
