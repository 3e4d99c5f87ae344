"""The log-probabilities of every evaluated pair: the trainer's, in dataset order, and pairs.json made of them."""

import json
import math

import pytest
import torch

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.files.atomic import write_json
from trl_cpo.files.run_files import PAIR_COLUMNS
from trl_cpo.pairs import PairLogps
from trl_cpo.run.record import pairs_document

from helpers.by_hand import make_trainer, pairs_by_hand
from helpers.tiny import pairs_dataset, training_options

# tests/data/test_validation.py tests the warnings about unused hyperparameters.
pytestmark = pytest.mark.filterwarnings("ignore:constraint=:UserWarning")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_every_pair_once_in_the_order_of_the_set(tmp_path, tokenizer, model_folder, ref_model_folder, reduction):
    """6 pairs in batches of 4; log-probabilities by hand, from logits in float64."""
    trainer = make_trainer(
        tmp_path, tokenizer, model_folder, ref_model_folder, constraint="clip", gamma=1.0, logps_reduction=reduction
    )
    assert trainer.evaluated_pairs == {}
    logged = trainer.evaluate()
    expected = [pair for batch in trainer.get_eval_dataloader() for pair in pairs_by_hand(trainer, batch)]
    got = trainer.evaluated_pairs["eval"]
    assert torch.tensor(expected, dtype=torch.float64).allclose(got.rows().double(), atol=1e-4) and len(got.gap) == 6
    assert got.gap.mean().item() == pytest.approx(logged["eval_cpo/gap"], abs=1e-4)
    assert all(not t.requires_grad and t.device.type == "cpu" for t in (got.policy_chosen, got.ref_rejected))


def test_several_sets_and_the_latest_evaluation(tmp_path, tokenizer, model_folder, ref_model_folder):
    trainer = make_trainer(tmp_path, tokenizer, model_folder, ref_model_folder, constraint="none")
    trainer.evaluate({"a": pairs_dataset(3, seed=1), "b": pairs_dataset(5, seed=2)})
    first = dict(trainer.evaluated_pairs)
    assert {name: len(pairs.gap) for name, pairs in first.items()} == {"eval_a": 3, "eval_b": 5}
    trainer.train()
    trainer.evaluate({"a": pairs_dataset(3, seed=1)})
    after = trainer.evaluated_pairs
    assert torch.equal(after["eval_a"].ref_chosen, first["eval_a"].ref_chosen)
    assert not torch.equal(after["eval_a"].policy_chosen, first["eval_a"].policy_chosen)
    assert after["eval_b"] is first["eval_b"]


def test_neither_training_nor_what_an_evaluation_left_is_among_them(tmp_path, tokenizer, model_folder, ref_model_folder):
    trainer = make_trainer(tmp_path, tokenizer, model_folder, ref_model_folder, constraint="clip")
    trainer.train()
    assert trainer.evaluated_pairs == {}
    trainer.model.eval()
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    trainer.evaluate()
    assert len(trainer.evaluated_pairs["eval"].gap) == 6


def test_rows_there_and_back():
    columns = [torch.randn(5) for _ in range(4)]
    pairs = PairLogps(*columns)
    back = PairLogps.from_rows(pairs.rows())
    assert pairs.rows().shape == (5, 4)
    for name, column in zip(("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"), columns, strict=True):
        assert torch.equal(getattr(back, name), column)


@pytest.mark.parametrize("start_is_reference", [True, False])
def test_the_document(tmp_path, start_is_reference):
    pairs = PairLogps(*torch.tensor([[-1.0, -2.0], [-3.0, math.nan], [-5.0, -6.0], [-7.0, -8.0]]))
    document = pairs_document(
        pairs,
        reduction="mean",
        gamma=0.5,
        beta=2.5,
        constraint="softplus",
        split="test",
        start_is_reference=start_is_reference,
    )
    write_json(tmp_path / "pairs.json", document)
    read = json.loads((tmp_path / "pairs.json").read_text())
    start = [[-5.0, -7.0], [-6.0, -8.0]] if start_is_reference else [[None, None]] * 2
    assert read == {
        "reduction": "mean",
        "gamma": 0.5,
        "beta": 2.5,
        "constraint": "softplus",
        "split": "test",
        "columns": list(PAIR_COLUMNS),
        "rows": [[-1.0, -3.0, -5.0, -7.0, *start[0]], [-2.0, None, -6.0, -8.0, *start[1]]],
    }


def test_an_evaluation_is_whole_though_training_drops_its_last_batch(tmp_path, tokenizer, model_folder):
    """`dataloader_drop_last` is about training: 3 of 5 pairs would be left out, or all of 3 without a word."""
    args = CPOConstrainedConfig(
        **training_options(tmp_path, dataloader_drop_last=True, max_steps=2, eval_strategy="steps", eval_steps=1),
        constraint="clip",
    )
    trainer = CPOConstrainedTrainer(
        model=model_folder,
        args=args,
        processing_class=tokenizer,
        train_dataset=pairs_dataset(7),
        eval_dataset=pairs_dataset(6, seed=5),
    )
    assert len(trainer.get_train_dataloader()) == 1  # the last batch of training is dropped, as asked
    trainer.train()
    assert trainer.evaluate()["eval_cpo/pairs"] == 6
    assert trainer.evaluate(pairs_dataset(3, seed=6))["eval_cpo/pairs"] == 3
    assert args.dataloader_drop_last
