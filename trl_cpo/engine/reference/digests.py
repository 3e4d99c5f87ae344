"""Digests of what log-probabilities come from: the weights that a model really has, and the token ids it is given."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Weights on another device are copied in pieces of this many bytes; those in memory are not copied.
_CHUNK = 1 << 24
# Rows of a dataset that are read at once.
_ROWS = 1000
_SIZE = 20


def text_digest(value: Any) -> str:
    """A digest of what `value` is as JSON, whatever the order of keys and sets; other objects count by what they print as."""

    def plain(other: Any) -> Any:
        return sorted(map(str, other)) if isinstance(other, (set, frozenset)) else str(other)

    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=plain).encode(), digest_size=_SIZE).hexdigest()


def weights_digest(model: torch.nn.Module, adapters: tuple[str, ...] = (), keep: str | None = None) -> str:
    """A digest of every parameter and buffer of `model`: names, types, shapes and bytes.

    Weights that are sharded are gathered one at a time, so every process has to call this, and each gets the digest of the
    whole (of its own part where an older FSDP keeps parts that do not gather one by one). Weights inside quantised layers
    count with their scales. Names are those of the bare model, without the wrappers around an adapter, so that a model
    with its adapter switched off has the digest of the model alone.

    Args:
        model: the model, without what wraps it for distributed training.
        adapters: the names of its PEFT adapters; their weights do not count.
        keep: the one adapter whose weights do.
    """
    whole, results = [], {}
    switched_off = _adapter_parts(model, {adapter for adapter in adapters if adapter != keep})
    for name, tensor in _tensors(model):
        if f"{name}.".startswith(switched_off):
            continue
        if _is_sharded(tensor):
            results[_bare(name)] = _gathered_digest(tensor)
        else:
            whole.append((_bare(name), tensor))
    # hashlib lets other threads run while it works.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        results.update(zip((name for name, _ in whole), threads.map(_digest, [t for _, t in whole]), strict=True))
    return text_digest(results)


def tokens_digest(dataset, columns: tuple[str, ...]) -> tuple[str, dict[str, np.ndarray]]:
    """A digest of the token ids of a dataset, row by row in order, and the lengths (N,) of each column.

    Covers whatever the ids come from: data, tokenizer and chat template.
    """
    digest, lengths = hashlib.blake2b(digest_size=_SIZE), {name: [] for name in columns}
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=_ROWS):
        for name in columns:
            column = table[name].combine_chunks()
            sizes = np.asarray(column.value_lengths(), dtype="<i8")
            digest.update(sizes.tobytes())
            digest.update(np.asarray(column.flatten(), dtype="<i8").tobytes())
            lengths[name].append(sizes)
    return digest.hexdigest(), {name: np.concatenate(parts) for name, parts in lengths.items()}


def _adapter_parts(model: torch.nn.Module, adapters: set[str]) -> tuple[str, ...]:
    """What the names of these adapters' tensors begin with.

    PEFT's modules keep dictionaries from an adapter's name to its part. Anywhere else the same word is a part of the
    model: an adapter may well be called "model" or "layers".
    """
    found = []
    for prefix, module in model.named_modules():
        if not any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__):
            continue
        for name, parts in module.named_children():
            if hasattr(parts, "keys"):
                found += [f"{prefix}.{name}.{adapter}.".lstrip(".") for adapter in adapters & set(parts.keys())]
    return tuple(found)


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        seen.add(name)
        yield name, tensor
    for prefix, module in model.named_modules():
        # Quantised layers keep scales beside their weight that are no buffers, and write them to the state dict themselves.
        writes_itself = type(module)._save_to_state_dict is not torch.nn.Module._save_to_state_dict
        if writes_itself and next(module.children(), None) is None:
            for name, value in module.state_dict(prefix=f"{prefix}." if prefix else "").items():
                if name not in seen and isinstance(value, Tensor):
                    seen.add(name)
                    yield name, value


def _bare(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id") or hasattr(tensor, "full_tensor")


def _gathered_digest(tensor: Tensor) -> str:
    if hasattr(tensor, "full_tensor"):
        return _digest(tensor.detach().full_tensor())
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return _digest(tensor)


def _digest(tensor: Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=_SIZE)
    _update(digest, tensor.detach())
    return digest.hexdigest()


def _update(digest, tensor: Tensor) -> None:
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        digest.update(str(context).encode())
        for name in names:
            _update(digest, getattr(tensor, name))
        return
    # As bytes, because numpy has no bfloat16 and no float8.
    flat = tensor.as_subclass(Tensor).reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _CHUNK):
        # A copy: a storage that numpy has looked into can no longer be resized, and FSDP2 frees gathered weights that way.
        digest.update(flat[start : start + _CHUNK].to("cpu", copy=True).numpy())
