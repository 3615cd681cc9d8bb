# Sets PYTHON to an interpreter that has the packages in the files of REQUIREMENTS; sourced by train_test.sh and
# run_tests.sh. The active environment is used if it has everything, else .venv, which is created and filled if needed.
#
#   PYTHON               the interpreter to use, or to create .venv with (default: python3)
#   TORCH_INDEX          package index for PyTorch; empty: pip's default, the CUDA build. Without a GPU, and not on the
#                        login node of a cluster, the default is the much smaller CPU build.
#   PIP_INSTALL_OPTIONS  options of pip install, e.g. "-c tests/constraints.txt"

PYTHON=${PYTHON:-python3}
CPU_INDEX=https://download.pytorch.org/whl/cpu

# PyTorch supports only CPython.
is_suitable() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10) or sys.implementation.name != "cpython")' 2>/dev/null
}
has_everything() { is_suitable "$1" && "$1" run/requirements.py $REQUIREMENTS 2>/dev/null; }
refuse() { echo "error: $1" >&2; exit 2; }

has_gpu() { nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/kfd ]; }
is_login_node() { command -v sbatch >/dev/null 2>&1 || command -v qsub >/dev/null 2>&1; }

install() {
    echo "installing $REQUIREMENTS into .venv (a few minutes, once)" >&2
    if [ -z "${TORCH_INDEX+set}" ] && [ "$(uname)" = Linux ] && ! has_gpu && ! is_login_node; then
        TORCH_INDEX=$CPU_INDEX
    fi
    pip="$PYTHON -m pip install --quiet --disable-pip-version-check"
    if [ -n "${TORCH_INDEX:-}" ]; then
        echo "PyTorch from $TORCH_INDEX; TORCH_INDEX= installs the CUDA build" >&2
        # --isolated: a package source in the user's pip settings must not supply one of the two without the other.
        $pip --isolated --index-url "$TORCH_INDEX" --timeout 5 --retries 0 torch torchvision \
            ${PIP_INSTALL_OPTIONS:-} 2>/dev/null ||
            echo "$TORCH_INDEX cannot be used; installing the default build of PyTorch" >&2
    fi
    files=
    for file in $REQUIREMENTS; do files="$files -r $file"; done
    $pip $files ${PIP_INSTALL_OPTIONS:-} || exit 1
}

if ! has_everything "$PYTHON"; then
    again="remove it (rm -r .venv) and start again"
    other="name another one, for example PYTHON=python3.12 sh train_test.sh"
    if [ -e .venv ]; then
        is_suitable .venv/bin/python || refuse ".venv cannot run here, or is not CPython 3.10 or newer; $again"
        .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null 2>&1 ||
            refuse ".venv has no pip, and it cannot be added; $again"
    else
        is_suitable "$PYTHON" || refuse "$PYTHON is missing or not CPython 3.10 or newer; $other"
        "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
            refuse "$PYTHON has no venv module (on Debian and Ubuntu: apt install python3-venv); install it, or $other"
        [ -w . ] || refuse "$(pwd) is not writable, so .venv cannot be created; copy the repository, or $other"
        "$PYTHON" -m venv .venv || refuse "cannot create .venv, see above"
    fi
    PYTHON=.venv/bin/python
    has_everything "$PYTHON" || install
fi
