#!/usr/bin/env bash
# On a GPU machine: checks the kernels on hardware, then measures them beside their peers, and writes everything into RESULTS.
#
#     run.sh RESULTS first|second|third|PART ...      README.md says what each does and what it costs
#
# Needs the driver and python3; the peers need PyTorch.
set -euo pipefail
exec python3 "$(cd "$(dirname "$0")" && pwd)/run.py" "$@"
