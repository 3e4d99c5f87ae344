"""FlashAttention's two operators on the CPU, in plain PyTorch, so that torch's own variable-length attention runs there.

They take what the kernels take, and refuse what those refuse, but for the dtype: float32 and float64 are computed as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch


def _sequences(query, key, value, cum_q, cum_k, max_q, max_k, dropout, causal, scale, left, right):
    """The checks of the kernels, and of each sequence its queries, its keys and what each query sees."""
    sizes = {t.shape[-1] for t in (query, key, value)}
    assert all(t.ndim == 3 and t.stride(-1) == 1 for t in (query, key, value))
    assert {t.dtype for t in (query, key, value)} == {query.dtype}, "the kernels take one dtype"
    assert len(sizes) == 1 and not sizes.copy().pop() % 8 and max(sizes) <= 256, f"head sizes {sizes}"
    assert query.shape[1] % key.shape[1] == 0 and key.shape[:2] == value.shape[:2]
    assert cum_q.dtype == cum_k.dtype == torch.int32 and cum_q.shape == cum_k.shape
    assert dropout == 0 and scale is not None
    starts_q, starts_k = cum_q.tolist(), cum_k.tolist()
    assert (starts_q[0], starts_q[-1]) == (0, len(query)) and (starts_k[0], starts_k[-1]) == (0, len(key))
    left, right = -1 if left is None else left, 0 if causal else (-1 if right is None else right)
    for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        assert 0 < b - a <= max_q and 0 < d - c <= max_k, "no empty sequence, none longer than said"
        # Aligned at the ends: the last query stands at the last key.
        ahead = torch.arange(d - c)[None, :] - torch.arange(d - c - (b - a), d - c)[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if right >= 0:
            seen &= ahead <= right
        if left >= 0:
            seen &= ahead >= -left
        yield slice(a, b), slice(c, d), seen


def _wide(tensor, heads):
    """(T, heads, size) of keys or values as (query heads, T, size), in float32 at least."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor.repeat_interleave(heads // tensor.shape[1], 1).transpose(0, 1)


@torch.autocast("cpu", enabled=False)
def forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    """aten::_flash_attention_forward over sequences."""
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[1], len(query), dtype=torch.promote_types(query.dtype, torch.float32))
    limits = (cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left, window_size_right)
    for queries, keys, seen in _sequences(query, key, value, *limits):
        q, k, v = (_wide(t, query.shape[1]) for t in (query[queries], key[keys], value[keys]))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        lse[:, queries] = scores.logsumexp(-1)
        out[queries] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, nothing


@torch.autocast("cpu", enabled=False)
def backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused,
    *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """aten::_flash_attention_backward over sequences, from the output and the log-sum-exp, as the kernels do."""
    exact = torch.promote_types(query.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(t.shape, dtype=exact) for t in (query, key, value))
    limits = (cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left, window_size_right)
    for queries, keys, seen in _sequences(query, key, value, *limits):
        q, k, v = (_wide(t, query.shape[1]) for t in (query[queries], key[keys], value[keys]))
        g, o = (_wide(t[queries], query.shape[1]) for t in (grad_out, out))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        weights = (scores - logsumexp[:, queries, None]).exp()
        inner = weights * (g @ v.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * scale

        def of_key_heads(wide):
            return wide.transpose(0, 1).unflatten(1, (key.shape[1], -1)).sum(2)

        dq[queries] += (inner @ k).transpose(0, 1)
        dk[keys] += of_key_heads(inner.transpose(1, 2) @ q)
        dv[keys] += of_key_heads(weights.transpose(1, 2) @ g)
    return dq.to(query.dtype), dk.to(query.dtype), dv.to(query.dtype)


@contextmanager
def flash_on_cpu(forward=forward, backward=backward) -> Iterator[None]:
    """Within the block, the two operators run on the CPU. Nothing else there calls them."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield
    finally:
        library._destroy()


KERNEL = "flash_emulated"


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """The flash-attn package's function of that name, differentiable as it stands."""
    outputs = []
    limits = (max_seqlen_q, max_seqlen_k, dropout_p, causal, softmax_scale, *window_size)
    for queries, keys, seen in _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, *limits):
        query, key, value = (_wide(t, q.shape[1]) for t in (q[queries], k[keys], v[keys]))
        scores = query @ key.transpose(1, 2) * softmax_scale
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


def flash_attn_func(q, k, v, **options):
    """The package's function for rows of one length."""
    starts = [torch.arange(len(t) + 1, dtype=torch.int32) * t.shape[1] for t in (q, k)]
    flat = (t.flatten(0, 1) for t in (q, k, v))
    return flash_attn_varlen_func(*flat, *starts, q.shape[1], k.shape[1], **options).unflatten(0, q.shape[:2])


@contextmanager
def flash_kernel() -> Iterator[None]:
    """Within the block, models can be on KERNEL, which transformers calls as it calls flash_attention_2."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import modeling_flash_attention_utils as upstream
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import flash_attention_mask

    functions = (flash_attn_func, flash_attn_varlen_func, None, upstream._pad_input, upstream._unpad_input)
    AttentionInterface.register(KERNEL, flash_attention_forward)
    AttentionMaskInterface.register(KERNEL, flash_attention_mask)
    try:
        with patch.object(upstream, "_lazy_imports", lambda *_, **__: functions):
            yield
    finally:
        upstream._loaded_implementation = None
        del AttentionInterface._global_mapping[KERNEL], AttentionMaskInterface._global_mapping[KERNEL]
