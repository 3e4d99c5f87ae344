"""The plan against its definition, token by token."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cpo.engine.forward.plan import CHOSEN, REJECTED, SHARED, BatchPlans, NotPackable, fill_rows, plan_pairs

from helpers.pair_batches import COLLATOR, HARD_SIZES, PAIRS, model_inputs, random_pairs


def plan_of(inputs, **options):
    return plan_pairs(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], **options)


@settings(max_examples=150, deadline=None)
@given(PAIRS, COLLATOR, st.booleans(), st.one_of(st.none(), st.integers(1, 64)))
def test_every_real_token_has_a_home_that_holds_it_at_its_position(pairs, collator, one_row, row_length):
    inputs = model_inputs(pairs, **collator)
    plan = plan_of(inputs, one_row=one_row, row_length=row_length)
    ids, real = inputs["input_ids"], inputs["attention_mask"] == 1
    packed = ids.reshape(-1)[plan.source].reshape(-1)
    home, pair, branch = plan.home, plan.pair.reshape(-1), plan.branch.reshape(-1)
    columns = torch.arange(ids.size(1)).expand_as(ids)
    rows = torch.arange(ids.size(0))[:, None].expand_as(ids)
    count = ids.size(0) // 2
    assert torch.equal(packed[home][real], ids[real])
    assert torch.equal(plan.position_ids.reshape(-1)[home][real], columns[real])
    assert torch.equal(pair[home][real], rows[real] % count)
    own = torch.where(rows < count, CHOSEN, REJECTED)
    assert bool(((branch[home] == SHARED) | (branch[home] == own))[real].all())
    # Every place that is not filling is somebody's home, and shared places are the home of two.
    visits = torch.bincount(home[real], minlength=packed.numel())
    expected = torch.where(pair < 0, 0, torch.where(branch == SHARED, 2, 1))
    assert torch.equal(visits, expected)
    assert plan.tokens == int((pair >= 0).sum())


@settings(max_examples=150, deadline=None)
@given(PAIRS, COLLATOR)
def test_what_is_shared_is_the_whole_common_prefix(pairs, collator):
    inputs = model_inputs(pairs, **collator)
    plan = plan_of(inputs)
    lengths = inputs["attention_mask"].sum(1).tolist()
    rows = [row[:n] for row, n in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
    for parts in plan.parts:
        chosen, rejected = rows[parts.pair], rows[parts.pair + len(rows) // 2]
        s = parts.shared
        assert chosen[:s] == rejected[:s]
        assert chosen[s : s + 1] != rejected[s : s + 1] or s == len(chosen) == len(rejected)
        assert (s + parts.chosen, s + parts.rejected) == (len(chosen), len(rejected))


@settings(max_examples=150, deadline=None)
@given(PAIRS, COLLATOR)
def test_scored_tokens_are_predicted_from_the_token_before_them(pairs, collator):
    inputs = model_inputs(pairs, **collator)
    plan = plan_of(inputs)
    labels = inputs["labels"]
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    assert plan.output_shape == (labels.size(0), labels.size(1) - 1)
    assert torch.equal(plan.labels, labels[rows, columns + 1])
    assert torch.equal(plan.target, rows * (labels.size(1) - 1) + columns)
    assert torch.equal(plan.scored, plan.home[rows, columns])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.one_of(st.none(), st.integers(1, 120)))
def test_first_fit_decreasing_rows(sizes, row_length):
    rows = fill_rows(sizes, row_length)
    length = max([*sizes, row_length or 0])
    used = [sum(sizes[i] for i in row) for row in rows]
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert max(used) <= length
    # First fit opens a row only when nothing before it has room, so no two rows could be one.
    assert all(a + b > length for n, a in enumerate(used) for b in used[n + 1 :])


def test_rows_are_as_long_as_the_longest_pair():
    plan = plan_of(model_inputs(random_pairs(HARD_SIZES)))
    assert plan.shape[1] == max(p.tokens for p in plan.parts)
    assert plan.longest == 44


def test_one_row_has_no_filling():
    plan = plan_of(model_inputs(random_pairs(HARD_SIZES)), one_row=True)
    assert plan.shape == (1, plan.tokens)


def test_truncation_from_the_left_that_shifts_one_row_shares_nothing():
    pairs = [([3, 4, 5, 6], [7, 8, 9, 10], [11])]
    plan = plan_of(model_inputs(pairs, max_length=5, truncation_mode="keep_end"))
    assert [(p.shared, p.chosen, p.rejected) for p in plan.parts] == [(0, 5, 5)]


def test_a_pair_of_empty_rows_is_left_out():
    ids = torch.tensor([[5, 6], [0, 0], [5, 7], [0, 0]])
    mask = (ids > 0).long()
    plan = plan_pairs(ids, mask, torch.full_like(ids, -100))
    assert [p.pair for p in plan.parts] == [0]
    assert len(plan.scored) == 0


@pytest.mark.parametrize(
    ("ids", "mask", "labels", "reason"),
    [
        ([[1, 2], [1, 3], [1, 4]], None, None, "pairs need"),
        ([[0, 2], [1, 3]], [[0, 1], [1, 1]], None, "padded on the left"),
        ([[1, 0, 2], [1, 3, 4]], [[1, 0, 1], [1, 1, 1]], None, "holes"),
        ([[1, 2], [1, 3]], [[1, 0], [1, 1]], [[-100, 2], [-100, 3]], "padding has labels"),
        ([[0, 0], [0, 0]], [[0, 0], [0, 0]], None, "nothing but padding"),
        ([[1, 2], [1, 3]], [[1, 1]], None, "shapes differ"),
    ],
)
def test_what_cannot_be_packed_is_refused(ids, mask, labels, reason):
    ids = torch.tensor(ids)
    mask = None if mask is None else torch.tensor(mask)
    labels = torch.full_like(ids, -100) if labels is None else torch.tensor(labels)
    with pytest.raises(NotPackable, match=reason):
        plan_pairs(ids, mask, labels)


def test_a_plan_rearranged_is_the_plan_of_those_rows():
    inputs = model_inputs(random_pairs(HARD_SIZES))
    of_rows = dict(row_length=40, one_row=False)
    one = plan_pairs(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], one_row=True)
    other = plan_pairs(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], **of_rows)
    assert_same_plan(one.rearranged(**of_rows), other)
    assert_same_plan(other.rearranged(one_row=True), one)


def test_the_plans_of_a_batch_are_made_once_and_only_for_its_shape():
    inputs = model_inputs(random_pairs(HARD_SIZES))
    batch = {**inputs, "completion_mask": (inputs["labels"] != -100).long()}
    plans, shape, rows = BatchPlans.of(batch), batch["input_ids"].shape, dict(row_length=None, one_row=True)
    plan = plans.get(shape, **rows)
    assert_same_plan(plan, plan_pairs(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], one_row=True))
    assert plans.get(shape, **rows) is plan
    dense = plans.get(shape, row_length=None, one_row=False)
    assert dense.shape[0] > 1 and plans.get(shape, row_length=None, one_row=False) is dense
    restored = pickle.loads(pickle.dumps(plans))  # as a loader's worker hands it on
    assert_same_plan(restored.get(shape, **rows), plan)
    assert plans.get(torch.Size([2, 5]), **rows) is None
    assert BatchPlans.of({**batch, "attention_mask": 1 - batch["attention_mask"]}).get(shape, **rows) is None


def assert_same_plan(one, other):
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name
        elif name != "_kept":
            assert value == getattr(other, name), name
