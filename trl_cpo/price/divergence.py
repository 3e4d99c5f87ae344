"""KL from policy to reference on the policy's own samples, exact over the vocabulary at each position."""

import inspect
from typing import Any

import torch
from torch import Tensor

from .answers import Answers

#: Rows of one forward.
_ROWS = 4


@torch.no_grad()
def answer_kl(answers: Answers, reference: Any) -> Tensor:
    """The conditional KL at each position of sampled answers, (n, new), nats; 0 at padding.

    `KL_t = Σ_v π(v | x, y_<t) · (log π(v | x, y_<t) − log π_ref(v | x, y_<t))`. Its sum over an answer y ~ π, averaged over
    answers, estimates `KL(π ‖ π_ref)` of a response without bias (Rao–Blackwell over each next token); divided by the
    tokens it is per token. Never below 0, up to rounding.

    Args:
        answers: sampled by the policy, with its distributions.
        reference: in evaluation mode.
    """
    found = []
    assert answers.logps is not None, "sampled answers have distributions"
    for at in range(0, len(answers.ids), _ROWS):
        rows = slice(at, at + _ROWS)
        own = answers.logps[rows]
        other = next_logps(reference, answers.ids[rows], answers.mask[rows], answers.new).cpu()
        # A token without probability adds nothing, however unlikely the reference finds it.
        terms = torch.where(own > float("-inf"), own.exp() * (own - other), 0.0)
        found.append(terms.sum(-1) * answers.mask[rows, -answers.new :].cpu())
    return torch.cat(found)


@torch.no_grad()
def next_logps(model: Any, ids: Tensor, mask: Tensor, last: int) -> Tensor:
    """log π(v | what is before) for each of the last `last` columns, (n, last, vocabulary), float32."""
    takes = _parameters(model)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    options: dict[str, Any] = {"position_ids": positions} if "position_ids" in takes else {}
    if "logits_to_keep" in takes:
        options["logits_to_keep"] = last + 1
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **options).logits
    return logits[:, -last - 1 : -1].float().log_softmax(-1)


def token_logps(model: Any, ids: Tensor, mask: Tensor, last: int) -> Tensor:
    """log π(token | what is before) of each of the last `last` tokens, (n, last), float32; 0 at padding."""
    logps = next_logps(model, ids, mask, last).gather(-1, ids[:, -last:, None]).squeeze(-1)
    return logps * mask[:, -last:]


def _parameters(model: Any) -> set[str]:
    # PEFT's wrapper passes everything on.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(base.forward).parameters)
