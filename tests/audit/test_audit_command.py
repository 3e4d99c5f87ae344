"""`trl-cpo audit` from end to end on tiny models: its numbers against a plain forward, its answers, its refusals."""

import json
import os
import shutil
import subprocess
import sys
import weakref

import datasets
import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset, load_dataset
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo._trl import reference as seam
from trl_cpo.cli import main
from trl_cpo.engine.reference import table_of, tables
from trl_cpo.engine.reference.digests import text_digest
from trl_cpo.labels.columns import MOST_GROUPS
from trl_cpo.scoring.token_pairs import TokenPairs, Truncation, answer_tokens

from helpers.paths import ROOT, TESTS
from helpers.tiny import make_model, pair_rows, pairs_dataset, training_options

GOLDEN = TESTS / "golden"
N = 24
#: The exit code of an audit that found faults, as in row 7 of `pairs_file`.
FAULTY = 1


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory) -> str:
    """24 pairs with a kind and scores; the prompt of row 5 fills max_length, row 7 has the same answer twice."""
    rows = pair_rows(N, seed=4)
    for number, row in enumerate(rows):
        row |= {"kind": "even" if number % 2 == 0 else "odd", "score_chosen": 1.0 + number % 3, "score_rejected": 1.5}
    rows[5]["prompt"] = "the fox " * 70
    rows[7]["rejected"] = rows[7]["chosen"]
    folder = tmp_path_factory.mktemp("pairs")
    Dataset.from_list(rows).to_json(folder / "pairs.jsonl")
    return str(folder / "pairs.jsonl")


