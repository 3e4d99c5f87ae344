"""What a user gets wrong, and the message for it: what was got, what is allowed, what to do next."""

import copy
import re
import warnings

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.cli import main

from helpers.tiny import make_model, pairs_dataset, training_options


@pytest.fixture
def make(tmp_path, tokenizer):
    def build(config=None, **arguments):
        defaults = dict(
            model=make_model(),
            ref_model=make_model(1),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            args=CPOConstrainedConfig(**training_options(tmp_path), **(config or {})),
        )
        return CPOConstrainedTrainer(**{**defaults, **arguments})

    return build


def test_dataset_without_rejected(make):
    with pytest.raises(ValueError) as error:
        make(train_dataset=pairs_dataset().rename_column("rejected", "loser"))
    message = str(error.value)
    assert "train_dataset has no column 'rejected'" in message and "'loser'" in message
    assert "rename_column" in message


def test_evaluation_dataset_without_rejected(make):
    with pytest.raises(ValueError, match=r"eval_dataset\['held_out'\] has no column 'rejected'"):
        make(eval_dataset={"held_out": pairs_dataset().remove_columns("rejected")})


def test_checks_come_before_the_model_is_loaded(make):
    """A model name that does not exist is not even looked at."""
    with pytest.raises(ValueError, match="no column 'chosen' and no column 'rejected'"):
        make(model="nobody/nothing", ref_model=None, train_dataset=Dataset.from_dict({"text": ["a"]}))


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_dataset(make, streaming):
    empty = pairs_dataset().select([])
    if streaming:
        empty = IterableDataset.from_generator(lambda: iter([]))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make(train_dataset=empty)


def test_evaluate_is_checked_as_well(make):
    trainer = make()
    with pytest.raises(ValueError, match="the eval dataset is empty"):
        trainer.evaluate(pairs_dataset().select([]))
    with pytest.raises(ValueError, match="the eval dataset has no column 'rejected'"):
        trainer.evaluate(pairs_dataset().remove_columns("rejected"))


def test_a_whole_datasetdict_as_training_set(make):
    with pytest.raises(TypeError, match="must be a `Dataset` or `IterableDataset`, got `DatasetDict`"):
        make(train_dataset=DatasetDict({"train": pairs_dataset()}))


def test_reference_by_name(make):
    with pytest.raises(TypeError, match="ref_model must be a model, got 'some/name'"):
        make(ref_model="some/name")


def test_reference_vocabulary_is_checked_before_the_reference_runs(make, tmp_path, model_folder):
    args = CPOConstrainedConfig(**training_options(tmp_path, precompute_ref_log_probs=True))
    with pytest.raises(ValueError, match="400 tokens"):
        make(model=model_folder, ref_model=make_model(vocab_size=384), args=args)


def test_dataset_emptied_by_max_length(make, tmp_path):
    with pytest.raises(ValueError) as error:
        make(args=CPOConstrainedConfig(**training_options(tmp_path, max_length=2)))
    assert "max_length=2" in str(error.value) and "larger max_length" in str(error.value)


def test_reference_with_another_vocabulary(make, tmp_path, model_folder):
    other = make_model(vocab_size=384)
    for model in (make_model(), model_folder):
        with pytest.raises(ValueError) as error:
            make(model=model, ref_model=other)
        assert "400 tokens" in str(error.value) and "384" in str(error.value)


def test_tokenizer_without_pad_and_eos(make, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="neither a pad token nor an EOS token.*tokenizer.pad_token ="):
        make(processing_class=bare)


def test_tokenizer_without_eos(make, tokenizer):
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", None
    with pytest.raises(ValueError, match="has no EOS token.*Set tokenizer.eos_token"):
        make(processing_class=tokenizer)
    make(processing_class=tokenizer, train_dataset=pairs_dataset(conversational=True))


def test_tokenizer_without_pad_takes_eos_as_in_trl(make, tokenizer):
    tokenizer.pad_token = None
    assert make(processing_class=tokenizer)._tokenizer.pad_token == tokenizer.eos_token


def test_messages_without_a_chat_template(make, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        make(processing_class=tokenizer, train_dataset=pairs_dataset(conversational=True))


def test_plain_dpoconfig(make, tmp_path):
    with pytest.raises(TypeError, match="args must be a CPOConstrainedConfig, got DPOConfig.*Replace `DPOConfig`"):
        make(args=DPOConfig(**training_options(tmp_path)))


def test_constraint_on_a_plain_dpoconfig(make, tmp_path):
    args = DPOConfig(**training_options(tmp_path))
    args.constraint = "clip"
    with pytest.raises(TypeError, match="Replace `DPOConfig` by `CPOConstrainedConfig`"):
        make(args=args)


def test_no_dataset_is_trls_message(make):
    with pytest.raises(ValueError, match="train_dataset"):
        make(train_dataset=None)


def test_caution_for_inverse_logp_comes_once(make):
    with pytest.warns(UserWarning, match="inverse_logp") as caught:
        make({"constraint": "inverse_logp", "gamma": 0.05, "logps_reduction": "mean"}).train()
    said = [str(w.message) for w in caught if "inverse_logp" in str(w.message)]
    assert len(said) == 1 and "BELOW DPO's" in said[0]


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"constraint": "none", "alpha": 0.5, "tau": 9.0}, "does not use tau=9.0, alpha=0.5"),
        ({"constraint": "clip", "penalty_weight": 3.0}, "does not use penalty_weight=3.0"),
        ({"constraint": "softplus", "alpha": 2.0}, "alpha=2.0 is above 1"),
        (
            {"constraint": "inverse_prob", "logps_reduction": "mean", "gamma": 0.0},
            "gamma=0 makes constraint='inverse_prob' plain DPO",
        ),
        ({"constraint": "penalty", "penalty_weight": 0.0}, "penalty_weight=0 makes"),
    ],
)
def test_options_without_effect_are_said(make, config, expected):
    with pytest.warns(UserWarning, match=re.escape(expected)):
        make(config)


