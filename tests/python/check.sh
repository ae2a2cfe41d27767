#!/usr/bin/env bash
# Builds the wheel, installs it into a fresh environment, and uses it as people do: the command, and the Python package.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tools/release.sh --as-tested "$work/files" >/dev/null
(cd "$work/files" && sha256sum --quiet -c SHA256SUMS)
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps "$work"/files/*.whl
export MMPO_FAST_CACHE="$work/cache"
root=$PWD
cd "$work"
"$work/venv/bin/python" "$root/tests/python/check_package.py" "$root"
tar xzf files/*.tar.gz
./mmpo-fast-*/mmpo-fast --version
test -s mmpo-fast-*/man/man1/mmpo-fast-train.1
test -s mmpo-fast-*/completions/mmpo-fast.bash
