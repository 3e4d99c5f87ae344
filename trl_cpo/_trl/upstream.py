"""What this package relies on inside TRL and transformers: versions, overridden methods, private names.

A missing name stops the trainer at construction. Otherwise, after a rename upstream our override would never be called, and
exact resume would be lost silently. An untested TRL is refused, or tried where the user asks for it (`trial`).
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import CodeType
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from trl import __version__ as trl_version

from . import trial

#: The versions of TRL whose DPOTrainer the identity tests were run against.
SUPPORTED_TRL = SpecifierSet(">=1.15,<1.17")

_DPO = "trl:DPOTrainer"

#: Methods of DPOTrainer that our trainers override, and why. Private ones must also still be called upstream.
OVERRIDDEN = {
    "compute_loss": "the loss at the constraint's target, plus its added term",
    "compute_ref_log_probs": "the reference goes through the packed forward",
    "_precompute_ref_logps": "reference tables that outlive a run, keyed by the actual weights",
    "_prepare_dataset": "invalid datasets are refused with an explanation",
    "_set_signature_columns_if_needed": "columns of labels reach the collator",
    "_get_train_sampler": "balance_tokens",
    "_get_dataloader": "an evaluation is whole, whatever training drops",
    "get_train_dataloader": "tokens_per_step",
    "evaluation_loop": "log-probabilities and metrics of every held-out pair",
    "log": "cpo/* metrics as means over pairs; no time below zero",
    "train": "resumes only from complete checkpoints; SIGTERM",
    "_save_checkpoint": "checkpoints appear complete, with the state that transformers loses",
    "_save": "weights on every machine under save_on_each_node",
    "_load_from_checkpoint": "weights that a checkpoint names otherwise are loaded",
    "_issue_warnings_after_load": "weights that were not loaded are no mere warning",
    "_maybe_log_save_evaluate": "the checkpoint on SIGTERM",
    "_init_training_state": "the position in a stream that is read more than once",
    "_run_epoch": "a run resumed at its last step ends there; batch order per epoch",
    "_determine_best_metric": "max_kl: no checkpoint beyond it is the best one",
    "_evaluate": "a resumed run does not repeat the evaluation at the start",
    "_finalize_training": "the summary covers the whole run",
}

#: Private names that are read, by owner: "module:class" for methods and attributes, "module" for functions.
READ = {
    _DPO: (
        "_get_output_dir",
        "_globalstep_last_logged",
        "_initial_global_step",
        "_metrics",
        "_precompute_engine",
        "_push_from_checkpoint",
        "_remove_unused_columns",
        "_signature_columns",
        "_tokenizer",
        "_total_loss_scalar",
        "_total_train_tokens",
        "_tr_loss",
        "ld_alpha",
        "precompute_ref_logps",
    ),
    "trl.data_utils": ("_tokenize",),
    "trl.models.utils": ("prepare_deepspeed", "prepare_fsdp"),
    "trl.trainer.utils": ("add_fused_lm_head", "create_model_from_path"),
    "trl.trainer.dpo_trainer": ("DataCollatorForPreference",),
    "transformers:PreTrainedModel": ("_can_set_attn_implementation",),
    "transformers:PreTrainedConfig": ("_attn_implementation", "_name_or_path"),
    "transformers.integrations.deepspeed": ("propagate_args_to_deepspeed",),
    "accelerate.data_loader:DataLoaderShard": ("_drop_last",),
    "accelerate.state:GradientState": ("active_dataloader", "remainder"),
    "datasets:Dataset": ("_fingerprint",),
}


# Versions that passed in this process, or that are being tried in it.
_accepted: set[str] = set()


def check_upstream(version_of_trl: str | None = None) -> None:
    """Raises `ImportError` if the installed TRL is not supported, or a name that this package relies on is missing.

    Where the user allows it, an untested TRL is tried, and taken with a warning if it passes.
    """
    found = trl_version if version_of_trl is None else version_of_trl
    supported = SUPPORTED_TRL.contains(Version(found).base_version) or found in _accepted
    word = os.environ.get(trial.ALLOWED_BY, "")
    if not supported and word != "1":
        raise ImportError(
            f"TRL {found} is installed; trl-cpo supports TRL {SUPPORTED_TRL}. It relies on internals of DPOTrainer that "
            "change between releases, so another version could silently train on wrong numbers. Install a supported one: "
            f"pip install 'trl{SUPPORTED_TRL}'. Or try this one: with {trial.ALLOWED_BY}=1 in the environment a self-test "
            "runs first, which takes some ten seconds, and the trainer is refused unless it passes."
            + (f" {trial.ALLOWED_BY} is {word[:40]!r} now, not '1'." if word else "")
        )
    missing = missing_upstream()
    if missing:
        raise ImportError(
            f"The installed libraries lack names that trl-cpo relies on: {', '.join(missing)}. Installed: "
            f"{', '.join(_versions())}. Install the versions in constraints.txt, or a trl-cpo that supports yours."
        )
    if not supported:
        _try(found)


def _try(found: str) -> None:
    """Raises `ImportError` unless the self-test passes, now or remembered; warns of what it cannot see."""
    failed, remembered = trial.tried()
    if failed:
        reasons = [f"{check}: {reason}" for check, reasons in failed.items() for reason in reasons]
        more = f" … and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        raise ImportError(
            f"TRL {found} is not one that trl-cpo supports ({SUPPORTED_TRL}), and it failed the self-test: "
            f"{'; '.join(reasons[:4])}{more}. Install a supported one: pip install 'trl{SUPPORTED_TRL}'. All reasons: "
            "python -m trl_cpo.selftest."
        )
    _accepted.add(found)
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"TRL {found} is not one that trl-cpo supports ({SUPPORTED_TRL}); it passed the self-test"
            f"{' before' if remembered else ''}. The self-test cannot see {trial.BLIND}. Before a long run, train a few steps "
            "with constraint='none' and with trl.DPOTrainer on your own machine, and compare the losses.",
            stacklevel=4,
        )


@contextmanager
def on_trial() -> Iterator[None]:
    """Within the block the installed TRL is taken as it is: the self-test judges it."""
    before = trl_version in _accepted
    _accepted.add(trl_version)
    try:
        yield
    finally:
        if not before:
            _accepted.discard(trl_version)


def check_kernels(device: str, version_of_trl: str = trl_version) -> None:
    """Raises `ImportError` if TRL's fused head cannot run on this type of device: TRL 1.15 has it in Triton alone."""
    if device != "cpu" or Version(version_of_trl) >= Version("1.16") or os.environ.get("TRITON_INTERPRET") == "1":
        return
    raise ImportError(
        f"TRL {version_of_trl} computes log-probabilities on a GPU alone, and this run is on the CPU. Install a newer one: "
        "pip install 'trl>=1.16,<1.17'. To try it all the same, slowly, set TRITON_INTERPRET=1."
    )


def missing_upstream() -> list[str]:
    """Listed names that are missing upstream, as `module:class.name`; empty if none is."""
    missing = []
    upstream = _resolved(_DPO)
    called = set(_names_used(upstream))
    for name in OVERRIDDEN:
        if not hasattr(upstream, name) or (name.startswith("_") and name not in called):
            missing.append(f"{_DPO}.{name}")
    for owner, names in READ.items():
        place = _resolved(owner)
        used = set(_names_used(place)) if isinstance(place, type) else set()
        missing += [f"{owner}.{name}" for name in names if not hasattr(place, name) and name not in used]
    return missing


def _resolved(owner: str) -> Any:
    module, _, name = owner.partition(":")
    try:
        found = import_module(module)
        return getattr(found, name) if name else found
    except (ImportError, AttributeError):
        return None


def _names_used(cls: type) -> Iterator[str]:
    """Attribute and method names used in the code of a class and its bases; instance attributes are found only there."""
    for base in getattr(cls, "__mro__", ()):
        for member in vars(base).values():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
            if code is not None:
                yield from _names_in(code)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _versions() -> Iterator[str]:
    for package in ("trl", "transformers", "accelerate", "datasets"):
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"no {package}"
