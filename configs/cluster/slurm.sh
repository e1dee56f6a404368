#!/usr/bin/env bash
# Two nodes of eight GPUs: sbatch configs/cluster/slurm.sh. Lightning reads nodes and processes from SLURM.
# Two minutes before the time is over, or when the job is pre-empted, the run saves itself and the job is queued again.
#SBATCH --job-name=lit_grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

srun --kill-on-bad-exit=1 lit-grpo fit -c configs/paper/2grpo.yaml \
    --trainer.strategy fsdp2 --trainer.num_nodes 2 --trainer.devices 8 \
    --run_dir runs/my_run --ckpt_path last
code=$?
if [ "$code" -eq 143 ] || [ "$code" -eq 138 ]; then # told to end, and saved; or told before there was anything to save
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
