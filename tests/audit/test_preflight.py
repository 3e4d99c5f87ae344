"""Faults planted in tokens and in text, and found; whole pairs, and none found."""

import random
import re

import pytest
from datasets import Dataset
from tokenizers import processors

from trl_cpo._trl.datasets import TOKENIZED_COLUMNS, tokenized
from trl_cpo.audit.preflight import FINDINGS, digests, examine
from trl_cpo.data.models import ModelError, base_of_adapter, end_tokens
from trl_cpo.quoting import escaped, quoted, trimmed
from trl_cpo.scoring.scorer import ROW, Scorer
from trl_cpo.scoring.token_pairs import TokenPairs, Truncation, answer_tokens

from helpers.tiny import make_tokenizer, pairs_dataset

WORD = 40  # a token that is no special one
WHOLE = Truncation(None)


def look(tokenizer, prompt, chosen, rejected, *, alone=None, truncation=WHOLE, rows=None):
    pairs = TokenPairs(prompt, chosen, rejected, rows if rows is not None else list(range(len(prompt))))
    document = examine(
        pairs,
        tokenizer,
        truncation,
        ends={tokenizer.eos_token_id},
        given=len(prompt),
        prompt_alone=lambda at: (alone or prompt)[at],
    )
    return {found["finding"]: found for found in document["findings"]}, document


@pytest.fixture
def ids(tokenizer):
    """A prompt and two answers as a whole pair has them: one BOS, each answer with its end."""
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [bos, WORD, WORD + 1], [WORD + 2, end], [WORD + 3, WORD + 4, end]


def test_whole_pairs_have_no_finding(tokenizer, ids):
    prompt, chosen, rejected = ids
    found, document = look(tokenizer, [prompt, prompt[:2]], [chosen, chosen], [rejected, rejected])
    assert found == {}
    assert document["leading_bos"] == {"1": 2} and document["ends_an_answer"] == {"1": 4}
    assert document["tokens"]["prompt"] == {"median": 2, "longest": 3}


def test_every_planted_fault_is_found_and_its_row_named(tokenizer, ids):
    prompt, chosen, rejected = ids
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    blank = tokenizer(" \n")["input_ids"]
    assert len(blank) and set(blank).isdisjoint(tokenizer.all_special_ids)
    planted = {
        "double_bos": ([bos, *prompt], chosen, rejected),
        "no_end": ([*prompt, 51], chosen[:-1], rejected),
        "double_end": ([*prompt, 52], chosen, [*rejected, *blank, end]),
        "empty_chosen": ([*prompt, 53], [*blank, end], rejected),
        "empty_rejected": ([*prompt, 54], chosen, [end]),
        "identical": ([*prompt, 55], chosen, chosen),
    }
    columns = [list(column) for column in zip((prompt, chosen, rejected), *planted.values(), strict=True)]
    rows = list(range(100, 107))
    found, _ = look(tokenizer, *columns, rows=rows)
    assert {name: one["rows"] for name, one in found.items()} == {name: [101 + place] for place, name in enumerate(planted)}
    assert all(one["count"] == 1 and one["of"] == 7 and one["fault"] for one in found.values())
    # Exchanged and repeated pairs: both of an exchanged pair are named, of a repeated one the later.
    found, _ = look(tokenizer, [prompt] * 3, [chosen, rejected, chosen], [rejected, chosen, rejected])
    assert found["contradicted"]["rows"] == [0, 1, 2] and found["duplicate"]["rows"] == [2]
    assert found["contradicted"]["fault"] and not found["duplicate"]["fault"]


def test_a_prompt_that_is_no_prefix_shows_what_is_left_out(tokenizer, ids):
    prompt, chosen, rejected = ids
    tail = tokenizer(" fox")["input_ids"]
    found, _ = look(tokenizer, [prompt, prompt[:2]], [chosen] * 2, [rejected] * 2, alone=[prompt, [*prompt[:2], *tail]])
    one = found["prompt_not_prefix"]
    assert one["rows"] == [1] and one["count"] == 1 and one["of"] == 2 and one["left_out"] == " fox"


