#!/bin/sh
# Trains a method and tests it. Edit this file, or give a config and overrides on the command line:
#
#   sh train_test.sh                                             the demo, with everything it needs
#   sh train_test.sh configs/clipspm/hmdb51.yaml TRAIN.SHOT=5    any config, any override
#   sh train_test.sh configs/clipspm/hmdb51.yaml TEST.ONLY_TEST=true TEST.TEST_MODEL_PATH=best.pt
set -eu

CONFIG=configs/clipspm/demo.yaml      # what to run if no config is given
# export CUDA_VISIBLE_DEVICES=0       # which GPU; without this line the first one, or the CPU if there is none

case "${1:-}" in
    /*.yaml | /*.yml) CONFIG=$1; shift ;;
    *.yaml | *.yml) CONFIG=$(pwd)/$1; shift ;;
esac
CDPATH= cd -- "$(dirname -- "$0")"

REQUIREMENTS=requirements.txt
. run/environment.sh

case "$CONFIG" in
    */demo.yaml) "$PYTHON" run/prepare.py demo ;;    # renders the demo's videos unless they exist
esac

"$PYTHON" run/run.py --cfg "$CONFIG" "$@"
# Several GPUs:  "$PYTHON" -m torch.distributed.run --nproc_per_node=2 run/run.py --cfg "$CONFIG" "$@"
