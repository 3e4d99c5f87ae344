"""The variable-length kernel on the device, held against plain attention in float64; and faults planted around it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from trl_cpo.engine.forward import probe, varlen
from trl_cpo.engine.forward.device_check import check_attention
from trl_cpo.engine.forward.mask import LayerKind
from trl_cpo.engine.forward.plan import NotPackable, plan_pairs
from trl_cpo.engine.forward.segments import segment_table
from trl_cpo.engine.forward.varlen import Gather, layout_of

from helpers.families import tiny_model
from helpers.on_gpu import ON_GPU, REHEARSAL, some
from helpers.pair_batches import model_inputs, random_pairs

pytestmark = ON_GPU

#: CPUs are slow in float16.
NARROW = [torch.bfloat16] if REHEARSAL else [torch.bfloat16, torch.float16]
#: Of queries and keys, and of values; the last are those of latent attention.
HEADS = [(64, 64), (128, 128), (256, 256), (80, 80), (192, 128)]
#: The rehearsal's kernels take their time.
SHORTER = 10 if REHEARSAL else 1


def attend(queries, keys, values, table, window):
    return varlen._attend(queries, keys, values, varlen.layout_of(table, queries.device), None, window)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("sizes", some(HEADS), ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_the_kernel_is_plain_attention(dtype, sizes, window, device, record):
    for groups in (1, 4, 8):
        errors = check_attention(attend, device, dtype, groups, sizes, window)
        record(groups=groups, output=errors.output, gradient=errors.gradient)


def plain(queries, keys, values, lengths, window):
    """Attention by the definition, sequence by sequence: the last query stands at the last key."""
    groups, parts, at_q, at_k = queries.shape[1] // keys.shape[1], [], 0, 0
    for q, k in lengths:
        these, those = slice(at_q, at_q + q), slice(at_k, at_k + k)
        heads = [queries[these], *(t[those].repeat_interleave(groups, 1) for t in (keys, values))]
        one, other, third = (t.transpose(0, 1) for t in heads)
        ahead = torch.arange(k, device=one.device)[None] - torch.arange(k - q, k, device=one.device)[:, None]
        hidden = (ahead > 0) | (ahead <= -window if window else False)
        scores = (one @ other.transpose(1, 2) * one.shape[2] ** -0.5).masked_fill(hidden, -torch.inf)
        parts.append((scores.softmax(-1) @ third).transpose(0, 1))
        at_q, at_k = at_q + q, at_k + k
    return torch.cat(parts)


def drawn(*shapes, device, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def outcome(attention, tensors, weight):
    """Output, dq, dk and dv, in float64."""
    inputs = [t.clone().requires_grad_() for t in tensors]
    out = attention(*inputs)
    return [t.detach().double() for t in (out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs))]


def assert_as_near(ours, by_hand, truth, dtype, record, **about):
    """No farther from float64 than plain attention in the same precision, on the whole and at the worst place."""
    found = {}
    for name, got, plain_one, exact in zip(("output", "dq", "dk", "dv"), ours, by_hand, truth, strict=True):
        errors = [(t - exact) for t in (got, plain_one)]
        whole, whole_plain = (float(e.square().mean().sqrt()) for e in errors)
        worst, worst_plain = (float(e.abs().max()) for e in errors)
        found[name] = [whole, whole_plain, worst, worst_plain]
        rounding = torch.finfo(dtype).eps * float(exact.square().mean().sqrt())
        assert whole <= 2 * max(whole_plain, rounding), (name, found[name], about)
        assert worst <= 4 * max(worst_plain, torch.finfo(dtype).eps * float(exact.abs().max())), (name, found[name], about)
    record(**about, **found)


#: Queries and keys of each sequence: as many, fewer, one, and beside the edges of a kernel's blocks.
LENGTHS = [(700, 700), (300, 2000), (1, 1500), (129, 1153), (2000, 2000), (64, 65), (127, 128), (1, 1), (900, 1600)]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("groups", [1, 4])
def test_long_sequences_with_more_keys_than_queries(dtype, size, window, groups, device, record):
    lengths = [(-(-q // SHORTER), -(-k // SHORTER)) for q, k in LENGTHS]
    window = window and max(window // SHORTER, 2)
    bounds = torch.tensor([(0, 0), *lengths], device=device).cumsum(0).int().T.contiguous()
    total_q, total_k = (sum(part) for part in zip(*lengths, strict=True))
    longest = [max(part) for part in zip(*lengths, strict=True)]
    *tensors, weight = drawn(
        (total_q, 2 * groups, size), *[(total_k, 2, size)] * 2, (total_q, 2 * groups, size), device=device, dtype=dtype
    )
    nothing = torch.zeros(0, dtype=torch.long, device=device)
    layout = varlen.Layout(*bounds, *longest, nothing, nothing, nothing, nothing)
    ours = outcome(lambda q, k, v: varlen._call(q, k, v, layout, size**-0.5, window), tensors, weight)
    by_hand = outcome(lambda *qkv: plain(*qkv, lengths, window), tensors, weight)
    truth = outcome(lambda *qkv: plain(*qkv, lengths, window), [t.double() for t in tensors], weight)
    assert_as_near(ours, by_hand, truth, dtype, record, groups=groups)


#: Shared, chosen and rejected tokens of each pair.
PAIRS = [(700, 1300, 900), (1400, 1, 600), (1000, 500, 1), (300, 1200, 1700), (31, 700, 129)]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("size", "window"), [(128, None), (64, 100), (80, None)])
def test_a_packed_row_of_long_pairs(dtype, size, window, device, record):
    """Gather and its gradient included; the answers of a pair see its prompt and not each other."""
    sizes = [tuple(-(-n // SHORTER) for n in pair) for pair in PAIRS]
    window = window and max(window // SHORTER, 2)
    inputs = model_inputs(random_pairs(sizes))
    plan = plan_pairs(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], one_row=True)
    table = segment_table(plan, LayerKind(window=window))
    segments = [tuple(column) for column in table[0, 0, :4].T.tolist()]
    *tensors, weight = drawn(
        (plan.tokens, 8, size), *[(plan.tokens, 2, size)] * 2, (plan.tokens, 8, size), device=device, dtype=dtype
    )

    def by_definition(queries, keys, values):
        keep, lengths = [], []
        for start, s, c, r in segments:
            trunk, end = start + s + c, start + s + c + r
            keep += [*range(start, trunk), *range(start, start + s), *range(trunk, end)]
            lengths += [(s + c, s + c), (r, s + r)]
        return plain(queries, keys[keep], values[keep], [each for each in lengths if each[0]], window)

    ours = outcome(lambda *qkv: attend(*qkv, table, window), tensors, weight)
    by_hand = outcome(by_definition, tensors, weight)
    truth = outcome(by_definition, [t.double() for t in tensors], weight)
    assert_as_near(ours, by_hand, truth, dtype, record, tokens=plan.tokens)


def aligned_at_their_starts(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), scale=None):
    """A kernel as FlashAttention was before 2.1: each sequence's first query stands at its first key."""
    queries, keys, parts = cu_seq_q.tolist(), cu_seq_k.tolist(), []
    for a, b, c, d in zip(queries, queries[1:], keys, keys[1:], strict=False):
        heads = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (query[a:b], key[c:d], value[c:d]))
        q, k, v = (t.transpose(0, 1)[None] for t in heads)
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1))
    return torch.cat(parts)


