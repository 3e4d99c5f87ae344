"""
LoRA or QLoRA from training to a merged model: trains an adapter, saves, reloads and merges it, and checks the result.

# LoRA: the adapter in Qwen-LoRA/, the merged model in Qwen-LoRA/merged/
python examples/lora.py --dataset_name trl-lib/ultrafeedback_binarized --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --constraint clip --gamma 1.0 --learning_rate 1e-5 --output_dir Qwen-LoRA

# QLoRA: the weights in 4 bits
python examples/lora.py --dataset_name trl-lib/ultrafeedback_binarized --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --load_in_4bit --bnb_4bit_quant_type nf4 --constraint clip --gamma 1.0 --learning_rate 1e-5 --output_dir Qwen-QLoRA

# Train an adapter further; the reference is then the adapter as loaded
python examples/lora.py --adapter Qwen-LoRA --learning_rate 1e-6 --output_dir Qwen-LoRA-2 ...

An adapter trained on 4-bit weights belongs to those weights. The script dequantizes them before merging, so that the merged
model is the one that was trained; merging into the original weights would add the rounding error of 4 bits. (On CPUs with
AVX512-BF16, 4-bit layers compute in bfloat16 during evaluation, so the check below finds differences of that size.)
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer


@dataclass
class AdapterArguments(ScriptArguments):
    """ScriptArguments plus an adapter to start from."""

    adapter: str | None = field(default=None, metadata={"help": "Folder of an adapter to train further."})


def load_base(model_args: ModelConfig):
    options = {"dtype": model_args.dtype, "quantization_config": get_quantization_config(model_args)}
    return AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **options)


@torch.no_grad()
def logits_of(model, tokenizer) -> torch.Tensor:
    inputs = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt").to(model.device)
    return model.eval()(**inputs).logits.float()


def main(script_args, training_args, model_args):
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    model_args.use_peft = True
    if script_args.adapter:
        model = PeftModel.from_pretrained(load_base(model_args), script_args.adapter, is_trainable=True)
        given = {"model": model}
    else:
        training_args.model_init_kwargs = {"dtype": model_args.dtype}
        given = {"model": model_args.model_name_or_path, "peft_config": get_peft_config(model_args)}
        given["quantization_config"] = get_quantization_config(model_args)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    trainer = CPOConstrainedTrainer(
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        processing_class=tokenizer,
        **given,
    )
    trainer.train()
    # Saves only the adapter: a few megabytes.
    trainer.save_model(training_args.output_dir)
    if not trainer.is_world_process_zero():
        return

    loaded = PeftModel.from_pretrained(load_base(model_args), training_args.output_dir)
    adapted = logits_of(loaded, tokenizer)
    with loaded.disable_adapter():
        moved = (adapted - logits_of(loaded, tokenizer)).abs().max().item()

    base = load_base(model_args)
    if model_args.load_in_4bit or model_args.load_in_8bit:
        base = base.dequantize()
    merged = PeftModel.from_pretrained(base, training_args.output_dir).merge_and_unload()
    error = (adapted - logits_of(merged, tokenizer)).abs().max().item()

    folder = Path(training_args.output_dir) / "merged"
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"the adapter moves logits by up to {moved:.2e}; those of the merged model are off by up to {error:.2e}")
    print(f"adapter  {training_args.output_dir}\nmerged   {folder}")


if __name__ == "__main__":
    main(*TrlParser((AdapterArguments, CPOConstrainedConfig, ModelConfig)).parse_args_and_config())
