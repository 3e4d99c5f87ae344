"""`assistant_turns_only`: in answers of several turns the assistant's tokens alone are scored, packed and padded alike."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer, PairMonitor
from trl_cpo._trl.datasets import tokenized
from trl_cpo._trl.turns import TurnsUnknown, assistant_mask, with_turn_masks
from trl_cpo.cli import main
from trl_cpo.data.rows import TURN_MASKS
from trl_cpo.data.spans import scored_span
from trl_cpo.data.validation import degenerate_rows
from trl_cpo.engine.reference import table_of
from trl_cpo.engine.resume.settings import data_facts
from trl_cpo.run.pair_columns import answer_tokens

from helpers.by_hand import log_probs_by_hand
from helpers.checkpoint_runs import StopAt, assert_same_end
from helpers.identity import assert_same_run, run
from helpers.tiny import make_model, pairs_dataset, training_options

ON = {"assistant_turns_only": True}
ASKS, ENDS = "<|im_start|>assistant\n", "<|im_end|>\n"


def said(role, content):
    return {"role": role, "content": content}


def turn_rows(n=8):
    """Pairs that part at an earlier turn, so that the users' words differ too; every third is of one turn."""
    rows = list(pairs_dataset(n, conversational=True))
    for at, row in enumerate(rows):
        if at % 3:
            row["chosen"] += [said("user", "why do you like seven hills near the old river"), said("assistant", "it runs")]
            row["rejected"] += [
                said("tool", "salt"),
                said("assistant", "maybe with bread"),
                said("user", "no"),
                said("assistant", "never"),
            ]
    return rows


@pytest.fixture
def make(tmp_path, tokenizer):
    def make(rows=None, *, ref=1, eval_dataset=None, data_collator=None, **options):
        dataset = Dataset.from_list(turn_rows()) if rows is None else rows
        settings = {"constraint": "clip", "gamma": 4.0, "max_length": None} | ON | options
        return CPOConstrainedTrainer(
            model=make_model(),
            ref_model=make_model(ref),
            args=CPOConstrainedConfig(**{**training_options(tmp_path), **settings}),
            processing_class=tokenizer,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
        )

    return make


def written(row, side):
    """The text of an answer's assistant turns, as they stand in the conversation."""
    return [turn["content"] + ENDS for turn in row[side] if turn["role"] == "assistant"]


def scored_texts(tokenizer, ids, mask):
    """The runs of scored tokens, decoded."""
    parts, last = [], False
    for token, scored in zip(ids, mask, strict=True):
        if scored:
            parts = parts if last else [*parts, []]
            parts[-1].append(token)
        last = bool(scored)
    return [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_the_assistant_wrote_is_scored_and_nothing_else(make, tokenizer, inside, streamed):
    rows = turn_rows()
    given = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows] if inside else rows
    dataset = IterableDataset.from_generator(lambda: iter(given)) if streamed else Dataset.from_list(given)
    trainer = make(dataset)
    for row, prepared in zip(rows, trainer.train_dataset, strict=True):
        for side, column in zip(("chosen", "rejected"), TURN_MASKS, strict=True):
            ids = prepared[f"{side}_ids"]
            assert scored_texts(tokenizer, ids, prepared[column]) == written(row, side)
            if len(row[side]) == 1:
                assert prepared[column] == [1] * len(ids)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("precomputed", [False, True])
