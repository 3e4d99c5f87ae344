"""Variable-length attention: one FlashAttention call a layer, for any number of pairs.

The packed row holds shared, chosen and rejected tokens of every pair, S | C | R. As sequences of queries over keys:

    [S | C] over [S | C]        [R] over [S | R]

both causal and aligned at their ends, which is what variable-length FlashAttention computes where keys outnumber queries.
Queries stay in row order. Keys and values are gathered once a layer, S twice, so they are T + Σ|S| long. Sequences
without queries are left out.

Models on a flash kernel are computed by that kernel, others by `torch.nn.attention.varlen`.

The row's layout reaches the layers as attention by segments' table does (`segments`). Its indices are sent to a device once
a batch. Any other mask goes to the attention that the model was on.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .device_check import check_attention, report
from .plan import NotPackable, sent
from .segments import FIELDS, is_segment_table, sdpa_attention

varlen_attn: Callable[..., torch.Tensor] | None
try:
    from torch.nn.attention import varlen as _torch

    varlen_attn = cast(Callable[..., torch.Tensor], _torch.varlen_attn)
except ImportError:  # before torch 2.10
    varlen_attn = None

logger = logging.getLogger(__name__)

NAME = "trl_cpo_varlen"
LARGEST_HEAD = 256
_MULTIPLE = 8  # of a head's size, for the kernels
#: Devices on which the kernel is held against plain attention before its first use.
CHECKED = ("cuda",)


@dataclass(frozen=True)
class Layout:
    """The sequences of a packed row, on a device.

    Attributes:
        queries, keys: (sequences + 1,) int32, where each sequence's queries and keys start, and the last ends.
        longest_queries, longest_keys: tokens of the longest sequence.
        gather: (T + Σ|S|,), the place in the row of each gathered key.
        first: (T,), where the gathered keys have each place of the row: a shared token's copy before the chosen answer.
        shared: (Σ|S|,), places of the row that are gathered twice, all different.
        second: (Σ|S|,), where the gathered keys have them again, before the rejected answer.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int
    longest_keys: int
    gather: torch.Tensor
    first: torch.Tensor
    shared: torch.Tensor
    second: torch.Tensor


def layout_of(table: torch.Tensor, device: torch.device) -> Layout:
    """The layout of a segment table on a device; the same object for the same segments, whichever copy of the table."""
    # Whole, because a slice would be computed, and under a fake device be fake.
    starts, *sizes = table.tolist()[0][0][:4]
    return _layout(tuple(zip(starts, *sizes, strict=True)), device)


# A few batches: policy and reference, several kinds of layers, and recomputation under checkpointing read the same one.
@functools.lru_cache(maxsize=8)
def _layout(segments: tuple[tuple[int, int, int, int], ...], device: torch.device) -> Layout:
    sequences: list[tuple[int, int]] = []  # queries and keys
    gather: list[torch.Tensor] = []
    first: list[torch.Tensor] = []
    shared: list[torch.Tensor] = []
    second: list[torch.Tensor] = []
    gathered = 0
    for start, s, c, r in segments:
        trunk, stop = s + c, start + s + c + r
        first.append(torch.arange(gathered, gathered + trunk))
        if trunk:
            sequences.append((trunk, trunk))
            gather.append(torch.arange(start, start + trunk))
            gathered += trunk
        if r:
            sequences.append((r, s + r))
            gather += [torch.arange(start, start + s), torch.arange(start + trunk, stop)]
            shared.append(torch.arange(start, start + s))
            second.append(torch.arange(gathered, gathered + s))
            first.append(torch.arange(gathered + s, gathered + s + r))
            gathered += s + r
    bounds = torch.tensor([(0, 0), *sequences]).cumsum(0).T
    parts = [
        *bounds,
        *(torch.cat(part) if part else torch.zeros(0, dtype=torch.long) for part in (gather, first, shared, second)),
    ]
    queries, keys, *indices = sent(parts, device)
    longest = [max(lengths) for lengths in zip(*sequences, strict=True)]
    return Layout(queries.int(), keys.int(), *longest, *indices)


