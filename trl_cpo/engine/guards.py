"""Checks on a batch before it may change weights: finite numbers, and two answers that differ."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from .._trl.loss import ObservedLoss
from .._trl.rewards import MovedRewards
from ..pairs import PairLogps

#: Consecutive micro-batches with non-finite numbers after which a float16 run is stopped. The loss scaler recovers from
#: overflowing gradients within a few steps, but never from an overflow in the forward.
FLOAT16_PATIENCE = 20


@dataclass(frozen=True)
class GatheredBatch:
    """The results of a batch of pairs from all processes, on the CPU; the same on every process.

    Attributes:
        logps: (N, 4), as `PairLogps.rows` makes them, nats.
        targets: (N,), the target margin of each pair, nats.
        degenerate: (N,), bool: pairs whose answers cannot be compared.
        losses: (N,), the loss of each pair's micro-batch.
        sound: whether every log-probability and every loss is finite.
        reference_sound: whether every log-probability of the reference is finite.
        all_counted: whether every pair counts: finite and not degenerate.
        beside: (N, K), what the method wants gathered beside them; None: nothing.
    """

    logps: Tensor
    targets: Tensor
    degenerate: Tensor
    losses: Tensor
    sound: bool
    reference_sound: bool
    all_counted: bool
    beside: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor) -> "GatheredBatch":
        """The batch of the gathered `rows_of` all processes."""
        logps, marks, beside = rows.split([4, 3, rows.size(1) - 7], dim=1)
        targets, degenerate, losses = marks.unbind(dim=1)
        degenerate, finite = degenerate.bool(), logps.isfinite()
        known = (
            finite.all() & losses.isfinite().all(),
            finite[:, 2:].all(),
            (finite.all(dim=1) & ~degenerate).all(),
        )
        sound, reference_sound, all_counted = torch.stack(known).tolist()
        return cls(logps, targets, degenerate, losses, sound, reference_sound, all_counted, beside if beside.size(1) else None)

    @property
    def finite(self) -> Tensor:
        """(N,), bool: pairs whose four log-probabilities are finite."""
        return self.logps.isfinite().all(dim=1)

    def counted(self) -> tuple[PairLogps, Tensor]:
        """Log-probabilities and targets of the pairs that metrics and multiplier count: finite and not degenerate."""
        return PairLogps.from_rows(self._counted(self.logps)), self._counted(self.targets)

    def counted_beside(self) -> Tensor | None:
        """What was gathered beside them, of the same pairs."""
        return None if self.beside is None else self._counted(self.beside)

    def _counted(self, rows: Tensor) -> Tensor:
        return rows if self.all_counted else rows[self.finite & ~self.degenerate]

    def left_out(self) -> dict[str, int]:
        """The number of pairs that `counted` leaves out, by reason; empty if none."""
        if self.all_counted:
            return {}
        counts = {
            "nonfinite_pairs": int((~self.finite).sum()),
            "incomparable_pairs": int((self.finite & self.degenerate).sum()),
        }
        return {name: count for name, count in counts.items() if count}


def rows_of(observed: ObservedLoss, beside: Tensor | None = None) -> Tensor:
    """All that is gathered of each pair, (B, 7 + K). `beside` is (B, K), numbers that float32 holds exactly."""
    pairs = observed.pairs.detach()
    loss = observed.loss.detach().expand(len(observed.target))
    marks = torch.stack([observed.target, observed.degenerate, loss], dim=1)
    return torch.cat([pairs.rows(), marks] if beside is None else [pairs.rows(), marks, beside.to(marks.dtype)], dim=1)


@dataclass(frozen=True)
class _Taken:
    """A micro-batch on the device: its gathered rows, and what its messages and its log need."""

    rows: Tensor
    inputs: dict[str, Tensor]
    step: int
    rewards: MovedRewards | None


class BatchGuard:
    """Stops training before a batch with non-finite numbers reaches the weights.

    The micro-batches of a step are taken as they come, and looked at together before its last backward pass, so that the
    CPU waits for the device once a step. Under fp16 the loss scaler skips a step with bad numbers, so a few in a row are
    tolerated (`FLOAT16_PATIENCE`).
    """

    def __init__(self, accelerator: Accelerator, decode: Callable[[Any], str]):
        self._accelerator = accelerator
        self._decode = decode
        self._unsound = 0  # micro-batches in a row
        self._taken: list[_Taken] = []

    def begin(self) -> None:
        """Start of training: drops micro-batches of a step that was interrupted."""
        self._taken = []

    def evaluated(self, observed: ObservedLoss, beside: Tensor | None = None) -> GatheredBatch:
        """The evaluated batch of all processes, without rows repeated to fill the last one; every process must call it."""
        rows = self._accelerator.gather_for_metrics(rows_of(observed, beside))
        taken = _Taken(rows, {}, 0, observed.rewards)
        return GatheredBatch.of(*_on_cpu([taken]))

    def take(self, observed: ObservedLoss, inputs: dict[str, Tensor], *, step: int, beside: Tensor | None = None) -> None:
        """Gathers a micro-batch that is trained on from all processes; every process must call it. Waits for nothing.

        Rows repeated to fill the last batch count, because they are trained on.

        Args:
            observed: the loss and log-probabilities of this process.
            inputs: the collated batch.
            step: number of the optimizer step, from 1.
            beside: (B, K), gathered with them; None: nothing.
        """
        rows = self._accelerator.gather(rows_of(observed, beside))
        texts: dict[str, Tensor] = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        self._taken.append(_Taken(rows, texts, step, observed.rewards))

    def settle(self) -> list[GatheredBatch]:
        """The micro-batches taken since the last call, in order, in one copy from the device.

        Raises:
            FloatingPointError: a log-probability or a loss is not finite. The message names the pairs and a remedy.
        """
        taken, self._taken = self._taken, []
        batches = [GatheredBatch.of(rows) for rows in _on_cpu(taken)]
        for one, batch in zip(taken, batches, strict=True):
            self._unsound = 0 if batch.sound else self._unsound + 1
            if batch.sound or self._is_patient(batch):
                continue
            text_of = _texts(one.inputs["input_ids"], one.inputs.get("attention_mask"), self._decode)
            rank, pairs = self._accelerator.process_index, len(one.inputs["input_ids"]) // 2
            raise FloatingPointError(not_finite_message(batch, step=one.step, per_process=pairs, text_of=text_of, rank=rank))
        return batches

    def _is_patient(self, batch: GatheredBatch) -> bool:
        half = self._accelerator.mixed_precision == "fp16"
        return half and batch.reference_sound and self._unsound < FLOAT16_PATIENCE


def _on_cpu(taken: list[_Taken]) -> list[Tensor]:
    """The rows of micro-batches, in one copy with the rewards, which go to the log."""
    tensors: list[Tensor] = []
    for one in taken:
        tensors += [one.rows] if one.rewards is None else [one.rows, one.rewards.numbers]
    if tensors and tensors[0].device.type != "cpu":
        parts = torch.cat([tensor.flatten() for tensor in tensors]).cpu().split([tensor.numel() for tensor in tensors])
        tensors = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    copied = iter(tensors)
    rows = []
    for one in taken:
        rows.append(next(copied))
        if one.rewards is not None:
            one.rewards.restore(next(copied).tolist())
    return rows


def not_finite_message(batch: GatheredBatch, *, step: int, per_process: int, text_of: Callable[[int], str], rank: int) -> str:
    """The error message for non-finite numbers: which pairs and which model, the usual causes, what to do.

    Args:
        batch: a batch that is not `sound`.
        step: number of the optimizer step, from 1.
        per_process: pairs in the micro-batch of each process.
        text_of: returns the text of pair i of this process's micro-batch.
        rank: index of this process.
    """
    bad = (~batch.finite).nonzero().flatten().tolist()
    if not bad:
        return (
            f"The loss of step {step} is not finite ({batch.losses[~batch.losses.isfinite()][0].item()}), though every "
            "log-probability is: the loss itself overflowed. This step has not changed the weights. Lower beta or the weight "
            "of the constraint, or use a loss_type that does not grow exponentially (discopop, forward_kl and "
            "alpha_divergence do)."
        )
    lines = []
    for index in bad[:5]:
        policy, reference = (part.isfinite().all().item() for part in batch.logps[index].chunk(2))
        whose = "the policy's" if reference else "the reference's" if policy else "the policy's and the reference's"
        process, position = divmod(index, per_process)
        text = f", {text_of(position)!r}" if process == rank else ""
        lines.append(f"pair {position} of the micro-batch of process {process} ({whose}{text})")
    more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
    if batch.reference_sound:
        remedy = (
            "This step has not changed the weights, but an earlier step may have broken them. Usual causes: a learning rate "
            "that is too high, or an overflow in float16. Resume from the last checkpoint with a lower learning_rate or with "
            "bf16. If it is always the same pairs, inspect them."
        )
    else:
        remedy = (
            "The reference never changes, so these pairs can never be trained on. Its weights may hold NaN, float16 may "
            "overflow, or a token may have probability zero under it. Load it in bfloat16 or float32, or remove these pairs "
            "from the dataset."
        )
    return f"Step {step}: log-probabilities are NaN or infinite for {'; '.join(lines)}{more}. {remedy}"


def _texts(input_ids: Tensor, attention_mask: Tensor | None, decode: Callable[[Any], str], length: int = 80) -> Callable:
    """Returns a function that gives the first characters of pair i of a collated batch, from its chosen row."""

    def beginning(pair: int) -> str:
        ids = input_ids[pair]
        if attention_mask is not None:
            ids = ids[attention_mask[pair].bool()]
        text = decode(ids[:length].tolist())
        return text[:length] + ("…" if len(text) > length else "")

    return beginning


class FiniteWeights(TrainerCallback):
    """Stops a run before NaN or infinite weights are saved or returned as its result.

    Every batch's log-probabilities are checked, but weights broken by the last gradient have not seen a batch yet.

    Args:
        gather: concatenates a (1,) tensor of every process, so that all stop together.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor], device: torch.device):
        self._gather = gather
        self._device = device

    def before_saving(self, model: torch.nn.Module, step: int) -> None:
        """Checks the weights before a checkpoint is written; every process must call it."""
        self._look(model, step, "Nothing was saved; resume from the checkpoint before it")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._look(model, state.global_step, "Resume from the last checkpoint")

    def _look(self, model, step: int, remedy: str) -> None:
        broken = torch.zeros(1, device=self._device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                # This process's part: a ZeRO-3 partition, an FSDP shard, or the whole parameter.
                held = getattr(parameter, "ds_tensor", parameter).detach()
                held = held.to_local() if hasattr(held, "to_local") else held
                broken += (~held.isfinite()).any().to(self._device)
        if self._gather(broken).any():
            raise FloatingPointError(
                f"After step {step} trained weights are NaN or infinite, because its gradient was. {remedy}, with a lower "
                "learning_rate, or with bf16 instead of fp16."
            )
