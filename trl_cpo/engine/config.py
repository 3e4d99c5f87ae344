"""The engine's DPOConfig: TRL's fields, plus those for packing, batching and the start check."""

import dataclasses
import math
import textwrap
from dataclasses import dataclass, field

import trl
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging

from .._trl.loss import LOSS_READS
from .._trl.loss_options import idle_options
from ..faults import is_finite, is_true_or_false, one_of
from ..files.masking import masked

logger = logging.get_logger(__name__)

#: Numbers among TRL's fields: lowest value, whether it is allowed itself, whether the number is whole. A None that is their
#: default stays allowed.
_BOUNDS: dict[str, tuple[float, bool, bool]] = {
    "per_device_train_batch_size": (1, True, True),
    "per_device_eval_batch_size": (1, True, True),
    "gradient_accumulation_steps": (1, True, True),
    "seed": (0, True, True),
    "data_seed": (0, True, True),
    "precompute_ref_batch_size": (1, True, True),
    "max_length": (1, True, True),
    "learning_rate": (0, True, False),
    "weight_decay": (0, True, False),
    "max_grad_norm": (0, True, False),
    "warmup_steps": (0, True, False),
    "logging_steps": (0, False, False),
    "save_steps": (0, False, False),
    "eval_steps": (0, False, False),
}

#: Orders of the training set for which transformers looks up lengths, in a column that DPOTrainer removes before.
_BY_LENGTH = ("group_by_length", "batch_rebalance")


def documented(cls: type) -> type:
    """Class decorator: lists a dataclass's own fields, with their help, under "Parameters:" in its docstring."""
    lines = []
    documents = [base for base in cls.__mro__[1:] if "Parameters:" in (base.__doc__ or "")]
    elsewhere = {each.name for base in documents if dataclasses.is_dataclass(base) for each in dataclasses.fields(base)}
    for each in dataclasses.fields(cls):
        if each.name in elsewhere:
            continue  # a base class documents it
        kind = each.type if isinstance(each.type, str) else getattr(each.type, "__name__", str(each.type))
        optional = "*optional*" if each.default is None else f"*optional*, defaults to `{each.default!r}`"
        lines.append(f"{each.name} (`{kind.removesuffix(' | None')}`, {optional}):")
        lines += textwrap.wrap(each.metadata["help"], 110, initial_indent="    ", subsequent_indent="    ")
    about, _, rest = (cls.__doc__ or "").partition("{parameters}")
    cls.__doc__ = about + "Parameters:\n" + textwrap.indent("\n".join(lines), "        ") + rest
    return cls


