"""Balanced micro-batches: the pairs of each step are a plain shuffle's, their order is the same everywhere and after a resume."""

import pytest
import torch
from conftest import pairs_dataset, training_options
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.forward.balance import BalancedSampler, deal, pair_tokens

costs_of = st.lists(st.integers(2, 2000), min_size=1, max_size=150)


@settings(max_examples=200, deadline=None)
@given(costs=costs_of, size=st.integers(1, 5), groups=st.integers(1, 6), epoch=st.integers(0, 3))
def test_the_pairs_of_a_step_do_not_depend_on_lengths(costs, size, groups, epoch):
    """As sets, the steps are those of the permutation that seed and epoch draw; nothing is lost or seen twice."""
    sampler = BalancedSampler(costs, micro_batch=size, micro_batches=groups, seed=3)
    sampler.set_epoch(epoch)
    order = list(sampler)
    plain = torch.randperm(len(costs), generator=torch.Generator().manual_seed(3 + epoch)).tolist()
    step = size * groups
    assert sorted(order) == list(range(len(costs))) and len(sampler) == len(order)
    for start in range(0, len(costs), step):
        assert sorted(order[start : start + step]) == sorted(plain[start : start + step])
    assert order == list(sampler), "the same order on every process and after a resume"


def test_epochs_differ():
    sampler = BalancedSampler([5] * 50, micro_batch=2, micro_batches=3, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_every_pair_is_equally_likely_in_every_step():
    """Over 2,000 seeds the long pair is in the first of ten steps a tenth of the time (5 standard errors)."""
    costs = [1000] + [10] * 39
    hits = sum(0 in list(BalancedSampler(costs, micro_batch=2, micro_batches=2, seed=s))[:4] for s in range(2000))
    assert abs(hits / 2000 - 0.1) < 5 * (0.1 * 0.9 / 2000) ** 0.5


@settings(max_examples=200, deadline=None)
@given(costs=st.lists(st.integers(2, 2000), min_size=4, max_size=64), groups=st.integers(1, 4))
def test_dealing_is_even(costs, groups):
    """Equal sizes; two sums differ by no more than the largest item times the items of a group's last round allow."""
    costs = costs[: len(costs) // groups * groups]
    dealt = deal(costs, groups)
    assert {len(group) for group in dealt} == {len(costs) // groups}
    sums = [sum(costs[i] for i in group) for group in dealt]
    assert sums == sorted(sums, reverse=True)
    shuffled = [sum(costs[i :: groups]) for i in range(groups)]
    assert max(sums) <= max(max(shuffled), max(costs) + sum(costs) / groups)


def test_it_evens_out_real_spreads():
    generator = torch.Generator().manual_seed(0)
    costs = (torch.randn(4096, generator=generator) * 0.8 + 5).exp().int().tolist()  # log-normal, as texts are

    def spread(order):
        sums = torch.tensor([costs[i] for i in order], dtype=torch.float).view(-1, 8, 4).sum(dim=2)
        return (sums.max(dim=1).values / sums.mean(dim=1)).mean().item()

    plain = torch.randperm(4096, generator=generator).tolist()
    balanced = list(BalancedSampler(costs, micro_batch=4, micro_batches=8, seed=0))
    assert spread(plain) > 1.7 and spread(balanced) < 1.3


@pytest.mark.parametrize("lengths, limit, cost", [((10, 5, 3), None, 18), ((10, 5, 3), 12, 14), ((20, 5, 3), 12, 12)])
def test_cost_of_a_pair(lengths, limit, cost):
    assert pair_tokens(*lengths, max_length=limit) == cost


def train(tmp_path, tokenizer, model_folder, checkpoint=None, **options):
    args = CPOConstrainedConfig(
        **training_options(
            tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=6, save_strategy="steps",
            save_steps=4, learning_rate=1e-3,
        ),
        **options,
    )  # fmt: skip
    trainer = CPOConstrainedTrainer(
        model=model_folder, args=args, processing_class=tokenizer, train_dataset=pairs_dataset(24)
    )
    seen, original = [], trainer.compute_loss

    def recorded(model, inputs, **kwargs):
        seen.append(inputs["input_ids"].tolist())
        return original(model, inputs, **kwargs)

    trainer.compute_loss = recorded
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, seen


def test_resumed_training_sees_the_rest_and_ends_the_same(tmp_path, tokenizer, model_folder):
    """Six steps of an epoch and a half, resumed after the fourth, which ends the first epoch."""
    whole, seen = train(tmp_path, tokenizer, model_folder, constraint="clip", balance_tokens=True)
    rest, seen_after = train(
        tmp_path, tokenizer, model_folder, tmp_path / "checkpoint-4", constraint="clip", balance_tokens=True
    )
    assert len(seen) == 18 and seen_after == seen[12:]
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lengths_known_beforehand_are_needed(tmp_path, tokenizer, model_folder):
    args = CPOConstrainedConfig(**training_options(tmp_path), balance_tokens=True)
    stream = IterableDataset.from_generator(lambda: iter(pairs_dataset().to_list()))
    with pytest.raises(ValueError, match="needs the lengths of all pairs beforehand, got IterableDataset"):
        CPOConstrainedTrainer(model=model_folder, args=args, processing_class=tokenizer, train_dataset=stream)


def test_two_orders_at_once_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Leave one of them out"):
        CPOConstrainedConfig(**training_options(tmp_path), balance_tokens=True, train_sampling_strategy="group_by_length")
