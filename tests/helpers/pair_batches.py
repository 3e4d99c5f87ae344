"""Batches of made-up pairs, put together by TRL's own collator, and hypothesis strategies for them."""

import random

from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference

from helpers.families import VOCABULARY


def model_inputs(pairs: list[tuple[list[int], list[int], list[int]]], **collator) -> dict:
    """What TRL's loss would pass a model for these (prompt, chosen, rejected) token lists."""
    examples = [dict(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in pairs]
    batch = DataCollatorForPreference(pad_token_id=0, **collator)(examples)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return dict(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        use_cache=False,
        fused_lm_head=True,
    )


def random_pairs(sizes: list[tuple[int, int, int]], seed: int = 0, start_alike: int = 0):
    """Pairs of the given (prompt, chosen, rejected) lengths; answers share their first `start_alike` tokens."""
    rng = random.Random(seed)

    def draw(count):
        return [rng.randrange(3, VOCABULARY) for _ in range(count)]

    pairs = []
    for prompt, chosen, rejected in sizes:
        common = draw(start_alike)
        pairs.append((draw(prompt), (common + draw(chosen))[:chosen], (common + draw(rejected))[:rejected]))
    return pairs


# The shapes that go wrong first: no prompt, one-token prompt and answer, long beside short, answers alike.
HARD_SIZES = [(0, 5, 3), (1, 1, 1), (30, 2, 14), (7, 20, 1), (12, 1, 1), (2, 9, 9)]

# Few different tokens, so that answers often start alike and rows are sometimes equal.
_TOKENS = st.integers(3, 6)
_ANSWER = st.lists(_TOKENS, min_size=1, max_size=10)
_PAIR = st.tuples(st.lists(_TOKENS, max_size=12), _ANSWER, _ANSWER)
PAIRS = st.lists(_PAIR, min_size=1, max_size=5)
COLLATOR = st.fixed_dictionaries(
    {
        "max_length": st.one_of(st.none(), st.integers(2, 16)),
        "truncation_mode": st.sampled_from(["keep_start", "keep_end"]),
        "pad_to_multiple_of": st.sampled_from([None, 8]),
    }
)
