"""Pairs of random tokens for the probe, as TRL's loss would pass them to a model."""

import torch

from ..repack import unwrap


class RandomPairs:
    """Draws pairs of a model's ordinary tokens, on the CPU, from its own generator."""

    def __init__(self, model: torch.nn.Module, seed: int):
        inner = unwrap(model)
        vocabulary = inner.config.get_text_config().vocab_size
        # Special and untrained tokens are at both ends of a vocabulary.
        self.low, self.high = vocabulary // 20 + 1, max(vocabulary * 9 // 10, vocabulary // 20 + 4)
        self.device = inner.get_input_embeddings().weight.device
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> torch.Tensor:
        return torch.randint(self.low, self.high, (count,), generator=self.generator)

    def other(self, tokens: torch.Tensor) -> torch.Tensor:
        """Random tokens that differ from `tokens` at every place."""
        span = self.high - self.low
        step = torch.randint(1, span, tokens.shape, generator=self.generator)
        return (tokens - self.low + step) % span + self.low

    def batch(self, sizes: tuple[tuple[int, int, int], ...]) -> dict:
        """A batch of pairs with the given (prompt, chosen, rejected) lengths; the answers differ from the first token on."""
        chosen, rejected = [], []
        for prompt, c, r in sizes:
            start, answer = self.draw(prompt), self.draw(c)
            rival = self.draw(r)
            rival[0] = self.other(answer[:1])[0]
            chosen.append(torch.cat([start, answer]))
            rejected.append(torch.cat([start, rival]))
        rows = chosen + rejected
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.low)
        places = torch.arange(ids.size(1))
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        prompts = torch.tensor([prompt for prompt, _, _ in sizes]).repeat(2)[:, None]
        mask = (places < lengths).long()
        labels = ids.masked_fill((places < prompts) | (mask == 0), -100)
        return self._inputs(ids, mask, labels)

    def change(self, inputs: dict, rows: tuple[int, ...]) -> dict:
        """The batch with all scored tokens of some rows replaced by others."""
        ids, labels = inputs["input_ids"].cpu().clone(), inputs["labels"].cpu().clone()
        for row in rows:
            answer = labels[row] != -100
            labels[row, answer] = ids[row, answer] = self._replacement(ids, row, answer)
        return self._inputs(ids, inputs["attention_mask"], labels)

    def _replacement(self, ids: torch.Tensor, row: int, answer: torch.Tensor) -> torch.Tensor:
        rival = ids[(row + len(ids) // 2) % len(ids)]
        first = answer.nonzero()[0, 0]
        while True:
            tokens = self.other(ids[row, answer])
            # The answers must still differ at their first token, or the packing plan would change.
            if tokens[0] != rival[first]:
                return tokens

    def _inputs(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> dict:
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return {**moved, "use_cache": False, "fused_lm_head": True}