def test_nothing_is_said_where_all_is_well(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make({"constraint": "softplus", "gamma": 0.5, "alpha": 0.25, "tau": 1.0})
    assert not [w for w in caught if issubclass(w.category, UserWarning) and "trl_cpo" in w.filename]


# --- a tokenizer with more tokens than the model ----------------------------------------------------------------------


@pytest.fixture
def grown(tokenizer):
    """The tokenizer with one token more than the model has embeddings."""
    tokenizer.add_tokens(["<note>"])
    assert len(tokenizer) == 401
    return tokenizer


def noted(at, streamed=False):
    rows = list(pairs_dataset())
    rows[at]["rejected"] += "<note>"
    return IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)


@pytest.mark.parametrize("constraint", ["none", "clip"])
def test_a_token_that_the_model_lacks_names_both_sizes_and_the_call(make, grown, constraint):
    with pytest.raises(ValueError, match="Row 7 of the train dataset has the token '<note>' with the id 400.*401 tokens, but"):
        make({"constraint": constraint}, processing_class=grown, train_dataset=noted(7))
    with pytest.raises(ValueError, match=r"embeds 400.*resize_token_embeddings\(401\)"):
        list(make({"constraint": constraint}, processing_class=grown, train_dataset=noted(7, True)).train_dataset)
    trainer = make({"constraint": constraint}, processing_class=grown)  # nothing uses the new token
    with pytest.raises(ValueError, match="Row 2 of the eval dataset"):
        trainer.evaluate(noted(2))


def test_a_pad_token_that_the_model_lacks_is_refused_before_it_is_loaded(make, grown, model_folder):
    grown.pad_token = "<note>"
    with pytest.raises(ValueError, match=r"The pad token '<note>' has the id 400.*resize_token_embeddings\(401\)"):
        make(processing_class=grown, model=model_folder, ref_model=None)


def test_a_resized_model_takes_them(make, grown):
    grown.pad_token = "<note>"
    models = [make_model(seed) for seed in (0, 1)]
    for model in models:
        model.resize_token_embeddings(401)
    make(processing_class=grown, model=models[0], ref_model=models[1], train_dataset=noted(7)).train()


def test_an_audit_says_the_same_before_the_model_is_loaded(tmp_path, grown, capsys):
    for part in (make_model(), grown):
        part.save_pretrained(tmp_path / "grown")
    noted(7).to_json(tmp_path / "pairs.jsonl")
    assert main(["audit", "--model", str(tmp_path / "grown"), "--dataset", str(tmp_path / "pairs.jsonl")]) == 2
    assert "resize_token_embeddings(401)" in capsys.readouterr().err


# --- models that cannot be trained as they are ------------------------------------------------------------------------


def test_a_model_without_a_name_says_what_cannot_be_loaded(make, tmp_path):
    with pytest.raises(ValueError, match=r"made in memory.*ref_model=copy.deepcopy\(model\).*processing_class=tokenizer"):
        make(ref_model=None, processing_class=None)
    with pytest.raises(ValueError, match="made in memory.*copy as its reference") as error:
        make(ref_model=None)
    assert "processing_class" not in str(error.value)
    model = make_model()
    make(model=model, ref_model=copy.deepcopy(model)).train()
    make(ref_model=None, peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    make(ref_model=None, args=CPOConstrainedConfig(**training_options(tmp_path, precompute_ref_log_probs=True)))


@pytest.fixture
def adapter_folder(tmp_path, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_nothing_trainable_is_said_before_training(make, model_folder, adapter_folder):
    frozen = make_model().requires_grad_(False)
    unasked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter_folder)
    for given in ({"model": frozen}, {"model": unasked, "ref_model": None}):
        trainer = make(**given)
        with pytest.raises(ValueError, match="No parameter is trained.*is_trainable=True"):
            trainer.train()
    asked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter_folder, is_trainable=True)
    make(model=asked, ref_model=None).train()


def test_an_adapters_folder_is_no_model_to_train(make, tmp_path, adapter_folder, model_folder, capsys):
    with pytest.raises(ValueError, match=f"is an adapter on {model_folder}, not a model.*merge_and_unload"):
        make(model=adapter_folder, ref_model=None)
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["train", "--model_name_or_path", adapter_folder, "--dataset_name", "demo", *out]) == 2
    assert "merge_and_unload" in capsys.readouterr().err and not (tmp_path / "out").exists()
