#!/bin/sh
# Lint, type check and tests on all cores, in the environment that train_test.sh uses too. Arguments go to pytest.
#
#   sh run_tests.sh                        everything
#   sh run_tests.sh --fast                 without the slow tests, see tests/conftest.py
#   sh run_tests.sh tests/test_otam.py     one file
set -eu
CDPATH= cd -- "$(dirname -- "$0")"

REQUIREMENTS="requirements.txt requirements-report.txt tests/requirements.txt"
. run/environment.sh

export OMP_WAIT_POLICY=PASSIVE    # as run/run.py sets it
"$PYTHON" -c "import torch, torchvision; print('torch', torch.__version__, 'torchvision', torchvision.__version__)"
# In a clone, only the files that git tracks: a user's own methods may have another style.
SOURCES=$(git ls-files '*.py' 2>/dev/null) || SOURCES=.
TYPED=$(git ls-files 'models/*.py' 'run/*.py' 'episodes/*.py' 'videotransforms/*.py' 'utils/*.py' 2>/dev/null) || TYPED=
"$PYTHON" -m ruff check $SOURCES
"$PYTHON" -m ruff format --check $SOURCES
"$PYTHON" -m mypy $TYPED
[ "${1:-}" != --fast ] || { shift; set -- -m "not slow" "$@"; }
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"    # one process for each core
"$PYTHON" -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 15 "$@"
