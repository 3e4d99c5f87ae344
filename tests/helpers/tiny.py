"""A tiny tokenizer, tiny models and preference pairs: everything is made here, nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

torch.set_num_threads(1)
disable_progress_bars()

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "quick",
    "slow",
    "fox",
    "hen",
    "river",
    "stone",
    "runs",
    "walks",
    "jumps",
    "over",
    "under",
    "near",
    "big",
    "small",
    "old",
    "new",
    "cup",
    "of",
    "tea",
    "with",
    "salt",
    "and",
    "bread",
    "why",
    "how",
    "when",
    "do",
    "you",
    "like",
    "it",
    "yes",
    "no",
    "maybe",
    "never",
    "always",
    "seven",
    "three",
    "hills",
    "rain",
    "sun",
]


#: Of Qwen3-8B, for devices without memory.
SHAPE_8B = dict(
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(low, high)))


def pair_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """n plain-text pairs of uneven lengths."""
    rng = random.Random(seed)
    return [
        {
            "prompt": sentence(rng, 2, 12) + "?",
            "chosen": " " + sentence(rng, 1, 14),
            "rejected": " " + sentence(rng, 1, 14) + " x",
        }
        for _ in range(n)
    ]


def pairs_dataset(n: int = 12, seed: int = 0, conversational: bool = False) -> Dataset:
    rows = pair_rows(n, seed)
    if conversational:
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
                "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
            }
            for row in rows
        ]
    return Dataset.from_list(rows)


def hh_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """The same pairs as dialogues of HH-RLHF."""
    return [
        {
            "chosen": f"\n\nHuman: {row['prompt']}\n\nAssistant: {row['chosen'].strip()}",
            "rejected": f"\n\nHuman: {row['prompt']}\n\nAssistant: {row['rejected'].strip()}",
        }
        for row in pair_rows(n, seed)
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(1)
    backend.train_from_iterator([sentence(rng, 5, 20) for _ in range(200)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A Llama of 20 thousand parameters whose outputs are far from uniform, so that errors show."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


def make_moe(seed: int = 0) -> Qwen3MoeForCausalLM:
    """A mixture of four experts with its auxiliary loss, of the same tokenizer."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        initializer_range=0.2,
        router_aux_loss_coef=0.1,
        output_router_logits=True,
    )
    return Qwen3MoeForCausalLM(config)


def make_mamba(seed: int = 0) -> MambaForCausalLM:
    """A model without attention, of the same tokenizer."""
    torch.manual_seed(seed)
    return MambaForCausalLM(
        MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.2)
    )


def make_lora(**changes) -> LoraConfig:
    """Adapters that are not the usual zeros, so that policy and reference differ from the first step."""
    settings = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return LoraConfig(**{**settings, **changes})


def training_options(output_dir, **overrides) -> dict:
    """Options for a few deterministic steps on the CPU, for DPOConfig and CPOConstrainedConfig alike."""
    options = dict(
        output_dir=str(output_dir),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=64,
        max_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
        beta=0.5,
    )
    return {**options, **overrides}
