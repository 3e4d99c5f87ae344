"""
DPO with a constraint on the preference gap, on HH-RLHF or any set of preference pairs.

# HH-RLHF and a small instruct model, by their hub names; full fine-tuning
accelerate launch examples/hh_rlhf.py

# The same with LoRA, a precomputed reference, and other hyperparameters
accelerate launch examples/hh_rlhf.py --use_peft --learning_rate 1e-5 --precompute_ref_log_probs \
    --per_device_train_batch_size 8 --max_length 512 --constraint softplus --gamma 1.0

# Plain DPO, for comparison
accelerate launch examples/hh_rlhf.py --constraint none

# The embedded model and pairs: no hub, no GPU, minutes
accelerate launch examples/hh_rlhf.py --config demo

--dataset_name takes a hub name, a local .jsonl[.gz], .json or .parquet file, or a folder. Every option of TRL's DPOConfig,
ModelConfig and ScriptArguments works here; unknown ones are refused. This script is `trl-cpo train`; the run itself is the
function `train` in trl_cpo/run/training.py.
"""

import sys

from trl_cpo.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
