"""What a constraint is: its hyperparameters, the target margin it sets, and the loss it adds."""

from dataclasses import Field, dataclass, field, fields
from typing import ClassVar

from torch import Tensor

from ..hyperparameters import hyperparameter
from ..pairs import PairLogps
from .dual_rule import DualRule


@dataclass(frozen=True)
class Constraint:
    """One form of the constraint with its hyperparameters; log-probabilities, and so γ, are in nats of `logps_reduction`.

    A form is a frozen dataclass in a file of its own and a line in the table `CONSTRAINTS`. A *margin form* defines
    `target` and so moves the target margin t of the loss `−log σ(β(δ_θ − t))`; it reads the reference alone. A
    *policy-side form* leaves the target at δ_ref (DPO's) and defines `added_loss`, which reads the policy.
    """

    beta: float = field(kw_only=True)
    logps_reduction: str = field(default="sum", kw_only=True)
    gamma: float = hyperparameter(
        0.0,
        "The preference gap asked for, in nats: a sum per response or a mean per token, as logps_reduction says. Pairs below "
        "it are counted as violations under every constraint.",
        at_least=0.0,
    )
    reach: float | None = hyperparameter(
        None, "κ, nats as gamma: pairs whose target, or gamma, lies further above their δ_ref train as in DPO.", above=0.0
    )

    #: Whether the form defines `target`, and whether it defines `added_loss`; set for each form.
    moves_target: ClassVar[bool] = False
    adds_loss: ClassVar[bool] = False

    def __init_subclass__(cls):
        cls.moves_target = cls.target is not Constraint.target
        cls.adds_loss = cls.added_loss is not Constraint.added_loss

    def target(self, pairs: PairLogps) -> Tensor:
        """The target margin t of each pair, (B,), nats. DPO's is δ_ref."""
        return pairs.ref_gap

    def added_loss(self, pairs: PairLogps, multiplier: float | Tensor) -> Tensor | None:
        """What is added to each pair's loss, (B,), nats, or None for nothing. Gradients flow through the policy's values.

        `multiplier` is λ at this step, one number or (B,), of a form with a `dual_rule`, whose added loss is λ times a
        violation; other forms ignore it.
        """
        return None

    @property
    def dual_rule(self) -> DualRule | None:
        """How the multiplier moves, of a form that has one."""
        return None

    def faults(self) -> list[str]:
        """What makes the values impossible together, one sentence each; called where β and the form's own are in range."""
        return []

    def cautions(self) -> list[str]:
        """What a user of these values should know before training, one sentence or two each."""
        return []

    @classmethod
    def hyperparameters(cls) -> dict[str, Field]:
        """The fields that a user sets by their name, gamma first."""
        return {each.name: each for each in fields(cls) if "help" in each.metadata}
