"""Pairs with images: a tiny Llava with random weights trains through TRL's own padded path, as DPOTrainer trains it."""

import math

import numpy as np
import pytest
import torch
from constraint_cases import CASES
from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.cli import main

from helpers.checkpoint_runs import StopAt, assert_same_end
from helpers.identity import assert_same_run, check, run
from helpers.tiny import make_lora, make_tokenizer, training_options

pytestmark = pytest.mark.filterwarnings("ignore:constraint=:UserWarning")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def processor():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(processor, seed: int = 0) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    eye = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    vocabulary = len(processor.tokenizer)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **eye).to_dict(),
        text_config=LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, **text).to_dict(),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    model.config._name_or_path = "tiny-llava"
    return model


def pairs(n: int = 8, seed: int = 0) -> Dataset:
    rng, words = np.random.default_rng(seed), ("a red tree", "the sea of stone", "why", "no rain on it")

    def said(role, text):
        return [{"role": role, "content": text}]

    rows = []
    for number in range(n):
        image = Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))
        chosen, rejected = words[number % 4], words[(number + 1 + number % 3) % 4]
        turns = said("user", "what is it"), said("assistant", chosen), said("assistant", rejected)
        rows.append({"images": [image], **dict(zip(("prompt", "chosen", "rejected"), turns, strict=True))})
    return Dataset.from_list(rows)


@pytest.fixture
def build(processor):
    def build(reference: int = 1, **more):
        return dict(
            model=make_model(processor),
            ref_model=make_model(processor, seed=reference),
            processing_class=processor,
            train_dataset=pairs(),
            eval_dataset=pairs(6, seed=5),
            **more,
        )

    return build


def test_the_images_are_seen(tmp_path, processor):
    """Other images give other log-probabilities: the tests below are not of text alone."""
    seen = []
    for seed in (0, 1):
        rows = pairs(2)
        other = pairs(2, seed)
        rows = Dataset.from_list([{**row, "images": image["images"]} for row, image in zip(rows, other, strict=True)])
        trainer = CPOConstrainedTrainer(
            model=make_model(processor),
            ref_model=make_model(processor),
            args=CPOConstrainedConfig(**training_options(tmp_path, max_length=None)),
            processing_class=processor,
            train_dataset=rows,
            eval_dataset=rows,
        )
        seen.append(trainer.evaluate()["eval_logps/chosen"])
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"loss_type": ["ipo"]}], ids=["plain", "two", "ipo"]
)
def test_without_a_constraint_it_is_dpo_trainer(tmp_path, build, options):
    check(tmp_path, build, {"max_length": None, **options})


@pytest.mark.parametrize("name", CASES)
def test_every_form_moves_the_loss_as_its_formula(tmp_path, build, name):
    """The loss of an evaluation is that of the recorded log-probabilities, by plain numbers."""
    form = CASES[name].form
    values = {each: getattr(form, each) for each in form.hyperparameters()} | {"gamma": 6.0}
    values |= {"logps_reduction": "mean"} if name == "inverse_prob" else {}
    args = CPOConstrainedConfig(**training_options(tmp_path, max_length=None, constraint=name, **values))
    trainer = CPOConstrainedTrainer(args=args, **build())
    loss = trainer.evaluate()["eval_loss"]
    logps = trainer.evaluated_pairs["eval"]
    beta = args.beta
    target = args.form.target(logps)
    added = args.form.added_loss(logps, 0.0 if form.dual_rule is None else form.dual_rule.start)
    z = [beta * (gap - t) for gap, t in zip(logps.gap.tolist(), target.tolist(), strict=True)]
    by_pair = [math.log1p(math.exp(-abs(x))) + max(0.0, -x) for x in z]
    if added is not None:
        by_pair = [one + more for one, more in zip(by_pair, added.tolist(), strict=True)]
    # The mean of batches of 4 and 2, each weighed by its pairs, as transformers does.
    assert loss == pytest.approx(sum(by_pair) / len(by_pair), rel=1e-4)
    assert logps.gap.abs().max() > 1e-3


def test_lora_and_the_start_as_reference(tmp_path, processor):
    options = {"max_length": None}

    def build():
        return dict(
            model=make_model(processor),
            processing_class=processor,
            train_dataset=pairs(),
            eval_dataset=pairs(6, seed=5),
            peft_config=make_lora(init_lora_weights=True),
        )

    check(tmp_path, build, options)
    args = ({"constraint": "clip", "gamma": 60.0}, {"constraint": "none"})
    runs = [
        run(CPOConstrainedTrainer, CPOConstrainedConfig, tmp_path / str(n), build, options, each) for n, each in enumerate(args)
    ]
    with pytest.raises(AssertionError):
        assert_same_run(*runs)  # the constraint acts


def test_resumed_is_uninterrupted(tmp_path, processor):
    def trainer_of(folder, stop=None):
        options = dict(
            max_steps=4, save_strategy="steps", save_steps=2, logging_steps=3, max_length=None, constraint="lagrangian"
        )
        torch.manual_seed(0)
        return CPOConstrainedTrainer(
            model=make_model(processor),
            ref_model=make_model(processor),
            args=CPOConstrainedConfig(
                **training_options(folder, gamma=20.0, epsilon=0.1, dual_lr=0.1, dual_max=3.0, **options)
            ),
            processing_class=processor,
            train_dataset=pairs(),
            callbacks=[StopAt(stop)] if stop else [],
        )

    alone = trainer_of(tmp_path / "alone")
    alone.train()
    trainer_of(tmp_path / "resumed", stop=2).train()
    resumed = trainer_of(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, alone)


def test_packing_is_refused_in_words(tmp_path, build):
    args = CPOConstrainedConfig(**training_options(tmp_path, max_length=None, constraint="clip", prefix_sharing=True))
    with pytest.raises(ValueError, match="pixel_values"):
        CPOConstrainedTrainer(args=args, **build()).train()


@pytest.mark.parametrize("option", ["balance_tokens", "tokens_per_step"])
def test_orders_by_length_are_refused_in_words(tmp_path, build, option):
    args = CPOConstrainedConfig(**training_options(tmp_path, max_length=None, **{option: True if option[0] == "b" else 100}))
    with pytest.raises(ValueError, match="one with images"):
        CPOConstrainedTrainer(args=args, **build())


def test_an_audit_says_that_it_reads_text(tmp_path, processor, capsys):
    make_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert main(["audit", "--model", str(tmp_path / "model"), "--dataset", "demo", "--max-pairs", "2"]) == 2
    assert "reads more than text (LlavaProcessor), and only text can be scored" in capsys.readouterr().err


def test_the_price_is_not_measured_and_training_is_as_without(tmp_path, build):
    options = dict(constraint="clip", max_length=None, eval_strategy="steps", eval_steps=3)

    def trained(**price):
        args = CPOConstrainedConfig(**training_options(tmp_path / str(len(price)), **options, **price))
        trainer = CPOConstrainedTrainer(args=args, **build())
        trainer.train()
        return trainer

    with pytest.warns(UserWarning, match="price is not measured: it needs a tokenizer of text, .* a LlavaProcessor"):
        told = trained(price=True)
    assert_same_end(told, trained())


def test_a_limit_on_the_price_is_refused_where_it_cannot_be_measured(tmp_path, build):
    every = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    args = CPOConstrainedConfig(**training_options(tmp_path, constraint="clip", max_length=None, max_kl=0.1, **every))
    with pytest.raises(ValueError, match="max_kl=0.1 would never act: .* a LlavaProcessor. Leave max_kl out"):
        CPOConstrainedTrainer(args=args, **build())
