"""The price in a trainer's evaluations: it disturbs nothing, ends nothing, and holds its limit."""

import json
import os

import pytest
import torch
from transformers import EarlyStoppingCallback

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.price import meter_of
from trl_cpo.price.meter import PriceMeter
from trl_cpo.price.questions import gather_questions, general_prompts, spread

from helpers.tiny import make_lora, make_model, make_tokenizer, pairs_dataset, training_options

EVERY_STEP = dict(eval_strategy="steps", eval_steps=1, eval_on_start=True)
CHECKPOINTS = dict(save_strategy="steps", save_steps=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def trainer_of(folder, output_dir, *, peft_config=None, ref_model=None, callbacks=None, tokenizer=None, pairs=None, **options):
    options = dict(constraint="clip", price_prompts=4, price_tokens=8, price_share=1.0, narrate=False) | options
    return CPOConstrainedTrainer(
        folder,
        ref_model=ref_model,
        args=CPOConstrainedConfig(**training_options(output_dir, **options)),
        train_dataset=pairs_dataset(12),
        eval_dataset=pairs_dataset(6, seed=4) if pairs is None else pairs,
        peft_config=peft_config,
        callbacks=callbacks,
        processing_class=tokenizer,
    )


def prices(trainer, name="eval_cpo/kl_general"):
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precomputed", [False, True])
def test_a_run_with_it_ends_where_one_without_does(folder, tmp_path, lora, precomputed):
    """Bit for bit: weights, losses, random states. With dropout, so that a moved random state would show."""
    runs = []
    for price in (False, True):
        adapter = make_lora(init_lora_weights=True, lora_dropout=0.2) if lora else None
        options = dict(precompute_ref_log_probs=precomputed, price=price, **EVERY_STEP)
        trainer = trainer_of(folder, tmp_path / str(price), peft_config=adapter, **options)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        runs.append((dict(trainer.model.named_parameters()), losses, torch.get_rng_state()))
    assert list(prices(trainer)) == [0, 1, 2, 3]
    assert prices(trainer)[0] < 1e-6 < prices(trainer)[3]
    assert runs[0][1] == runs[1][1] and torch.equal(runs[0][2], runs[1][2])
    assert all(torch.equal(weight, runs[1][0][name]) for name, weight in runs[0][0].items())


def test_every_way_to_the_reference_gives_the_same_price(folder, tmp_path):
    """TRL's own reference model, one given, and the start kept beside a precomputed reference."""
    found = []
    for name, options in {
        "own": {},
        "given": {"ref_model": make_model()},
        "precomputed": {"precompute_ref_log_probs": True},
    }.items():
        trainer = trainer_of(folder, tmp_path / name, price=True, **options)
        trainer.train()
        price = trainer.price.meter.measure(3)
        found.append((price.metrics(), trainer.price.meter.before["general"].repetition))
    for metrics, before in found[1:]:
        assert before == found[0][1]
        assert metrics == pytest.approx(found[0][0], rel=1e-4)
    assert found[0][0]["cpo/kl"] > 1e-3


def test_a_quantized_model(folder, tmp_path):
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    trainer = CPOConstrainedTrainer(
        folder,
        args=CPOConstrainedConfig(**training_options(tmp_path, price=True, price_prompts=2, price_tokens=4, narrate=False)),
        train_dataset=pairs_dataset(12),
        eval_dataset=pairs_dataset(4, seed=4),
        quantization_config=quantization,
        peft_config=make_lora(init_lora_weights=True),
    )
    assert trainer.evaluate()["eval_cpo/kl"] == 0
    trainer.train()
    assert trainer.evaluate()["eval_cpo/kl"] > 0


def test_one_of_several_sets_is_measured(folder, tmp_path):
    sets = {"b": pairs_dataset(6, seed=4), "a": pairs_dataset(6, seed=5)}
    found = trainer_of(folder, tmp_path, price=True, pairs=sets).evaluate()
    assert "eval_b_cpo/kl" in found and "eval_a_cpo/kl" not in found


def test_the_file_holds_every_measurement_and_survives_a_resume(folder, tmp_path):
    options = dict(price=True, **EVERY_STEP, **CHECKPOINTS)
    trainer_of(folder, tmp_path, **options, max_steps=2).train()
    resumed = trainer_of(folder, tmp_path, **options, max_steps=3)
    with pytest.warns(UserWarning, match="max_steps was 2 and is 3"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    document = json.loads((tmp_path / "price.json").read_text())
    assert document["format"] == 1 and [each["step"] for each in document["measurements"]] == [0, 1, 2, 3]
    last = document["measurements"][-1]
    assert last["sets"]["general"]["kl"]["value"] == prices(resumed)[3]
    assert last["sets"]["pairs"]["samples"][0].keys() == {"prompt", "greedy"} and last["nll"].keys() == {"chosen"}
    # The reference of a resumed run is the start, and not the checkpoint.
    straight = trainer_of(folder, tmp_path / "straight", **options, max_steps=3)
    straight.train()
    assert prices(straight)[3] == prices(resumed)[3]
    assert straight.price.meter.before == resumed.price.meter.before


def test_another_runs_file_is_moved_aside(folder, tmp_path):
    (tmp_path / "price.json").write_text("mine")
    trainer_of(folder, tmp_path, price=True).evaluate()
    assert (tmp_path / "earlier-price.json").read_text() == "mine"
    assert json.loads((tmp_path / "price.json").read_text())["measurements"]


def test_the_middle_of_training_goes_without_where_time_is_short(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, price=True, price_share=0.0, **EVERY_STEP)
    trainer.train()
    assert list(prices(trainer)) == [0]
    assert "eval_cpo/kl" in trainer.evaluate()


# The limit


def test_beyond_the_limit_training_stops_and_the_last_checkpoint_within_is_kept(folder, tmp_path, capsys):
    free = trainer_of(folder, tmp_path / "free", price=True, max_steps=6, **EVERY_STEP)
    free.train()
    kls = prices(free)
    assert kls[1] < kls[2] < kls[3], "this run must drift for the rest to say something"
    options = dict(max_kl=(kls[2] + kls[3]) / 2, max_steps=6, save_total_limit=1, **EVERY_STEP, **CHECKPOINTS)
    held = trainer_of(folder, tmp_path / "held", **options)
    held.train()
    assert held.state.global_step == 3
    assert os.path.basename(held.state.best_model_checkpoint) == "checkpoint-2"
    assert held.evaluate()["eval_cpo/kl_general"] == kls[2]
    assert "beyond max_kl" in capsys.readouterr().out
    # Resumed, the run is over, and the same model is kept.
    again = trainer_of(folder, tmp_path / "held", **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert again.evaluate()["eval_cpo/kl_general"] == kls[2]


def test_within_the_limit_nothing_changes(folder, tmp_path):
    free = trainer_of(folder, tmp_path / "free", price=True, **EVERY_STEP)
    free.train()
    held = trainer_of(folder, tmp_path / "held", max_kl=100.0, **EVERY_STEP, **CHECKPOINTS)
    held.train()
    assert held.state.global_step == 3 and prices(held) == prices(free)
    assert os.path.basename(held.state.best_model_checkpoint) == "checkpoint-3"


def test_the_best_checkpoint_by_a_metric_is_one_within_the_limit(folder, tmp_path):
    """The gap grows while KL does: by the gap alone the last checkpoint is best, within the limit an earlier one."""
    free = trainer_of(folder, tmp_path / "free", price=True, max_steps=5, **EVERY_STEP)
    free.train()
    kls, losses = prices(free), prices(free, "eval_loss")
    best = min((step for step in (1, 2)), key=losses.get)
    assert losses[3] < losses[best], "without the limit a later checkpoint would be best"
    held = trainer_of(
        folder,
        tmp_path / "held",
        max_kl=(kls[2] + kls[3]) / 2,
        max_steps=5,
        metric_for_best_model="eval_loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=5)],
        **EVERY_STEP,
        **CHECKPOINTS,
    )
    held.train()
    assert os.path.basename(held.state.best_model_checkpoint) == f"checkpoint-{best}"
    assert held.evaluate()["eval_loss"] == pytest.approx(losses[best])


def test_a_limit_passed_at_once_is_told(folder, tmp_path, capsys):
    held = trainer_of(folder, tmp_path, max_kl=1e-6, **EVERY_STEP, **CHECKPOINTS)
    held.train()
    assert held.state.global_step == 1
    assert "no checkpoint was within it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(max_kl=0.1), "eval_strategy and save_strategy alike"),
        (dict(max_kl=0.1, eval_strategy="steps", save_strategy="epoch"), "eval_strategy and save_strategy alike"),
        (dict(max_kl=-1.0, **EVERY_STEP, **CHECKPOINTS), "max_kl must be a finite number > 0"),
        (dict(max_kl=True, **EVERY_STEP, **CHECKPOINTS), "max_kl must be a finite number > 0"),
        (dict(price_prompts=0), "price_prompts must be a whole number ≥ 1"),
        (dict(price_tokens=2.5), "price_tokens must be a whole number ≥ 1"),
        (dict(price_share=1.5), "price_share must be a number from 0 to 1"),
        (dict(price="yes"), "price must be"),
        (dict(price_text=3), "price_text must be the path"),
    ],
)
def test_options_are_checked(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        CPOConstrainedConfig(**training_options(tmp_path, **options))


# What fails ends nothing


def questions(tokenizer=None, **changes):
    rows = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 2]}, {"prompt_ids": [9] * 30, "chosen_ids": [8, 2]}]
    given = dict(pairs=rows, prompts=4, room=512, max_new_tokens=8) | changes
    return gather_questions(make_tokenizer() if tokenizer is None else tokenizer, **given)


