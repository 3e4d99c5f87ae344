"""Pairs that cannot be used: the same refusal, with the row, in the trainer, on the command line and in an audit."""

import json

import pytest
from datasets import Dataset, IterableDataset

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.cli import main
from trl_cpo.data.rows import row_fault
from trl_cpo.engine import DPOConfig, DPOTrainer

from helpers.tiny import hh_rows, make_model, pair_rows, pairs_dataset, training_options


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


WHY, RAIN, NO = [user("Why?")], [assistant("Rain.")], [assistant("No.")]

DAMAGED = {
    "null": ({"prompt": "Why?", "chosen": " Rain.", "rejected": None}, "`rejected` is null"),
    "an object": ({"prompt": "Why?", "chosen": {"text": "Rain."}, "rejected": "No."}, "`chosen` is an object"),
    "no messages": ({"prompt": WHY, "chosen": [], "rejected": NO}, "`chosen` is an empty list"),
    "content null": (
        {"prompt": WHY, "chosen": [{"role": "assistant", "content": None}], "rejected": NO},
        "`chosen` is a list whose item 0 says nothing: its content is null",
    ),
    "no role": ({"prompt": WHY, "chosen": [{"content": "Rain."}], "rejected": NO}, "`chosen` is a list whose item 0"),
    "a list of strings": ({"prompt": WHY, "chosen": RAIN, "rejected": ["No."]}, "`rejected` is a list whose item 0"),
    "a number": ({"prompt": "Why?", "chosen": 3, "rejected": "No."}, "`chosen` is of type int"),
    "messages beside text": (
        {"prompt": "Why?", "chosen": RAIN, "rejected": NO},
        "`prompt` is a string, but `chosen` is messages",
    ),
    "text beside messages": (
        {"prompt": WHY, "chosen": "Rain.", "rejected": "No."},
        "`prompt` is messages, but `chosen` is a string",
    ),
    "sides of two kinds": ({"chosen": WHY + RAIN, "rejected": "No."}, "`rejected` is a string, but `chosen` is messages"),
    "no turn in common": ({"chosen": WHY + RAIN, "rejected": [user("How?"), *NO]}, "share no first turn"),
}
TWICE = {
    "text": {"prompt": "Why?", "chosen": "Why? Rain.", "rejected": "Why? No."},
    "text with blanks": {"prompt": "Why? ", "chosen": "Why?\nRain.", "rejected": " Why? No."},
    "messages": {"prompt": WHY, "chosen": WHY + RAIN, "rejected": WHY + NO},
    "messages, one side": {"prompt": WHY, "chosen": WHY + RAIN, "rejected": NO},
    "messages without the system turn": {
        "prompt": [{"role": "system", "content": "Be kind."}, *WHY],
        "chosen": WHY + RAIN,
        "rejected": WHY + NO,
    },
}
FAULTS = {**DAMAGED, **{f"twice: {name}": (row, "the prompt, which is there twice") for name, row in TWICE.items()}}
SOUND = {
    "text": {"prompt": "Why?", "chosen": " Rain.", "rejected": " No."},
    "text that quotes the question in one answer": {"prompt": "Why?", "chosen": "Why? Rain.", "rejected": "No."},
    "a prompt that ends within a word": {"prompt": "a", "chosen": "apple", "rejected": "and"},
    "an empty prompt": {"prompt": "", "chosen": "Rain.", "rejected": "No."},
    "messages": {"prompt": WHY, "chosen": RAIN, "rejected": NO},
    "messages with the prompt inside": {"chosen": WHY + RAIN, "rejected": WHY + NO},
    "several turns": {"prompt": WHY, "chosen": [*RAIN, user("Where?"), *NO], "rejected": NO},
    "a call of a tool": {
        "prompt": WHY,
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}],
        "rejected": NO,
    },
}


@pytest.mark.parametrize("row, fault", FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_with_a_row(row, fault):
    assert fault in row_fault(row)


@pytest.mark.parametrize("row", SOUND.values(), ids=SOUND)
def test_sound_rows(row):
    assert row_fault(row) is None


@pytest.fixture
def make(tmp_path, tokenizer):
    def build(train_dataset, trainer=CPOConstrainedTrainer, **options):
        config = CPOConstrainedConfig if trainer is CPOConstrainedTrainer else DPOConfig
        args = config(**training_options(tmp_path / "out", **options))
        return trainer(make_model(), make_model(1), args=args, processing_class=tokenizer, train_dataset=train_dataset)

    return build


def among_good(row, at=3):
    """`row` in the place `at` among good rows of its form."""
    kind = isinstance(row.get("prompt", row["chosen"]), list)
    rows = [
        {name: row_[name] if name in row else None for name in row} if "prompt" in row else inside(row_)
        for row_ in pairs_dataset(6, conversational=kind)
    ]
    rows[at] = row
    return rows


def inside(row):
    return {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}


STORED = ["null", "no messages", "no turn in common", *(name for name in FAULTS if name.startswith("twice"))]


@pytest.mark.parametrize("constraint", ["none", "clip"])
@pytest.mark.parametrize("name", STORED)
def test_the_trainer_refuses_with_the_row(make, name, constraint):
    row, fault = FAULTS[name]
    with pytest.raises(ValueError) as error:
        make(Dataset.from_list(among_good(row)), constraint=constraint)
    assert fault in str(error.value) and "train_dataset: 6 rows: 5 can be used, 1 cannot" in str(error.value)
    assert "(row 3)" in str(error.value)


@pytest.mark.parametrize("name", STORED)
def test_a_stream_stops_at_the_row(make, name):
    row, fault = FAULTS[name]
    rows = among_good(row)
    trainer = make(IterableDataset.from_generator(lambda: iter(rows)), constraint="clip", per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="the train dataset: row 3 ") as error:
        list(trainer.train_dataset)
    assert fault in str(error.value)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("command", ["train", "audit"])
def test_the_command_line_says_the_same(tmp_path, small_model, capsys, name, command):
    row, fault = FAULTS[name]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in among_good(row)))
    options = {
        "train": ["--model_name_or_path", small_model, "--dataset_name", str(file), "--output_dir", str(tmp_path / "out")],
        "audit": ["--model", small_model, "--dataset", str(file)],
    }
    assert main([command, *options[command]]) == 2
    said = capsys.readouterr().err
    assert fault in said and "6 rows: 5 can be used, 1 cannot" in said and "(row 3)" in said
    assert not (tmp_path / "out").exists()


