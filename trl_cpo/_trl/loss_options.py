"""Which options of DPOConfig change the loss, and where; tests/test_loss_options.py holds it against losses."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .loss import LOSS_READS

#: Loss types that read `label_smoothing`. TRL's "sigmoid" does not.
_SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
_WITH_SMOOTHING = f"only a loss_type of {', '.join(map(repr, _SMOOTHED))} reads it"
_WITH_REFERENCE = "loss_type 'sft' by itself reads no reference"


def _any_of(*names: str) -> Callable[[Any], bool]:
    return lambda args: not set(names).isdisjoint(args.loss_type)


def _reads_reference(args: Any) -> bool:
    return any(LOSS_READS.get(name) != "no reference" for name in args.loss_type)


#: Fields of DPOConfig that change the loss only beside others: when they do, and otherwise why not.
ACTS_WHERE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "ld_alpha": (lambda args: _reads_reference(args) or args.adds_loss, _WITH_REFERENCE),
    "f_divergence_type": (_reads_reference, _WITH_REFERENCE),
    "label_smoothing": (_any_of(*_SMOOTHED), _WITH_SMOOTHING),
    "label_smoothing_factor": (
        lambda args: False,
        f"DPO's loss has no use for it; label_smoothing is DPO's, and {_WITH_SMOOTHING}",
    ),
    "discopop_tau": (_any_of("discopop"), "only loss_type 'discopop' reads it"),
    "f_alpha_divergence_coef": (
        lambda args: args.f_divergence_type == "alpha_divergence" and _reads_reference(args),
        "only f_divergence_type='alpha_divergence' reads it",
    ),
    "ref_model_mixup_alpha": (lambda args: args.sync_ref_model, "only sync_ref_model=True reads it"),
    "ref_model_sync_steps": (lambda args: args.sync_ref_model, "only sync_ref_model=True reads it"),
}


def idle_options(args: Any) -> list[str]:
    """Options about the loss that were set and change nothing, one sentence each."""
    defaults = {each.name: each.default for each in fields(args)}
    return [
        f"{name}={getattr(args, name)!r} changes nothing: {why}. Leave it out, or choose what reads it."
        for name, (acts, why) in ACTS_WHERE.items()
        if getattr(args, name) != defaults[name] and not acts(args)
    ]