def test_questions():
    found = questions()
    assert found.prompts["pairs"] == [[5, 6, 7], [9] * 30] and len(found.prompts["general"]) == 4
    assert found.texts == {"chosen": [([5, 6, 7], [8, 2]), ([9] * 30, [8, 2])]} and not found.missing
    assert len(set(general_prompts())) == len(general_prompts()) == 24
    assert spread(list(range(10)), 4) == [0, 3, 6, 9] and spread([1], 4) == [1] and spread([1, 2, 3], 1) == [1]


def test_a_prompt_that_several_pairs_share_is_asked_once():
    assert questions(pairs=[{"prompt_ids": [5], "chosen_ids": [8]}] * 3).prompts["pairs"] == [[5]]


def test_questions_that_cannot_be_had_are_named():
    assert list(questions(room=20).prompts["pairs"]) == [[5, 6, 7]]
    found = questions(room=9)
    assert "pairs" not in found.prompts and "none of 2 leaves room for 8 tokens" in found.missing[0]
    assert "general" not in found.prompts and "general prompts" in found.missing[1]
    assert "there are no held-out pairs" in questions(pairs=None).missing[0]
    assert "could not be read" in questions(pairs=[{"prompt": 1}, None]).missing[0]
    broken = make_tokenizer()
    broken.chat_template = "{{ raise_exception('system first') }}"
    assert "system first" in questions(broken).missing[0] and "pairs" in questions(broken).prompts
    plain = make_tokenizer()
    plain.chat_template = None
    assert len(questions(plain).prompts["general"]) == 4 and not questions(plain).missing


