"""Bad data in the middle of a run: NaN, answers that are equal or gone after truncation. Never silent, one behaviour each."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.data_utils import is_conversational
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo._trl.datasets import without_padding
from trl_cpo.data import validation as checks
from trl_cpo.data.spans import visible_span
from trl_cpo.engine import guards
from trl_cpo.pairs import PairLogps, degenerate_pairs
from trl_cpo.scoring.scorer import ROW, Scorer

from helpers.tiny import make_model, pair_rows, pairs_dataset, training_options

UNSEEN = 399  # a token that stands in no pair of `pairs_dataset`
BETA = 0.5


def broken_at_one_token(seed=0):
    """A model whose numbers are NaN for any text with the token UNSEEN, and right for all others."""
    model = make_model(seed, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[UNSEEN] = float("nan")
    return model


@pytest.fixture
def make(tmp_path, tokenizer):
    def build(options=None, **arguments):
        args = CPOConstrainedConfig(**training_options(tmp_path / "out", **{"beta": BETA, **(options or {})}))
        defaults = dict(
            model=make_model(tie_word_embeddings=False),
            ref_model=make_model(1, tie_word_embeddings=False),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(12),
        )
        return CPOConstrainedTrainer(args=args, **{**defaults, **arguments})

    return build


def batch_of(trainer, rows=4):
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return trainer.data_collator([{n: trainer.train_dataset[i][n] for n in names} for i in range(rows)])


class AtStep(TrainerCallback):
    """Does something to the model when a step has been made."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.do(model)


def poison(model):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


def test_a_policy_without_numbers_stops_the_run_with_step_pairs_and_causes(make):
    """With `logging_nan_inf_filter`, the default, DPOTrainer would go on and log losses that look right."""
    trainer = make({"max_steps": 6}, callbacks=[AtStep(2, poison)])
    assert trainer.args.logging_nan_inf_filter
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert trainer.state.global_step == 2
    message = str(error.value)
    assert message.startswith("Step 3: log-probabilities are NaN or infinite for pair 0 of the micro-batch of process 0")
    assert "the policy's" in message and "the reference's" not in message and "learning_rate" in message
    first = trainer.processing_class.decode(trainer.train_dataset[0]["prompt_ids"][:4])
    assert any(row["prompt"][:6] in message for row in pair_rows(12)), (message, first)


def test_dpo_trainer_itself_goes_on_and_logs_numbers(tmp_path, tokenizer):
    """What the stop is for: the day this fails, DPOTrainer has learned it."""
    args = DPOConfig(**training_options(tmp_path, max_steps=4, logging_steps=2))
    trainer = DPOTrainer(
        model=make_model(),
        ref_model=make_model(1),
        args=args,
        processing_class=tokenizer,
        train_dataset=pairs_dataset(12),
        callbacks=[AtStep(3, poison)],
    )
    trainer.train()
    losses = [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2 and all(loss == loss for loss in losses)


def test_a_reference_without_numbers_for_one_pair_is_refused_with_its_text(make):
    trainer = make(ref_model=broken_at_one_token())
    batch = batch_of(trainer)
    batch["input_ids"][[2, 6], 1] = UNSEEN
    trainer.model.train()
    with pytest.raises(FloatingPointError) as error:
        trainer.compute_loss(trainer.model, batch)
    message = str(error.value)
    assert "pair 2 of the micro-batch of process 0 (the reference's, " in message and "; pair" not in message
    assert "remove these pairs" in message
    text = trainer.processing_class.decode(batch["input_ids"][2][:6].tolist())
    assert text in message


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_bad_numbers_in_any_micro_batch_stop_the_run_before_its_step(make, bad):
    """The micro-batches of a step are looked at together, at its end."""
    trainer = make(
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 2}, ref_model=broken_at_one_token()
    )
    calls, compute = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        calls.append(len(calls))
        if len(calls) == 3 + bad + 1:  # in the second step
            inputs["input_ids"][[1, 3], 0] = UNSEEN
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    with pytest.raises(
        FloatingPointError, match="^Step 2: log-probabilities are NaN or infinite for pair 1 of the micro-batch"
    ):
        trainer.train()
    assert trainer.state.global_step == 1 and len(calls) == 6


