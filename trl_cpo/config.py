"""CPOConstrainedConfig: DPOConfig and the fields of the constraint."""

import difflib
import math
from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging
from trl import DPOConfig

from ._trl.loss import LOSS_READS, MEAN_OF
from .constraints import CONSTRAINTS, Knobs
from .multiplier import SIGNALS, DualRule
from .pairs import REDUCTIONS

logger = logging.get_logger(__name__)

#: The knobs of the constraint: name to (lowest value, whether the lowest value itself is allowed).
_BOUNDS = {
    "gamma": (0.0, True),
    "tau": (0.0, False),
    "alpha": (0.0, False),
    "penalty_weight": (0.0, True),
    "epsilon": (0.0, True),
    "dual_lr": (0.0, True),
    "dual_max": (0.0, False),
    "dual_init": (0.0, True),
    "dual_warmup_steps": (0, True),
}
#: Knobs that may be infinite, and knobs that may be None, which leaves them to β.
_UNBOUNDED, _LEFT_TO_BETA = ("epsilon",), ("dual_lr", "dual_max")


def one_of(name: str, got, allowed) -> str:
    """The sentence for a value that is not among the allowed names, with the nearest of them offered."""
    nearest = difflib.get_close_matches(str(got), list(allowed), n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{name} must be one of {', '.join(map(repr, allowed))}; got {got!r}.{hint}"


def is_finite(number: int | float) -> bool:
    """Whether a number is finite as a float, which an integer beyond the largest float is not."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


@dataclass
class CPOConstrainedConfig(DPOConfig):
    r"""
    Configuration of [`CPOConstrainedTrainer`]: every field of [`~trl.DPOConfig`], and the constraint's.

    Below, a gap is the policy's own preference gap `δ_θ = s_θ(chosen) − s_θ(rejected)` in nats, where `s` is the
    response's log-probability, summed or averaged over its tokens (`logps_reduction`).

    Parameters:
        constraint (`str`, *optional*, defaults to `"none"`):
            Form of the constraint: `"none"` (plain DPO), `"clip"`, `"softplus"`, `"inverse_prob"`, `"inverse_logp"`,
            `"penalty"`, `"lagrangian"`. The last two leave the loss's target margin at `δ_ref`, the others move it;
            `"penalty"` adds `penalty_weight * max(0, gamma − δ_θ)`, and `"lagrangian"` adds the same with a weight λ that
            it updates until the mean violation is at most `epsilon`.
        gamma (`float`, *optional*, defaults to `0.0`):
            The gap asked for, γ ≥ 0, in nats: a sum per response or a mean per token, as `logps_reduction` says. Under
            every constraint, `"none"` too, a pair with `δ_θ < gamma` counts as a violation in the logs.
        tau (`float`, *optional*, defaults to `2.0`):
            Sharpness τ > 0 of `"softplus"`, per nat; the larger, the closer to `"clip"`.
        alpha (`float`, *optional*, defaults to `1.0`):
            Divisor α > 0 of the `"softplus"` margin, without unit; below 1 it pushes misaligned pairs past gamma,
            above 1 the target may stay below gamma.
        penalty_weight (`float`, *optional*, defaults to `1.0`):
            Weight λ ≥ 0 of `"penalty"`, per nat.
        epsilon (`float`, *optional*, defaults to `0.0`):
            For `"lagrangian"`: the mean violation allowed, ε ≥ 0, in the unit of `dual_signal`; `inf` allows any, which
            with `dual_init=0` is plain DPO.
        dual_lr (`float`, *optional*):
            For `"lagrangian"`: step size η ≥ 0 of `λ ← clip(λ + η (violation − ε), 0, dual_max)`, once per optimizer
            step. By default `0.1 β²` for the signal `"violation"` and `0.1 β` for `"violation_rate"`, so that λ/β, which
            has no unit, moves by a tenth of the excess measured in rewards, βδ.
        dual_max (`float`, *optional*):
            For `"lagrangian"`: cap of λ, > 0, per nat. By default β, more than which no bound needs under DPO's own loss.
        dual_init (`float`, *optional*, defaults to `0.0`):
            For `"lagrangian"`: λ at the start, ≥ 0, per nat.
        dual_warmup_steps (`int`, *optional*, defaults to `0`):
            For `"lagrangian"`: optimizer steps at the start in which λ stays as it is.
        dual_signal (`str`, *optional*, defaults to `"violation"`):
            For `"lagrangian"`: what drives λ: `"violation"`, the mean of `max(0, gamma − δ_θ)` in nats, or
            `"violation_rate"`, the fraction of pairs with `δ_θ < gamma`. The loss differentiates the former in both cases.
        logps_reduction (`str`, *optional*, defaults to `"sum"`):
            How a response's log-probability is made of its tokens', for policy and reference alike: `"sum"` (DPO's), or
            `"mean"` (per token). With `"mean"` the default loss is TRL's `sigmoid_norm`, which is DPO's loss of means.
        prefix_sharing (`bool`, *optional*):
            Whether each pair's prompt is computed once and pairs are packed without padding, which gives the same
            log-probabilities to float rounding in less time and memory. By default wherever a constraint is on and a
            probe of the model at the start finds it exact; under `"none"` the forward is DPOTrainer's own, bit for
            bit, unless this is `True`. `True` refuses models that cannot be packed; `False` pads as DPOTrainer does.
        balance_tokens (`bool`, *optional*, defaults to `False`):
            Whether the pairs of each optimizer step are dealt to processes and micro-batches so that each computes about
            as many tokens. The pairs of a step stay those of a plain shuffle, and so does its loss.
        tokens_per_step (`int`, *optional*):
            Most tokens of a mean optimizer step, over all processes and accumulation steps: steps then hold as many
            pairs of a plain shuffle as that makes, in place of `per_device_train_batch_size`, dealt as by
            `balance_tokens`. A pair costs its prompt once and both its answers, or both its rows where
            `truncation_mode="keep_end"` cuts them by different amounts. Losses are multiplied by the step's pairs over
            those of a mean step, so that every pair of an epoch weighs the same in them.
        check_reference (`bool`, *optional*, defaults to `True`):
            Whether the first micro-batch of a run without `ref_model` is looked at before the first step: there policy and
            reference must give the same log-probabilities, up to rounding, or training stops with what may be wrong. It
            costs nothing where they do.

        narrate (`bool`, *optional*, defaults to `True`):
            Whether the first training log and the end of training are told in one line of words each: which of the two
            log-probabilities moved how far against the reference, and how many pairs are in the undesirable region U. The
            first process alone prints it.

    Raises:
        ValueError: naming every fault of these fields at once.

    > [!NOTE]
    > Where the machine has no bfloat16 and `bf16` was not set, training is in float32, where `DPOConfig` raises.
    """

    constraint: str = field(
        default="none",
        metadata={
            "help": "Form of the constraint on the preference gap. 'none' is plain DPO.",
            "choices": list(CONSTRAINTS),
        },
    )
    gamma: float = field(
        default=0.0,
        metadata={
            "help": "The preference gap asked for, >= 0, in nats: a sum per response or a mean per token, as "
            "logps_reduction says. Pairs below it are counted as violations under every constraint."
        },
    )
    tau: float = field(default=2.0, metadata={"help": "Sharpness of 'softplus', > 0, per nat."})
    alpha: float = field(
        default=1.0,
        metadata={"help": "Divisor of the 'softplus' margin, > 0, without unit. Above 1, targets may stay below gamma."},
    )
    penalty_weight: float = field(default=1.0, metadata={"help": "Weight of 'penalty', >= 0, per nat."})
    epsilon: float = field(
        default=0.0,
        metadata={"help": "For 'lagrangian': the mean violation allowed, >= 0, in nats or as a fraction (dual_signal)."},
    )
    dual_lr: float | None = field(
        default=None,
        metadata={
            "help": "For 'lagrangian': step size of the multiplier per optimizer step, >= 0. Default: 0.1 beta^2 for the "
            "signal 'violation', 0.1 beta for 'violation_rate'."
        },
    )
    dual_max: float | None = field(
        default=None, metadata={"help": "For 'lagrangian': cap of the multiplier, > 0, per nat. Default: beta."}
    )
    dual_init: float = field(default=0.0, metadata={"help": "For 'lagrangian': the multiplier at the start, >= 0, per nat."})
    dual_warmup_steps: int = field(
        default=0, metadata={"help": "For 'lagrangian': optimizer steps at the start that leave the multiplier as it is."}
    )
    dual_signal: str = field(
        default="violation",
        metadata={
            "help": "For 'lagrangian': what drives the multiplier, the mean hinge 'violation' (nats) or the fraction "
            "'violation_rate'.",
            "choices": list(SIGNALS),
        },
    )
    logps_reduction: str = field(
        default="sum",
        metadata={
            "help": "How a response's log-probability is made of its tokens', for policy and reference alike: 'sum' "
            "or 'mean' (per token). With 'mean' the loss 'sigmoid' is TRL's 'sigmoid_norm'.",
            "choices": list(REDUCTIONS),
        },
    )
    prefix_sharing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute each pair's prompt once and pack pairs without padding. Default: where a constraint is on "
            "and a probe finds it exact. True: always, refusing models that cannot be packed. False: never."
        },
    )
    balance_tokens: bool = field(
        default=False,
        metadata={
            "help": "Deal the pairs of each optimizer step to processes and micro-batches so that each computes about as "
            "many tokens. Which pairs a step holds stays a plain shuffle."
        },
    )
    tokens_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a mean optimizer step over all processes, in place of a fixed number of pairs "
            "(per_device_train_batch_size). Every pair of an epoch keeps the same weight in the loss."
        },
    )
    check_reference: bool = field(
        default=True,
        metadata={
            "help": "Stop before the first step if, without a ref_model, policy and reference give other log-probabilities "
            "on the first micro-batch."
        },
    )
    narrate: bool = field(
        default=True,
        metadata={"help": "Tell the first training log and the end of training in one line of words each."},
    )

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        for name in ("constraint", "logps_reduction", "dual_signal"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{type(self).__name__}: {name} must be a string; got {getattr(self, name)!r}.")
        faults = self._knob_faults()
        if self.constraint in CONSTRAINTS and self.logps_reduction in REDUCTIONS and set(self.loss_type) <= set(LOSS_READS):
            faults += self._combination_faults()
        if faults:
            count = "" if len(faults) == 1 else f" ({len(faults)} faults)"
            raise ValueError(f"{type(self).__name__}{count}: " + "\n".join(faults))
        if self.logps_reduction == "mean":
            self.loss_type = [MEAN_OF.get(loss_type, loss_type) for loss_type in self.loss_type]
        if self.bf16 is None and not self.fp16 and not self._has_bf16():
            logger.warning_once(
                "This machine has no bfloat16 support: training in float32 (bf16=False). On a GPU without bfloat16, "
                "fp16=True gives mixed precision."
            )
            self.bf16 = False
        super().__post_init__()

    @property
    def knobs(self) -> Knobs:
        """The numbers that the constraint reads."""
        return Knobs(
            beta=self.beta,
            gamma=self.gamma,
            tau=self.tau,
            alpha=self.alpha,
            penalty_weight=self.penalty_weight,
            logps_reduction=self.logps_reduction,
            epsilon=self.epsilon,
            dual_lr=self.dual_lr,
            dual_max=self.dual_max,
            dual_init=self.dual_init,
            dual_warmup_steps=self.dual_warmup_steps,
            dual_signal=self.dual_signal,
        )

    @property
    def dual_rule(self) -> DualRule:
        """How the multiplier of a dual constraint moves, with what β sets filled in."""
        scale = self.beta**2 if self.dual_signal == "violation" else self.beta
        return DualRule(
            epsilon=self.epsilon,
            step_size=0.1 * scale if self.dual_lr is None else self.dual_lr,
            cap=self.beta if self.dual_max is None else self.dual_max,
            start=self.dual_init,
            warmup_steps=self.dual_warmup_steps,
            signal=self.dual_signal,
        )

    def _has_bf16(self) -> bool:
        # On the CPU DPOConfig uses bfloat16 only when told `use_cpu`; then it is left alone.
        if self.use_cpu:
            return True
        return is_torch_bf16_gpu_available() or is_torch_xla_available()

    def _knob_faults(self) -> list[str]:
        faults = []
        if self.constraint not in CONSTRAINTS:
            faults.append(one_of("constraint", self.constraint, CONSTRAINTS))
        if self.logps_reduction not in REDUCTIONS:
            faults.append(one_of("logps_reduction", self.logps_reduction, REDUCTIONS))
        for name, (lowest, allowed) in _BOUNDS.items():
            value = getattr(self, name)
            if value is None and name in _LEFT_TO_BETA:
                continue
            kind, kinds = ("finite number", (int, float)) if isinstance(lowest, float) else ("whole number", int)
            kind = "number" if name in _UNBOUNDED else kind
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            is_number = is_number and (is_finite(value) or (name in _UNBOUNDED and value == math.inf))
            if not is_number or value < lowest or (value == lowest and not allowed):
                sign = "≥" if allowed else ">"
                faults.append(f"{name} must be a {kind} {sign} {lowest:g}; got {value!r}.")
        if self.dual_signal not in SIGNALS:
            faults.append(one_of("dual_signal", self.dual_signal, SIGNALS))
        if self.prefix_sharing is not None and not isinstance(self.prefix_sharing, bool):
            faults.append(f"prefix_sharing must be True, False or None; got {self.prefix_sharing!r}.")
        for name in ("balance_tokens", "check_reference", "narrate"):
            if not isinstance(getattr(self, name), bool):
                faults.append(f"{name} must be True or False; got {getattr(self, name)!r}.")
        budget = self.tokens_per_step
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
            faults.append(f"tokens_per_step must be a whole number ≥ 1, or None; got {budget!r}.")
        for loss_type in self.loss_type:
            if loss_type not in LOSS_READS:
                faults.append(one_of("loss_type", loss_type, LOSS_READS))
        return faults

    def _combination_faults(self) -> list[str]:
        form = CONSTRAINTS[self.constraint]
        faults = []
        if form.reads and not (isinstance(self.beta, (int, float)) and is_finite(self.beta) and self.beta > 0):
            faults.append(f"beta must be a finite number > 0 under constraint={self.constraint!r}; got {self.beta!r}.")
        faults += form.faults(self.knobs)
        if form.dual and not faults and not self._knob_faults():  # only sound numbers can be compared
            faults += self._dual_faults()
        reads = {loss_type: LOSS_READS[loss_type] for loss_type in self.loss_type}
        if self.logps_reduction == "mean":
            summed = [name for name, read in reads.items() if read in ("sum", "one side") and name not in MEAN_OF]
            if summed:
                faults.append(
                    f"logps_reduction='mean' with loss_type {summed}: TRL defines it on summed log-probabilities. Use "
                    "'sigmoid', 'sigmoid_norm', 'ipo' or 'sft', or logps_reduction='sum'."
                )
        if form.moves_target:
            faults += self._target_faults(reads)
        asked = {"balance_tokens": self.balance_tokens is True, "tokens_per_step": isinstance(self.tokens_per_step, int)}
        orders = [f"{name}={getattr(self, name)}" for name, given in asked.items() if given]
        if orders and self.train_sampling_strategy != "random":
            faults.append(
                f"{orders[0]} orders the training pairs itself; got train_sampling_strategy="
                f"{self.train_sampling_strategy!r} beside it. Leave one of them out."
            )
        if self.tokens_per_step is not None and self.auto_find_batch_size:
            faults.append(
                "auto_find_batch_size=True looks for a number of pairs, and tokens_per_step sets none. Leave one of them out."
            )
        return faults

    def _dual_faults(self) -> list[str]:
        rule, faults = self.dual_rule, []
        if rule.start > rule.cap:
            faults.append(f"dual_init must be at most dual_max={rule.cap:g}; got {rule.start!r}.")
        if rule.signal == "violation_rate" and 1.0 <= rule.epsilon < math.inf:
            faults.append(
                f"epsilon is a fraction of pairs under dual_signal='violation_rate', and {rule.epsilon!r} allows them all. Set "
                "it below 1, or use dual_signal='violation' for an epsilon in nats."
            )
        return faults

    def _target_faults(self, reads: dict[str, str]) -> list[str]:
        faults = []
        one_side = [name for name, read in reads.items() if read == "one side"]
        if one_side:
            faults.append(
                f"constraint={self.constraint!r} moves the target margin of a pair, and loss_type {one_side} reads one "
                "side's log-ratio by itself, where a margin has no meaning. Use 'sigmoid', 'hinge', 'robust', "
                "'exo_pair', 'discopop', 'aot', 'sigmoid_norm', 'ipo' or 'sft', or constraint='penalty'."
            )
        averaged = [name for name, read in reads.items() if read == "mean"]
        if self.logps_reduction == "sum" and averaged:
            faults.append(
                f"loss_type {averaged} averages log-probabilities per token: under constraint={self.constraint!r} set "
                "logps_reduction='mean', so that gamma and the target are per token as well."
            )
        if all(read == "no reference" for read in reads.values()):
            faults.append(
                f"loss_type {list(reads)} reads no reference, so constraint={self.constraint!r} would change nothing. "
                "Add a preference loss such as 'sigmoid', or use constraint='penalty' or 'none'."
            )
        if self.f_divergence_type != "reverse_kl":
            faults.append(
                f"constraint={self.constraint!r} is defined for f_divergence_type='reverse_kl' alone; got "
                f"{self.f_divergence_type!r}, which bends each side's log-ratio before they are compared, so that no "
                "target margin on their difference exists. Use 'reverse_kl', or constraint='penalty'."
            )
        return faults


def unused_knobs(config: CPOConstrainedConfig) -> list[str]:
    """Knobs that were set away from their default and that the constraint does not read, as `name=value`."""
    reads = CONSTRAINTS[config.constraint].reads
    fields = CPOConstrainedConfig.__dataclass_fields__
    return [
        f"{name}={getattr(config, name)}"
        for name in _BOUNDS
        if name not in reads and name != "gamma" and getattr(config, name) != fields[name].default
    ]
