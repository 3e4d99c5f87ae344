"""What the data says of a pair beside its order: how sure it is, by how much the answer is better, and of which group."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..constraints import Constraint
from ..pairs import PairLogps

#: The metric of `reach`, in the column behind those of `trl_cpo.metrics`.
WITHIN = "within_reach"
#: Loss types for which a probability is defined, by how it enters: as an added term, as a shift of the target, or not at
#: all (a loss that compares no answers).
SOFT_LOSSES = {"sigmoid": "term", "sigmoid_norm": "term", "ipo": "target", "sft": "none"}


@dataclass(frozen=True)
class PairLabels:
    """The labels of B pairs; None where the data has no such column.

    Attributes:
        probability: p, (B,), in [0, 1]: how probable it is that the chosen answer is the better one.
        margin: m, (B,), ≥ 0, without unit: by how much its reward is higher.
        group: (B,), whole numbers: an index into the names of the groups.
    """

    probability: Tensor | None = None
    margin: Tensor | None = None
    group: Tensor | None = None

    def rows(self) -> Tensor | None:
        """The labels that there are, as columns (B, K) of float32, in the order of the fields; None: there are none."""
        columns = [each.float() for each in (self.probability, self.margin, self.group) if each is not None]
        return torch.stack(columns, dim=1) if columns else None

    @classmethod
    def from_rows(cls, rows: Tensor | None, present: Sequence[bool]) -> "PairLabels":
        """The inverse of `rows`; `present` says of each field whether it is among the columns."""
        columns = iter(() if rows is None else rows.unbind(dim=1))
        probability, margin, group = (next(columns) if there else None for there in present)
        return cls(probability, margin, None if group is None else group.long())

    @property
    def certainty(self) -> Tensor | None:
        """`c = max(0, 2p − 1)`, (B,): the share of a bound, or of a moved target, that a pair is held to. None: all of it."""
        return None if self.probability is None else torch.relu(2.0 * self.probability - 1.0)


@dataclass(frozen=True)
class LabelledForm:
    """A form of the constraint on pairs with labels.

    With p the loss is `−p log σ(z) − (1−p) log σ(−z)` at z = β(δ_θ − t). As `−log σ(−z) = −log σ(z) + z`, that is DPO's own
    loss plus `(1−p) z`; its population optimum is δ_θ = t + logit(p)/β. IPO's squared loss has its optimum at
    δ_θ = t + (2p−1)/(2β), so its target is lowered by (1−p)/β instead.

    Attributes:
        form: the constraint, its γ the default of all groups.
        labels: of the batch.
        gammas: γ of each group, in nats, in the order of the groups' indices; None: all have the form's.
        losses: loss types and their weights.
    """

    form: Constraint
    labels: PairLabels
    gammas: Tensor | None
    losses: Sequence[tuple[str, float]]

    @property
    def gamma(self) -> float | Tensor:
        """γ of every pair: a number, or (B,), nats."""
        return self.form.gamma if self.gammas is None or self.labels.group is None else self.gammas[self.labels.group]

    @property
    def _of_pairs(self) -> Constraint:
        gamma = self.gamma
        return replace(self.form, gamma=gamma) if isinstance(gamma, Tensor) else self.form

    @property
    def moves_target(self) -> bool:
        labels = self.labels
        squared = labels.probability is not None and any(SOFT_LOSSES.get(name) == "target" for name, _ in self.losses)
        return self.form.moves_target or labels.margin is not None or squared

    def within_reach(self, ref_gap: Tensor, asked: float | Tensor) -> Tensor | None:
        """Which pairs the form is for, (B,), bool: `asked − δ_ref ≤ κ`, t or a bound's γ being asked. None: all, without κ."""
        return None if self.form.reach is None else asked - ref_gap <= self.form.reach

    def target(self, pairs: PairLogps) -> Tensor:
        """The target margin of each pair, (B,), nats: `t − (1−c)(t − δ_ref) + m/β`, t the form's own, δ_ref beyond reach."""
        target = self._of_pairs.target(pairs)
        within = self.within_reach(pairs.ref_gap, target)
        if within is not None:
            target = torch.where(within, target, pairs.ref_gap)
        p, margin, certainty = self.labels.probability, self.labels.margin, self.labels.certainty
        if certainty is not None and self.form.moves_target:
            # So written, c = 1 leaves t to the bit.
            target = target - (1.0 - certainty) * (target - pairs.ref_gap)
        if margin is not None:
            target = target + margin / self.form.beta
        if p is not None and any(SOFT_LOSSES.get(name) == "target" for name, _ in self.losses):
            target = target - (1.0 - p) / self.form.beta
        return target

    def added_loss(self, pairs: PairLogps, multiplier: float | Tensor) -> Tensor | None:
        """What is added to each pair's loss, (B,), nats: `c` times the form's own, and `(1−p) z`. None: nothing.

        `multiplier` is λ, one number or one a pair.
        """
        added, p = self._of_pairs.added_loss(pairs, multiplier), self.labels.probability
        if added is not None:
            added = self.asked(added, pairs.ref_gap)
        if p is None:
            return added
        weight = sum(weight for name, weight in self.losses if SOFT_LOSSES.get(name) == "term")
        if not weight:
            return added
        z = self.form.beta * (pairs.gap - self.target(pairs.detach()))
        soft = weight * (1.0 - p) * z
        return soft if added is None else added + soft

    def asked(self, bound: Tensor, ref_gap: Tensor) -> Tensor:
        """What the form's bound on the gap makes of each pair, (B,), times its certainty; 0 beyond reach of γ."""
        within = self.within_reach(ref_gap, self.gamma)
        return self.weighed(bound if within is None else torch.where(within, bound, 0.0))

    def metrics(self, rows: Tensor, pairs: PairLogps) -> Tensor:
        """The metrics of pairs, one row each, with `cpo/within_reach` behind them if there is a reach."""
        asked = self._of_pairs.target(pairs) if self.form.moves_target else self.gamma
        within = self.within_reach(pairs.ref_gap, asked)
        return rows if within is None else torch.cat([rows, within.to(rows.dtype).unsqueeze(1)], dim=1)

    def weighed(self, bound: Tensor) -> Tensor:
        """What a bound makes of each pair, (B,), times the pair's certainty."""
        certainty = self.labels.certainty
        return bound if certainty is None else certainty * bound


def chosen_floor_violation(pairs: PairLogps, floor: float) -> Tensor:
    """How far each chosen answer has fallen through its floor: `max(0, s_ref(chosen) − κ − s_θ(chosen))`, (B,), nats.

    κ ≥ 0 (`floor`) is in nats of `logps_reduction`. At κ = 0 it is the penalty term of DPO-Positive (arXiv 2402.13228),
    which stands inside that paper's log-sigmoid.
    """
    return torch.relu(pairs.ref_chosen - floor - pairs.policy_chosen)