def test_an_evaluation_counts_pairs_without_numbers_and_leaves_them_out(make):
    """Nothing is learned from an evaluation, so it does not end a run; transformers drops such losses without a word."""
    trainer = make({"constraint": "clip", "per_device_eval_batch_size": 2}, model=broken_at_one_token())
    batch = batch_of(trainer, 6)
    rows = [
        {
            "prompt_ids": ids[:2].tolist() if i != 1 else [UNSEEN, 5],
            "chosen_ids": ids[2:8].tolist(),
            "rejected_ids": ids[3:7].tolist(),
        }
        for i, ids in enumerate(batch["input_ids"][:6])
    ]
    means = {}
    for name, kept in (("all", rows), ("sound", rows[:1] + rows[2:])):
        trainer.eval_dataset = Dataset.from_list(kept)
        means[name] = trainer.evaluate()
    assert means["all"]["eval_cpo/nonfinite_pairs"] == 1 and means["all"]["eval_cpo/pairs"] == 5
    assert "eval_cpo/nonfinite_pairs" not in means["sound"]
    for metric in ("gap", "target", "violation", "chosen_logps_shift"):
        key = f"eval_cpo/{metric}"
        assert means["all"][key] == pytest.approx(means["sound"][key], rel=1e-5)
    assert len(trainer.evaluated_pairs["eval"].policy_chosen) == 5


def test_a_gradient_without_numbers_is_never_saved(make, tmp_path):
    """Its loss was finite, and no batch has been through the weights that it broke."""
    trainer = make({"max_steps": 4, "save_strategy": "steps", "save_steps": 1})
    trainer.add_callback(AtStep(1, lambda model: next(model.parameters()).register_hook(lambda g: g * float("nan"))))
    with pytest.raises(FloatingPointError, match="After step 2 trained weights are NaN or infinite.*Nothing was saved"):
        trainer.train()
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1"]


@pytest.mark.parametrize("more", [{}, {"eval_strategy": "epoch"}], ids=["at the end", "put off until after the evaluation"])
def test_a_gradient_without_numbers_is_not_saved_at_the_end_of_an_epoch(make, tmp_path, more):
    """There the saving is asked for when the step's own callbacks have run."""
    given = {"max_steps": -1, "num_train_epochs": 4, "per_device_train_batch_size": 12, "save_strategy": "epoch", **more}
    trainer = make(given, eval_dataset=pairs_dataset(4) if more else None)
    trainer.add_callback(AtStep(1, lambda model: next(model.parameters()).register_hook(lambda g: g * float("nan"))))
    with pytest.raises(FloatingPointError, match="After step 2 trained weights are NaN or infinite.*Nothing was saved"):
        trainer.train()
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1"]


def test_a_gradient_without_numbers_in_the_last_step_is_not_given_out(make):
    trainer = make({"max_steps": 1})
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="After step 1 trained weights"):
        trainer.train()


def test_a_loss_that_overflows_by_itself_is_named(make):
    trainer = make({"loss_type": "discopop", "beta": 1e4})
    trainer.model.train()
    with pytest.raises(FloatingPointError, match=r"The loss of step 1 is not finite \(.*\), though every log-probability is"):
        trainer.compute_loss(trainer.model, batch_of(trainer))


def test_float16_leaves_a_few_to_the_loss_scaler_and_counts_them(make, monkeypatch):
    trainer = make({"constraint": "clip"}, model=broken_at_one_token())
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
    trainer.model.train()
    batch = batch_of(trainer)
    batch["input_ids"][[0, 4], 1] = UNSEEN
    for _ in range(guards.FLOAT16_PATIENCE - 1):
        assert trainer.compute_loss(trainer.model, batch).isnan()
    trainer.compute_loss(trainer.model, batch_of(trainer))
    logged = trainer._ledgers["train"].flush()
    assert logged["cpo/nonfinite_pairs"] == guards.FLOAT16_PATIENCE - 1
    assert all(value == value for value in logged.values())
    for _ in range(guards.FLOAT16_PATIENCE - 1):
        trainer.compute_loss(trainer.model, batch)
    with pytest.raises(FloatingPointError, match="Step 1"):
        trainer.compute_loss(trainer.model, batch)


