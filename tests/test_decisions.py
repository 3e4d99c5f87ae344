"""Decisions are scored as training scores them, whatever the batch, and counted with exact intervals."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cpo.cli import main
from trl_cpo.decisions import COUNTED, Decision, counts, decide, document, fault_of, in_words, option_logps
from trl_cpo.intervals import clopper_pearson, paired_difference

OPTIONS = ["red fox", "blue", "the old river", "tea"]


def text_row(number: int, beginning: str = "why the stone runs") -> dict:
    chosen, rejected = OPTIONS[number % 4], OPTIONS[(number + 1) % 4]
    return {"prompt": f"{beginning} {'over ' * number}->", "chosen": chosen, "rejected": rejected, "options": OPTIONS}


def message_row(number: int) -> dict:
    row = text_row(number)
    wrapped = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {**row, **wrapped, "prompt": [{"role": "user", "content": row["prompt"]}]}


ROWS = {
    "text": [text_row(n) for n in range(5)],
    "messages": [message_row(n) for n in range(5)],
    "nothing in common": [text_row(n, beginning) for n, beginning in enumerate(("a hen", "salt", "quick cup of"))],
}


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def model(model_folder):
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    # Far from uniform, so that a wrong position or a wrong mask is seen.
    for parameter in found.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return found.train()


def alone(model, tokenizer, row) -> tuple[dict[str, float], str]:
    """The plain way: one forward an option, without a cache or padding; and generate's greedy answer."""
    if isinstance(row["prompt"], str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = [tokenizer(row["prompt"] + option + tokenizer.eos_token)["input_ids"] for option in OPTIONS]
    else:
        template = tokenizer.apply_chat_template
        prompt = template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        answers = [[{"role": "assistant", "content": option}] for option in OPTIONS]
        whole = [template(row["prompt"] + answer, return_dict=True)["input_ids"] for answer in answers]
    scores = {}
    with torch.no_grad():
        for option, ids in zip(OPTIONS, whole, strict=True):
            assert ids[: len(prompt)] == prompt
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores[option] = sum(logps[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))
        longest = max(len(ids) for ids in whole) - len(prompt)
        given = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=longest, do_sample=False
        )
    return scores, tokenizer.decode(given[0, len(prompt) :], skip_special_tokens=True).strip().split("\n")[0].strip()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_scores_and_answers_are_those_of_each_row_alone(model, tokenizer, kind, batch_size):
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    state = torch.get_rng_state()
    found = decide(model, tokenizer, ROWS[kind], batch_size)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval()
    for row, decision in zip(ROWS[kind], found, strict=True):
        scores, answer = alone(model, tokenizer, row)
        assert decision.scores == pytest.approx(scores, abs=2e-4) and list(decision.scores) == OPTIONS
        assert decision.answer == answer
        text = (lambda a: a) if isinstance(row["chosen"], str) else (lambda a: a[0]["content"])
        assert (decision.chosen, decision.rejected) == (text(row["chosen"]), text(row["rejected"]))


def decision(right: float, wrong: float, other: float, answer: str) -> Decision:
    return Decision({" A": right, " B": wrong, " C": other}, " A", " B", answer)


def test_what_is_counted():
    likeliest = {"preferred": True, "right": True, "answered": True, "named": True}
    assert decision(-1.0, -2.0, -3.0, "A").outcomes == likeliest
    assert decision(-1.0, -2.0, -0.5, "C").outcomes == {**likeliest, "right": False, "answered": False}
    assert decision(-2.0, -1.0, -3.0, "A, of course").outcomes == dict.fromkeys(COUNTED, False)
    # A tie is not a win.
    assert decision(-1.0, -1.0, -1.0, "B").outcomes == {**dict.fromkeys(COUNTED, False), "named": True}


def test_counts_have_exact_intervals():
    found = counts([decision(-1, -2, -3, "A")] * 3 + [decision(-2, -1, -3, "B")])
    low, high = clopper_pearson(3, 4)
    assert found["rows"] == 4 and found["right"] == {"count": 3, "share": 0.75, "low": low, "high": high}
    assert found["named"]["count"] == 4


