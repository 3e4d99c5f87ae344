"""The embedded demo: pairs in HH-RLHF's own text form (PAIR_FILES, beside this file) and a small model (`model.py`)."""

#: What the demo's pairs and its model are called.
DEMO = "demo"
PAIR_FILES = {"train": "train.jsonl", "test": "test.jsonl"}
