"""The embedded demo: pairs in HH-RLHF's own text form (PAIR_FILES, beside this file) and a small model (`model.py`)."""

PAIR_FILES = {"train": "train.jsonl", "test": "test.jsonl"}
