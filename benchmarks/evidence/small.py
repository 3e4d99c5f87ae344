"""A small language model: made, taught text, taught answers."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def make_model(vocabulary: int, width: int, layers: int, eos: int, pad: int):
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return LlamaForCausalLM(config)


def padded(rows: list[list[int]], pad: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, (rows, longest)."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for at, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[at, where], mask[at, where] = torch.tensor(row), 1
    return ids, mask


def teach(
    model,
    rows: list[tuple[list[int], int]],
    pad: int,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    said: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Cross-entropy on token rows; of each, positions before its second entry are read and not learnt. Rate falls to 0."""
    order, shuffled = random.Random(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        if len(shuffled) < batch:
            shuffled = order.sample(range(len(rows)), len(rows))
        chosen, shuffled = [rows[at] for at in shuffled[:batch]], shuffled[batch:]
        ids, mask = padded([row for row, _ in chosen], pad)
        known = torch.tensor([start for _, start in chosen])
        learnt = (mask == 1) & (torch.arange(ids.shape[1]) >= known[:, None])
        given = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(learnt, ids, -100)}
        loss = model(**{name: tensor.to(model.device) for name, tensor in given.items()}).loss
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        said(step, loss.item())


def language_model(texts: list[str], tokenizer, folder: Path, *, width: int, layers: int, steps: int, batch: int, longest: int):
    """Makes a small model that learnt these texts, in a folder."""
    model = make_model(len(tokenizer), width, layers, tokenizer.eos_token_id, tokenizer.pad_token_id)
    rows = [([*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:longest], 1) for text in texts]
    losses: list[float] = []

    def said(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 100 == 99:
            print(f"language model, step {step + 1}: {sum(losses[-100:]) / 100:.2f} nats a token", flush=True)

    teach(model, rows, tokenizer.pad_token_id, steps=steps, batch=batch, learning_rate=3e-3, seed=0, said=said)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