class Gather(torch.autograd.Function):
    """Rows of keys or values in the order of the sequences; a shared token's gradient is the sum of its two copies'.

    The gradient is written at places that are all different, so that it is the same in every run: index_select's own
    backward adds with atomics.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return rows.index_select(0, layout.gather)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        layout = ctx.layout
        rows = gradient.index_select(0, layout.first)
        both = rows.index_select(0, layout.shared) + gradient.index_select(0, layout.second)
        return rows.index_copy_(0, layout.shared, both), None


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention with transformers' interface: one variable-length call if the mask is a segment table, else sdpa.

    Args:
        query, key, value: (1, heads, L, head size), key and value with fewer heads in grouped attention.
        attention_mask: the table from `segment_table`.

    Returns:
        (1, L, heads, head size), and None for the weights.

    Raises:
        NotImplementedError: the model asks for a feature that this attention lacks.
        NotPackable: on this device the kernel's numbers are not those of plain attention.
    """
    if not is_segment_table(attention_mask):
        return sdpa_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    asked = [name for name in ("position_bias", "softcap", "s_aux", "cache") if kwargs.get(name) is not None]
    asked += ["dropout"] * bool(dropout) + ["attention that is not causal"] * (is_causal is False)
    if asked or attention_mask.shape[2] != FIELDS:
        raise NotImplementedError(f"variable-length attention does not do {asked or 'this mask'}")
    layout, window, chunk = _read(attention_mask, query.device)
    if chunk:
        raise NotImplementedError("variable-length attention does not do chunks")
    dtype = _product_dtype(value)
    queries, keys, values = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))
    if query.device.type in CHECKED:
        report(_fault(query.device, dtype, queries.shape[1] // keys.shape[1], queries.shape[2], values.shape[2], window))
    return _attend(queries, keys, values, layout, scaling, window)[None], None


def kernel_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """[`varlen_attention`] for models on a flash kernel, by that kernel's own variable-length function.

    transformers calls it, for sequences that are given as such. It pads the values of latent attention, and passes on windows,
    softcapping and sinks. Other masks are computed as before.
    """
    flash_attention = flash_attention_of_transformers()
    given = dict(scaling=scaling, is_causal=is_causal, **kwargs)
    if not is_segment_table(attention_mask):
        return flash_attention(module, query, key, value, attention_mask, **given)
    layout, window, chunk = _read(attention_mask, query.device)
    if is_causal is False or chunk:
        raise NotImplementedError("variable-length attention does not do chunks, or attention that is not causal")

    def attend(query, key, value, layout, **given):
        key, value = (Gather.apply(t[0].transpose(0, 1), layout).transpose(0, 1)[None] for t in (key, value))
        sequences = dict(cu_seq_lens_q=layout.queries, cu_seq_lens_k=layout.keys)
        longest = dict(max_length_q=layout.longest_queries, max_length_k=layout.longest_keys)
        return flash_attention(module, query, key, value, None, **{**given, "is_causal": True}, **sequences, **longest)

    if query.device.type in CHECKED:
        report(_kernel_fault(module.config._attn_implementation, attend, query, key, value, window))
    return attend(query, key, value, layout, **given)


def flash_attention_of_transformers() -> Callable:
    """transformers' attention function for flash kernels."""
    from transformers.integrations.flash_attention import flash_attention_forward

    return flash_attention_forward


_KERNEL_FAULTS: dict[tuple, str] = {}


def _kernel_fault(name: str, attend: Callable, query, key, value, window: int | None) -> str:
    """What is wrong with a flash kernel on a device, looked for once for each kind of layer; empty if nothing is."""
    device, dtype, groups = query.device, _product_dtype(value), query.shape[1] // key.shape[1]
    sizes = query.shape[3], value.shape[3]

    def packed(queries, keys, values, table, window):
        rows = (t.transpose(0, 1)[None] for t in (queries, keys, values))
        return attend(*rows, layout_of(table, device), scaling=sizes[0] ** -0.5, sliding_window=window)[0][0]

    about = (name, device, dtype, groups, sizes, window)
    if about not in _KERNEL_FAULTS:
        _KERNEL_FAULTS[about] = _checked(name, packed, device, dtype, groups, sizes, window)
    return _KERNEL_FAULTS[about]


def _checked(name: str, attend: Callable, device: torch.device, dtype: torch.dtype, groups: int, sizes, window) -> str:
    """Holds an attention against plain attention on a device; the fault found, or empty."""
    try:
        errors = check_attention(attend, device, dtype, groups, sizes, window)
    except NotPackable as fault:
        return str(fault)
    logger.info("%s on %s, %s, heads of %d: held against plain attention, %s", name, device, dtype, sizes[0], errors)
    return ""


def _read(table: torch.Tensor, device: torch.device) -> tuple[Layout, int | None, int | None]:
    """The layout of a segment table, and its window and its chunk where they bind."""
    layout = layout_of(table, device)
    window, chunk = (limit[0] if limit[0] and layout.longest_keys > limit[0] else None for limit in table.tolist()[0][0][4:])
    return layout, window, chunk


def _product_dtype(value: torch.Tensor) -> torch.dtype:
    """What sdpa would compute in: autocast's dtype where it is on, else the values'. Norms may leave q and k in float32."""
    kind = value.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention over a packed row: queries, keys and values (T, heads, size) of one dtype, to (T, heads, value size)."""
    size, value_size = queries.shape[2], values.shape[2]
    scaling = size**-0.5 if scaling is None else scaling
    # All of one size, with zeros, which change no score; latent attention (MLA) has smaller values.
    padded = -(-max(size, value_size) // _MULTIPLE) * _MULTIPLE
    if padded > LARGEST_HEAD:
        raise NotImplementedError(f"variable-length attention does heads of up to {LARGEST_HEAD}, not {padded}")
    queries, keys, values = (F.pad(t, (0, padded - t.shape[2])) if t.shape[2] < padded else t for t in (queries, keys, values))
    keys, values = Gather.apply(keys, layout), Gather.apply(values, layout)
    return _call(queries, keys, values, layout, scaling, window)[..., :value_size]


def _call(queries, keys, values, layout: Layout, scaling: float, window: int | None) -> torch.Tensor:
    """torch's function, as this version of it takes its options."""
    if varlen_attn is None:
        raise NotImplementedError("this torch has no variable-length attention; it came with 2.10")
    options: dict = {}
    known = _options(varlen_attn)
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise NotImplementedError("this torch's variable-length attention does no windows")
    if "scale" in known:
        options["scale"] = scaling
    else:
        queries = queries * (scaling * queries.shape[2] ** 0.5)
    # Before torch 2.12 the kernel takes fewer key heads without being told.
    if "enable_gqa" in known:
        options["enable_gqa"] = queries.shape[1] > keys.shape[1]
    # Without its log-sum-exp: the backward ignores a gradient of that.
    return varlen_attn(
        queries, keys, values, layout.queries, layout.keys, layout.longest_queries, layout.longest_keys, **options
    )


@functools.cache
def _options(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def does_windows() -> bool:
    """Whether this torch's variable-length attention takes a window."""
    return varlen_attn is not None and "window_size" in _options(varlen_attn)


@functools.cache
def _fault(device: torch.device, dtype: torch.dtype, groups: int, size: int, value_size: int, window: int | None) -> str:
    """What is wrong with torch's kernel on a device, looked for once for each kind of layer; empty if nothing is."""

    def attend(queries, keys, values, table, window):
        return _attend(queries, keys, values, layout_of(table, device), None, window)

    return _checked("torch.nn.attention.varlen", attend, device, dtype, groups, (size, value_size), window)
