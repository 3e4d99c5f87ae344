"""Micro-batches by tokens: what a step holds is a plain shuffle's, every pair weighs the same, a resume sees the same."""

import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine.batching import BalancedSampler, TokenBudget, deal, pair_tokens
from trl_cpo.engine.forward.plan import plan_pairs

from helpers.tiny import pairs_dataset, training_options

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
    shuffled = [sum(costs[i::groups]) for i in range(groups)]
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


@settings(max_examples=300, deadline=None)
@given(costs=costs_of, groups=st.integers(1, 4), share=st.floats(0, 1), epoch=st.integers(0, 3))
def test_a_step_under_a_budget_holds_its_share_of_tokens(costs, groups, share, epoch):
    """Steps in the permutation's order, as many in every epoch, each within its share and a round; no pair twice."""
    costs = costs + costs[: groups - 1] if len(costs) >= groups else costs * groups
    least = -(-sum(costs) * groups // len(costs))
    # From the smallest budget, a step for every round, to one step for all, evenly in the number of steps.
    tokens = max(least, -(-sum(costs) // max(1, round(share * len(costs) / groups))))
    sampler = TokenBudget(costs, tokens=tokens, micro_batches=groups, seed=3)
    assert sampler.steps == min(len(costs) // groups, -(-sum(costs) // tokens))
    sampler.set_epoch(epoch)
    batches = list(sampler)
    plain = torch.randperm(len(costs), generator=torch.Generator().manual_seed(3 + epoch)).tolist()
    assert batches == list(sampler) and len(batches) == len(sampler) == sampler.steps * groups
    kept = plain[: len(costs) // groups * groups]
    rounds = [sum(costs[i] for i in kept[r : r + groups]) for r in range(0, len(kept), groups)]
    seen = 0
    for start in range(0, len(batches), groups):
        step = batches[start : start + groups]
        assert len({len(batch) for batch in step}) == 1 and step[0]
        pairs = sorted(i for batch in step for i in batch)
        assert pairs == sorted(kept[seen : seen + len(pairs)])
        assert sum(costs[i] for i in pairs) <= sum(rounds) / sampler.steps + max(rounds)
        seen += len(pairs)
    assert seen == len(kept)
    assert sampler.mean_pairs == pytest.approx(seen / len(batches))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_under_a_budget_every_pair_of_an_epoch_weighs_the_same(micro_batches):
    """Short pairs have loss 0 and long ones 1: the mean over steps is the share of long pairs, which plain means miss."""
    costs = [1000 if i % 5 == 0 else 30 for i in range(300)]
    sampler = TokenBudget(costs, tokens=4000, micro_batches=micro_batches, seed=1)
    weighed, plain = [], []
    for batch in sampler:
        mean = sum(costs[i] == 1000 for i in batch) / len(batch)
        plain.append(mean)
        weighed.append(mean * len(batch) / sampler.mean_pairs)
    assert sum(weighed) / len(weighed) == pytest.approx(0.2, abs=1e-12)
    assert sum(plain) / len(plain) > 0.21


def test_steps_under_a_budget_are_even_where_texts_are_not():
    generator = torch.Generator().manual_seed(0)
    costs = (torch.randn(4096, generator=generator) * 0.8 + 5).exp().int().tolist()
    budget = 32 * sum(costs) / 4096
    batches = list(TokenBudget(costs, tokens=round(budget), micro_batches=2, seed=0))
    sums = torch.tensor([sum(costs[i] for i in batch) for batch in batches], dtype=torch.float).view(-1, 2).sum(1)
    plain = torch.tensor(costs, dtype=torch.float)[torch.randperm(4096, generator=generator)].view(-1, 32).sum(1)
    assert sums.std() / sums.mean() < 0.35 * plain.std() / plain.mean()


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(tokens=39, micro_batches=2), "one pair for each of a step's 2 micro-batches takes 40 tokens"),
        (dict(tokens=1000, micro_batches=5), "Got 4 training pairs, fewer than the 5 micro-batches"),
    ],
)
def test_a_budget_that_no_step_can_keep_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        TokenBudget([20] * 4, seed=0, **options)


@pytest.mark.parametrize("lengths, limit, cost", [((10, 5, 3), None, 18), ((10, 5, 3), 12, 14), ((20, 5, 3), 12, 12)])
def test_cost_of_a_pair(lengths, limit, cost):
    assert pair_tokens(*lengths, max_length=limit) == cost


def token_rows(prompt, chosen, rejected):
    """A pair of these lengths, no token of it twice, so that it shares what it must and nothing by chance."""
    ids = list(range(5, 5 + prompt + chosen + rejected))
    return {"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt : prompt + chosen], "rejected_ids": ids[prompt + chosen :]}


def tokens_run(row, max_length, keep):
    """Tokens that the packed forward computes for one pair, as TRL's collator cuts it."""
    batch = DataCollatorForPreference(pad_token_id=2, max_length=max_length, truncation_mode=keep)([row])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return plan_pairs(batch["input_ids"], batch["attention_mask"], labels).tokens


parts_of = st.tuples(st.integers(1, 12), st.integers(1, 8), st.integers(1, 8))


@settings(max_examples=300, deadline=None)
@given(lengths=parts_of, limit=st.none() | st.integers(1, 20), keep=st.sampled_from(["keep_start", "keep_end"]))
def test_the_cost_of_a_pair_is_what_is_computed_of_it(lengths, limit, keep):
    """Cut at the front by different amounts, the two rows of a pair begin apart and share nothing."""
    assert pair_tokens(*lengths, max_length=limit, truncation_mode=keep) == tokens_run(token_rows(*lengths), limit, keep)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("keep", ["keep_start", "keep_end"])
def test_the_trainer_counts_pairs_as_they_are_cut(tmp_path, tokenizer, model_folder, keep):
    args = CPOConstrainedConfig(**training_options(tmp_path, max_length=32, truncation_mode=keep), tokens_per_step=500)
    trainer = CPOConstrainedTrainer(model=model_folder, args=args, processing_class=tokenizer, train_dataset=pairs_dataset())
    rows = [token_rows(*lengths) for lengths in [(3, 4, 5), (28, 5, 9), (28, 9, 9), (30, 1, 6), (2, 40, 35)]]
    assert trainer._costs(Dataset.from_list(rows)) == [tokens_run(row, 32, keep) for row in rows]


def train(tmp_path, tokenizer, model_folder, checkpoint=None, **options):
    args = CPOConstrainedConfig(
        **training_options(
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            max_steps=6,
            save_strategy="steps",
            save_steps=4,
            learning_rate=1e-3,
        ),
        **options,
    )
    trainer = CPOConstrainedTrainer(model=model_folder, args=args, processing_class=tokenizer, train_dataset=pairs_dataset(24))
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


def test_training_under_a_budget_goes_on_with_the_rest_and_ends_the_same(tmp_path, tokenizer, model_folder):
    options = dict(constraint="clip", tokens_per_step=180)
    whole, seen = train(tmp_path, tokenizer, model_folder, **options)
    rest, seen_after = train(tmp_path, tokenizer, model_folder, tmp_path / "checkpoint-4", **options)
    steps = whole._order.steps
    assert len(seen) == 18 and seen_after == seen[12:] and steps > 4, "an epoch longer than four steps"
    assert len({len(rows) for rows in seen}) > 1, "steps of different sizes"
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_losses_of_an_epoch_under_a_budget_have_the_mean_over_pairs(tmp_path, tokenizer, model_folder):
    """With a learning rate of 0, the logged losses average to the mean over the pairs that the epoch held."""
    args = CPOConstrainedConfig(
        **training_options(tmp_path, gradient_accumulation_steps=2, learning_rate=0.0, num_train_epochs=1, max_steps=-1),
        constraint="penalty",
        gamma=5.0,
        penalty_weight=0.1,
        tokens_per_step=180,
    )
    dataset = pairs_dataset(24)
    trainer = CPOConstrainedTrainer(
        model=model_folder, args=args, processing_class=tokenizer, train_dataset=dataset, eval_dataset=dataset
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == trainer._order.steps == len(trainer.get_train_dataloader()) / 2
    assert len({len(batch) for batch in trainer._order}) > 1
    trainer.evaluate()
    pairs = trainer.evaluated_pairs["eval"]
    expected = torch.nn.functional.softplus(torch.tensor(0.0)) + 0.1 * (5.0 - pairs.gap).clamp(min=0).mean()
    assert sum(losses) / len(losses) == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_under_a_budget_weighs_nothing(tmp_path, tokenizer, model_folder):
    """Its batches hold another number of pairs than a mean micro-batch, and its loss is the mean over the set all the same."""
    args = CPOConstrainedConfig(
        **training_options(tmp_path, learning_rate=0.0, max_steps=1), constraint="penalty", gamma=5.0, tokens_per_step=180
    )
    dataset = pairs_dataset(24)
    trainer = CPOConstrainedTrainer(
        model=model_folder, args=args, processing_class=tokenizer, train_dataset=dataset, eval_dataset=dataset
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert abs(trainer._order.mean_pairs / args.per_device_eval_batch_size - 1) > 0.1
    expected = math.log(2) + (5.0 - trainer.evaluated_pairs["eval"].gap).clamp(min=0).mean().item()
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("option", [dict(balance_tokens=True), dict(tokens_per_step=500)])
def test_lengths_known_beforehand_are_needed(tmp_path, tokenizer, model_folder, option):
    args = CPOConstrainedConfig(**training_options(tmp_path), **option)
    stream = IterableDataset.from_generator(lambda: iter(pairs_dataset().to_list()))
    with pytest.raises(
        ValueError, match=f"{next(iter(option))} needs the lengths of all pairs beforehand, got IterableDataset"
    ):
        CPOConstrainedTrainer(model=model_folder, args=args, processing_class=tokenizer, train_dataset=stream)


@pytest.mark.parametrize("option", [dict(balance_tokens=True), dict(tokens_per_step=500)])
def test_two_orders_at_once_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match="Leave one of them out"):
        CPOConstrainedConfig(**training_options(tmp_path), **option, train_sampling_strategy="group_by_length")


def test_the_smallest_budget_is_exact():
    """Seven pairs of 29 tokens in all, seven micro-batches: floats would put the least budget above 29."""
    assert TokenBudget([5, 4, 4, 4, 4, 4, 4], tokens=29, micro_batches=7, seed=0).steps == 1


def test_a_budget_is_looked_at_before_training(tmp_path, tokenizer, model_folder):
    args = CPOConstrainedConfig(**training_options(tmp_path), tokens_per_step=10)
    with pytest.raises(ValueError, match="tokens_per_step=10 is too small: one pair"):
        CPOConstrainedTrainer(model=model_folder, args=args, processing_class=tokenizer, train_dataset=pairs_dataset())
    with pytest.raises(ValueError, match="auto_find_batch_size=True searches for a number of pairs"):
        CPOConstrainedConfig(**training_options(tmp_path, auto_find_batch_size=True), tokens_per_step=500)


@pytest.mark.parametrize("accumulation, tokens", [(1, 120), (2, 180)])
def test_every_pair_moves_the_multiplier_alike(tmp_path, tokenizer, model_folder, accumulation, tokens):
    """With weights that stand still, λ after an epoch is η times the steps times (mean violation − ε)."""
    args = CPOConstrainedConfig(
        **training_options(
            tmp_path, learning_rate=0.0, num_train_epochs=1, max_steps=-1, gradient_accumulation_steps=accumulation
        ),
        constraint="lagrangian",
        gamma=40.0,
        epsilon=1.0,
        dual_lr=1e-3,
        dual_max=10.0,
        tokens_per_step=tokens,
    )
    dataset = pairs_dataset(24)
    trainer = CPOConstrainedTrainer(
        model=model_folder, args=args, processing_class=tokenizer, train_dataset=dataset, eval_dataset=dataset
    )
    trainer.train()
    assert len({len(batch) for batch in trainer._order}) > 1
    violation = trainer.evaluate()["eval_cpo/violation"]
    steps = trainer._order.steps
    assert trainer._bounds.multipliers["dual"].parts[""].value == pytest.approx(1e-3 * steps * (violation - 1.0), rel=1e-5)


@pytest.mark.parametrize("budget", [0, -5, True, 3.5, "many", torch.ones(2)])
def test_a_budget_is_a_number_of_tokens(tmp_path, budget):
    with pytest.raises(ValueError, match="tokens_per_step must be a whole number ≥ 1, or None"):
        CPOConstrainedConfig(**training_options(tmp_path), tokens_per_step=budget)