def test_a_text_of_the_users(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the red fox runs over the hills " * 100)
    found = questions(text=text)
    assert all(len(given) == 1 and 0 < len(said) <= 255 for given, said in found.texts["text"])
    assert "not measured" in questions(text=tmp_path / "none.txt").missing[0]
    text.write_bytes(b"\xff\xfe\xff")
    assert "not measured" in questions(text=text).missing[0]


def test_the_likelihood_of_a_text_is_followed(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the red fox runs over the hills " * 20)
    trainer = trainer_of(folder, tmp_path / "run", price=True, price_text=str(text))
    nll = trainer.evaluate()["eval_cpo/text_nll"]
    ids = torch.tensor([make_tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"]])[:, :256]
    with torch.no_grad():
        assert nll == pytest.approx(float(make_model()(ids, labels=ids).loss), rel=1e-4)


def test_a_failing_generation_ends_no_training(folder, tmp_path, monkeypatch):
    trainer = trainer_of(folder, tmp_path, price=True, **EVERY_STEP)

    def generate(*_, **__):
        raise RuntimeError("no more memory\nsecond line")

    monkeypatch.setattr(trainer.model, "generate", generate)
    with pytest.warns(UserWarning, match="not measured") as told:
        trainer.train()
    sentences = [str(each.message) for each in told if "not measured" in str(each.message)]
    assert sentences == [
        f"Answers to the {name} prompts were not measured: RuntimeError: no more memory" for name in ("pairs", "general")
    ]
    assert trainer.state.global_step == 3 and not prices(trainer)
    assert list(prices(trainer, "eval_cpo/chosen_nll")) == [0, 1, 2, 3]


def test_without_an_end_token(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, price=True)
    trainer.processing_class.eos_token = None
    trainer.model.generation_config.eos_token_id = None
    found = trainer.evaluate()
    assert found["eval_cpo/answers_ended"] == 0 and found["eval_cpo/answer_tokens"] == 8


@pytest.mark.parametrize("kind", ["ZeRO-3", "FSDP"])
def test_a_sharded_model_is_not_measured_and_said_so(folder, tmp_path, monkeypatch, kind):
    trainer = trainer_of(folder, tmp_path)
    if kind == "FSDP":
        trainer.is_fsdp_enabled = True
    else:
        state = type(trainer.accelerator.state)
        monkeypatch.setattr(state, "deepspeed_plugin", property(lambda _: type("Plugin", (), {"zero_stage": 3})()))
    meter = meter_of(trainer, pairs=None)
    assert f"not measured under {kind}" in meter.unable
    price = meter.measure(7)
    assert price.missing == [meter.unable] and price.metrics() == {} and price.step == 7


def test_a_processor_of_images_is_told(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path)
    trainer.processing_class = object()
    assert "needs a tokenizer of text" in meter_of(trainer, pairs=None).unable


def test_measuring_twice_gives_the_same(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, price=True)
    trainer.train()
    first, second = trainer.price.meter.measure(3), trainer.price.meter.measure(3)
    assert first.metrics() == second.metrics() and first.sets == second.sets


def test_a_meter_needs_no_trainer():
    model, tokenizer = make_model().eval(), make_tokenizer()
    meter = PriceMeter(model, tokenizer, questions(tokenizer), reference=make_model(1).eval(), max_new_tokens=8)
    price = meter.measure(0)
    assert price.sets["pairs"].kl.value > 0.1 and meter.before["pairs"].kl.value == 0