def test_float16_leaves_nothing_of_the_reference_to_the_loss_scaler(make, monkeypatch):
    """It never changes: what it lacks now it lacks in every step."""
    trainer = make({"constraint": "clip"}, ref_model=broken_at_one_token(1))
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
    trainer.model.train()
    batch = batch_of(trainer)
    batch["input_ids"][[0, 4], 1] = UNSEEN
    with pytest.raises(FloatingPointError, match="Step 1: .*the reference's.*The reference never changes"):
        trainer.compute_loss(trainer.model, batch)


class Sharded(torch.Tensor):
    """A stand-in for a DTensor: what this process holds of it is had by `to_local`."""

    def detach(self):
        return self

    def to_local(self):
        return self.part


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("kind", ["ZeRO-3", "FSDP2"])
def test_of_sharded_weights_the_part_held_here_is_looked_at(kind, broken):
    """ZeRO-3 keeps it in `ds_tensor` and leaves the parameter empty; FSDP2's is behind `to_local`."""
    model = torch.nn.Linear(2, 2, bias=False)
    part = torch.tensor([1.0, float("nan") if broken else 2.0])
    if kind == "ZeRO-3":
        model.weight.data = torch.empty(0)
        model.weight.ds_tensor = part
    else:
        weight = torch.zeros(2, 2).as_subclass(Sharded)
        weight.part = part
        model.weight = torch.nn.Parameter(weight)
    look = guards.FiniteWeights(lambda tensor: tensor, torch.device("cpu")).before_saving
    if not broken:
        return look(model, 3)
    with pytest.raises(FloatingPointError, match="After step 3 trained weights are NaN"):
        look(model, 3)


# --- pairs that compare nothing ---------------------------------------------------------------------------------------


def collated(rows, max_length, keep):
    """What TRL's own collator makes of token ids."""
    return DataCollatorForPreference(pad_token_id=2, max_length=max_length, truncation_mode=keep)(rows)


ids = st.lists(st.integers(2, 4), max_size=5)
rows = st.lists(st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}), min_size=1, max_size=6)


