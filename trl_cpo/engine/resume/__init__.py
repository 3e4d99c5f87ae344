"""Interrupted and resumed training is uninterrupted training."""
