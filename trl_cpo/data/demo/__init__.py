"""The embedded demo: pairs as HH-RLHF text (PAIR_FILES, beside this file) and a small model (`model.py`)."""

#: What the demo's pairs and its model are called.
DEMO = "demo"
PAIR_FILES = {"train": "train.jsonl", "test": "test.jsonl"}
