"""The embedded demo: pairs as HH-RLHF text (PAIR_FILES, beside this file) and a small model (`model.py`)."""

PAIR_FILES = {"train": "train.jsonl", "test": "test.jsonl"}