def test_reasons_are_counted_and_the_first_rows_named(make):
    rows = pair_rows(12)
    for at in range(1, 8):
        rows[at]["rejected"] = None
    rows[9]["chosen"] = None
    with pytest.raises(ValueError) as error:
        make(Dataset.from_list(rows))
    assert "12 rows: 4 can be used, 8 cannot" in str(error.value)
    assert "7: `rejected` is null (row 1, 2, 3, 4, 5, ...)" in str(error.value)
    assert "1: `chosen` is null (row 9)" in str(error.value)


def test_sets_given_to_evaluate_are_looked_at(make):
    trainer = make(pairs_dataset())
    with pytest.raises(ValueError, match="the eval dataset: 6 rows: 5 can be used"):
        trainer.evaluate(Dataset.from_list(among_good(TWICE["text"])))


# --- no prompt --------------------------------------------------------------------------------------------------------

QUESTIONS = [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in pair_rows(6)]


@pytest.mark.parametrize("rows", [QUESTIONS, hh_rows(6)], ids=["another name", "HH-RLHF text"])
@pytest.mark.parametrize("streamed", [False, True])
def test_text_without_a_prompt_is_refused_under_a_constraint_and_warned_of_without(make, rows, streamed):
    """TRL takes what the answers begin with alike, here nothing, and trains on answers to no question."""
    given = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)
    with pytest.raises(ValueError, match=r"train_dataset has no column 'prompt'.*rename_column.*to_conversational"):
        make(given, constraint="penalty")
    for trainer in (CPOConstrainedTrainer, DPOTrainer):
        options = {"constraint": "none"} if trainer is CPOConstrainedTrainer else {}
        with pytest.warns(UserWarning, match="train_dataset has no column 'prompt'"):
            make(given, trainer, **options)


def test_the_command_line_refuses_text_without_a_prompt(tmp_path, small_model, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for constraint in ("none", "clip"):
        options = ["--model_name_or_path", small_model, "--dataset_name", str(file), "--constraint", constraint]
        assert main(["train", *options, "--output_dir", str(tmp_path / "out")]) == 2
        assert "Add the column prompt" in capsys.readouterr().err


# --- a template that raises -------------------------------------------------------------------------------------------

STRICT = (
    "{% for m in messages %}{% if m['content'] == 'boom' %}{{ raise_exception('no booms') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("inside_answers", [False, True])
def test_a_template_that_raises_on_a_row_names_it(make, tokenizer, inside_answers):
    rows = [inside(row) if inside_answers else row for row in pairs_dataset(6, conversational=True)]
    rows[4]["rejected"][-1]["content"] = "boom"
    tokenizer.chat_template = STRICT
    with pytest.raises(ValueError, match="(?s)the train dataset, made into tokens: 6 rows: 5 can.*no booms .row 4") as error:
        make(Dataset.from_list(rows))
    assert type(error.value.__cause__).__name__ == "TemplateError"


@pytest.mark.parametrize("command", ["train", "audit"])
def test_the_command_line_names_it_too(tmp_path, tokenizer, capsys, command):
    tokenizer.chat_template = STRICT
    for part in (make_model(), tokenizer):
        part.save_pretrained(tmp_path / "strict")
    rows = list(pairs_dataset(6, conversational=True))
    rows[4]["chosen"][-1]["content"] = "boom"
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, out = str(tmp_path / "strict"), ["--output_dir", str(tmp_path / "out"), "--held_out", "1", "--use_cpu", "True"]
    options = {
        "train": ["--model_name_or_path", source, "--dataset_name", str(file), *out],
        "audit": ["--model", source, "--dataset", str(file)],
    }
    assert main([command, *options[command]]) == 2
    assert "no booms" in capsys.readouterr().err


def test_other_errors_of_the_preparation_stay_what_they_are(make, tokenizer, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no disk")

    monkeypatch.setattr(Dataset, "map", fails)
    with pytest.raises(RuntimeError, match="no disk"):
        make(pairs_dataset())
