#!/usr/bin/env bash
# One training command on all hosts of a Cloud TPU slice.
#
#     TPU=my-tpu ZONE=us-west4-a RUN=/mnt/runs/first tools/launch/tpu_pod.sh \
#         --config=configs/pretrain.py --config.mesh.fsdp=16
#
# JAX finds the hosts of a slice by itself. Before the first time, and whenever the code changes,
# bring the same code to all hosts (a run whose hosts have other code is refused at its start):
#
#     gcloud compute tpus tpu-vm scp --recurse --worker=all --zone=$ZONE . $TPU:llm_jax
#     gcloud compute tpus tpu-vm ssh $TPU --worker=all --zone=$ZONE \
#         --command='pip install -e "llm_jax[tpu]"'
#
# Killed with the terminal, the run resumes when the same command is given again.
set -euo pipefail

TPU=${TPU:?the name of the slice, as gcloud compute tpus tpu-vm list shows it}
ZONE=${ZONE:?its zone}
RUN=${RUN:?the run directory, on storage that all hosts mount: Filestore, or a bucket by gcsfuse}
CODE=${CODE:-llm_jax}     # where this repository lies on each host
PYTHON=${PYTHON:-python3}

command="cd ${CODE@Q} && exec ${PYTHON@Q} -m llm_jax.main --workdir=${RUN@Q} ${*@Q}"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
