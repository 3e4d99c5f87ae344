"""CPOConstrainedConfig: DPOConfig and the fields of the constraint."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ._trl.loss import LOSS_READS, MEAN_OF
from .constraint_fields import HYPERPARAMETERS, ConstraintFields, FormName
from .constraints import CONSTRAINTS, Constraint
from .constraints.dual_rule import DualRule
from .engine.config import DPOConfig, documented
from .faults import is_finite, is_true_or_false, one_of
from .hyperparameters import fault
from .labels.bounds import Bounds
from .labels.fields import LabelFields, label_faults, prepare_labels
from .labels.form import SOFT_LOSSES
from .metrics import MORE_IS_BETTER
from .pairs import REDUCTIONS
from .price.fields import PRICE_IS_BETTER, PriceFields, prepare_price, price_faults
from .units import DEFAULTS_OF_MEANS, UNITS
from .unset import UnsetNumber, UnsetText

#: Of every `cpo/*` name that an evaluation logs, the price's too: whether more is better, or None.
DIRECTIONS = {**MORE_IS_BETTER, **PRICE_IS_BETTER}


def _unset(of: Any, name: str, default: UnsetNumber | UnsetText):
    """A field as `of` has it, whose default can be told from the same value given."""
    about = dict(of.__dataclass_fields__[name].metadata)
    if name in DEFAULTS_OF_MEANS:
        about["help"] += f" Not given, it is {DEFAULTS_OF_MEANS[name]:g} under logps_reduction='mean'."
    return field(default=default, metadata=about)


def _own(metric: str | None) -> str | None:
    """Of `eval_cpo/<name>`, or with a set's name in front, the name; None of a metric that is not ours."""
    return str(metric).rpartition("cpo/")[2] if "cpo/" in str(metric) else None


