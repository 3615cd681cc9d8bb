# Sets PYTHON to an interpreter that has the requirements; sourced by train_test.sh and run_tests.sh.
#   . run/environment.sh requirements.txt [more requirement files]
# The active environment is used if it has them all, else .venv, which is made and filled if need be.
# The first torch download is large; PIP_INSTALL_OPTIONS is passed on, e.g. "-c tests/constraints.txt".

PYTHON=${PYTHON:-python3}
if ! "$PYTHON" run/requirements.py "$@" 2>/dev/null; then
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || exit 1
    PYTHON=.venv/bin/python
    if ! "$PYTHON" run/requirements.py "$@" 2>/dev/null; then
        echo "installing the requirements into .venv (a few minutes, once)"
        for file in "$@"; do files="${files:-} -r $file"; done
        # shellcheck disable=SC2086
        "$PYTHON" -m pip install --quiet --disable-pip-version-check $files ${PIP_INSTALL_OPTIONS:-} || exit 1
        "$PYTHON" run/requirements.py "$@" || exit 1
    fi
fi