def test_gains_are_paired():
    good, bad = decision(-1, -2, -3, "A"), decision(-2, -1, -3, "B")
    found = document([bad] * 6 + [good] * 4, [good] * 5 + [bad] + [good] * 3 + [bad])
    low, high = paired_difference(5, 1, 10)
    assert found["gain"]["right"] == {"share": pytest.approx(0.4), "low": low, "high": high}
    assert found["gain"]["named"]["share"] == 0 and found["gain"]["named"]["high"] == paired_difference(0, 0, 10)[1]
    text = in_words(found)
    assert "decisions on 10 held-out rows" in text and "40 % (12 to 74)" in text and f"+40 ({100 * low:+.0f} to " in text
    assert document(None, [good])["before"] is None and " - " in in_words(document(None, [good]))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"options": "tea"}, "must hold a list of strings, got 'tea'"),
        ({"options": ["tea", ""]}, "must hold a list of strings"),
        ({"options": ["tea", "tea"]}, "at least two different strings"),
        ({"options": ["red fox"]}, "at least two different strings"),
        ({"chosen": "salt"}, "chosen is 'salt', which is not among the options"),
        ({"rejected": [{"role": "assistant", "content": "cup"}]}, "rejected is 'cup', which is not among the options"),
    ],
)
def test_a_row_that_is_no_decision_is_refused(model, tokenizer, changes, said):
    row = {**text_row(0), **changes}
    assert said in fault_of(row) and fault_of(text_row(0)) is None
    with pytest.raises(ValueError, match=r"Row 1: .*Give every row its options"):
        decide(model, tokenizer, [text_row(0), row])


def test_a_model_with_another_memory_is_refused(tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    sliding = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), sliding_window=8, **sizes))
    with pytest.raises(ValueError, match="full attention in every layer; this one keeps DynamicSlidingWindowLayer"):
        decide(sliding, tokenizer, ROWS["text"])


@pytest.fixture
def trained(tmp_path, model_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def trained(rows, *options):
        for split in ("train", "test"):
            name = "salt" if split == "train" else "bread"
            kept = [{**row, "prompt": f"{name} {row['prompt']}"} for row in rows]
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        small = ["--model_name_or_path", model_folder, "--dataset_name", str(tmp_path), "--max_length", "64"]
        small += ["--use_cpu", "--bf16", "False", "--max_steps", "2", "--dtype", "float32", "--output_dir", "out"]
        small += ["--per_device_train_batch_size", "2", "--report_to", "none", "--disable_tqdm", "True"]
        assert main(["train", *small, *options]) == 0, capsys.readouterr().err
        return json.loads((tmp_path / "out" / "metrics.json").read_text()), capsys.readouterr().out

    return trained


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_tells_its_decisions(trained, tmp_path):
    record, said = trained(ROWS["text"], "--learning_rate", "0.05", "--use_peft")
    found = record["decisions"]
    assert found["before"]["rows"] == found["after"]["rows"] == 5 and set(found["gain"]) == set(COUNTED)
    # By sums, what decisions call preferred is what the pairs' own evaluation calls it.
    for when in ("before", "after"):
        assert found[when]["preferred"]["share"] == pytest.approx(record[when]["eval_cpo/prefers_chosen"])
    assert "decisions on 5 held-out rows" in said and "decisions on 5" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_whose_options_do_not_fit_says_so_and_goes_on(trained):
    record, said = trained([{**row, "options": ["x", "y"]} for row in ROWS["text"]])
    assert "decisions are not counted: ValueError: Row 0: chosen is" in said and "decisions" not in record


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_without_options_says_nothing(trained):
    record, said = trained([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS["text"]])
    assert "decisions" not in said and "decisions" not in record


def test_scores_carry_the_gradients_of_plain_forwards(model, tokenizer):
    rows = ROWS["text"]
    sum(part.pow(2).sum() for part in option_logps(model, tokenizer, rows)).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for option in OPTIONS:
            ids = tokenizer(row["prompt"] + option + tokenizer.eos_token)["input_ids"]
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total = total + sum(logps[at - 1, ids[at]] for at in range(len(prompt), len(ids))).pow(2)
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-3 * parameter.grad.abs().max().item())
