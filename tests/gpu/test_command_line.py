"""The command line on the device, from pairs to a report and an audit."""

import json

import torch
from transformers import AutoModelForCausalLM

from trl_cpo.cli import main

from helpers.on_gpu import LORA, ON_GPU, REHEARSAL
from helpers.tiny import pair_rows

pytestmark = ON_GPU


@LORA
def test_train_report_and_audit(lora, tmp_path, model_folder, monkeypatch, capsys, record):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(24)))
    command = ["train", "--model_name_or_path", model_folder, "--dataset_name", "pairs.jsonl", "--output_dir", "mine"]
    command += ["--held_out", "6", "--max_steps", "3", "--max_length", "128", "--logging_steps", "1", "--report_to", "none"]
    command += ["--eval_strategy", "steps", "--eval_steps", "1", "--per_device_train_batch_size", "4", "--price", "True"]
    command += ["--price_prompts", "2", "--price_tokens", "8", "--constraint", "clip", "--gamma", "0.5"]
    command += ["--save_strategy", "steps", "--save_steps", "2", "--learning_rate", "1e-3"]
    command += ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"] if lora else []
    command += ["--use_cpu"] if REHEARSAL else []
    code = main(command)
    said = capsys.readouterr()
    assert code == 0, said.err[-4000:]
    metrics = json.loads((tmp_path / "mine" / "metrics.json").read_text())
    assert metrics["after"]["eval_cpo/gap"] != metrics["before"]["eval_cpo/gap"] and "eval_cpo/kl" in metrics["after"]
    assert (tmp_path / "mine" / "price.json").is_file() and (tmp_path / "mine" / "pairs.json").is_file()

    # Resumed from its checkpoint, it is finished again.
    assert main([*command, "--resume_from_checkpoint", "mine/checkpoint-2"]) == 0
    capsys.readouterr()

    code = main(["report", "mine"])
    said = capsys.readouterr()
    assert code == 0, said.err[-4000:]

    code = main(["audit", "--model", model_folder, "--dataset", "pairs.jsonl", "--max-length", "128", "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err[-4000:]
    assert json.loads(said.out)["sets"][0]["all"]["misaligned"]["sum"]["n"] == 24

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    with torch.no_grad():
        assert bool(model(torch.tensor([[5, 6, 7]])).logits.isfinite().all())
    record(before=metrics["before"]["eval_cpo/gap"], after=metrics["after"]["eval_cpo/gap"], runtime=metrics.get("seconds"))