@settings(max_examples=120, deadline=None)
@given(rows=rows, max_length=st.none() | st.integers(1, 8), keep=st.sampled_from(["keep_start", "keep_end"]))
def test_preparation_and_batch_agree_on_what_compares_nothing(rows, max_length, keep):
    """What is counted beforehand from token ids is what the collated, truncated and padded batch shows."""
    if not any(row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"] for row in rows):
        return  # TRL's collator makes float tensors of nothing
    batch = collated(rows, max_length, keep)
    by_batch = degenerate_pairs(batch["input_ids"], batch["completion_mask"]).tolist()
    found = checks.degenerate_rows(Dataset.from_list(rows), max_length, keep)
    assert not set(found["same answers"]) & set(found["nothing scored"])
    assert sorted(found["same answers"] + found["nothing scored"]) == [i for i, bad in enumerate(by_batch) if bad]
    scored = batch["completion_mask"][:, 1:].sum(dim=1).view(2, -1).T.tolist()
    for row, lengths in zip(rows, scored, strict=True):
        for name, length in zip(("chosen_ids", "rejected_ids"), lengths, strict=True):
            assert visible_span(len(row["prompt_ids"]), len(row[name]), max_length, keep)[2] == length


def test_the_padding_token_may_be_the_one_that_ends_an_answer():
    row = {"prompt_ids": [5], "chosen_ids": [6, 2], "rejected_ids": [6]}
    batch = collated([row], None, "keep_start")
    assert torch.equal(*batch["input_ids"])
    assert degenerate_pairs(batch["input_ids"], batch["completion_mask"]).tolist() == [False]


def with_bad_rows(tokenizer):
    """12 pairs, the second with equal answers, the fourth with answers that differ only where they are cut off."""
    rows = pair_rows(12)
    rows[1] = {**rows[1], "rejected": rows[1]["chosen"]}
    rows[3] = {"prompt": rows[3]["prompt"], "chosen": " the fox" * 60 + " x", "rejected": " the fox" * 60 + " y"}
    return Dataset.from_list(rows)


def test_preparation_counts_them_once_and_says_which_and_why(make, tokenizer):
    rows = with_bad_rows(tokenizer).to_list()
    rows.append({"prompt": "the fox " * 80, "chosen": "a", "rejected": "b"})
    with pytest.warns(UserWarning, match="pairs of the train dataset") as warned:
        make({"constraint": "clip"}, train_dataset=Dataset.from_list(rows))
    messages = [str(w.message) for w in warned if "pairs of the train dataset" in str(w.message)]
    assert len(messages) == 1
    (message,) = messages
    assert "Of the 13 pairs of the train dataset, 1 were dropped" in message and "max_length=64" in message
    assert "2 have the same tokens in both answers, after truncation (rows 1, 3)" in message
    assert "scored" not in message and "cpo/incomparable_pairs" in message


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_answers_without_a_scored_token(make, tokenizer):
    """With keep_end and an answer of one token, what stays is that token alone, with nothing before it to predict it."""
    options = {"max_length": 1, "truncation_mode": "keep_end"}
    with pytest.warns(
        UserWarning, match=r"12 have an answer without a scored token, after truncation \(rows 0, 1, 2, 3, 4, …\)"
    ):
        make(options)


def test_good_data_is_not_warned_about(make):
    make({"constraint": "clip"}, eval_dataset=pairs_dataset(4))  # a warning is an error in these tests


@pytest.mark.filterwarnings("ignore:Of the 12 pairs", "ignore:constraint='inverse_logp'")
@pytest.mark.parametrize("form", ["clip", "softplus", "penalty", "lagrangian", "inverse_logp"])
def test_the_constraint_asks_nothing_of_pairs_that_compare_nothing(make, tokenizer, form):
    """Their loss is DPO's, by DPO's formula; the others' is the constraint's; they drive neither metrics nor multiplier."""
    options = {"constraint": form, "gamma": 3.0, "prefix_sharing": False}
    if form == "lagrangian":
        options |= {"dual_init": 0.7, "dual_max": 1.0, "epsilon": 0.1}
    trainer = make(options, train_dataset=with_bad_rows(tokenizer))
    batch = batch_of(trainer, 5)
    batch["completion_mask"][2] = 0  # the third pair's chosen answer is gone
    batch["completion_mask"][5 + 2, 0] = 0
    trainer.model.train()
    seen = {}
    original = trainer.on_batch

    def on_batch(gathered):
        seen["pairs"], seen["target"] = PairLogps.from_rows(gathered.logps), gathered.targets
        return original(gathered)

    trainer.on_batch = on_batch
    loss = trainer.compute_loss(trainer.model, batch)
    pairs, target = seen["pairs"], seen["target"]
    good = torch.tensor([True, False, False, False, True])
    form_of = trainer._form
    asked = torch.where(good, form_of.target(pairs), pairs.ref_gap)
    assert torch.equal(target, asked)
    assert not torch.equal(asked, pairs.ref_gap) or not form_of.moves_target
    expected = -F.logsigmoid(BETA * (pairs.gap - asked))
    weight = {"penalty": 1.0, "lagrangian": 0.7}.get(form, 0.0)
    expected = expected + weight * torch.where(good, torch.relu(3.0 - pairs.gap), 0.0)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    if form == "lagrangian":
        ((signal, _),) = trainer._bounds.multipliers["dual"]._seen
        assert torch.equal(signal, torch.relu(3.0 - pairs.gap)[good])
    logged = trainer._ledgers["train"].flush()
    assert logged["cpo/incomparable_pairs"] == 3
    assert logged["cpo/gap"] == pytest.approx(pairs.gap[good].mean().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Of the 12 pairs")
def test_equal_answers_have_no_gradient(make, tokenizer):
    trainer = make({"constraint": "clip", "gamma": 3.0, "prefix_sharing": False}, train_dataset=with_bad_rows(tokenizer))
    trainer.model.train()
    row = {n: trainer.train_dataset[1][n] for n in ("prompt_ids", "chosen_ids", "rejected_ids")}
    trainer.compute_loss(trainer.model, trainer.data_collator([row])).backward()
    largest = max(p.grad.abs().max().item() for p in trainer.model.parameters() if p.grad is not None)
    trainer.model.zero_grad()
    row["rejected_ids"] = row["rejected_ids"][:-1]
    trainer.compute_loss(trainer.model, trainer.data_collator([row])).backward()
    other = max(p.grad.abs().max().item() for p in trainer.model.parameters() if p.grad is not None)
    assert largest < 1e-5 * other


@pytest.mark.filterwarnings("ignore:Of the 12 pairs")
def test_without_a_constraint_bad_rows_train_as_in_dpo(tmp_path, tokenizer):
    """Counted, and otherwise DPOTrainer bit for bit."""
    weights, counted = [], None
    for trainer_class, config in ((DPOTrainer, DPOConfig), (CPOConstrainedTrainer, CPOConstrainedConfig)):
        torch.manual_seed(0)
        trainer = trainer_class(
            model=make_model(),
            ref_model=make_model(1),
            args=config(**training_options(tmp_path / config.__name__)),
            processing_class=tokenizer,
            train_dataset=with_bad_rows(tokenizer),
        )
        trainer.train()
        weights.append(copy.deepcopy(trainer.model.state_dict()))
        counted = sum(log.get("cpo/incomparable_pairs", 0) for log in trainer.state.log_history)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert counted == 2


def test_a_streamed_set_is_counted_as_it_comes(make, tokenizer):
    rows = with_bad_rows(tokenizer).to_list()
    streamed = IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows)))
    trainer = make({"constraint": "penalty", "logging_steps": 3}, train_dataset=streamed)
    trainer.train()
    (logged,) = [log for log in trainer.state.log_history if "cpo/gap" in log]
    assert logged["cpo/incomparable_pairs"] == 2


