#!/bin/bash
# Several machines under Slurm: one Accelerate launcher on each, which starts that machine's processes.
#
#   sbatch examples/slurm.sh examples/drop_in.py --dataset_name ... --output_dir /shared/out
#
# CONFIG selects the strategy (ddp.yaml, zero2.yaml, zero3.yaml, fsdp2.yaml). Put the output folder where all machines see
# it, or add --save_on_each_node. Set --nodes, --gpus-per-node, --cpus-per-task and --time below for your cluster.
#SBATCH --job-name=trl-cpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail
CONFIG=${CONFIG:-deepspeed_configs/zero3.yaml}
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
# sed reads all of the output; `head` would break the pipe and end the script.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# One port per job, so that two jobs on a machine do not collide.
port=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}

# --kill-on-bad-exit: if one machine's launcher fails, the others end as well.
srun --kill-on-bad-exit=1 bash -c '
    config=$1 gpus=$2 first=$3 port=$4
    shift 4
    exec accelerate launch --config_file "$config" \
        --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes $((SLURM_NNODES * gpus)) \
        --main_process_ip "$first" --main_process_port "$port" "$@"
' launch "$CONFIG" "$GPUS" "$first" "$port" "$@"
