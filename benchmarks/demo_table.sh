#!/bin/sh
# Every method on the demo data, three seeds: writes benchmarks/results/demo_table.md. At most 40 minutes on 2 cores.
set -eu
cd "$(dirname "$0")/.."

REQUIREMENTS=requirements.txt
. run/environment.sh

"$PYTHON" run/prepare.py demo
"$PYTHON" benchmarks/demo_table.py "$@"