@documented
@dataclass
class CPOConstrainedConfig(ConstraintFields, LabelFields, PriceFields, DPOConfig):
    r"""
    Configuration of [`CPOConstrainedTrainer`]: every field of [`~trl.DPOConfig`] and of the engine, and the constraint's.

    Below, a gap is the policy's own preference gap `δ_θ = s_θ(chosen) − s_θ(rejected)` in nats, where `s` is the
    response's log-probability, summed or averaged over its tokens (`logps_reduction`).

    {parameters}

    Raises:
        ValueError: naming every fault of these fields at once.
    """

    constraint: FormName = _unset(ConstraintFields, "constraint", UnsetText("none"))
    gamma: float = _unset(ConstraintFields, "gamma", UnsetNumber(0.0))
    beta: float = _unset(DPOConfig, "beta", UnsetNumber(DPOConfig.beta))
    logps_reduction: str = field(
        default="sum",
        metadata={
            "help": "How a response's log-probability is made of its tokens', for policy and reference alike: 'sum' "
            "or 'mean' (per token). With 'mean' the loss 'sigmoid' is TRL's 'sigmoid_norm', and beta and gamma that are not "
            "given are the paper's, 2.5 and 0.05.",
            "choices": list(REDUCTIONS),
        },
    )
    narrate: bool = field(
        default=True,
        metadata={"help": "Tell the first training log and the end of training in one line of words each."},
    )

    # Of the instance, but for a config that an earlier version pickled (training_args.bin).
    chose_constraint = True
    not_given = tuple[str, ...]()

    def __post_init__(self):
        self._settle_unset()
        prepare_labels(self)
        if not price_faults(self):
            prepare_price(self)
        if self.greater_is_better is None:
            # transformers takes less to be better only of names that end with "loss".
            self.greater_is_better = DIRECTIONS.get(_own(self.metric_for_best_model))
        super().__post_init__()
        if self.logps_reduction == "mean":
            self.loss_type = [MEAN_OF.get(loss_type, loss_type) for loss_type in self.loss_type]

    def _settle_unset(self) -> None:
        """Gives β and γ that were not given their values, and keeps what was not given."""
        self.chose_constraint = not isinstance(self.constraint, UnsetText)
        plain: Any = self.constraint if self.chose_constraint else str.__str__(self.constraint)
        self.constraint = plain
        #: Of β and γ, those that were not given. A resumed run keeps the values that they had.
        self.not_given = tuple(name for name in DEFAULTS_OF_MEANS if isinstance(getattr(self, name), UnsetNumber))
        for name in self.not_given:
            setattr(self, name, DEFAULTS_OF_MEANS[name] if self.logps_reduction == "mean" else float(getattr(self, name)))

    def keep(self, settings: Mapping[str, Any]) -> list[str]:
        """Has β and γ that were not given be those of a run that is gone on with; returns what changed, `name=value` each.

        Earlier versions gave means the defaults of sums. Where the reductions differ, nothing is kept.

        Args:
            settings: of the run, as its checkpoint holds them.
        """
        if settings.get("logps_reduction") != self.logps_reduction:
            return []
        kept = [name for name in self.not_given if settings.get(name, getattr(self, name)) != getattr(self, name)]
        for name in kept:
            setattr(self, name, settings[name])
        self.not_given = tuple(name for name in self.not_given if name not in kept)
        return [f"{name}={settings[name]:g}" for name in kept]

    def faults(self) -> list[str]:
        """What is wrong with these fields, one sentence each."""
        strings = [name for name, declared in HYPERPARAMETERS.items() if declared.metadata["choices"]]
        for name in ("constraint", "logps_reduction", *strings):
            if not isinstance(getattr(self, name), str):
                return [f"{name} must be a string; got {getattr(self, name)!r}."]
        faults = []
        if self.constraint not in CONSTRAINTS:
            faults.append(one_of("constraint", self.constraint, CONSTRAINTS))
        if self.logps_reduction not in REDUCTIONS:
            faults.append(one_of("logps_reduction", self.logps_reduction, REDUCTIONS))
        known, out_of_range = not faults, self._out_of_range()
        faults += [*out_of_range.values(), *is_true_or_false("narrate", self.narrate), *super().faults()]
        faults += [*price_faults(self), *label_faults(self)]
        if known and set(self.loss_type) <= set(LOSS_READS):
            faults += self._combination_faults(out_of_range)
        return faults

    @property
    def is_plain_dpo(self) -> bool:
        return self.constraint == "none" and not self.labels_act

    @property
    def adds_loss(self) -> bool:
        return self.form.adds_loss or self.has_soft_labels or self.chosen_floor is not None

    def bounds(self, groups: Sequence[str], epsilons: Mapping[str, float]) -> Bounds:
        """The bounds that are asked for, for groups of these names; `epsilons` are the constraint's, by group."""
        floor, weight, rule = self.chosen_floor, self.chosen_floor_weight, None
        if floor is not None and weight is None:
            # Step size and cap are the defaults of 'lagrangian'.
            rule = DualRule(self.chosen_floor_epsilon, 0.1 * self.beta**2, self.beta)
        return Bounds(self.form.dual_rule, floor=floor, floor_weight=weight, floor_rule=rule, groups=groups, epsilons=epsilons)

    @property
    def form(self) -> Constraint:
        """The constraint, with the hyperparameters that it reads."""
        form = CONSTRAINTS[self.constraint]
        return form(**{each.name: getattr(self, each.name) for each in dataclasses.fields(form)})

    def cautions(self) -> list[str]:
        """What to know of the constraint before training: hyperparameters that it does not use, and what it says itself."""
        reads = self.form.hyperparameters()
        unused = [
            f"{name}={getattr(self, name)}"
            for name, declared in HYPERPARAMETERS.items()
            if name not in reads and getattr(self, name) != declared.default
        ]
        notes = [f"constraint={self.constraint!r} does not use {', '.join(unused)}."] if unused else []
        notes += filter(None, [self._idle_gamma()])
        return notes + super().cautions() + self._best_model_cautions() + self.form.cautions()

    def follows(self) -> str | None:
        """Which of β and γ were not given and follow the reduction, in a sentence; None where none do."""
        if self.logps_reduction != "mean" or not self.not_given:
            return None
        values = " and ".join(f"{name}={getattr(self, name):g}" for name in self.not_given)
        follow = "it follows" if len(self.not_given) == 1 else "they follow"
        return (
            f"{values}: not given, so {follow} logps_reduction='mean' ({UNITS['mean']}). By sums beta is TRL's "
            f"{DPOConfig.beta:g} and gamma 0."
        )

    def _idle_gamma(self) -> str | None:
        if self.chose_constraint or not self.is_plain_dpo or "gamma" in self.not_given or not self.gamma:
            return None
        return (
            f"gamma={self.gamma:g} changes nothing in training: no constraint was given, and constraint='none' is plain DPO. "
            "Set constraint='clip' to train every pair towards gamma, or constraint='none' to compare."
        )

    def _best_model_cautions(self) -> list[str]:
        name, said = self.metric_for_best_model, self.greater_is_better
        own = _own(name)
        better = DIRECTIONS.get(own)
        if better is not None and said is not better:
            return [
                f"metric_for_best_model={name!r} with greater_is_better={said} keeps the worst checkpoint: "
                f"{'more' if better else 'less'} of it is better. Set greater_is_better={better}, or leave it out."
            ]
        if own in DIRECTIONS and better is None:
            return [
                f"metric_for_best_model={name!r} says nothing of the policy, so it finds no best checkpoint. Use "
                "'eval_loss', 'eval_cpo/violation' or 'eval_cpo/gap'."
            ]
        return []

    def _out_of_range(self) -> dict[str, str]:
        faults = {name: fault(declared, getattr(self, name)) for name, declared in HYPERPARAMETERS.items()}
        return {name: text for name, text in faults.items() if text is not None}

    def _combination_faults(self, out_of_range: dict[str, str]) -> list[str]:
        form, faults = self.form, []
        sound_beta = isinstance(self.beta, (int, float)) and is_finite(self.beta) and self.beta > 0
        if not self.is_plain_dpo and not sound_beta:
            under = f"under constraint={self.constraint!r}" if self.constraint != "none" else "with labels or a chosen floor"
            faults.append(f"beta must be a finite number > 0 {under}; got {self.beta!r}.")
        elif self.chosen_floor_weight is None and self.chosen_floor is not None and self.beta > 1e100:
            # its square, of which the multiplier's step size is made, may be beyond any float
            faults.append(f"beta must be at most 1e100 with a chosen floor; got {self.beta!r}.")
        if self.constraint == "none" and self.reach is not None:
            faults.append(
                f"reach says which pairs a constraint leaves alone, and constraint='none' leaves all; got {self.reach!r}. "
                "Leave it out, or set a constraint such as 'clip'."
            )
        own = form.hyperparameters().keys() - Constraint.hyperparameters().keys()
        if not faults and own.isdisjoint(out_of_range):  # only sound numbers can be compared
            faults += form.faults()
        reads = {loss_type: LOSS_READS[loss_type] for loss_type in self.loss_type}
        if self.logps_reduction == "mean":
            summed = [name for name, read in reads.items() if read in ("sum", "one side") and name not in MEAN_OF]
            if summed:
                faults.append(
                    f"logps_reduction='mean' with loss_type {summed}: TRL defines it on summed log-probabilities. Use "
                    "'sigmoid', 'sigmoid_norm', 'ipo' or 'sft', or logps_reduction='sum'."
                )
        if form.moves_target or self.margin_column is not None:
            faults += self._target_faults(reads)
        if self.has_soft_labels:
            faults += self._soft_label_faults(reads)
        return faults

    def _soft_label_faults(self, reads: dict[str, str]) -> list[str]:
        faults, how = [], {name: SOFT_LOSSES[name] for name in reads if name in SOFT_LOSSES}
        undefined = [name for name in reads if name not in SOFT_LOSSES]
        if undefined:
            faults.append(
                f"A probability of labels is not defined for loss_type {undefined}. Use 'sigmoid', 'sigmoid_norm' or 'ipo', "
                "each also beside 'sft'."
            )
        if {"term", "target"} <= set(how.values()):
            faults.append(
                f"With a probability of labels, loss_type {list(reads)} mixes losses that take it up in different ways. Use "
                "either 'ipo' or 'sigmoid'."
            )
        if self.logps_reduction == "sum" and "mean" in reads.values():
            faults.append(
                f"loss_type {[n for n, read in reads.items() if read == 'mean']} averages log-probabilities per token: with a "
                "probability of labels set logps_reduction='mean'."
            )
        if self.use_weighting:
            faults.append("use_weighting=True and a probability of labels both weigh a pair. Leave one of them out.")
        if self.f_divergence_type != "reverse_kl":
            faults.append(
                f"A probability of labels is defined for f_divergence_type='reverse_kl' alone; got {self.f_divergence_type!r}."
            )
        return faults

    @property
    def _mover(self) -> str:
        return f"constraint={self.constraint!r}" if self.form.moves_target else f"margin_column={self.margin_column!r}"

    def _target_faults(self, reads: dict[str, str]) -> list[str]:
        faults = []
        one_side = [name for name, read in reads.items() if read == "one side"]
        if one_side:
            faults.append(
                f"{self._mover} moves the target margin of a pair, and loss_type {one_side} reads one "
                "side's log-ratio by itself, where a margin has no meaning. Use 'sigmoid', 'hinge', 'robust', "
                "'exo_pair', 'discopop', 'aot', 'sigmoid_norm', 'ipo' or 'sft', or constraint='penalty'."
            )
        averaged = [name for name, read in reads.items() if read == "mean"]
        if self.logps_reduction == "sum" and averaged:
            faults.append(
                f"loss_type {averaged} averages log-probabilities per token: under {self._mover} set "
                "logps_reduction='mean', so that gamma and the target are per token as well."
            )
        if all(read == "no reference" for read in reads.values()):
            faults.append(
                f"loss_type {list(reads)} reads no reference, so {self._mover} would change nothing. "
                "Add a preference loss such as 'sigmoid', or use constraint='penalty' or 'none'."
            )
        if self.f_divergence_type != "reverse_kl":
            faults.append(
                f"{self._mover} is defined for f_divergence_type='reverse_kl' alone; got "
                f"{self.f_divergence_type!r}, which bends each side's log-ratio before they are compared, so that no "
                "target margin on their difference exists. Use 'reverse_kl', or constraint='penalty'."
            )
        return faults
