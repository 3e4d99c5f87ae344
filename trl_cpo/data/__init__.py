"""Preference pairs: where they come from, and what they must look like."""
