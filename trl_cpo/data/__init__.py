"""Preference pairs: loading, conversion and validation."""