def rejected_sees_chosen(table, device):
    """The layout in which keys before the rejected answer are those that stand there in the row, chosen ones among them."""
    layout = layout_of(table, device)
    gather = layout.gather.clone()
    ahead = [torch.full((s,), c, device=device) for _, s, c, r, *_ in table[0, 0].T.tolist() if r]
    gather[layout.second] += torch.cat([gather[:0], *ahead])
    return dataclasses.replace(layout, gather=gather)


class CountedOnce(Gather):
    """A shared token's gradient is that of its first copy alone."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.layout.first), None


FAULTS = {
    "kernels aligned at their starts": ("varlen_attn", aligned_at_their_starts, "output"),
    "the rejected answer sees the chosen one": ("layout_of", rejected_sees_chosen, "output"),
    "a shared token's gradient counted once": ("Gather", CountedOnce, "d[kv]"),
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_here(fault, dtype, device, monkeypatch):
    name, faulty, where = FAULTS[fault]
    monkeypatch.setattr(varlen, name, faulty)
    with pytest.raises(NotPackable, match=f"attention on {device} is wrong: {where}"):
        check_attention(attend, device, dtype, 4, (64, 64), None)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_whose_kernel_is_at_fault_gets_another_attention(fault, device, monkeypatch, unchecked, record):
    model = tiny_model("llama").to(device, torch.bfloat16)
    name, faulty, _ = FAULTS[fault]
    monkeypatch.setattr(varlen, name, faulty)
    verdict = probe(model, max_length=48)
    assert verdict.ok and verdict.attention == "segments", verdict
    assert f"its attention on {device} is wrong" in verdict.why
    record(verdict=str(verdict))