@pytest.fixture
def audit(capsys, pairs_file, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def run(*more, model=model_folder, dataset=pairs_file):
        code = main(["audit", "--model", model, "--dataset", str(dataset), "--max-length", "64", *map(str, more)])
        return code, *capsys.readouterr()

    return run


def plain_logps(model, tokenizer, prompt: str, answer: str) -> tuple[float, int]:
    """The sum of an answer's token log-probabilities, by transformers alone, and its tokens (at most 64 in all)."""
    before, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"][:64]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[at - 1, ids[at]].item() for at in range(len(before), len(ids))), len(ids) - len(before)


def counted(document, *path):
    one = document["sets"][0]["all"]
    for key in path:
        one = one[key]
    return one["k"], one["n"]


def test_the_numbers_are_those_of_a_plain_forward(audit, pairs_file, model_folder, ref_model_folder, tokenizer):
    code, out, err = audit("--json", "--ref-model", ref_model_folder, "--slice", "kind", "--worst", 2, "--beta", 0.5)
    assert code == FAULTY, err
    document = json.loads(out)
    (one,) = document["sets"]
    with open(pairs_file) as lines:
        rows = [json.loads(line) for line in lines]
    kept = [number for number in range(N) if number not in (5, 7)]
    gaps = {}
    for name, folder in (("ref", ref_model_folder), ("policy", model_folder)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        sides = [
            [plain_logps(model, tokenizer, rows[n]["prompt"], rows[n][side]) for n in kept] for side in ("chosen", "rejected")
        ]
        gaps[name] = np.array([a - b for (a, _), (b, _) in zip(*sides, strict=True)])
        gaps[f"{name} mean"] = np.array([a / k - b / m for (a, k), (b, m) in zip(*sides, strict=True)])
    assert np.abs(np.concatenate(list(gaps.values()))).min() > 1e-3  # no sign hangs on rounding
    assert counted(document, "misaligned", "sum") == ((gaps["ref"] < 0).sum(), 22)
    assert counted(document, "misaligned", "mean") == ((gaps["ref mean"] < 0).sum(), 22)
    assert 0 < (gaps["ref"] < 0).sum() < 22
    assert one["all"]["ref_gap"]["sum"]["mean"] == pytest.approx(gaps["ref"].mean(), abs=1e-4)
    assert one["all"]["policy"]["gap"] == pytest.approx(gaps["policy"].mean(), abs=1e-4)
    in_region = (gaps["policy"] < 0) & (gaps["policy"] > gaps["ref"])
    assert counted(document, "policy", "in_undesirable_region") == (in_region.sum(), 22)
    reward = np.array([1.0 + n % 3 - 1.5 for n in kept])
    assert counted(document, "assumption", "violated") == ((gaps["ref"] + reward / 0.5 <= 0).sum(), 22)
    assert counted(document, "assumption", "contradict_label") == ((reward < 0).sum(), 22)
    worst = sorted(range(22), key=lambda at: gaps["ref"][at])[:2]
    assert [pair["row"] for pair in one["worst"]] == [kept[at] for at in worst]
    assert one["worst"][0]["chosen"].strip() in rows[kept[worst[0]]]["chosen"] + tokenizer.eos_token
    even = np.array([n % 2 == 0 for n in kept])
    slices = {part["value"]: part for part in one["slices"]}
    assert slices["even"]["misaligned"]["sum"]["k"] == ((gaps["ref"] < 0) & even).sum()
    assert slices["even"]["pairs"] + slices["odd"]["pairs"] == 22
    # The preflight has what was left out.
    assert one["preflight"]["dropped"] == 1 and one["preflight"]["pairs"] == 23
    found = {finding["finding"]: finding for finding in one["preflight"]["findings"]}
    assert found["identical"]["rows"] == [7] and found["identical"]["fault"]
    assert "FAULT: 1 of 23 pairs have the same chosen and rejected answer" in err


def test_text_and_a_second_run_that_scores_nothing(audit, monkeypatch):
    code, first, _ = audit()
    assert code == FAULTY and "Where the reference stands (22 pairs scored)" in first and "- First mend the pairs" in first

    def refuse(*_, **__):
        raise AssertionError("scored again")

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", refuse)
    assert audit()[:2] == (FAULTY, first)
    # Another max_length is another table, so that the patch is seen to be where scoring goes through.
    code, _, err = audit("--max-length", 48)
    assert code == 3 and "scored again" in err


def test_training_finds_the_audits_table(audit, pairs_file, model_folder, tmp_path, tokenizer, monkeypatch):
    assert audit()[0] == FAULTY
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("scored again"))
    args = CPOConstrainedConfig(**training_options(tmp_path / "run", constraint="softplus", precompute_ref_log_probs=True))
    pairs = load_dataset("json", data_files=pairs_file, split="train", cache_dir=str(tmp_path / "data"))
    with pytest.warns(UserWarning, match="Of the 24 pairs"):
        trainer = CPOConstrainedTrainer(model=model_folder, args=args, train_dataset=pairs)
    table = table_of(trainer, "train")
    assert len(table) == 23 and np.isfinite(table.chosen_logps).all()


def test_tokens_are_counted_as_the_table_counts_them(pairs_file, model_folder, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "cache"))
    pairs = load_dataset("json", data_files=pairs_file, split="train", cache_dir=str(tmp_path / "data")).select([0, 1, 2, 3])
    args = CPOConstrainedConfig(
        **training_options(tmp_path / "run", constraint="clip", precompute_ref_log_probs=True, max_length=14)
    )
    trainer = CPOConstrainedTrainer(model=model_folder, args=args, train_dataset=pairs)
    table = table_of(trainer, "train")
    columns = (trainer.train_dataset[name][:] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    counts = answer_tokens(TokenPairs(*columns, rows=range(4)), Truncation(14))
    assert table.chosen_tokens.tolist() == counts[0].tolist() and table.rejected_tokens.tolist() == counts[1].tolist()


def test_preflight_alone_loads_no_model(audit, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer_only")
    make_model().config.save_pretrained(tmp_path / "tokenizer_only")
    code, out, err = audit("--preflight-only", model=str(tmp_path / "tokenizer_only"))
    assert code == FAULTY, err
    assert "FAULT: 1 of 23 (4.3 %) have the same chosen and rejected answer" in out and "Where the reference" not in out


def test_no_trainer_is_made_and_every_text_is_tokenized_once(audit, ref_model_folder, monkeypatch):
    """Two models, one of them twice: the pairs' ids are those of the preflight."""

    def refuse(*_, **__):
        raise AssertionError("a trainer was made")

    for kind in (CPOConstrainedTrainer, DPOTrainer, Trainer):
        monkeypatch.setattr(kind, "__init__", refuse)
    prepared, prepare = [], DPOTrainer._prepare_dataset

    def counted(self, dataset, *args):
        prepared.append(dataset["prompt"][:])
        return prepare(self, dataset, *args)

    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", counted)
    code, out, err = audit("--json", "--ref-model", ref_model_folder)
    assert code == FAULTY, err
    assert len(prepared) == 1 and len(prepared[0]) == json.loads(out)["sets"][0]["rows"] == N


def test_a_model_is_let_go_before_the_next_is_loaded(audit, ref_model_folder, monkeypatch):
    loaded, load = [], seam.load_model

    def watched(*args):
        assert not [ref for ref in loaded if ref() is not None]
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(seam, "load_model", watched)
    code, _, err = audit("--ref-model", ref_model_folder)
    assert code == FAULTY, err
    assert len(loaded) == 2


def test_a_table_of_version_0_1_is_found_and_read(audit, pairs_file, model_folder, tmp_path, monkeypatch):
    """Key and shard of the audit of these pairs and this model, as commit 242b0db wrote them into its cache."""
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("scored again"))
    key = json.loads((GOLDEN / "reference_table" / "key.json").read_text())
    # Other versions of libraries have tables of their own, and another transformers other fields in a config.
    installed = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    if key["versions"]["transformers"] != transformers.__version__:
        config = {name: value for name, value in make_model().config.to_dict().items() if name not in tables._ORIGIN}
        key["config"] = text_digest(config)
    folder = tmp_path / "cache" / "scores" / text_digest(key | {"versions": installed})
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "reference_table" / "000000.safetensors", folder)
    code, out, err = audit("--json")
    assert code == FAULTY, err
    assert json.loads((folder / "manifest.json").read_text())["key"] == key | {"versions": installed}
    monkeypatch.undo()
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "another"))
    code, scored, err = audit("--json")
    assert code == FAULTY, err
    found, again = (json.loads(text)["sets"][0]["all"]["ref_gap"]["sum"] for text in (out, scored))
    assert found == pytest.approx(again, abs=1e-3)


ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    # DPOTrainer would copy none of its weights to the adapter that it takes for its reference.
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_scored_as_it_stands(audit, model_folder, tmp_path, tokenizer, kind):
    """A trained adapter against its base: the policy differs, and differs by what merging it gives."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = get_peft_model(base, ADAPTERS[kind])
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    numbers = []
    for model in ("adapter", "merged"):
        code, out, err = audit("--json", "--ref-model", model_folder, model=str(tmp_path / model))
        assert code == FAULTY, err
        numbers.append(json.loads(out)["sets"][0]["all"])
    assert numbers[0]["policy"]["gap"] == pytest.approx(numbers[1]["policy"]["gap"], abs=1e-3)
    assert numbers[0]["ref_gap"] == numbers[1]["ref_gap"]
    assert abs(numbers[0]["policy"]["gap"] - numbers[0]["ref_gap"]["sum"]["mean"]) > 0.05


def test_training_on_an_adapter_finds_the_audits_table(audit, pairs_file, model_folder, tmp_path, tokenizer, monkeypatch):
    """DPOTrainer's reference is then its own copy of the adapter."""
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    get_peft_model(base, ADAPTERS["lora"]).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    code, _, err = audit(model=str(tmp_path / "adapter"))
    assert code == FAULTY, err
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("scored again"))
    args = CPOConstrainedConfig(**training_options(tmp_path / "run", constraint="clip", precompute_ref_log_probs=True))
    pairs = load_dataset("json", data_files=pairs_file, split="train", cache_dir=str(tmp_path / "data"))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    with pytest.warns(UserWarning, match="Of the 24 pairs"):
        trainer = CPOConstrainedTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
    assert len(table_of(trainer, "train")) == 23


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_on_the_head_is_refused(audit, model_folder, tmp_path, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    get_peft_model(base, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    code, out, err = audit(model=str(tmp_path / "adapter"))
    assert code == 2 and out == "" and "changes lm_head" in err and "Merge it into its base" in err


def test_two_processes_share_the_work_and_are_one(audit, pairs_file, model_folder, tmp_path):
    """One document, and the table of one process, to the bit."""
    code, alone, err = audit("--json")
    assert code == FAULTY, err
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRL_CPO_CACHE": str(tmp_path / "two")}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    launch = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "-m", "trl_cpo", "audit"]
    command += ["--model", model_folder, "--dataset", pairs_file, "--max-length", "64", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)
    assert done.returncode == FAULTY, done.stderr[-3000:]
    assert json.loads(done.stdout) == json.loads(alone)
    (one,), (two,) = ((tmp_path / name / "scores").glob("*/000000.safetensors") for name in ("cache", "two"))
    assert one.parent.name == two.parent.name and one.read_bytes() == two.read_bytes()


def test_a_draw_is_a_random_one_and_the_same_each_time(audit):
    documents = [json.loads(audit("--json", "--preflight-only", "--max-pairs", 6, "--seed", seed)[1]) for seed in (1, 1, 2)]
    seen = [[pair["row"] for pair in document["sets"][0]["preflight"]["seen"]] for document in documents]
    assert seen[0] == seen[1] != seen[2]
    assert all(document["sets"][0]["preflight"]["given"] == 6 and document["sets"][0]["rows"] == N for document in documents)


def test_hh_text_and_several_splits(audit, tmp_path):
    folder = tmp_path / "hh"
    folder.mkdir()
    for split, answers in (("train", ["Yes.", "No.", "Maybe so."]), ("test", ["Red.", "Blue."])):
        rows = [
            {"chosen": f"\n\nHuman: Q{n}?\n\nAssistant: {a}", "rejected": f"\n\nHuman: Q{n}?\n\nAssistant: not {a}"}
            for n, a in enumerate(answers)
        ]
        if split == "train":
            rows.insert(1, {"chosen": "no dialogue", "rejected": rows[0]["rejected"]})
        Dataset.from_list(rows).to_json(folder / f"{split}.jsonl")
    code, out, err = audit("--json", "--split", "train", "test", dataset=str(folder))
    assert code == 0, err
    train, test = json.loads(out)["sets"]
    assert (train["set"], train["all"]["pairs"], train["refused"], train["rows"]) == ("train", 3, 1, 4)
    assert (test["set"], test["all"]["pairs"], test["refused"]) == ("test", 2, 0)
    assert {pair["row"] for pair in train["worst"]} <= {0, 2, 3}
    (reason,) = train["refused_for"]
    assert (reason["reason"], reason["count"], reason["rows"]) == ("not_a_dialogue", 1, [1]) and test["refused_for"] == []
    out = audit("--split", "train", "--preflight-only", dataset=str(folder))[1]
    assert f"  1 not_a_dialogue: {reason['says']} (rows 1)" in out


def test_each_pair_is_written_where_asked(audit, tmp_path, ref_model_folder):
    """The numbers that the document's fractions are made of."""
    out = tmp_path / "pairs.jsonl"
    code, text, err = audit("--json", "--pairs", out, "--ref-model", ref_model_folder, "--slice", "kind")
    assert code == FAULTY, err
    document = json.loads(text)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in rows] == [n for n in range(N) if n not in (5, 7)] and len(rows) == counted(
        document, "misaligned", "sum"
    )[1]
    for name in ("sum", "mean"):
        assert sum(row["misaligned"][name] for row in rows) == counted(document, "misaligned", name)[0]
    assert sum(row["in_undesirable_region"]["sum"] for row in rows) == counted(document, "policy", "in_undesirable_region")[0]
    for row in rows:
        assert row["ref_gap"]["sum"] == row["ref_chosen"] - row["ref_rejected"]
        assert row["gap"]["sum"] == row["policy_chosen"] - row["policy_rejected"]
        assert row["slices"] == {"kind": "even" if row["row"] % 2 == 0 else "odd"} and row["reward_gap"] == row["row"] % 3 - 0.5
    code, text, err = audit("--pairs", out)
    assert code == 2 and "exists and is not overwritten" in err
    code, text, err = audit("--pairs", tmp_path / "no" / "x.jsonl")
    assert code == 2 and "in a folder that does not exist" in err
    code, text, err = audit("--pairs", tmp_path / "y.jsonl", "--preflight-only")
    assert code == 2 and "scores nothing" in err and not (tmp_path / "y.jsonl").exists()


def test_how_each_group_starts(audit, tmp_path):
    """The same counts as of the slices of that column; the command trains with these groups."""
    code, text, err = audit("--json", "--slice", "kind", "--by", "kind")
    assert code == FAULTY, err
    (one,) = json.loads(text)["sets"]
    slices = {part["value"]: part for part in one["slices"]}
    assert one["groups"]["column"] == "kind" and [each["group"] for each in one["groups"]["each"]] == ["even", "odd"]
    for each in one["groups"]["each"]:
        assert (each["pairs"], each["misaligned"]) == (slices[each["group"]]["pairs"], slices[each["group"]]["misaligned"])
        assert each["deficit"]["50%"]["n"] == each["pairs"] - slices[each["group"]]["same_target"]["k"]
    code, text, err = audit("--by", "kind")
    assert "Groups by kind (deficit" in text and " --group_column kind " in text

    def refused(values):
        Dataset.from_list([{**row, "topic": value} for row, value in zip(pair_rows(len(values)), values, strict=True)]).to_json(
            tmp_path / "other.jsonl"
        )
        code, out, err = audit("--by", "topic", dataset=tmp_path / "other.jsonl")
        assert code == 2 and out == ""
        return err

    assert "row 1: --by topic must hold the name of a group, without '/'; got None" in refused(["a", None])
    assert "row 0: --by topic must hold the name of a group, without '/'; got 'a/b'" in refused(["a/b", "c"])
    err = refused([str(number) for number in range(MOST_GROUPS + 1)])
    assert "holds 101 different values, too many for groups (at most 100). Name a column with few, or use --slice topic" in err
    code, out, err = audit("--by", "source")
    assert code == 2 and "no column 'source'" in err


def test_refusals_say_what_to_do_and_exit_with_2(audit, tmp_path, model_folder, tokenizer):
    def refused(*more, **where):
        code, out, err = audit(*more, **where)
        assert code == 2 and out == "" and "Traceback" not in err
        assert err.rstrip().endswith("trl-cpo audit --help")
        return err

    err = refused("--slice", "source", "--score-columns", "good", "bad")
    assert "no column 'source' and no column 'good' and no column 'bad'" in err and "kind" in err
    assert "must hold numbers" in refused("--score-columns", "kind", "kind")
    err = refused("--beta", 0, "--gamma", -1, "--max-pairs", 0, "--beta", "nan")
    assert "--beta must be > 0; got nan" in err and "--gamma must be >= 0; got -1" in err and "--max-pairs must be > 0" in err
    assert "unknown option --bta. Did you mean --beta?" in refused("--bta", 1)
    assert "Cannot load a tokenizer" in refused(model=str(tmp_path / "nothing"))
    assert "There is no file or folder" in refused(dataset="./nothing.jsonl")
    assert "has no split 'dev'" in refused("--split", "dev")
    other = tmp_path / "other"
    make_model(vocab_size=384).save_pretrained(other)
    assert "vocabulary of 400 tokens, but ref_model one of 384" in refused("--ref-model", str(other))
    assert "every prompt alone fills max_length=1 tokens" in refused("--max-length", 1)


CARRIED = [" Rain.<|im_end|>\n", " Rain.<|im_end|>", " Rain.<|im_end|>\n\n "]


@pytest.mark.parametrize("answer", CARRIED, ids=["end and line", "end alone", "end and blanks"])
def test_text_that_carries_its_template_is_a_fault_and_exits_with_1(audit, tmp_path, answer):
    """The tokenizer's end token is appended, unless the text ends in it to the last character."""
    rows = pair_rows(6)
    for row in rows:
        row |= {"chosen": answer}
    Dataset.from_list(rows).to_json(tmp_path / "carried.jsonl")
    code, out, _ = audit("--json", "--preflight-only", dataset=tmp_path / "carried.jsonl")
    found = {one["finding"]: one for one in json.loads(out)["sets"][0]["preflight"]["findings"]}
    if answer.endswith("<|im_end|>"):
        assert code == 0 and "double_end" not in found
    else:
        assert code == FAULTY and found["double_end"]["count"] == 6
    code, out, _ = audit("--preflight-only", dataset=tmp_path / "carried.jsonl")
    assert ("FAULT: 6 of 6" in out) == (code == FAULTY)


def test_turns_of_others_in_an_answer_are_counted_in_tokens(audit, tmp_path, tokenizer):
    """Whole conversations that part at an earlier turn: the user's words behind that turn are scored as well."""
    rows = list(pairs_dataset(6, conversational=True))
    more = [{"role": "user", "content": "why do you like tea?"}, {"role": "assistant", "content": "maybe"}]
    rows[2]["chosen"] += more
    rows[4] = {
        "chosen": rows[4]["prompt"] + rows[4]["chosen"] + more,
        "rejected": rows[4]["prompt"] + rows[4]["rejected"] + more,
    }
    rows[4] |= {"prompt": rows[4]["chosen"][:1], "chosen": rows[4]["chosen"][1:], "rejected": rows[4]["rejected"][1:]}
    Dataset.from_list(rows).to_json(tmp_path / "turns.jsonl")
    code, out, _ = audit("--json", "--preflight-only", "--max-length", "0", dataset=tmp_path / "turns.jsonl")
    found = {one["finding"]: one for one in json.loads(out)["sets"][0]["preflight"]["findings"]}["other_turns"]
    turn = len(tokenizer("<|im_start|>user\nwhy do you like tea?<|im_end|>\n")["input_ids"])
    assert code == FAULTY and found["fault"] and found["rows"] == [2, 4] and found["tokens"] == 3 * turn
    whole = sum(
        len(tokenizer(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n")["input_ids"]) - 3 * (at == 0)
        for row in (rows[2], rows[4])
        for side in ("chosen", "rejected")
        for at, one in enumerate(row[side])
    )
    heads = len(tokenizer("<|im_start|>assistant\n")["input_ids"])
    assert found["of_tokens"] == whole + 4 * (3 - heads)
    _, out, _ = audit("--preflight-only", "--max-length", "0", dataset=tmp_path / "turns.jsonl")
    assert f"{3 * turn} of their {found['of_tokens']} tokens" in " ".join(out.split())
