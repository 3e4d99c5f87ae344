"""The options that name a dataset's columns of labels, and what is asked of groups and of the chosen answer."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..faults import is_finite
from ..hyperparameters import LARGEST

#: `score_scale` for a scale that is fitted on the evaluation set.
FIT = "fit"
_COLUMNS = ("probability_column", "margin_column", "group_column")
_MAPPINGS = ("gamma_by_group", "epsilon_by_group")


@dataclass
class LabelFields:
    probability_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the probability, from 0 to 1, that the chosen answer is the better one, such as "
            "'chosen_probs'. A pair at 0.5 is pulled nowhere. For the losses 'sigmoid', 'sigmoid_norm' and 'ipo'."
        },
    )
    score_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Two columns with the scores of the chosen and the rejected answer; with score_scale they give the "
            "probability.",
            "nargs": 2,
        },
    )
    score_scale: str | None = field(
        default=None,
        metadata={
            "help": "η > 0 in p = σ(η (score of chosen − score of rejected)), or 'fit': by maximum likelihood on the "
            "evaluation set."
        },
    )
    margin_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the margin m ≥ 0 by which the chosen answer's reward is higher: the target t becomes t + m/β."
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Column with the group of a pair: metrics, gamma, epsilon and the multiplier are then per group."},
    )
    gamma_by_group: dict | str | None = field(
        default=None, metadata={"help": "gamma by the name of a group, as a mapping or JSON; gamma is that of the others."}
    )
    epsilon_by_group: dict | str | None = field(
        default=None,
        metadata={
            "help": "For 'lagrangian': epsilon by the name of a group, as a mapping or JSON; epsilon is that of the others."
        },
    )
    chosen_floor: float | None = field(
        default=None,
        metadata={
            "help": "κ ≥ 0: bounds max(0, s_ref(chosen) − κ − s_θ(chosen)), how far the chosen answer falls, in nats of "
            "logps_reduction. Goes with every constraint."
        },
    )
    chosen_floor_weight: float | None = field(
        default=None,
        metadata={"help": "Fixed weight of the chosen floor's violation, per nat. Default: a multiplier."},
    )
    chosen_floor_epsilon: float = field(
        default=0.0, metadata={"help": "Mean violation of the chosen floor that its multiplier allows, nats."}
    )

    @property
    def has_soft_labels(self) -> bool:
        """Whether pairs have a probability, given or made from scores."""
        return self.probability_column is not None or self.score_columns is not None

    @property
    def has_labels(self) -> bool:
        """Whether any label of the data is read."""
        return self.has_soft_labels or self.margin_column is not None or self.group_column is not None

    @property
    def labels_act(self) -> bool:
        """Whether these options change the loss, of plain DPO too. Groups alone do not."""
        return self.has_soft_labels or self.margin_column is not None or self.chosen_floor is not None


def prepare_labels(args: Any) -> None:
    """Reads JSON and numbers out of strings, as the command line gives them; what cannot be read stays, for `label_faults`."""
    for name in _MAPPINGS:
        value = getattr(args, name)
        if isinstance(value, str):
            try:
                setattr(args, name, json.loads(value))
            except ValueError:
                continue
    if isinstance(args.score_scale, str) and args.score_scale != FIT:
        try:
            args.score_scale = float(args.score_scale)
        except ValueError:
            return


def label_faults(args: Any) -> list[str]:
    """What is wrong with these fields of a configuration, one sentence each."""
    return [*_column_faults(args), *_group_faults(args), *_floor_faults(args)]


def _column_faults(args: Any) -> Iterator[str]:
    for name in _COLUMNS:
        value = getattr(args, name)
        if value is not None and (not isinstance(value, str) or not value):
            yield f"{name} must be the name of a column, or None; got {value!r}."
    columns, scale = args.score_columns, args.score_scale
    if columns is not None and not (
        isinstance(columns, (list, tuple)) and len(columns) == 2 and all(isinstance(name, str) and name for name in columns)
    ):
        yield f"score_columns must be two names of columns, of the chosen and the rejected answer's score; got {columns!r}."
    if (columns is None) != (scale is None):
        yield (
            f"score_columns={columns!r} and score_scale={scale!r} go together: p = σ(score_scale (score of chosen − score of "
            "rejected)). Give both, or none."
        )
    if scale is not None and not (isinstance(scale, str) and scale == FIT) and not (_is_number(scale) and 0 < scale <= LARGEST):
        yield f"score_scale must be a number > 0, or {FIT!r}; got {scale!r}."
    if columns is not None and args.probability_column is not None:
        yield (
            f"probability_column={args.probability_column!r} and score_columns={columns!r} both say how sure a pair is. Leave "
            "one of them out."
        )


def _group_faults(args: Any) -> Iterator[str]:
    for name in _MAPPINGS:
        value = getattr(args, name)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            yield f'{name} must be a mapping from groups to numbers, such as {{"helpful": 1.0}}; got {value!r}.'
        elif args.group_column is None:
            yield f"{name} needs group_column, the column that holds a pair's group."
        else:
            for group, number in value.items():
                if not (_is_number(number) and 0 <= number <= LARGEST):
                    yield f"{name}[{group!r}] must be a finite number ≥ 0; got {number!r}."
    if args.epsilon_by_group is not None and args.constraint != "lagrangian":
        yield f"epsilon_by_group is for constraint='lagrangian', whose multipliers it bounds; got {args.constraint!r}."
    if isinstance(args.epsilon_by_group, Mapping) and args.dual_signal == "violation_rate":
        for group, number in args.epsilon_by_group.items():
            if _is_number(number) and number >= 1:
                yield f"epsilon_by_group[{group!r}] is a fraction under dual_signal='violation_rate', below 1; got {number!r}."


def _floor_faults(args: Any) -> Iterator[str]:
    for name, optional in (("chosen_floor", True), ("chosen_floor_weight", True), ("chosen_floor_epsilon", False)):
        value = getattr(args, name)
        if not (value is None and optional) and not (_is_number(value) and 0 <= value <= LARGEST):
            yield f"{name} must be a finite number ≥ 0{', or None' if optional else ''}; got {value!r}."
    allows = not _is_number(args.chosen_floor_epsilon) or args.chosen_floor_epsilon != 0
    if args.chosen_floor is None and (args.chosen_floor_weight is not None or allows):
        yield "chosen_floor_weight and chosen_floor_epsilon need chosen_floor, the fall that is allowed, in nats."
    elif args.chosen_floor_weight is not None and allows:
        yield "chosen_floor_epsilon is what a multiplier allows, chosen_floor_weight a fixed weight. Leave one of them out."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value)
