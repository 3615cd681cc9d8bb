# Sets PYTHON to an interpreter that has what the files in REQUIREMENTS ask for; sourced by train_test.sh and
# run_tests.sh. The active environment is used if it has everything, else .venv, which is made and filled if need be.
# The first torch download is large. PIP_INSTALL_OPTIONS is passed on to pip, e.g. "-c tests/constraints.txt".

PYTHON=${PYTHON:-python3}
if ! "$PYTHON" run/requirements.py $REQUIREMENTS 2>/dev/null; then
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv .venv || exit 1
    PYTHON=.venv/bin/python
    if ! "$PYTHON" run/requirements.py $REQUIREMENTS 2>/dev/null; then
        echo "installing $REQUIREMENTS into .venv (a few minutes, once)" >&2
        for file in $REQUIREMENTS; do FILES="${FILES:-} -r $file"; done
        "$PYTHON" -m pip install --quiet --disable-pip-version-check $FILES ${PIP_INSTALL_OPTIONS:-} || exit 1
        "$PYTHON" run/requirements.py $REQUIREMENTS || exit 1
    fi
fi
