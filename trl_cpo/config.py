"""CPOConstrainedConfig: DPOConfig and the fields of the constraint."""

import difflib
import math
from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging
from trl import DPOConfig

from ._trl import LOSS_READS, MEAN_OF
from .constraints import CONSTRAINTS, Knobs
from .pairs import REDUCTIONS

logger = logging.get_logger(__name__)

#: The knobs of the constraint: name to (lowest value, whether the lowest value itself is allowed).
_BOUNDS = {"gamma": (0.0, True), "tau": (0.0, False), "alpha": (0.0, False), "penalty_weight": (0.0, True)}


def one_of(name: str, got, allowed) -> str:
    """The sentence for a value that is not among the allowed names, with the nearest of them offered."""
    nearest = difflib.get_close_matches(str(got), list(allowed), n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{name} must be one of {', '.join(map(repr, allowed))}; got {got!r}.{hint}"


@dataclass
class CPOConstrainedConfig(DPOConfig):
    r"""
    Configuration of [`CPOConstrainedTrainer`]: every field of [`~trl.DPOConfig`], and the constraint's.

    Below, a gap is the policy's own preference gap `δ_θ = s_θ(chosen) − s_θ(rejected)` in nats, where `s` is the
    response's log-probability, summed or averaged over its tokens (`logps_reduction`).

    Parameters:
        constraint (`str`, *optional*, defaults to `"none"`):
            Form of the constraint: `"none"` (plain DPO), `"clip"`, `"softplus"`, `"inverse_prob"`, `"inverse_logp"`,
            `"penalty"`. All but `"penalty"` move the loss's target margin from `δ_ref` to another; `"penalty"` adds
            `penalty_weight * max(0, gamma − δ_θ)`.
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

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        for name in ("constraint", "logps_reduction"):
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
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < lowest or (value == lowest and not allowed):
                sign = "≥" if allowed else ">"
                faults.append(f"{name} must be a finite number {sign} {lowest:g}; got {value!r}.")
        if self.prefix_sharing not in (None, True, False):
            faults.append(f"prefix_sharing must be True, False or None; got {self.prefix_sharing!r}.")
        for loss_type in self.loss_type:
            if loss_type not in LOSS_READS:
                faults.append(one_of("loss_type", loss_type, LOSS_READS))
        return faults

    def _combination_faults(self) -> list[str]:
        form = CONSTRAINTS[self.constraint]
        faults = []
        if form.reads and not (isinstance(self.beta, (int, float)) and math.isfinite(self.beta) and self.beta > 0):
            faults.append(f"beta must be a finite number > 0 under constraint={self.constraint!r}; got {self.beta!r}.")
        faults += form.faults(self.knobs)
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
        if self.balance_tokens and self.train_sampling_strategy != "random":
            faults.append(
                f"balance_tokens=True orders the training pairs itself; got train_sampling_strategy="
                f"{self.train_sampling_strategy!r} beside it. Leave one of them out."
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