def test_truncation_counts(tokenizer):
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt = [bos, WORD, WORD, WORD]
    same_start = [51, 52]
    found, document = look(
        tokenizer,
        [prompt, [bos, WORD]],
        [[*same_start, 53, end], [54, end]],
        [[*same_start, 55, end], [55, end]],
        truncation=Truncation(6),
    )
    assert {name: one["rows"] for name, one in found.items()} == {
        "identical_when_cut": [0],
        "cut_chosen": [0],
        "cut_rejected": [0],
    }
    # What is shown is what is left.
    assert document["seen"][0]["chosen"] == document["seen"][0]["rejected"] == quoted(tokenizer.decode(same_start), 99)


def test_keep_end_cuts_the_prompt_first(tokenizer):
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    found, document = look(tokenizer, [[bos, 50, 51]], [[52, 53, 54, end]], [[55, end]], truncation=Truncation(4, "keep_end"))
    # The chosen sequence keeps its answer alone, and of the rejected one BOS goes.
    assert found["prompt_cut"]["rows"] == [0] and "cut_chosen" not in found and "nothing_scored" not in found
    found, _ = look(tokenizer, [[bos]], [[52, 53, end]], [[end]], truncation=Truncation(1, "keep_end"))
    assert found["nothing_scored"]["rows"] == [0]  # one token, and the first is never scored
    assert document["seen"][0]["prompt"] == ""