@documented
@dataclass
class DPOConfig(trl.DPOConfig):
    """
    Configuration of the engine's [`~trl_cpo.engine.DPOTrainer`]: every field of [`~trl.DPOConfig`], and these.

    {parameters}

    Raises:
        ValueError: naming every fault of these fields at once.

    > [!NOTE]
    > If the machine has no bfloat16 and `bf16` is not set, training runs in float32; TRL's config raises an error.
    """

    prefix_sharing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute each pair's prompt once and pack pairs without padding: the same log-probabilities up to float "
            "rounding, in less time and memory. Default: on with a constraint, if a probe of the model finds it exact; plain "
            "DPO runs TRL's own forward, bit for bit. True: always on; models that cannot be packed are refused. False: off."
        },
    )
    balance_tokens: bool = field(
        default=False,
        metadata={
            "help": "Deal the pairs of each optimizer step to processes and micro-batches so that all compute about the same "
            "number of tokens. A step's pairs, and its loss, stay those of a plain shuffle."
        },
    )
    tokens_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Token budget for an average optimizer step over all processes; each step takes as many shuffled pairs as "
            "fit, in place of per_device_train_batch_size. A pair costs its prompt once and both answers. Losses are scaled "
            "so that every pair weighs the same over an epoch."
        },
    )
    assistant_turns_only: bool = field(
        default=False,
        metadata={
            "help": "Score the assistant's turns alone in answers of several turns: what users and tools say there counts "
            "nothing in log-probabilities, gaps and metrics, nor in a precomputed reference. For messages whose chat template "
            "renders earlier turns the same way whatever follows. Answers of one turn are scored as in DPOTrainer."
        },
    )
    check_reference: bool = field(
        default=True,
        metadata={
            "help": "Check on the first micro-batch, without a ref_model, that policy and reference agree up to rounding; "
            "otherwise stop before the first step and list likely causes."
        },
    )

    def to_dict(self):
        """As TRL's, with secrets masked wherever they stand: trackers, checkpoints and records are written from it."""
        return masked(super().to_dict())

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        faults = self.faults()
        if faults:
            count = "" if len(faults) == 1 else f" ({len(faults)} faults)"
            raise ValueError(f"{type(self).__name__}{count}: " + "\n".join(faults))
        if self.bf16 is None and not self.fp16 and not has_bf16(self.use_cpu):
            logger.warning_once(
                "This machine has no bfloat16 support: training in float32 (bf16=False). On a GPU without bfloat16, "
                "fp16=True gives mixed precision."
            )
            self.bf16 = False
        super().__post_init__()

    def faults(self) -> list[str]:
        """The faults of these fields, one sentence each; empty if there are none."""
        faults = is_true_or_false("prefix_sharing", self.prefix_sharing, optional=True)
        faults += is_true_or_false("balance_tokens", self.balance_tokens)
        faults += is_true_or_false("assistant_turns_only", self.assistant_turns_only)
        faults += is_true_or_false("check_reference", self.check_reference)
        budget = self.tokens_per_step
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
            faults.append(f"tokens_per_step must be a whole number ≥ 1, or None; got {budget!r}.")
        faults += self._number_faults()
        faults += [one_of("loss_type", name, LOSS_READS) for name in self.loss_type if name not in LOSS_READS]
        unweighted = [name for name in self.loss_type if name in ("aot", "aot_unpaired", "sft")]
        if self.use_weighting and unweighted:
            faults.append(
                f"use_weighting=True weighs each pair's loss, and loss_type {unweighted} has none: TRL sorts or averages "
                "over the batch first. Leave one of them out."
            )
        weights = self.loss_weights
        if weights is not None and len(weights) != len(self.loss_type):
            faults.append(
                f"loss_weights has {len(weights)} values for {len(self.loss_type)} loss types ({', '.join(self.loss_type)}). "
                "Give one for each, in their order."
            )
        return faults + self._order_faults()

    def _number_faults(self) -> list[str]:
        faults = []
        for name, (lowest, allowed, whole) in _BOUNDS.items():
            value = getattr(self, name)
            if value is None:
                continue
            is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and is_finite(value)
            most = 2**32 - 1 if name in ("seed", "data_seed") else math.inf
            if not is_number or value < lowest or (value == lowest and not allowed) or value > most:
                kind = "whole number" if whole else "finite number"
                limit = "" if most == math.inf else f" and at most {most}"
                faults.append(f"{name} must be a {kind} {'≥' if allowed else '>'} {lowest}{limit}; got {value!r}.")
        steps, epochs = self.max_steps, self.num_train_epochs
        if steps != -1 and not (isinstance(steps, int) and steps >= 1):
            faults.append(f"max_steps must be a whole number ≥ 1, or -1 to train for num_train_epochs; got {steps!r}.")
        elif steps == -1 and not (isinstance(epochs, (int, float)) and is_finite(epochs) and epochs > 0):
            faults.append(f"num_train_epochs must be a finite number > 0; got {epochs!r}.")
        return faults

    def cautions(self) -> list[str]:
        """What to know before training: options that change nothing."""
        return idle_options(self)

    def _order_faults(self) -> list[str]:
        faults = []
        asked = {"balance_tokens": self.balance_tokens is True, "tokens_per_step": isinstance(self.tokens_per_step, int)}
        orders = [f"{name}={getattr(self, name)}" for name, given in asked.items() if given]
        if orders and self.train_sampling_strategy != "random":
            faults.append(
                f"{orders[0]} sets the order of the training pairs; it cannot be combined with train_sampling_strategy="
                f"{self.train_sampling_strategy!r}. Leave one of them out."
            )
        elif self.train_sampling_strategy in _BY_LENGTH and self.remove_unused_columns:
            faults.append(
                f"train_sampling_strategy={self.train_sampling_strategy!r} needs the lengths of single sequences, which pairs "
                "do not have. Set balance_tokens=True instead: processes and micro-batches of a step get about the same number "
                "of tokens, and each step keeps its pairs. (A column of your own lengths, length_column_name, is read only "
                "under remove_unused_columns=False.)"
            )
        if self.tokens_per_step is not None and self.auto_find_batch_size:
            faults.append(
                "auto_find_batch_size=True searches for a number of pairs per batch, but tokens_per_step varies it. Leave one "
                "of them out."
            )
        return faults

    @property
    def is_plain_dpo(self) -> bool:
        """Whether the loss is plain DPO, so that the trainer must match TRL's bit for bit."""
        return True

    @property
    def adds_loss(self) -> bool:
        """Whether a method adds a term of the pairs' log-probabilities to TRL's loss."""
        return False

    @property
    def packs(self) -> bool | None:
        """Whether to pack: True always, False never, None if a probe of the model finds it exact.

        Plain DPO must match TRL bit for bit, so it packs only under `prefix_sharing=True`.
        """
        return bool(self.prefix_sharing) if self.is_plain_dpo else self.prefix_sharing


def has_bf16(use_cpu: bool) -> bool:
    """Whether this machine trains in bfloat16."""
    # On a CPU, TRL's config turns bfloat16 on only under `use_cpu`; leave that to it.
    return use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
