"""Losses, gradients and metrics of a batch from plain formulas in float64: no code of TRL, none of the trainer.

Every row runs by itself, without padding or masks. A sum over tokens is written as one.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .materials import END, token_ids


@dataclass(frozen=True)
class Expected:
    """What a batch of pairs gives.

    Attributes:
        loss: nats.
        gradients: of the loss, by parameter.
        metrics: as TRL logs them, and `cpo/*` as the trainer does.
    """

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Answer:
    """One answer under a model: its summed log-probability (tokens weighted), and what TRL logs of its tokens."""

    logp: Tensor
    entropy: Tensor
    logits: Tensor
    right: Tensor
    tokens: int


def clip(beta: float, gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`−log σ(β(δ_θ − max(δ_ref, γ)))` of each pair."""
    return lambda gap, ref_gap: -torch.log(torch.sigmoid(beta * (gap - torch.where(ref_gap > gamma, ref_gap, gamma))))


def penalty(beta: float, gamma: float, weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`−log σ(β(δ_θ − δ_ref)) + λ · max(0, γ − δ_θ)` of each pair."""

    def loss(gap: Tensor, ref_gap: Tensor) -> Tensor:
        short = torch.where(gap < gamma, gamma - gap, 0.0)
        return -torch.log(torch.sigmoid(beta * (gap - ref_gap))) + weight * short

    return loss


def expected(
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    pairs: Sequence[dict[str, str]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    beta: float,
    gamma: float,
    ld_alpha: float = 1.0,
) -> Expected:
    """The mean loss of the pairs, its gradient and metrics.

    Args:
        policy, reference: causal language models; left as they are.
        pairs: texts; an END follows each answer.
        loss_of: the loss of each pair from its gaps δ_θ and δ_ref, (B,) each.
        beta, gamma: as in the config.
        ld_alpha: weight of the tokens of an answer beyond the length of the other one.
    """
    policy, reference = (copy.deepcopy(each).double().eval() for each in (policy, reference))
    policy.zero_grad()
    answers: tuple[list[_Answer], ...] = ([], [], [], [])
    chosen, rejected, ref_chosen, ref_rejected = answers
    for pair in pairs:
        shared = min(len(token_ids(pair[side])) for side in ("chosen", "rejected")) + 1
        for side, ours, theirs in (("chosen", chosen, ref_chosen), ("rejected", rejected, ref_rejected)):
            ours.append(_answer(policy, pair["prompt"], pair[side], shared, ld_alpha))
            with torch.no_grad():
                theirs.append(_answer(reference, pair["prompt"], pair[side], shared, ld_alpha))
    s_chosen, s_rejected, r_chosen, r_rejected = (torch.stack([answer.logp for answer in side]) for side in answers)
    gap, ref_gap = s_chosen - s_rejected, r_chosen - r_rejected
    loss = loss_of(gap, ref_gap).sum() / len(pairs)
    loss.backward()
    gap, s_chosen, s_rejected = gap.detach(), s_chosen.detach(), s_rejected.detach()

    def mean(values: Tensor) -> float:
        return values.double().sum().item() / len(values)

    def per_token(name: str, answers: list[_Answer]) -> float:
        return sum(getattr(answer, name).item() for answer in answers) / sum(answer.tokens for answer in answers)

    texts = [pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")]
    metrics = {
        "rewards/chosen": beta * mean(s_chosen - r_chosen),
        "rewards/rejected": beta * mean(s_rejected - r_rejected),
        "rewards/margins": beta * mean(gap - ref_gap),
        "rewards/accuracies": mean(gap > ref_gap),
        "logps/chosen": mean(s_chosen),
        "logps/rejected": mean(s_rejected),
        "logits/chosen": per_token("logits", chosen),
        "logits/rejected": per_token("logits", rejected),
        "entropy": per_token("entropy", chosen + rejected),
        "mean_token_accuracy": per_token("right", chosen),
        "num_tokens": float(sum(len(token_ids(text)) + 1 for text in texts)),
        "cpo/gap": mean(gap),
        "cpo/ref_gap": mean(ref_gap),
        "cpo/violation": mean(torch.where(gap < gamma, gamma - gap, 0.0)),
    }
    gradients = {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}
    return Expected(loss.item(), gradients, metrics)


def _answer(model: torch.nn.Module, prompt: str, answer: str, shared: int, ld_alpha: float) -> _Answer:
    start, ids = len(token_ids(prompt)), [*token_ids(prompt + answer), END]
    logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
    log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    logp = sum(log_probs[place, token] * (1.0 if place < shared else ld_alpha) for place, token in enumerate(ids[start:]))
    seen = log_probs.detach()
    return _Answer(
        logp=logp,
        entropy=-(seen.exp() * seen).sum(),
        logits=logits.detach().mean(dim=-1).sum(),
        right=(seen.argmax(dim=-1) == torch.tensor(ids[start:])).sum(),
        tokens=len(ids) - start,
    )