def test_what_is_left_is_what_the_collator_leaves(tokenizer):
    """Truncation.left against TRL's collator, for both modes and lengths around the limit."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rng = random.Random(0)
    for mode in ("keep_start", "keep_end"):
        for max_length in (None, 1, 3, 7):
            truncation = Truncation(max_length, mode)
            collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)
            for _ in range(40):
                parts = [[rng.randint(1, 2) for _ in range(rng.randint(1, 6))] for _ in range(3)]
                batch = collator([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), parts, strict=True))])
                pairs = TokenPairs(*([part] for part in parts), rows=[0])
                counts = answer_tokens(pairs, truncation)
                assert [int(count[0]) for count in counts[:2]] == batch["completion_mask"].sum(dim=1).tolist()
                answers, scored = [], []
                for row, answer in enumerate(parts[1:]):
                    tokens = [batch[name][row] for name in ("input_ids", "completion_mask", "attention_mask")]
                    inside, real = tokens[1].bool(), tokens[2].bool()
                    answers.append(tokens[0][inside].tolist())
                    scored.append(int(inside[1:].sum()))
                    assert truncation.left(parts[0], answer) == (tokens[0][real & ~inside].tolist(), answers[-1], scored[-1])
                assert bool(counts[2][0]) == (min(scored) < 1 or answers[0] == answers[1])


def prepared(tokenizer, rows, **fields):
    pairs = Dataset.from_list([{**row, ROW: number} for number, row in enumerate(rows)])
    scorer = Scorer(**{"max_length": 64, "options": {"use_cpu": True, "bf16": False}, **fields})
    one = scorer.prepare(pairs, tokenizer, "train")
    return examine(
        one.tokens, tokenizer, scorer.truncation, ends={tokenizer.eos_token_id}, prompt_alone=one.prompt_alone, given=one.given
    )


def findings(document):
    return {found["finding"] for found in document["findings"]}


def test_text_and_messages_pass(tokenizer):
    for conversational in (False, True):
        document = prepared(tokenizer, list(pairs_dataset(8, conversational=conversational)))
        assert not {name for name in findings(document) if FINDINGS[name][0]}, document["findings"]
        assert document["given"] == document["pairs"] == 8 and document["dropped"] == 0
    seen = document["seen"][0]
    assert seen["prompt"].startswith("<|im_start|>user\\n") and seen["prompt"].endswith("<|im_start|>assistant\\n")
    assert seen["chosen"].endswith("<|im_end|>\\n")


def test_a_tokenizer_and_a_template_that_both_add_bos(tokenizer):
    """The usual double BOS: text that holds it already, and a tokenizer that puts it in front."""
    bos = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    rows = list(pairs_dataset(4))
    assert "double_bos" not in findings(prepared(tokenizer, rows))
    rows[2]["prompt"] = bos + rows[2]["prompt"]
    document = prepared(tokenizer, rows)
    (one,) = [found for found in document["findings"] if found["finding"] == "double_bos"]
    assert one["rows"] == [2] and document["leading_bos"] == {"1": 3, "2": 1}
    # Messages whose template leaves it out are no fault, but to be known.
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"
    document = prepared(tokenizer, list(pairs_dataset(4, conversational=True)))
    assert "missing_bos" in findings(document) and document["leading_bos"] == {"0": 4}


def test_a_template_without_an_end_and_one_that_renders_prompts_apart(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert "no_end" in findings(prepared(tokenizer, list(pairs_dataset(4, conversational=True))))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>think{% endif %}"
    )
    document = prepared(tokenizer, list(pairs_dataset(4, conversational=True)))
    (one,) = [found for found in document["findings"] if found["finding"] == "prompt_not_prefix"]
    assert one["count"] == one["of"] == 4 and one["left_out"].startswith("<|im_start|>think")


def test_pairs_dropped_by_max_length_are_counted_and_rows_keep_their_numbers(tokenizer):
    rows = list(pairs_dataset(6))
    rows[1]["prompt"] = "the fox " * 60
    rows[4]["chosen"] = rows[4]["rejected"]
    document = prepared(tokenizer, rows)
    assert (document["given"], document["dropped"], document["pairs"]) == (6, 1, 5)
    (one,) = [found for found in document["findings"] if found["finding"] == "identical"]
    assert one["rows"] == [4]
    with pytest.raises(ValueError, match="No pair of the train dataset is left"):
        prepared(tokenizer, rows[1:2])


def test_digests_know_equal_prompts(tokenizer, ids):
    prompt, chosen, rejected = ids
    numbers, parts = digests(TokenPairs([prompt, [1], prompt], [chosen] * 3, [rejected] * 3, [0, 1, 2]))
    assert numbers.tolist() == [0, 1, 0] and parts[0] == parts[2] != parts[1]


def test_end_tokens_include_those_of_generation(tmp_path, tokenizer, model_folder):
    assert end_tokens(str(tmp_path), tokenizer) == {tokenizer.eos_token_id}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert end_tokens(str(tmp_path), tokenizer) == {tokenizer.eos_token_id, 1, 7}


def test_an_adapter_names_its_base(tmp_path):
    assert base_of_adapter(str(tmp_path)) is None
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    assert base_of_adapter(str(tmp_path)) == "some/base"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no base model"):
        base_of_adapter(str(tmp_path))


def test_quotations_cannot_break_a_line_or_drive_a_terminal():
    nasty = "a\nb\x1b[31mred\x07\u202eevil\ud800\r\tz\u2028é漢 \x9b"
    shown = escaped(nasty)
    assert "\\x1b[31m" in shown and "\\u202e" in shown and "\\ud800" in shown and "é漢" in shown
    assert shown.isprintable() and not re.search(r"[\x00-\x1f\x7f-\x9f]", shown)
    shown.encode("utf-8")
    assert trimmed("abcdefghij", 6) == "abcde…" and trimmed("abcdefghij", 6, 2) == "abc…ij" and trimmed("abc", 3) == "abc"
    assert len(quoted("\x00" * 50, 20, 5)) == 20


@pytest.mark.filterwarnings("ignore:Of the 6 pairs")
def test_the_seam_gives_what_the_trainer_trains_on(tmp_path, tokenizer):
    """Token ids without a trainer are those of the trainer."""
    from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

    from helpers.tiny import make_model, training_options

    for conversational in (False, True):
        pairs = pairs_dataset(6, conversational=conversational)
        args = CPOConstrainedConfig(**training_options(tmp_path, max_length=24))
        trainer = CPOConstrainedTrainer(
            model=make_model(), ref_model=make_model(1), processing_class=tokenizer, train_dataset=pairs, args=args
        )
        without = tokenized(pairs, make_tokenizer(), args, "train")
        assert len(without) == len(trainer.train_dataset)
        for column in TOKENIZED_COLUMNS:
            assert without[column][:] == trainer.train_dataset[column][:]
