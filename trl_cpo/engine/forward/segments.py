"""Attention by segments: no mask over the whole row, and no masked-out scores to compute.

The packed batch is one long row without filling. For each pair, the shared part and the chosen tail are a plain causal
sequence, and the rejected tail is a causal continuation of the shared part. So two calls of
`scaled_dot_product_attention` per pair suffice, each no larger than needed.

The segments reach the layers as the attention mask, an int64 tensor (1, 1, 6, pairs) on the CPU: models pass a 4-D mask
through unread, gradient checkpointing restores it in the backward pass, and reading it never waits for a GPU. Any other
mask goes to transformers' own sdpa attention, so a model left with this implementation behaves as with sdpa.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .mask import LayerKind
from .plan import PackingPlan

NAME = "trl_cpo_segments"
# Not cuDNN, which plans anew, for up to a second, for every size of a part and every stride of a row.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FIELDS = 6  # start, shared, chosen, rejected, window, chunk; 0: no window, no chunk


def segment_table(plan: PackingPlan, kind: LayerKind) -> torch.Tensor:
    """The segments of a one-row plan as an int64 tensor (1, 1, 6, pairs), in row order."""
    if plan.shape[0] != 1 or plan.tokens != plan.shape[1]:
        raise ValueError(f"Segments need a plan of one row without filling; got rows of shape {plan.shape}.")
    limits = (kind.window or 0, kind.chunk or 0)
    parts = sorted(plan.parts, key=lambda p: p.start)
    return torch.tensor([(p.start, p.shared, p.chosen, p.rejected, *limits) for p in parts]).T[None, None]


def segment_masks(plan: PackingPlan, kinds: dict[str, LayerKind]) -> torch.Tensor | dict[str, torch.Tensor]:
    """The segment tables as a model takes masks: one tensor, or a dict by kind of layer."""
    tables = {name: segment_table(plan, kind) for name, kind in kinds.items()}
    return next(iter(tables.values())) if len(tables) == 1 else tables


def is_segment_table(mask: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether an attention mask is a segment table; other masks are bool or floating-point."""
    return isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.dtype == torch.int64


def _limited(queries: int, keys: int, window: int, chunk: int, device: torch.device) -> torch.Tensor | None:
    """Mask (queries, keys) of a causal continuation that ends at the last key; None if plain causal attention suffices."""
    binds = (window and keys > window) or (chunk and keys > chunk)
    if queries == keys and not binds:
        return None
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)[None, :]
    seen = k <= q
    if binds and window:
        seen &= k > q - window
    if binds and chunk:
        seen &= k // chunk == q // chunk
    return seen


def segment_attention(
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
    """Attention with transformers' interface: by segments if the mask is a segment table, else sdpa.

    Args:
        query, key, value: (1, heads, L, head size), key and value with fewer heads in grouped attention.
        attention_mask: the table from `segment_table`.

    Returns:
        (1, L, heads, head size), and None for the weights.

    Raises:
        NotImplementedError: the model asks for a feature that attention by segments lacks.
    """
    if not is_segment_table(attention_mask):
        return sdpa_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    asked = [name for name in ("position_bias", "softcap", "s_aux", "cache") if kwargs.get(name) is not None]
    if asked or is_causal is False or attention_mask.shape[2] != FIELDS:
        raise NotImplementedError(f"attention by segments does not do {asked or 'attention that is not causal'}")
    segments = list(zip(*attention_mask[0, 0].tolist(), strict=True))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))

    # Split once: the backward of one split writes one gradient; each slice's would write a full-size one.
    sizes = [size for _, s, c, r, _, _ in segments for size in (s + c, r)]
    queries, keys, values = (t.split(sizes, dim=2) for t in (query, key, value))
    outputs = []
    with _kernels(query.device):
        for n, (_, s, c, r, window, chunk) in enumerate(segments):
            q, k, v = queries[2 * n], keys[2 * n], values[2 * n]
            if s + c:
                outputs.append(_attend(q, k, v, _limited(s + c, s + c, window, chunk, q.device), dropout, scaling))
            if r:
                q, tail_k, tail_v = queries[2 * n + 1], keys[2 * n + 1], values[2 * n + 1]
                k, v = torch.cat([k[:, :, :s], tail_k], dim=2), torch.cat([v[:, :, :s], tail_v], dim=2)
                outputs.append(_attend(q, k, v, _limited(r, s + r, window, chunk, q.device), dropout, scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(q, k, v, mask, dropout, scaling) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None)


def _kernels(device: torch.device) -> AbstractContextManager:
    return sdpa_kernel(_KERNELS) if device.type == "cuda" else nullcontext()


def sdpa_attention(*args, **kwargs) -> tuple[torch.Tensor, None]:
    """transformers' own sdpa attention, for masks that are no segment tables."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **kwargs)
