"""PairMonitor on trainers as TRL and transformers ship them: it sees the right numbers and changes nothing."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer, PairMonitor
from trl_cpo.certificates import certify_run
from trl_cpo.report.reading import read_run

from helpers.tiny import make_lora, make_model, make_tokenizer, pair_rows, pairs_dataset, training_options

OPTIONS = dict(eval_strategy="steps", eval_steps=2, max_steps=3)
LOOK = dict(price_prompts=2, price_tokens=4, price_share=1.0, batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def options_for(output_dir, **changes):
    options = training_options(output_dir, **OPTIONS) | changes
    return options


def dpo(folder, output_dir, **changes):
    peft_config = changes.pop("peft_config", None)
    return DPOTrainer(
        folder,
        args=DPOConfig(**options_for(output_dir, **changes)),
        train_dataset=pairs_dataset(12),
        eval_dataset=pairs_dataset(4, seed=5),
        peft_config=peft_config,
    )


def sft(folder, output_dir, **changes):
    options = options_for(output_dir, **changes)
    del options["beta"]
    text = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in pair_rows(12)])
    return SFTTrainer(folder, args=SFTConfig(**options), train_dataset=text, eval_dataset=text)


def kto(folder, output_dir, **changes):
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": at % 2 == 0} for at, row in enumerate(pair_rows(12))
    ]
    data = Dataset.from_list(rows)
    args = KTOConfig(**options_for(output_dir, **changes))
    return KTOTrainer(folder, args=args, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer())


def orpo(folder, output_dir, **changes):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    args = ORPOConfig(**options_for(output_dir, **changes))
    data = pairs_dataset(12)
    model = make_model()
    return ORPOTrainer(model, args=args, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer())


def plain(folder, output_dir, **changes):
    options = options_for(output_dir, **changes)
    for name in ("beta", "max_length"):
        del options[name]
    tokenizer = make_tokenizer()
    rows = [{"input_ids": tokenizer(row["prompt"] + row["chosen"])["input_ids"]} for row in pair_rows(12)]
    return Trainer(
        make_model(),
        args=TrainingArguments(**options),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def ours(folder, output_dir, **changes):
    return CPOConstrainedTrainer(
        folder,
        args=CPOConstrainedConfig(**options_for(output_dir, constraint="clip", gamma=1.0, **changes)),
        train_dataset=pairs_dataset(12),
        eval_dataset=pairs_dataset(4, seed=5),
    )


TRAINERS = {"dpo": dpo, "sft": sft, "kto": kto, "orpo": orpo, "transformers": plain, "ours": ours}


@pytest.mark.parametrize("name", TRAINERS)
def test_any_trainer(name, folder, tmp_path):
    """The run folder is read by report and certify; the training is the one without a monitor, bit for bit."""
    alone = TRAINERS[name](folder, tmp_path / "alone")
    alone.train()
    watched = TRAINERS[name](folder, tmp_path / "watched")
    watched.add_callback(PairMonitor(watched, pairs_dataset(10, seed=4), gamma=0.5, **LOOK))
    watched.train()
    weights = dict(alone.model.named_parameters())
    assert all(torch.equal(weight, weights[key]) for key, weight in watched.model.named_parameters())
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (alone, watched)]
    assert losses[0] == losses[1]
    logged = [log for log in watched.state.log_history if "eval_pairs_cpo/gap" in log]
    assert [log["step"] for log in logged] == [0, 2, 3] and all("eval_pairs_cpo/kl" in log for log in logged)

    run = read_run(tmp_path / "watched" / "pairs")
    assert not [note for note in run.notes if "missing" in note or "cannot" in note], run.notes
    assert len(run.held_out.rows if hasattr(run.held_out, "rows") else run.held_out.gap) == 10
    metrics = json.loads((tmp_path / "watched" / "pairs" / "metrics.json").read_text())
    assert metrics["before"]["eval_cpo/kl"] == 0 < metrics["after"]["eval_cpo/kl"]
    assert metrics["after"]["eval_cpo/gap"] == logged[-1]["eval_pairs_cpo/gap"]
    assert [each["step"] for each in json.loads((tmp_path / "watched/pairs/price.json").read_text())["measurements"]] == [
        0,
        2,
        3,
    ]
    assert certify_run(tmp_path / "watched" / "pairs")["evidence"]["numbers"]["pairs"] == 10


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_numbers_are_those_that_our_trainer_logs(folder, tmp_path, reduction, lora):
    held_out = pairs_dataset(10, seed=4)
    trainer = CPOConstrainedTrainer(
        folder,
        args=CPOConstrainedConfig(**training_options(tmp_path, gamma=0.5, logps_reduction=reduction, constraint="penalty")),
        train_dataset=pairs_dataset(12),
        eval_dataset=held_out,
        peft_config=make_lora(init_lora_weights=True) if lora else None,
    )
    trainer.add_callback(PairMonitor(trainer, held_out, price=False, batch_size=3))
    trainer.train()
    own = trainer.evaluate()
    seen = next(log for log in reversed(trainer.state.log_history) if "eval_pairs_cpo/gap" in log)
    for name, value in seen.items():
        if name.startswith("eval_pairs_cpo/"):
            assert value == pytest.approx(own[name.replace("eval_pairs_", "eval_")], rel=1e-4, abs=1e-4), name
    assert own["eval_cpo/gap"] != own["eval_cpo/ref_gap"]


def test_a_resumed_training_is_measured_from_its_start(folder, tmp_path):
    changes = dict(save_strategy="steps", save_steps=2)
    whole = dpo(folder, tmp_path / "whole", **changes)
    whole.add_callback(PairMonitor(whole, pairs_dataset(6, seed=4), **LOOK))
    whole.train()
    resumed = dpo(folder, tmp_path / "whole", **changes)
    resumed.add_callback(PairMonitor(resumed, pairs_dataset(6, seed=4), folder=tmp_path / "again", **LOOK))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    last = [next(log for log in reversed(each.state.log_history) if "eval_pairs_cpo/kl" in log) for each in (whole, resumed)]
    for name in ("gap", "ref_gap", "kl"):
        assert last[0][f"eval_pairs_cpo/{name}"] == pytest.approx(last[1][f"eval_pairs_cpo/{name}"], rel=1e-3)


def test_a_second_run_gets_a_folder_of_its_own(folder, tmp_path):
    for _ in range(2):
        trainer = dpo(folder, tmp_path)
        trainer.add_callback(PairMonitor(trainer, pairs_dataset(4, seed=4), price=False))
        trainer.train()
    assert (tmp_path / "pairs" / "metrics.json").exists() and (tmp_path / "pairs-2" / "metrics.json").exists()


def test_pairs_from_a_file(folder, tmp_path):
    file = tmp_path / "held-out.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in pair_rows(5, seed=4)))
    trainer = dpo(folder, tmp_path)
    trainer.add_callback(PairMonitor(trainer, file, split="train", max_pairs=3, price=False))
    trainer.train()
    assert json.loads((tmp_path / "pairs" / "metrics.json").read_text())["held_out_pairs"] == 3


def test_a_model_that_cannot_be_scored_is_trained_all_the_same(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    rows = [{"input_ids": [5, 6, 7], "labels": at % 2} for at in range(8)]
    options = options_for(tmp_path, eval_strategy="no")
    for name in ("beta", "max_length"):
        del options[name]
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=2
        )
    )
    trainer = Trainer(model, args=TrainingArguments(**options), train_dataset=Dataset.from_list(rows))
    with pytest.warns(UserWarning, match="scores no pairs: LlamaForSequenceClassification"):
        trainer.add_callback(PairMonitor(trainer, pairs_dataset(4)))
    trainer.train()
    assert trainer.state.global_step == 3 and not (tmp_path / "pairs").exists()


@pytest.mark.parametrize(
    ("option", "words"), [({"gamma": -1.0}, "gamma must be"), ({"logps_reduction": "max"}, "must be one of")]
)
def test_options_are_checked(folder, tmp_path, option, words):
    with pytest.raises(ValueError, match=words):
        PairMonitor(dpo(folder, tmp_path), pairs_dataset(4), **option)
