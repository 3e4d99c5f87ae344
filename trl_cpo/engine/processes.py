"""Checks on runs of several processes, before anything is loaded: the launch, and that all processes agree."""

import dataclasses
import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset

#: Configuration fields that may differ between processes, because they concern the process, its machine or its log.
PER_PROCESS = {
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataset_num_proc",
    "disable_tqdm",
    "local_rank",
    "log_level",
    "log_level_replica",
    "logging_dir",
    "narrate",
    "report_to",
    "run_name",
}
#: Keys inside dictionaries of options that may differ: `device_map={"": local_rank}` is the usual way to load 4-bit models,
#: and a model's folder may have another path on another machine.
_OWN_KEYS = {"_commit_hash", "_name_or_path", "base_model_name_or_path", "device_map", "name_or_path", "token"}
#: Packages whose version affects the numbers or the communication between processes.
PACKAGES = ("trl-cpo", "trl", "transformers", "torch", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes")
#: Distributed types that Accelerate can shard with FSDP: those on devices that it treats as GPUs.
_SHARDED = ("MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_SDAA", "MULTI_HPU", "MULTI_NEURON")
#: Number of dataset rows to compare: evenly spaced, including the first and the last.
SAMPLED_ROWS = 32


class ProcessesDisagree(RuntimeError):
    """The processes of one run were started with different settings or data."""


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def uses_fsdp(args: Any) -> bool:
    """Whether FSDP was asked for, by the launcher or by `args` (`TrainingArguments`)."""
    return bool(args.fsdp) or _is_set("ACCELERATE_USE_FSDP")


def check_launch(args: Any, kind: DistributedType | None = None) -> None:
    """Raises `ValueError` if the launcher's request would silently not be met.

    That is the case for sharding on a device that Accelerate does not shard on, and for several processes without a process
    group, each of which would train its own model.

    Args:
        args: the `TrainingArguments`.
        kind: the distributed type; Accelerate's by default.
    """
    kind = PartialState().distributed_type if kind is None else kind
    if uses_fsdp(args) and kind not in (*_SHARDED, "FSDP", "XLA"):
        raise ValueError(
            f"FSDP was asked for, but Accelerate does not shard on this kind of device ({args.device.type}, {kind.value}). "
            "Every process would hold the whole model, or train by itself. Run on GPUs; on CPUs use DDP or ZeRO "
            "(accelerate launch --config_file deepspeed_configs/zero3.yaml)."
        )
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if kind == DistributedType.NO and started > 1:
        raise ValueError(
            f"This is one of {started} processes (WORLD_SIZE={started}), but there is no process group: it would train by "
            "itself. Without a GPU set use_cpu=True (--use_cpu), and launch with "
            f"`accelerate launch --multi_gpu --num_processes {started}` or `torchrun --nproc_per_node {started}`."
        )


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """Flattens settings to `prefix.key`: values to compare and show, long or secret ones as a digest."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        found = {}
        for key, inner in value.items():
            # Secrets are never shown in a message.
            secret = any(word in str(key).lower() for word in ("token", "secret", "password", "api_key"))
            if key not in _OWN_KEYS:
                found.update({f"{prefix}.{key}": _digest(inner)} if secret else _flat(f"{prefix}.{key}", inner))
        return found
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        shown = str(list(value))
        return {prefix: shown if len(shown) <= 80 else f"{len(value)} values, {_digest(value)}"}
    if value is None or isinstance(value, (bool, int, float)):
        return {prefix: value}
    shown = str(value)
    return {prefix: shown if len(shown) <= 80 else f"{len(shown)} characters, {_digest(shown)}"}


def _dataset(name: str, dataset: Any) -> dict[str, Any]:
    if isinstance(dataset, Mapping):
        found = {f"{name}.sets": sorted(dataset)}
        for key, part in dataset.items():
            found.update(_dataset(f"{name}[{key!r}]", part))
        return found
    if dataset is None:
        return {name: None}
    columns = getattr(dataset, "column_names", None)
    found = {f"{name}.type": type(dataset).__name__, f"{name}.columns": sorted(columns) if columns else columns}
    if isinstance(dataset, Dataset):
        # Not the fingerprint, which also depends on the file's path and time and so differs between machines. Streamed
        # datasets are skipped: each process may read its own part.
        count = len(dataset)
        found[f"{name}.rows"] = count
        picked = sorted({round(i * (count - 1) / max(SAMPLED_ROWS - 1, 1)) for i in range(SAMPLED_ROWS)} if count else [])
        # Arrow gives rows as stored, without decoding images.
        rows = dataset.with_format("arrow")[picked].to_pylist() if picked else []
        if rows:
            found[f"{name}.first row"], found[f"{name}.last row"] = _digest(rows[0]), _digest(rows[-1])
            found[f"{name}.{len(rows)} rows"] = _digest(rows)
    return found


def _versions() -> dict[str, str | None]:
    found = {}
    for package in PACKAGES:
        try:
            found[f"version of {package}"] = version(package)
        except PackageNotFoundError:
            found[f"version of {package}"] = None
    return found


def _settings(args: Any) -> dict[str, Any]:
    left_out = PER_PROCESS | ({"output_dir"} if args.save_on_each_node else set())
    found = _flat("args", {key: value for key, value in args.to_dict().items() if key not in left_out})
    launched = ("ACCELERATE_USE_", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_", "ACCELERATE_DEEPSPEED_", "FSDP_")
    for key in os.environ:
        # A config file's path may differ between machines; its contents are compared below.
        if key.startswith(launched) and not key.endswith("CONFIG_FILE"):
            found[f"environment.{key}"] = os.environ[key]
    if getattr(args, "deepspeed_plugin", None) is not None:
        found.update(_flat("deepspeed", args.deepspeed_plugin.deepspeed_config))
        found.pop("args.deepspeed", None)
    return found


def _config(name: str, config: Any) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return _flat(name, config)
    return _flat(name, config.to_dict() if hasattr(config, "to_dict") else str(config))


def facts_of(args: Any, *, configs: Mapping[str, Any], datasets: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that must be the same on every process of a run, by name.

    Args:
        args: the `TrainingArguments`.
        configs: by name, an object with a `to_dict`, a callable that returns one, or None.
        datasets: by name, a dataset, a dictionary of datasets, or None. Streamed datasets contribute only their columns.
    """
    facts = _versions()
    parts: list[tuple[str, Callable[[], dict[str, Any]]]] = [("args", lambda: _settings(args))]
    for name, config in configs.items():
        parts.append((name, lambda n=name, c=config: _config(n, c() if callable(c) and not hasattr(c, "to_dict") else c)))
    for name, dataset in datasets.items():
        parts.append((name, lambda n=name, d=dataset: _dataset(n, d)))
    for name, part in parts:
        try:
            facts.update(part())
        # Any exception: a process that raised here would leave the others waiting. A fault on every process is reported by
        # the checks that follow.
        except Exception as error:
            facts[name] = f"{type(error).__name__}: {error}"[:300]
    return facts


def check_agreement(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raises `ProcessesDisagree` on every process if `facts` differ; the message lists each one and which process has what.

    Gathers over all processes, so each must call it. With a single process, and on TPUs, it does nothing.
    """
    state = PartialState()
    if state.num_processes == 1 or state.distributed_type == DistributedType.XLA:
        return
    gathered = gather_object([(socket.gethostname(), dict(facts()))])
    message = disagreement([host for host, _ in gathered], [theirs for _, theirs in gathered])
    if message:
        raise ProcessesDisagree(message)


def disagreement(hosts: list[str], facts: list[Mapping[str, Any]]) -> str | None:
    """The message about facts that differ, or None. `hosts` and `facts` are lists by rank."""
    missing = "missing"
    lines = []
    for name in dict.fromkeys(name for theirs in facts for name in theirs):
        ranks: dict[str, list[int]] = {}
        for rank, theirs in enumerate(facts):
            ranks.setdefault(repr(theirs.get(name, missing)), []).append(rank)
        if len(ranks) > 1:
            lines.append(f"  {name}: " + "; ".join(f"{value} on {_named(who, hosts)}" for value, who in ranks.items()))
    if not lines:
        return None
    shown = lines[:20] + [f"  and {len(lines) - 20} more"] * (len(lines) > 20)
    return (
        f"The {len(facts)} processes of this run were started differently. They would wait for each other forever, or train "
        "on mixed-up numbers:\n" + "\n".join(shown) + "\nStart every process with the same script, options, data and "
        "package versions. The usual cause is a seed, a path or a shuffle that each process chooses for itself."
    )


def agreed_refusal(reason: str) -> str:
    """The reason of the first process that has one, on all processes; empty if none has one. Every process calls it."""
    state = PartialState()
    if state.num_processes == 1 or state.distributed_type == DistributedType.XLA:
        return reason
    reasons = gather_object([reason])
    rank = next((rank for rank, theirs in enumerate(reasons) if theirs), None)
    if rank is None or all(reasons):
        return reason
    return f"{reasons[rank]} (on process {rank} of {len(reasons)}; others found no fault)"


def _named(ranks: list[int], hosts: list[str]) -> str:
    several = len(set(hosts)) > 1
    shown = [f"{rank} ({hosts[rank]})" if several else str(rank) for rank in ranks[:8]]
    rest = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(shown)}{rest}"
