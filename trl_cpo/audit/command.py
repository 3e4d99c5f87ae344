"""The command that the audit's advice comes to, with every option that it rests on."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

#: The loss that is advised for decisions.
_DECISIONS = {"beta": 1.0, "gamma": 1.0, "reduction": "sum"}
#: Advice after which plain DPO is what to train.
_PLAIN = ("dpo_as_good", "undecided", "dpo_as_fast", "nothing_to_escape", "length_not_preference")


def train_command(advice: Sequence[Mapping[str, str]], settings: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    """`trl-cpo train …` for one audited set; None where nothing was advised.

    Args:
        advice: what `advise` gave.
        settings: "beta", "gamma", "reduction" of the audit.
        options: further options of `trl-cpo train`, by name; None leaves one out.
    """
    cases = {piece["case"] for piece in advice}
    if "constrain" in cases:
        constraint, loss = "clip", settings
    elif "decisions" in cases:
        constraint, loss = "clip", _DECISIONS
    elif cases & set(_PLAIN):
        constraint, loss = "none", settings
    else:
        return None
    chosen = {
        **options,
        "constraint": constraint,
        "beta": f"{loss['beta']:g}",
        "gamma": f"{loss['gamma']:g}" if constraint != "none" else None,
        "logps_reduction": loss["reduction"],
    }
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in chosen.items() if value is not None]
    return " ".join(["trl-cpo train", *words])
