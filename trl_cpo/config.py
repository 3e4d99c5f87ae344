"""CPOConstrainedConfig: DPOConfig and the fields of the constraint."""

import math
from dataclasses import dataclass, field

from ._trl.loss import LOSS_READS, MEAN_OF
from .constraints import CONSTRAINTS, Knobs
from .engine.config import DPOConfig, documented
from .faults import is_finite, is_true_or_false, one_of
from .multiplier import SIGNALS, DualRule
from .pairs import REDUCTIONS

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


@documented
@dataclass
class CPOConstrainedConfig(DPOConfig):
    r"""
    Configuration of [`CPOConstrainedTrainer`]: every field of [`~trl.DPOConfig`] and of the engine, and the constraint's.

    Below, a gap is the policy's own preference gap `δ_θ = s_θ(chosen) − s_θ(rejected)` in nats, where `s` is the
    response's log-probability, summed or averaged over its tokens (`logps_reduction`).

    {parameters}

    Raises:
        ValueError: naming every fault of these fields at once.
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
    narrate: bool = field(
        default=True,
        metadata={"help": "Tell the first training log and the end of training in one line of words each."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.logps_reduction == "mean":
            self.loss_type = [MEAN_OF.get(loss_type, loss_type) for loss_type in self.loss_type]

    def faults(self) -> list[str]:
        """What is wrong with these fields, one sentence each."""
        for name in ("constraint", "logps_reduction", "dual_signal"):
            if not isinstance(getattr(self, name), str):
                return [f"{name} must be a string; got {getattr(self, name)!r}."]
        faults = self._knob_faults() + is_true_or_false("narrate", self.narrate) + super().faults()
        if self.constraint in CONSTRAINTS and self.logps_reduction in REDUCTIONS and set(self.loss_type) <= set(LOSS_READS):
            faults += self._combination_faults()
        return faults

    @property
    def is_plain_dpo(self) -> bool:
        return self.constraint == "none"

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
