"""The bounds of a run, the constraint's own and the floor under the chosen answer, with a multiplier for each group."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..constraints.dual_rule import DualRule
from ..metrics import COLUMNS
from ..multiplier import Multiplier
from ..pairs import PairLogps
from .form import LabelledForm, PairLabels, chosen_floor_violation

#: The metric of the chosen floor, in the column behind those of `trl_cpo.metrics`.
FALLEN = "chosen_floor_violation"


class Multipliers:
    """A multiplier for each group of pairs, moved by that group's pairs alone; without groups, one for all pairs.

    All follow one rule, each with its own ε: `λ_g ← clip(λ_g + η (v_g − ε_g), 0, cap)`. A group that a step lacks stays.

    Args:
        rule: with the ε of groups that have none of their own.
        groups: their names, in the order of their indices; empty: no groups.
        epsilons: ε by the name of a group.
        bound: in front of the names that are logged: `cpo/<group>/<bound>lambda`.
    """

    def __init__(
        self,
        rule: DualRule,
        groups: Sequence[str] = (),
        epsilons: Mapping[str, float] | None = None,
        bound: str = "",
    ):
        own, self.rule, self.bound = epsilons or {}, rule, bound
        #: By the name of the group; the one for all pairs under "".
        self.parts = {
            name: Multiplier(replace(rule, epsilon=own.get(name, rule.epsilon)), f"cpo/{name}/{bound}") for name in groups
        }
        if not groups:
            self.parts = {"": Multiplier(rule, f"cpo/{bound}")}
        self._seen: list[tuple[Tensor, Tensor | None]] = []
        self._evaluated: list[tuple[Tensor, Tensor | None]] = []

    def of_pairs(self, group: Tensor | None) -> float | Tensor:
        """λ of each pair: one number where all have the same, else (B,), 1/nats. `group` is (B,), indices."""
        values = [part.value for part in self.parts.values()]
        if group is None or len(set(values)) == 1:
            return values[0]
        return torch.tensor(values, dtype=torch.float32).to(group.device, non_blocking=True)[group]

    def pairs_of_a_step(self, mean: float | None, shares: Mapping[str, float]) -> None:
        """Sets the pairs of a mean step, where steps differ in it; a group has its share of them."""
        for name, part in self.parts.items():
            part.mean_pairs = None if mean is None else mean * shares.get(name, 1.0)

    def begin(self) -> None:
        """Start of training: drop violations left from a run interrupted mid-step."""
        self._seen = []

    def begin_evaluation(self) -> None:
        """Start of an evaluation."""
        self._evaluated = []

    def observe(self, signal: Tensor, group: Tensor | None, training: bool) -> None:
        """Takes the signal and the group of pairs trained on or evaluated, (B,) each, of all processes; waits for nothing."""
        (self._seen if training else self._evaluated).append((signal.detach(), group))

    def step(self) -> None:
        """End of an optimizer step: moves each λ by the mean over its pairs observed since the last one."""
        seen, self._seen = self._seen, []
        for part, own in self._by_part(seen):
            part.observe(own)
        for part in self.parts.values():
            part.step()

    def slacks(self) -> Iterator[tuple[Multiplier, float]]:
        """Of each part that the evaluation has pairs of, ε less the mean signal: of what moves λ in training."""
        own: dict[str, list[Tensor]] = {}
        for part, signal in self._by_part(self._evaluated):
            own.setdefault(part.name, []).append(signal.double())
        for part in self.parts.values():
            if part.name in own:
                yield part, part.rule.epsilon - torch.cat(own[part.name]).mean().item()

    def _by_part(self, seen: list[tuple[Tensor, Tensor | None]]) -> Iterator[tuple[Multiplier, Tensor]]:
        for signal, group in seen:
            signal = signal.cpu()
            for index, part in enumerate(self.parts.values()):
                own = signal if group is None or "" in self.parts else signal[group.cpu() == index]
                if len(own):
                    yield part, own

    def flush(self) -> dict[str, float]:
        """The numbers of all parts to log."""
        return {name: value for part in self.parts.values() for name, value in part.flush().items()}

    def stateful(self, name: str) -> dict[str, Multiplier]:
        """The parts as a checkpoint knows them: `name` for all pairs, `name:<group>` for a group."""
        return {f"{name}:{group}" if group else name: part for group, part in self.parts.items()}


class Bounds:
    """All bounds on means of violations, beside the loss: what they add to it, and how their multipliers move.

    Args:
        rule: of the constraint's multiplier; None for a form without one.
        floor: κ of the chosen floor, nats; None: no floor.
        floor_weight: its fixed weight, 1/nats; None: a multiplier, by `floor_rule`.
        groups, epsilons: the names of the groups, and the constraint's ε of those that have their own.
    """

    def __init__(
        self,
        rule: DualRule | None,
        *,
        floor: float | None = None,
        floor_weight: float | None = None,
        floor_rule: DualRule | None = None,
        groups: Sequence[str] = (),
        epsilons: Mapping[str, float] | None = None,
    ):
        self.floor, self._floor_weight = floor, floor_weight
        #: By the name in a checkpoint.
        self.multipliers: dict[str, Multipliers] = {}
        if rule is not None:
            self.multipliers["dual"] = Multipliers(rule, groups, epsilons)
        if floor_rule is not None:
            self.multipliers["chosen_floor"] = Multipliers(floor_rule, groups, bound="chosen_floor_")

    def added_loss(self, form: LabelledForm, pairs: PairLogps) -> Tensor | None:
        """What the form and the floor add to each pair's loss, (B,), nats; None: nothing."""
        added = form.added_loss(pairs, self._multiplier("dual", form.labels))
        if self.floor is None:
            return added
        weight = self._floor_weight
        weight = self._multiplier("chosen_floor", form.labels) if weight is None else weight
        if isinstance(weight, float) and weight == 0.0:
            return added
        fallen = form.weighed(weight * chosen_floor_violation(pairs, self.floor))
        return fallen if added is None else added + fallen

    def _multiplier(self, bound: str, labels: PairLabels) -> float | Tensor:
        return self.multipliers[bound].of_pairs(labels.group) if bound in self.multipliers else 0.0

    def metrics(self, rows: Tensor, pairs: PairLogps) -> Tensor:
        """The metrics of pairs, one row each, with the floor's violation behind them if there is a floor."""
        if self.floor is None:
            return rows
        return torch.cat([rows, chosen_floor_violation(pairs, self.floor).unsqueeze(1)], dim=1)

    def observe(self, rows: Tensor, form: LabelledForm, training: bool = True) -> None:
        """Takes the metrics of pairs trained on or evaluated, of all processes; every multiplier has its signal from them."""
        for name, multipliers in self.multipliers.items() if len(rows) else ():
            if name == "chosen_floor":
                signal = form.weighed(rows[:, -1])
            else:
                signal = form.asked(rows[:, COLUMNS[multipliers.rule.signal]], rows[:, COLUMNS["ref_gap"]])
            multipliers.observe(signal, form.labels.group, training)

    def begin(self) -> None:
        """Start of training."""
        for multipliers in self.multipliers.values():
            multipliers.begin()

    def begin_evaluation(self) -> None:
        """Start of an evaluation."""
        for multipliers in self.multipliers.values():
            multipliers.begin_evaluation()

    def step(self) -> None:
        """End of an optimizer step."""
        for multipliers in self.multipliers.values():
            multipliers.step()

    def pairs_of_a_step(self, mean: float | None, shares: Mapping[str, float]) -> None:
        """Sets the pairs of a mean step, where steps differ in it, and each group's share of them."""
        for multipliers in self.multipliers.values():
            multipliers.pairs_of_a_step(mean, shares)

    def flush(self) -> dict[str, float]:
        """λ, slack and whether the bound held, of every multiplier since the last log."""
        return {name: value for each in self.multipliers.values() for name, value in each.flush().items()}

    def held(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Slack, and whether the bound holds, of every group in the evaluation."""
        for multipliers in self.multipliers.values():
            for part, slack in multipliers.slacks():
                yield f"{prefix}{part.name}slack", slack
                yield f"{prefix}{part.name}holds", float(slack >= 0)

    def stateful(self) -> dict[str, Multiplier]:
        """Every multiplier, as a checkpoint knows it."""
        return {key: part for name, each in self.multipliers.items() for key, part in each.stateful(name).items()}
