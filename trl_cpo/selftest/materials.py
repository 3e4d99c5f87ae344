"""What the self-test trains: a tiny Llama with random weights, a tokenizer of numbered words, pairs. Nothing is read."""

import random
from collections.abc import Sequence

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 40
_PAD, _END = "[pad]", "[end]"
_IDS = {_PAD: 0, _END: 1} | {f"w{number}": number + 2 for number in range(WORDS)}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `w0` to `w39`, and tokens that pad and end a text."""
    backend = Tokenizer(models.WordLevel(_IDS, unk_token=_PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=_PAD, eos_token=_END)


def token_ids(text: str) -> list[int]:
    """The ids of a text, without the tokenizer."""
    return [_IDS[word] for word in text.split()]


#: The id that ends an answer.
END = _IDS[_END]


def model(seed: int, dropout: float = 0.0) -> LlamaForCausalLM:
    """A Llama of one layer whose answers are far from uniform, so that errors show."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(_IDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=_IDS[_PAD],
    )
    return LlamaForCausalLM(config)


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of uneven lengths: the rejected answers are longer or shorter than the chosen ones."""
    drawn = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{drawn.randrange(WORDS)}" for _ in range(drawn.randint(low, high)))

    return [{"prompt": words(2, 6), "chosen": f" {words(1, 7)}", "rejected": f" {words(1, 7)}"} for _ in range(count)]


def dataset(pairs: Sequence[dict[str, str]]) -> Dataset:
    """The pairs as the trainer takes them."""
    return Dataset.from_list(list(pairs))