# --- columns that are not the pair's ----------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "why?"}]


def asks_first(column):
    """TRL's is_conversational in a process whose hash seed puts `column` first."""

    def asked(example):
        return is_conversational({column: example[column]} if column in example else example)

    return asked


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("column, value", [("messages", TURNS), ("completion", TURNS), ("completion", "rain")])
@pytest.mark.parametrize("conversational", [False, True])
def test_a_helper_column_changes_no_token_under_any_hash_seed(make, monkeypatch, column, value, conversational, streamed):
    """TRL asks one column of a row whether it is messages, and which one depends on PYTHONHASHSEED."""
    plain = pairs_dataset(6, conversational=conversational)
    rows = [{**row, column: value, "note": n} for n, row in enumerate(plain)]
    helped = IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows))) if streamed else Dataset.from_list(rows)
    wanted = list(make(train_dataset=plain).train_dataset)
    for first in (column, "prompt"):
        monkeypatch.setattr(dpo_trainer, "is_conversational", asks_first(first))
        got = list(make(train_dataset=helped).train_dataset)
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        assert [[row[name] for name in names] for row in got] == [[row[name] for name in names] for row in wanted]
        assert [row[column] for row in got] == [value] * 6 and [row["note"] for row in got] == list(range(6))
        assert not any("hidden" in name for row in got for name in row)


@pytest.mark.parametrize("behind, warned", [("", False), ("\n", True), (" \n\n", True)])
def test_text_that_carries_its_end_token_and_blanks_is_warned_of(make, tokenizer, behind, warned):
    """TRL adds EOS to a text that does not end in it to the last character: `<|im_end|>` and a line get a second one."""
    rows = pair_rows(6)
    for at in (1, 4):
        rows[at]["chosen"] += tokenizer.eos_token + behind
    if not warned:
        make(train_dataset=Dataset.from_list(rows))  # a warning is an error in these tests
        return
    with pytest.warns(UserWarning, match=r"2 of the 6 pairs of the train dataset \(rows 1, 4\) have an answer that ends in"):
        trainer = make(train_dataset=Dataset.from_list(rows))
    assert trainer.train_dataset[1]["chosen_ids"].count(tokenizer.eos_token_id) == 2


# --- keys that only other rows have -----------------------------------------------------------------------------------

WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>{% endfor %}"
)


