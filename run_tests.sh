#!/bin/sh
# Lint, type check and tests, in the environment that train_test.sh uses too. Arguments go to pytest.
set -eu
cd "$(dirname "$0")"

REQUIREMENTS="requirements.txt tests/requirements.txt"
. run/environment.sh

export OMP_WAIT_POLICY=PASSIVE    # as run/run.py sets it
"$PYTHON" -c "import torch, torchvision; print('torch', torch.__version__, 'torchvision', torchvision.__version__)"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest "$@"
