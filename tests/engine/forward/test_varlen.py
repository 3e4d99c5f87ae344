"""Variable-length attention over emulated kernels, and the emulation itself, against plain attention."""

import dataclasses
import logging

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.varlen import varlen_attn

from trl_cpo.engine.forward import PackedPairForward, probe, varlen
from trl_cpo.engine.forward.device_check import check_attention
from trl_cpo.engine.forward.mask import LayerKind, visible
from trl_cpo.engine.forward.plan import NotPackable, plan_pairs
from trl_cpo.engine.forward.segments import segment_attention, segment_table
from trl_cpo.engine.forward.varlen import Gather, layout_of, varlen_attention

from helpers import flash_emulation
from helpers.families import tiny_model
from helpers.forward_checks import gradients
from helpers.pair_batches import HARD_SIZES, PAIRS, model_inputs, random_pairs

CPU = torch.device("cpu")
#: Before torch 2.12 fewer key heads are not named.
GROUPED = ({}, dict(enable_gqa=True) if "enable_gqa" in varlen._options(varlen_attn) else {})


FULL = LayerKind()


def table_of(pairs, kind=FULL):
    inputs = model_inputs(pairs)
    plan = plan_pairs(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], one_row=True)
    return plan, segment_table(plan, kind)


def drawn(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("window", [(-1, 0), (2, 0), (-1, -1)])
def test_the_emulated_kernels_are_plain_attention(groups, window):
    lengths = [(5, 5), (2, 7), (1, 4), (6, 6)]
    q, k, v = drawn((14, 2 * groups, 8), (22, 2, 8), (22, 2, 8))
    weight = torch.randn(14, 2 * groups, 8, dtype=torch.float64)
    cum = torch.tensor([(0, 0), *lengths]).cumsum(0).int()
    got = varlen_attn(q, k, v, *cum.T.contiguous(), 6, 7, window_size=window, scale=0.3, **GROUPED[groups > 1])
    parts = []
    for (a, c), (b, d) in zip(cum.tolist(), cum.tolist()[1:], strict=False):
        keys, values = (t[c:d].repeat_interleave(groups, 1) for t in (k, v))
        # The last query stands at the last key.
        ahead = torch.tensor([[j - (i + (d - c) - (b - a)) for j in range(d - c)] for i in range(b - a)])
        hidden = (ahead > 0) & (window[1] == 0) | (-ahead > window[0]) & (window[0] >= 0)
        scores = (torch.einsum("qhd,khd->hqk", q[a:b], keys) * 0.3).masked_fill(hidden, -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    expected = torch.cat(parts)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    for ours, theirs in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(PAIRS)
def test_sequences_are_what_the_two_rows_of_a_pair_are(pairs):
    plan, table = table_of(pairs)
    layout = layout_of(table, CPU)
    expected = []
    for part in sorted(plan.parts, key=lambda p: p.start):
        shared = list(range(part.start, part.start + part.shared))
        chosen = list(range(part.start + part.shared, part.start + part.shared + part.chosen))
        rejected = list(range(part.start + part.shared + part.chosen, part.start + part.tokens))
        expected += [(keys, keys) for keys in [shared + chosen] if keys]
        expected += [(rejected, shared + rejected)] if rejected else []
    assert torch.equal(layout.gather, torch.tensor([place for _, keys in expected for place in keys]))
    assert layout.queries.tolist() == [0, *torch.tensor([len(q) for q, _ in expected]).cumsum(0).tolist()]
    assert layout.keys.tolist() == [0, *torch.tensor([len(k) for _, k in expected]).cumsum(0).tolist()]
    assert [place for queries, _ in expected for place in queries] == list(range(plan.tokens))
    assert (layout.longest_queries, layout.longest_keys) == tuple(max(map(len, part)) for part in zip(*expected, strict=True))
    assert len(layout.shared.unique()) == len(layout.shared)


@settings(max_examples=20, deadline=None)
@given(PAIRS)
def test_the_gradient_of_the_gather_is_that_of_an_index(pairs):
    plan, table = table_of(pairs)
    layout = layout_of(table, CPU)
    (rows,) = drawn((plan.tokens, 2, 3))
    weight = torch.randn(len(layout.gather), 2, 3, dtype=torch.float64)
    got = torch.autograd.grad((Gather.apply(rows, layout) * weight).sum(), rows)[0]
    torch.testing.assert_close(got, torch.autograd.grad((rows[layout.gather] * weight).sum(), rows)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("size", "value_size"), [(24, 16), (12, 12), (16, 24)])
def test_heads_of_any_size_and_smaller_values(size, value_size):
    plan, table = table_of(random_pairs(HARD_SIZES))
    q, k, v = drawn((1, 4, plan.tokens, size), (1, 4, plan.tokens, size), (1, 4, plan.tokens, value_size))
    got, expected = (call(torch.nn.Module(), q, k, v, table)[0] for call in (varlen_attention, segment_attention))
    assert got.shape == (1, plan.tokens, 4, value_size)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    for one, other in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (got, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_queries_and_keys_that_a_norm_left_in_float32(autocast):
    plan, table = table_of(random_pairs(HARD_SIZES))
    q, k, v = drawn((1, 4, plan.tokens, 8), (1, 2, plan.tokens, 8), (1, 2, plan.tokens, 8), dtype=torch.float32)
    narrow = [t.bfloat16() for t in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, _ = varlen_attention(torch.nn.Module(), q, k, v if autocast else narrow[2], table)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, varlen_attention(torch.nn.Module(), *narrow, table)[0])


@pytest.mark.parametrize("asked", [dict(s_aux=torch.zeros(1)), dict(dropout=0.1)])
def test_sinks_and_dropout_are_refused(asked):
    plan, table = table_of(random_pairs(HARD_SIZES))
    q = torch.zeros(1, 1, plan.tokens, 8)
    with pytest.raises(NotImplementedError, match=next(iter(asked))):
        varlen_attention(torch.nn.Module(), q, q, q, table, **asked)


@pytest.mark.parametrize("chunk", [8, 100])
def test_chunks_are_refused_where_they_bind(chunk):
    plan, table = table_of(random_pairs(HARD_SIZES), LayerKind(chunk=chunk))
    q = torch.zeros(1, 1, plan.tokens, 8)
    if chunk == 100:
        assert varlen_attention(torch.nn.Module(), q, q, q, table)[0].shape == (1, plan.tokens, 1, 8)
        return
    with pytest.raises(NotImplementedError, match="chunks"):
        varlen_attention(torch.nn.Module(), q, q, q, table)


def test_heads_too_large_for_the_kernels_are_refused():
    plan, table = table_of(random_pairs([(2, 3, 4)]))
    q = torch.zeros(1, 1, plan.tokens, 260)
    with pytest.raises(NotImplementedError, match="256"):
        varlen_attention(torch.nn.Module(), q, q, q, table)


def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """torch 2.10's signature: no scale, no window; fewer key heads are not named."""
    assert is_causal
    options = dict(window_size=(-1, 0), scale=query.shape[2] ** -0.5, **GROUPED[query.shape[1] > key.shape[1]])
    return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


def test_an_older_torch_is_called_by_its_own_signature(monkeypatch):
    plan, table = table_of(random_pairs(HARD_SIZES))
    q, k, v = drawn((1, 4, plan.tokens, 12), (1, 2, plan.tokens, 12), (1, 2, plan.tokens, 12))
    expected = varlen_attention(torch.nn.Module(), q, k, v, table, scaling=0.7)[0]
    monkeypatch.setattr(varlen, "varlen_attn", older)
    torch.testing.assert_close(varlen_attention(torch.nn.Module(), q, k, v, table, scaling=0.7)[0], expected)
    assert not varlen.does_windows()
    with pytest.raises(NotImplementedError, match="windows"):
        varlen_attention(torch.nn.Module(), q, k, v, segment_table(plan, LayerKind(window=8)))
    monkeypatch.setattr(varlen, "varlen_attn", None)
    with pytest.raises(NotImplementedError, match="2.10"):
        varlen_attention(torch.nn.Module(), q, k, v, table)


@pytest.mark.parametrize("pairs", [1, 6])
def test_one_call_a_layer_for_any_number_of_pairs(pairs, monkeypatch):
    calls = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **k: calls.append(1) or varlen_attn(*a, **k))
    known = varlen._options(varlen_attn)
    monkeypatch.setattr(varlen, "_options", lambda function: known)
    model = tiny_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        PackedPairForward(model, attention="varlen", required=True)(**model_inputs(random_pairs(HARD_SIZES[:pairs])))
    assert len(calls) == 3


def test_indices_are_sent_once_for_policy_reference_and_every_layer(monkeypatch):
    varlen._layout.cache_clear()
    sent = []
    monkeypatch.setattr(varlen, "sent", lambda tensors, device: sent.append(len(tensors)) or list(tensors))
    models = [tiny_model("gemma3_text", seed=seed) for seed in (0, 1)]
    inputs = model_inputs(random_pairs(HARD_SIZES))
    for model in models:
        model.gradient_checkpointing_enable()
        model.train()
        gradients(model, PackedPairForward(model, attention="varlen", required=True)(**inputs))
    assert len(sent) == 1


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v3"])
def test_repeats_are_equal_to_the_bit(name):
    model = tiny_model(name).to(torch.bfloat16)
    inputs = model_inputs(random_pairs(HARD_SIZES))
    packed = PackedPairForward(model, attention="varlen", required=True)
    runs = []
    for _ in range(2):
        outputs = packed(**inputs)
        runs.append([outputs.log_probs, *gradients(model, outputs).values()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def attend(queries, keys, values, table, window):
    return varlen._attend(queries, keys, values, layout_of(table, CPU), None, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("groups", "sizes", "window"), [(1, (16, 16), None), (4, (24, 16), None), (2, (16, 16), 4096)])
def test_the_check_on_a_device_finds_nothing_wrong(dtype, groups, sizes, window):
    errors = check_attention(attend, CPU, dtype, groups, sizes, window)
    assert 0 < errors.output[0] < 0.1 and 0 < errors.gradient[0] < 1


def aligned_at_their_starts(*args):
    """Sequences as FlashAttention saw them before 2.1."""
    for queries, keys, seen in SEQUENCES(*args):
        yield queries, keys, torch.ones_like(seen).tril()


def rejected_sees_chosen(table, device):
    """The layout in which keys before the rejected answer are those that stand there in the row, chosen ones among them."""
    layout = layout_of(table, device)
    gather = layout.gather.clone()
    ahead = [torch.full((s,), c) for _, s, c, r, *_ in table[0, 0].T.tolist() if r]
    gather[layout.second] += torch.cat([gather[:0], *ahead])
    return dataclasses.replace(layout, gather=gather)


class CountedOnce(Gather):
    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.layout.first), None


SEQUENCES = flash_emulation._sequences
FAULTS = {
    "kernels aligned at their starts": (flash_emulation, "_sequences", aligned_at_their_starts),
    "the rejected answer sees the chosen one": (varlen, "layout_of", rejected_sees_chosen),
    "a shared token's gradient counted once": (varlen, "Gather", CountedOnce),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_on_a_device_finds_a_fault(fault, dtype, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])

    def faulty(queries, keys, values, table, window):
        return varlen._attend(queries, keys, values, varlen.layout_of(table, CPU), None, window)

    with pytest.raises(NotPackable, match="wrong: d[kv]" if "gradient" in fault else "wrong: output"):
        check_attention(faulty, CPU, dtype, 2, (16, 16), None)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("kernels aligned at their starts", "differ from the padded path"),
        ("the rejected answer sees the chosen one", "when another answer is changed"),
    ],
)
def test_the_probe_finds_a_fault_in_the_kernel(fault, reason, monkeypatch):
    assert probe(tiny_model("llama"), attention="varlen").ok
    monkeypatch.setattr(*FAULTS[fault])
    assert reason in probe(tiny_model("llama"), attention="varlen").reason


@pytest.fixture
def checked_here(monkeypatch):
    """The CPU counts as a device whose kernel is checked."""
    monkeypatch.setattr(varlen, "CHECKED", ("cpu",))
    varlen._fault.cache_clear()
    yield
    varlen._fault.cache_clear()


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_device_checks_its_kernel_once_before_it_is_used(fault, checked_here, monkeypatch, caplog):
    if fault:
        monkeypatch.setattr(*FAULTS[fault])
    model, count = tiny_model("mistral"), []
    model.model.register_forward_hook(lambda *_: count.append(1))
    with caplog.at_level(logging.INFO):
        verdict = probe(model, attention="varlen")
    assert verdict.ok == (fault is None)
    assert caplog.text.count("held against plain attention") == (fault is None)
    assert fault is None or "its attention on cpu is wrong" in verdict.reason
    # No forward is broken off in the middle: another process, whose device is sound, would wait for this one.
    assert len(count) == 10


def test_a_fault_that_shows_in_training_stops_it(checked_here, monkeypatch):
    model = tiny_model("llama")
    packed = PackedPairForward(model, attention="varlen", required=True)
    monkeypatch.setattr(*FAULTS["a shared token's gradient counted once"])
    with pytest.raises(NotPackable, match="its attention on cpu is wrong: dk"):
        packed(**model_inputs(random_pairs(HARD_SIZES)))


def test_a_mask_that_is_no_table_is_sdpas():
    plan, _ = table_of(random_pairs(HARD_SIZES))
    q, k, v = drawn(*[(1, 2, plan.tokens, 8)] * 3, dtype=torch.float32)
    mask = visible(plan, LayerKind())
    got, _ = varlen_attention(torch.nn.Module(), q, k, v, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(got, expected.transpose(1, 2))
