#!/bin/sh
# on-cluster COMMAND...: make this container a node of the Ray cluster at RAY_ADDRESS, then become COMMAND.
#
# A driver needs a Ray node on its own machine. This one has no CPUs and no GPUs, so that no actor is put beside the
# driver; it ends with the container.
set -eu
ray start --address="$RAY_ADDRESS" --num-cpus=0 --num-gpus=0 --object-store-memory=268435456 > /dev/null
exec "$@"
