"""Exact resume: a resumed run computes the same numbers as an uninterrupted one."""
