#!/usr/bin/env bash
# Makes .venv at the repository's root: PyTorch (CPU) and transformers, pinned, from PyPI alone.
# Downloads about 720 MB, takes 2.2 GB of disk. Needs python3 (3.11 or later), cc and binutils.
# Only the scripts under tests/reference and benches/peers need it: the goldens they made are committed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-"$here/../../.venv"}

if [ -x "$venv/bin/python" ] && cmp -s "$here/requirements.txt" "$venv/requirements.installed"; then
  echo "$venv is up to date"
  exit 0
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup.sh: python3 is $(python3 -V 2>&1 | cut -d" " -f2), 3.11 or later is needed" >&2
  exit 1
}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$here/requirements.txt"
"$venv/bin/python" "$here/cuda_stubs.py"
"$venv/bin/python" - <<'PYTHON'
import torch
import transformers

product = torch.ones(8, 8) @ torch.ones(8, 8)
assert product.sum().item() == 512.0, product
print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
PYTHON
cp "$here/requirements.txt" "$venv/requirements.installed"
