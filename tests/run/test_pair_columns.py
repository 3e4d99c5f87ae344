"""Tokens of the answers and columns to slice by, as a run writes them to pairs.json."""

import json
import math

import pytest
import torch
from datasets import Dataset

from trl_cpo.files.run_files import PAIR_COLUMNS
from trl_cpo.labels.columns import CARRIED
from trl_cpo.pairs import PairLogps, completion_lengths
from trl_cpo.run.pair_columns import answer_tokens, slice_columns
from trl_cpo.run.record import pairs_document

from helpers.by_hand import make_trainer


@pytest.mark.parametrize(("max_length", "keep"), [(None, "keep_start"), (14, "keep_start"), (14, "keep_end")])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The .*keep_end:FutureWarning")
def test_counts_are_those_that_means_divide_by(tmp_path, tokenizer, model_folder, ref_model_folder, max_length, keep):
    trainer = make_trainer(
        tmp_path, tokenizer, model_folder, ref_model_folder, constraint="clip", max_length=max_length, truncation_mode=keep
    )
    counts = answer_tokens(trainer.eval_dataset, max_length, keep)
    masks = [batch["completion_mask"] for batch in trainer.get_eval_dataloader()]
    expected = [completion_lengths(mask).chunk(2) for mask in masks]
    for side in (0, 1):
        assert counts[side] == torch.cat([pair[side] for pair in expected]).tolist()


def test_of_a_stream_or_of_untokenized_pairs_nothing_is_known():
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    assert answer_tokens(rows, None, "keep_start") is None
    assert (
        answer_tokens(rows.to_iterable_dataset(), None, "keep_start") is None
        and slice_columns(rows.to_iterable_dataset()) == {}
    )


def test_columns_that_part_the_pairs_are_kept():
    count = 30
    rows = Dataset.from_dict(
        {
            "prompt": ["p"] * count,
            "chosen": ["c"] * count,
            "rejected": ["r"] * count,
            "source": ["a", "b", None] * 10,
            "margin": [at / 3 if at else math.nan for at in range(count)],
            "safe": [True, False] * 15,
            "always": ["same"] * count,
            "id": [f"row {at}" for at in range(count)],
            "text": ["x" * 81, "y"] * 15,
            "tags": [["a"], ["b"]] * 15,
            "chosen_ids": [[1]] * count,
            "ref_chosen_logps": [float(at) for at in range(count)],
            **{name: [at % 3 for at in range(count)] for name in CARRIED},
        }
    )
    found = slice_columns(rows)
    assert list(found) == ["source", "margin", "safe"] and found["source"] == ["a", "b", None] * 10
    assert found["margin"][0] is None and found["margin"][3] == 1.0


def test_they_are_written_beside_the_pairs_that_are_kept():
    pairs = PairLogps(*torch.arange(12.0).reshape(3, 4).unbind(1))
    about = dict(reduction="sum", gamma=1.0, beta=0.1, constraint="clip", split="test", start_is_reference=True)
    degenerate = torch.tensor([False, True, False])
    document = pairs_document(
        pairs, **about, degenerate=degenerate, tokens=([3, 4, 5], torch.tensor([6, 7, 8])), slices={"source": ["a", "b", "c"]}
    )
    assert document["columns"] == [*PAIR_COLUMNS, "chosen_tokens", "rejected_tokens"]
    assert [row[6:] for row in document["rows"]] == [[3, 6], [5, 8]] and document["slices"] == {"source": ["a", "c"]}
    json.dumps(document)
    # Of another number of pairs, nobody knows which is whose; without them the document is what it was.
    plain = pairs_document(pairs, **about, degenerate=degenerate)
    assert plain == pairs_document(pairs, **about, degenerate=degenerate, tokens=([3], [4]), slices={"source": ["a"]})
    assert plain["columns"] == list(PAIR_COLUMNS) and "slices" not in plain and len(plain["rows"][0]) == 6
