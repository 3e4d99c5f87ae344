"""What a constraint is: the knobs it reads, the target margin it sets, and the loss it adds."""

from dataclasses import dataclass

from torch import Tensor

from ..pairs import PairLogps


@dataclass(frozen=True)
class Knobs:
    """The numbers that constraints read. Log-probabilities, and so γ and 1/τ, are in nats of `logps_reduction`.

    Of the dual ones, documented in `CPOConstrainedConfig`, `dual_lr` and `dual_max` are None where β sets them.
    """

    beta: float
    gamma: float = 0.0
    tau: float = 2.0
    alpha: float = 1.0
    penalty_weight: float = 1.0
    logps_reduction: str = "sum"
    epsilon: float = 0.0
    dual_lr: float | None = None
    dual_max: float | None = None
    dual_init: float = 0.0
    dual_warmup_steps: int = 0
    dual_signal: str = "violation"


class Constraint:
    """One form of the constraint. A new one is a subclass in a file of its own and a line in the table `CONSTRAINTS`.

    A *margin form* moves the target margin t of the loss `−log σ(β(δ_θ − t))` and reads the reference alone. A
    *policy-side form* leaves the target at δ_ref (DPO's) and adds a term that reads δ_θ.
    """

    #: Fields of `Knobs` that this form reads, beside gamma for counting violations.
    reads: tuple[str, ...] = ()
    #: Whether `target` can differ from δ_ref.
    moves_target: bool = False
    #: Whether the weight of the added term, `penalty_weight`, is a multiplier that the trainer updates (`trl_cpo.multiplier`).
    dual: bool = False

    def target(self, pairs: PairLogps, knobs: Knobs) -> Tensor:
        """The target margin t of each pair, (B,), nats. DPO's is δ_ref."""
        return pairs.ref_gap

    def added_loss(self, pairs: PairLogps, knobs: Knobs) -> Tensor | None:
        """What is added to each pair's loss, (B,), or None for nothing. Gradients flow through the policy's values."""
        return None

    def faults(self, knobs: Knobs) -> list[str]:
        """What makes these knobs impossible for this form, one sentence each; empty where they are possible."""
        return []

    def cautions(self, knobs: Knobs) -> list[str]:
        """What a user of these knobs should know before training, one sentence or two each."""
        return []
