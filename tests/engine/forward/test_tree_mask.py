"""Masks and attention by segments against one definition: a token sees what it would see in its own sequence."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trl_cpo.engine.forward.mask import (
    CHUNKED,
    FULL,
    SLIDING,
    LayerKind,
    dense_masks,
    layer_kinds,
    rope_follows_length,
    visible,
)
from trl_cpo.engine.forward.plan import NotPackable, plan_pairs
from trl_cpo.engine.forward.segments import is_segment_table, segment_attention, segment_masks, segment_table
from trl_cpo.engine.forward.varlen import varlen_attention

from helpers.families import tiny_config
from helpers.pair_batches import HARD_SIZES, PAIRS, model_inputs, random_pairs

KINDS = st.sampled_from([LayerKind(), LayerKind(window=1), LayerKind(window=5), LayerKind(chunk=4)])


def plan_of(pairs, **options):
    inputs = model_inputs(pairs)
    return plan_pairs(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], **options)


def seen_by_definition(plan, kind):
    """Place by place: the keys of the query's own sequence, up to itself and within the layer's reach."""
    rows, length = plan.shape
    seen = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row in range(rows):
        for place in range(length):
            if plan.pair[row, place] < 0:
                seen[row, 0, place, place] = True
        for parts in (p for p in plan.parts if p.row == row):
            shared = list(range(parts.start, parts.start + parts.shared))
            first = parts.start + parts.shared
            middle = first + parts.chosen
            for tail in (range(first, middle), range(middle, middle + parts.rejected)):
                sequence = shared + list(tail)
                for p, query in enumerate(sequence):
                    for k, key in enumerate(sequence[: p + 1]):
                        near = kind.window is None or p - k < kind.window
                        together = kind.chunk is None or p // kind.chunk == k // kind.chunk
                        seen[row, 0, query, key] = near and together
    return seen


@settings(max_examples=60, deadline=None)
@given(PAIRS, KINDS, st.one_of(st.none(), st.integers(1, 80)))
def test_visible_is_the_definition(pairs, kind, row_length):
    plan = plan_of(pairs, row_length=row_length)
    assert torch.equal(visible(plan, kind), seen_by_definition(plan, kind))


@settings(max_examples=40, deadline=None)
@given(PAIRS, KINDS, st.sampled_from([1, 2]), st.sampled_from([segment_attention, varlen_attention]))
def test_attention_is_masked_attention_values_and_gradients(pairs, kind, groups, attention):
    plan = plan_of(pairs, one_row=True)
    assume(attention is segment_attention or kind.chunk is None)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2 * groups, plan.tokens, 4)] + [(1, 2, plan.tokens, 4)] * 2
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    weight = torch.randn(1, plan.tokens, 2 * groups, 4, generator=generator, dtype=torch.float64)
    module = torch.nn.Module()

    got, _ = attention(module, q, k, v, segment_table(plan, kind), scaling=0.7)
    wide = [t.repeat_interleave(groups, 1) for t in (k, v)]
    scores = (q @ wide[0].transpose(2, 3) * 0.7).masked_fill(~visible(plan, kind), -torch.inf)
    expected = (scores.softmax(-1) @ wide[1]).transpose(1, 2)

    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_limit_nobody_reaches_leaves_one_mask_for_all_kinds():
    plan = plan_of(random_pairs(HARD_SIZES))
    kinds = {FULL: LayerKind(), SLIDING: LayerKind(window=44)}
    masks = dense_masks(plan, kinds, None, "cpu")
    assert masks[FULL] is masks[SLIDING]
    masks = dense_masks(plan, {FULL: LayerKind(), SLIDING: LayerKind(window=43)}, None, "cpu")
    assert not torch.equal(masks[FULL], masks[SLIDING])


def test_an_additive_mask_is_zero_where_a_key_is_seen():
    plan = plan_of(random_pairs(HARD_SIZES))
    mask = dense_masks(plan, {FULL: LayerKind()}, torch.bfloat16, "cpu")
    assert mask.dtype == torch.bfloat16
    assert torch.equal(mask == 0, visible(plan, LayerKind()))
    assert bool(torch.isfinite(mask).all())


def test_segments_need_one_row_and_no_other_mask_is_taken_for_their_table():
    plan = plan_of(random_pairs(HARD_SIZES))
    with pytest.raises(ValueError, match="one row"):
        segment_table(plan, LayerKind())
    one = plan_of(random_pairs(HARD_SIZES), one_row=True)
    assert is_segment_table(segment_masks(one, {FULL: LayerKind()}))
    assert not is_segment_table(visible(plan, LayerKind()))
    assert not is_segment_table(torch.ones(2, 5, dtype=torch.long))
    assert not is_segment_table(None)


@pytest.mark.parametrize("attention", [segment_attention, varlen_attention])
@pytest.mark.parametrize("asked", [dict(softcap=1.0), dict(position_bias=torch.zeros(1)), dict(is_causal=False)])
def test_what_is_not_computed_is_refused(asked, attention):
    plan = plan_of(random_pairs(HARD_SIZES), one_row=True)
    q = torch.zeros(1, 1, plan.tokens, 4)
    with pytest.raises(NotImplementedError):
        attention(torch.nn.Module(), q, q, q, segment_table(plan, LayerKind()), **asked)


@pytest.mark.parametrize(
    ("name", "changes", "kinds"),
    [
        ("llama", {}, {FULL: LayerKind()}),
        ("mistral", {}, {SLIDING: LayerKind(window=8)}),
        ("mistral", dict(sliding_window=None), {FULL: LayerKind()}),
        ("qwen2", dict(sliding_window=8, use_sliding_window=False), {FULL: LayerKind()}),
        ("gemma2", {}, {SLIDING: LayerKind(window=8), FULL: LayerKind()}),
        ("llama4_text", {}, {CHUNKED: LayerKind(chunk=8), FULL: LayerKind()}),
    ],
)
def test_kinds_of_layers_by_configuration(name, changes, kinds):
    assert layer_kinds(tiny_config(name, **changes)) == kinds


def test_layers_that_are_no_masked_attention_are_refused():
    with pytest.raises(NotPackable, match="conv"):
        layer_kinds(tiny_config("lfm2"))


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "longrope"])
def test_frequencies_that_follow_the_length_are_found_for_any_kind_of_layer(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    both = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": rope}
    for config in (tiny_config("llama", rope_parameters=rope), tiny_config("gemma3_text", rope_parameters=both)):
        assert rope_follows_length(config) == (kind in ("dynamic", "longrope"))
