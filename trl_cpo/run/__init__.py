"""A training run from options to files: what `trl-cpo train` and examples/hh_rlhf.py do.

`arguments` are the options, `data` the pairs, `training` the run itself, `record` the files that it leaves.
"""
