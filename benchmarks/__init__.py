"""Benchmarks of trl-cpo against the installed DPOTrainer: `python -m benchmarks --help`."""
