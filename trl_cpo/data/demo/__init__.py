"""The embedded demo: two sets of pairs (files beside this one) and a small model (`model.py`).

The pairs were written for this project and have its licence, Apache-2.0. `demo` are decisions: support messages to one of
six teams. `demo-answers` are long answers, as HH-RLHF text.
"""

#: The demo's model, and its first set of pairs.
DEMO = "demo"
#: The embedded sets of pairs: by name, the file of each split.
PAIR_FILES = {
    DEMO: {"train": "decisions-train.jsonl", "test": "decisions-test.jsonl"},
    "demo-answers": {"train": "answers-train.jsonl", "test": "answers-test.jsonl"},
}
