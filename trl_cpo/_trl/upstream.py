"""What this package rests on inside TRL and transformers: the versions, the methods overridden, the private names read.

A name that is missing stops a trainer at its construction. Without that, a method renamed upstream would leave ours
uncalled, and exact resume would be lost without a word.
"""

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import CodeType
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from trl import __version__ as trl_version

#: The versions of TRL whose DPOTrainer the identity tests were run against.
SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")

_DPO = "trl:DPOTrainer"

#: Methods of DPOTrainer that our trainers override, and why. The private ones must also still be called upstream.
OVERRIDDEN = {
    "compute_loss": "the loss at the constraint's target, plus what it adds",
    "compute_ref_log_probs": "the reference goes through the packed forward",
    "_precompute_ref_logps": "reference tables that outlive a run and are keyed by the real weights",
    "_prepare_dataset": "datasets are refused in words",
    "_get_train_sampler": "balance_tokens",
    "_get_dataloader": "an evaluation is whole, whatever training drops",
    "get_train_dataloader": "tokens_per_step",
    "evaluation_loop": "log-probabilities and metrics of every held-out pair",
    "log": "cpo/* metrics as means over pairs",
    "train": "resumes from whole checkpoints alone; SIGTERM",
    "_save_checkpoint": "checkpoints come into place whole, with what transformers loses",
    "_save": "weights on every machine under save_on_each_node",
    "_maybe_log_save_evaluate": "the checkpoint that SIGTERM asks for",
    "_init_training_state": "the place in a stream that is gone through more than once",
    "_run_epoch": "a run resumed at its last step ends there; batching",
    "_evaluate": "no second evaluation at the start of a resumed run",
    "_finalize_training": "the summary is of the whole run",
}

#: Private names that are read, by where they live: "module:class" for methods and attributes, "module" for functions.
READ = {
    _DPO: (
        "_get_output_dir",
        "_globalstep_last_logged",
        "_initial_global_step",
        "_metrics",
        "_precompute_engine",
        "_push_from_checkpoint",
        "_remove_unused_columns",
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


def check_upstream(version_of_trl: str | None = None) -> None:
    """Raises `ImportError` if the installed TRL is not supported, or lacks something that this package rests on."""
    found = trl_version if version_of_trl is None else version_of_trl
    if not SUPPORTED_TRL.contains(Version(found).base_version):
        raise ImportError(
            f"trl-cpo works with TRL {SUPPORTED_TRL}, and TRL {found} is installed. It builds on the inside of "
            "DPOTrainer, which changes between releases, so other versions could train on wrong numbers without a "
            f"sign of it. Install a supported one: pip install 'trl{SUPPORTED_TRL}'."
        )
    missing = missing_upstream()
    if missing:
        raise ImportError(
            f"trl-cpo rests on names inside its host libraries that are not there: {', '.join(missing)}. Installed are "
            f"{', '.join(_versions())}. Install the versions of constraints.txt, or a trl-cpo that knows these."
        )


def missing_upstream() -> list[str]:
    """What is listed here and is not upstream, as `module:class.name`; empty where all is there."""
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
    """Names of attributes and methods that the code of a class and its bases mentions: instance attributes are set there."""
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