def tool(name, **parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def tool_rows(form):
    """Two pairs whose tools, options of the template and calls have different keys."""
    rows = list(pairs_dataset(2, conversational=True))
    for row, key in zip(rows, ("red", "blue"), strict=True):
        tools = [tool("fox", **{key: {"type": "string"}})]
        row |= {
            "tools": {"lists": tools, "text": json.dumps(tools)}[form],
            "chat_template_kwargs": {"mood": "calm"} if key == "red" else {"other": 1},
        }
        row["chosen"][0]["tool_calls"] = [{"type": "function", "function": {"name": "fox", "arguments": {key: "x"}}}]
    return rows


@pytest.mark.parametrize("form", ["lists", "text"])
@pytest.mark.parametrize("streamed", [False, True])
def test_keys_that_arrow_pads_are_not_seen(make, tokenizer, form, streamed):
    """Each pair by itself has nothing padded; beside the other, Arrow gives each the other's keys as null."""
    tokenizer.chat_template = WITH_TOOLS
    names = ("prompt_ids", "chosen_ids", "rejected_ids")

    def tokens(rows):
        dataset = Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if streamed else dataset
        return [[row[name] for name in names] for row in make({"max_length": None}, train_dataset=dataset).train_dataset]

    rows = tool_rows(form)
    together, alone = tokens(rows), [tokens([row])[0] for row in rows]
    assert together == alone
    text = tokenizer.decode(sum(together[0], []))
    assert "red" in text and "blue" not in text and "null" not in text and "None" not in text and "calm" in text


def test_an_audit_sees_them_as_training_does(make, tokenizer):
    tokenizer.chat_template = WITH_TOOLS
    pairs = Dataset.from_list(tool_rows("lists"))
    trained = make({"max_length": None}, train_dataset=pairs).train_dataset
    prepared = Scorer(max_length=None).prepare(pairs.add_column(ROW, [0, 1]), tokenizer, "train")
    assert prepared.tokens.prompt == trained["prompt_ids"][:] and prepared.tokens.chosen == trained["chosen_ids"][:]


@pytest.mark.parametrize("streamed", [False, True])
def test_calls_inside_a_prompt_that_only_the_answers_hold_are_not_padded(make, tokenizer, streamed):
    """TRL takes the prompt out of the answers; what it makes would be padded anew."""
    tokenizer.chat_template = WITH_TOOLS
    rows = []
    for row in tool_rows("text"):
        asked = [*row["prompt"], row["chosen"][0], {"role": "tool", "content": "done"}]
        plain = {"role": "assistant", "content": "so it is"}
        rows.append({"chosen": [*asked, plain], "rejected": [*asked, {**plain, "content": "no"}]})

    def tokens(rows):
        dataset = Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if streamed else dataset
        got = make({"max_length": None}, train_dataset=dataset).train_dataset
        return [[row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in got]

    together = tokens(rows)
    assert together == [tokens([row])[0] for row in rows]
    assert "null" not in tokenizer.decode(together[0][0]) and "red" in tokenizer.decode(together[0][0])


def test_turns_lack_the_keys_that_only_other_turns_have():
    """Under transformers 5.19 a template sees them: Llama 3.1's asks whether `tool_calls` is there, and for its length."""
    rows = [{**row, "rejected": [{**row["rejected"][0], "thinking": "so"}]} for row in tool_rows("text")]
    rows += pairs_dataset(1, conversational=True)
    got = list(without_padding(Dataset.from_list(rows)))
    for row, before in zip(got, rows, strict=True):
        assert [row[side] for side in ("prompt", "chosen", "rejected")] == [before[s] for s in ("prompt", "chosen", "rejected")]


def test_a_set_without_padding_is_handed_on_as_it_is(tokenizer):
    for rows in (pair_rows(3), tool_rows("text")[:1], [{**row, "tools": [tool("fox", red=1)]} for row in pair_rows(3)]):
        dataset = Dataset.from_list(rows)
        assert without_padding(dataset) is dataset


def test_turns_of_others_in_an_answer_are_warned_of(make):
    rows = list(pairs_dataset(6, conversational=True))
    rows[3]["rejected"] += [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "no"}]
    inside = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    for form in (rows, inside):
        with pytest.warns(UserWarning, match=r"1 of the 6 pairs of the train dataset \(rows 3\) have an answer with turns"):
            make(train_dataset=Dataset.from_list(form))