def test_log_probabilities_gaps_and_metrics_are_those_of_its_words(make, packed, precomputed, reduction):
    """By hand: whole conversations through the model, and the sum over the places where the assistant's words stand."""
    gamma = {"sum": 4.0, "mean": 0.2}[reduction]
    trainer = make(
        prefix_sharing=packed,
        precompute_ref_log_probs=precomputed,
        logps_reduction=reduction,
        gamma=gamma,
        max_steps=1,
        per_device_train_batch_size=8,
        learning_rate=0.0,
    )
    columns = []
    for model in (make_model(), make_model(1)):
        for side, mask in zip(("chosen", "rejected"), TURN_MASKS, strict=True):
            found = []
            for row in trainer.train_dataset:
                ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
                inside = torch.tensor([[0] * len(row["prompt_ids"]) + row[mask]])
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": inside}
                (total,), (count,) = log_probs_by_hand(model, inputs)
                found.append((total, total / count)[reduction == "mean"])
            columns.append(torch.tensor(found))
    gap, ref_gap = columns[0] - columns[1], columns[2] - columns[3]
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["cpo/gap"] == pytest.approx(gap.mean().item(), rel=1e-4, abs=1e-4)
    assert log["cpo/ref_gap"] == pytest.approx(ref_gap.mean().item(), rel=1e-4, abs=1e-4)
    assert log["cpo/violation"] == pytest.approx((gamma - gap).clamp(min=0).mean().item(), rel=1e-4, abs=1e-4)
    if reduction == "sum":
        assert log["logps/chosen"] == pytest.approx(columns[0].mean().item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*have an answer with turns:UserWarning")
def test_the_table_of_a_reference_is_of_the_same_tokens(make):
    off, on = (make(precompute_ref_log_probs=True, assistant_turns_only=value, prefix_sharing=False) for value in (False, True))
    one_turn = [at for at, row in enumerate(turn_rows()) if len(row["chosen"]) == 1]
    tables = table_of(off), table_of(on)
    for name in ("chosen_logps", "rejected_logps"):
        same = [getattr(tables[0], name)[at] == getattr(tables[1], name)[at] for at in range(8)]
        assert [at for at, equal in enumerate(same) if equal] == one_turn


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("constraint", ["none", "clip"])
def test_answers_of_one_turn_train_to_the_bit_as_without(tmp_path, tokenizer, packed, constraint):
    def build():
        sets = dict(train_dataset=pairs_dataset(conversational=True), eval_dataset=pairs_dataset(6, 5, conversational=True))
        return dict(model=make_model(), ref_model=make_model(1), processing_class=tokenizer, **sets)

    options = dict(constraint=constraint, prefix_sharing=packed, max_length=64)
    runs = [
        run(CPOConstrainedTrainer, CPOConstrainedConfig, tmp_path / str(on), build, options, {"assistant_turns_only": on})
        for on in (False, True)
    ]
    assert_same_run(*runs)
    assert not set(TURN_MASKS) & set(runs[1].trainer.train_dataset.column_names)


@pytest.mark.filterwarnings("ignore:The .*keep_end:FutureWarning", "ignore:.*pairs of the train dataset:UserWarning")
@pytest.mark.parametrize(
    ("length", "keep"), [(34, "keep_start"), (50, "keep_start"), (6, "keep_end"), (9, "keep_end"), (34, "keep_end")]
)
def test_cut_answers_are_counted_as_batches_count_them(make, length, keep):
    rows = turn_rows()
    rows[1]["chosen"].append(said("user", "why do you like tea with bread and salt"))  # nothing else is left by 6 tokens
    trainer = make(Dataset.from_list(rows), max_length=length, truncation_mode=keep)
    counts = answer_tokens(trainer.train_dataset, length, keep)
    masks = [trainer.data_collator([row])["completion_mask"].sum(dim=1).tolist() for row in trainer.train_dataset]
    assert [list(pair) for pair in zip(*counts, strict=True)] == masks
    whole = [[len(row[f"{side}_ids"]) for side in ("chosen", "rejected")] for row in trainer.train_dataset]
    assert any(kept < there for pair in zip(masks, whole, strict=True) for kept, there in zip(*pair, strict=True))
    # A pair of which truncation leaves an answer only what others said compares nothing.
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    empty = [at for at, one in enumerate(batches) if not one["completion_mask"][:, 1:].any(dim=1).all()]
    assert degenerate_rows(trainer.train_dataset, length, keep)["nothing scored"] == empty
    assert (1 in empty) == (length < 10)


def test_a_sequences_first_token_has_no_predecessor_to_predict_it():
    # Two tokens of prompt and four of the answer; the last three are left, of which the first is the assistant's.
    assert scored_span(2, 4, 3, "keep_end", [1, 1, 0, 0]) == (1, 4, 1, 0)
    assert scored_span(2, 4, 3, "keep_end", [1, 0, 1, 1]) == (1, 4, 2, 2)
    assert scored_span(2, 4, 3, "keep_end", None) == (1, 4, 3, 2)


def test_what_is_scored_is_part_of_what_a_checkpoint_compares(make):
    trained = make().train_dataset
    assert data_facts(trained) != data_facts(trained.remove_columns(list(TURN_MASKS)))


def test_a_resumed_run_is_the_uninterrupted_one(make, tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, precompute_ref_log_probs=True)
    alone = make(**options, output_dir=str(tmp_path / "alone"))
    alone.train()
    first = make(**options, output_dir=str(tmp_path / "resumed"))
    first.add_callback(StopAt(2))
    first.train()
    resumed = make(**options, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, alone)


def test_certificates_and_stress_count_what_the_run_counted(tmp_path, small_model, capsys):
    for name, rows in (("train", turn_rows(6)), ("test", turn_rows(12)[6:])):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, out = str(tmp_path / "pairs"), str(tmp_path / "run")
    options = ["--use_cpu", "True", "--bf16", "False", "--max_steps", "2", "--report_to", "none", "--price", "False"]
    given = ["--model_name_or_path", small_model, "--dataset_name", data, "--output_dir", out, *options]
    assert main(["train", *given, "--assistant_turns_only", "True", "--gamma", "1"]) == 0
    pairs = json.loads((tmp_path / "run" / "pairs.json").read_text())
    scores = ["--model", out, "--ref-model", small_model, "--dataset", data, "--gamma", "1", "--scores"]
    for on in (False, True):
        folder = tmp_path / f"scores-{on}"
        main(["certify", *scores, str(folder), *(["--assistant-turns-only"] if on else [])])
        found = json.loads((folder / "pairs.json").read_text())["rows"]
        close = [row[:4] == pytest.approx(own[:4], rel=1e-4, abs=1e-3) for row, own in zip(found, pairs["rows"], strict=True)]
        assert close == [on or at % 3 == 0 for at in range(6)]
    capsys.readouterr()
    assert main(["stress", out, "--only", "typos", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reproduced"]["holds"]


def test_sets_given_to_evaluate_are_scored_so_too(make):
    trainer = make(pairs_dataset(conversational=True), per_device_eval_batch_size=8)
    found = trainer.evaluate(Dataset.from_list(turn_rows()))
    other = make(per_device_train_batch_size=8)
    assert found["eval_cpo/gap"] == pytest.approx(other.evaluate(other.train_dataset)["eval_cpo/gap"])
    plain = make(pairs_dataset(conversational=True), assistant_turns_only=False)
    with pytest.warns(UserWarning, match="Set assistant_turns_only=True, end both answers after their first turn"):
        assert plain.evaluate(Dataset.from_list(turn_rows()))["eval_cpo/gap"] != pytest.approx(found["eval_cpo/gap"], rel=0.01)


def test_an_end_of_the_conversation_alone_is_no_part_of_an_earlier_turn(make, tokenizer):
    """As Phi-3's template ends: EOS behind the last turn, whoever speaks in it."""
    end, eos = "<|im_end|>\n", "<|endoftext|>"
    tokenizer.eos_token = eos
    tokenizer.chat_template += "{% if not add_generation_prompt %}" + eos + "{% endif %}"
    rows = turn_rows(5)
    for row, prepared in zip(rows, make(Dataset.from_list(rows)).train_dataset, strict=True):
        *before, last = written(row, "rejected")
        scored = scored_texts(tokenizer, prepared["rejected_ids"], prepared[TURN_MASKS[1]])
        assert scored == [*before, last + eos] and last.endswith(end)


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
#: For models that read images: their turns are lists of parts.
OF_IMAGES = ("idefics3", "llava_next", "smolvlm")


@pytest.mark.filterwarnings("ignore:.*not a prefix")
def test_the_templates_that_trl_ships(tokenizer):
    """docs/data.md says which are refused."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|return|>"]})
    refused, rows = [], Dataset.from_list(turn_rows(2)).select([1])
    rows = rows.map(lambda row: {"rejected": [row["rejected"][0], *row["chosen"][1:]]})  # not every template knows tools
    cut = SimpleNamespace(max_length=None, truncation_mode="keep_start", dataset_num_proc=None)
    files = [file for file in sorted(TEMPLATES.glob("*.jinja")) if not file.stem.startswith(OF_IMAGES)]
    for file in files:
        tokenizer.chat_template = file.read_text()
        tokenizer.eos_token = "<|return|>" if file.stem.startswith("gptoss") else "<|im_end|>"
        prepared = tokenized(rows, tokenizer, cut, file.stem)
        try:
            (row,) = with_turn_masks(prepared, tokenizer, file.stem)
        except ValueError:
            refused.append(file.stem)
            continue
        for side, mask in zip(("chosen", "rejected"), TURN_MASKS, strict=True):
            parts = scored_texts(tokenizer, row[f"{side}_ids"], row[mask])
            words = [turn["content"] for turn in rows[0][side]]
            assert len(parts) == 2 and words[0] in parts[0] and words[2] in parts[1] and words[1] not in "".join(parts), file
    assert len(files) > 50 and refused == ["qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"]


# --- refusals ---------------------------------------------------------------------------------------------------------

#: As Qwen3's: the last answer carries what earlier ones lose.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}(hm) {% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_template_that_does_not_tell_the_turns_is_refused_with_the_rows(make, tokenizer, streamed):
    tokenizer.chat_template = FORGETS
    rows = turn_rows(5)
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)
    with pytest.raises(ValueError) as error:
        list(make(dataset).train_dataset)
    said = str(error.value)
    assert "renders turn 0 of `chosen` otherwise once others follow" in said and "get_training_chat_template" in said
    assert ("row 1 (counted from 0)" if streamed else "3: the chat template") in said
    assert streamed or "(row 1, 2, 4)" in said
    make(pairs_dataset(conversational=True))


def test_what_comes_before_a_turn_must_stay_too(tokenizer):
    # What a user said is shortened once it was answered.
    tokenizer.chat_template = FORGETS.replace("'assistant' %}(hm)", "'user' %}(new)")
    row = {"prompt": [said("user", "why")], "chosen": [said("assistant", "a"), said("user", "b"), said("assistant", "c")]}
    ids = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=True)["input_ids"]
    begins = len(tokenizer("<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    with pytest.raises(TurnsUnknown, match="what comes before turn 2 of `chosen`"):
        assistant_mask(tokenizer, {**row, "prompt_ids": ids[:begins], "chosen_ids": ids[begins:]}, "chosen")


def test_text_is_refused_before_anything_is_loaded(make, tmp_path, small_model, capsys):
    with pytest.raises(ValueError, match="assistant_turns_only needs messages, and train_dataset is text"):
        make(pairs_dataset())
    with pytest.raises(ValueError, match="needs messages, and the eval dataset is text"):
        make(pairs_dataset(conversational=True)).evaluate(pairs_dataset())
    pairs_dataset().to_json(tmp_path / "text.jsonl")
    assert main(["audit", "--model", small_model, "--dataset", str(tmp_path / "text.jsonl"), "--assistant-turns-only"]) == 2
    assert "assistant_turns_only needs messages" in capsys.readouterr().err


def test_a_collator_of_ones_own_and_a_value_of_another_type_are_refused(make):
    with pytest.raises(ValueError, match="needs DPOTrainer's own collator for text; got function"):
        make(data_collator=lambda rows: rows)
    with pytest.raises(ValueError, match="assistant_turns_only"):
        make(assistant_turns_only="yes")


# --- the command line -------------------------------------------------------------------------------------------------


def test_an_audit_and_a_run_of_the_command_line_score_the_same(make, tmp_path, small_model, capsys):
    file = tmp_path / "turns.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in turn_rows()))
    words = ["audit", "--model", small_model, "--dataset", str(file), "--max-length", "0", "--json"]
    found = {}
    for on in (False, True):
        code = main([*words, *(["--assistant-turns-only"] if on else []), "--pairs", str(tmp_path / f"{on}.jsonl")])
        (one,) = json.loads(capsys.readouterr().out)["sets"]
        findings = {each["finding"]: each for each in one["preflight"]["findings"]}
        assert code == (0 if on else 1) and ("turns_left_out" if on else "other_turns") in findings
        assert ("--assistant_turns_only True" in (one["command"] or "--assistant_turns_only True")) or not on
        found[on] = [json.loads(line) for line in (tmp_path / f"{on}.jsonl").read_text().splitlines()]
    trainer, model = make(), AutoModelForCausalLM.from_pretrained(small_model)
    for row, audited in zip(trainer.train_dataset, found[True], strict=True):
        totals, counts = log_probs_by_hand(model, trainer.data_collator([row]))
        assert [audited["ref_chosen"], audited["ref_rejected"]] == pytest.approx(totals, rel=1e-4)
        assert [audited["chosen_tokens"], audited["rejected_tokens"]] == counts
    differ = [at for at in range(8) if found[True][at]["ref_chosen"] != found[False][at]["ref_chosen"]]
    assert differ == [at for at in range(8) if at % 3]


def test_a_monitor_follows_the_trainers_option(make, tmp_path):
    trainer = make(ref=0, eval_dataset=Dataset.from_list(turn_rows()), max_steps=2, per_device_eval_batch_size=8)
    trainer.add_callback(PairMonitor(trainer, Dataset.from_list(turn_rows()), price=False, folder=tmp_path / "seen"))
    trainer.train()
    seen = next(log for log in reversed(trainer.state.log_history) if "eval_pairs_cpo/gap" in log)
    own = trainer.evaluate()
    for name in ("gap", "ref_gap", "violation"):
        assert seen[f"eval_pairs_cpo/{name}"] == pytest.approx(own[f"eval_cpo/{name}"], rel=1e-4, abs=1e-4)
