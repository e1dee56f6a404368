#!/usr/bin/env bash
# The same command on every node: HEAD=name.of.the.first NODES=2 bash configs/cluster/torchrun.sh
# A process that dies ends all of them; the same command goes on from the last checkpoint.
set -euo pipefail
: "${HEAD:?the name of one of the nodes}" "${NODES:?how many there are}"

exec torchrun --nnodes "$NODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id my_run \
    -m lit_grpo fit -c configs/paper/2grpo.yaml \
    --trainer.strategy fsdp2 --trainer.num_nodes "$NODES" --trainer.devices 8 \
    --run_dir runs/my_run --ckpt_path last
