#!/bin/sh
# Lint, type check and tests, in the environment that train_test.sh uses too. Arguments go to pytest.
set -eu
CDPATH= cd -- "$(dirname -- "$0")"

REQUIREMENTS="requirements.txt tests/requirements.txt"
. run/environment.sh

export OMP_WAIT_POLICY=PASSIVE    # as run/run.py sets it
"$PYTHON" -c "import torch, torchvision; print('torch', torch.__version__, 'torchvision', torchvision.__version__)"
# A user's own methods beside ours need not keep our style: of a clone, the files that git tracks.
SOURCES=$(git ls-files '*.py' 2>/dev/null) || SOURCES=.
TYPED=$(git ls-files 'models/*.py' 'run/*.py' 'episodes/*.py' 'videotransforms/*.py' 'utils/*.py' 2>/dev/null) || TYPED=
"$PYTHON" -m ruff check $SOURCES
"$PYTHON" -m ruff format --check $SOURCES
"$PYTHON" -m mypy $TYPED
"$PYTHON" -m pytest "$@"
