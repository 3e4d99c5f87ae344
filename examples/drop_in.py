"""
A plain TRL script for DPO with CPOConstrainedTrainer dropped in. Four lines differ, each marked "was".

# One GPU, or a CPU with --use_cpu --bf16 False
python examples/drop_in.py --dataset_name trl-lib/ultrafeedback_binarized --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --constraint clip --gamma 1.0 --output_dir Qwen2.5-0.5B-CPO

# Several GPUs: the whole model on each (ddp.yaml), or sharded over them (zero2.yaml, zero3.yaml, fsdp2.yaml)
accelerate launch --config_file deepspeed_configs/zero3.yaml --num_processes 4 examples/drop_in.py \
    --dataset_name trl-lib/ultrafeedback_binarized --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --constraint clip --gamma 1.0 --output_dir Qwen2.5-7B-CPO

--dataset_name is a hub name or a folder of files that `datasets` loads, with columns prompt, chosen and rejected.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config  # was: DPOConfig, ... too

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer  # was: from trl import DPOConfig, DPOTrainer


def main(script_args, training_args, model_args):
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    training_args.model_init_kwargs = dict(
        revision=model_args.model_revision, attn_implementation=model_args.attn_implementation, dtype=model_args.dtype
    )
    trainer = CPOConstrainedTrainer(  # was: DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, CPOConstrainedConfig, ModelConfig))  # was: DPOConfig
    main(*parser.parse_args_and_config())
