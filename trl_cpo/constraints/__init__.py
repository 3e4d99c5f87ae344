"""The forms of the constraint, by the name that the config knows them by."""

from .base import Constraint
from .clip import Clip
from .inverse_logp import InverseLogp
from .inverse_prob import InverseProb
from .lagrangian import Lagrangian
from .none import NoConstraint
from .penalty import Penalty
from .softplus import Softplus

CONSTRAINTS: dict[str, type[Constraint]] = {
    "none": NoConstraint,
    "clip": Clip,
    "softplus": Softplus,
    "inverse_prob": InverseProb,
    "inverse_logp": InverseLogp,
    "penalty": Penalty,
    "lagrangian": Lagrangian,
}

__all__ = ["CONSTRAINTS", "Constraint"]
