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
# It runs on other Linuxes than this one, and asks for no library of CUDA.
compgen -G "$work/files/*-manylinux_*_x86_64.whl" >/dev/null
if ldd "$work/venv/bin/mmpo-fast" | grep --ignore-case --extended-regexp 'cuda|cublas|nccl'; then exit 1; fi
# Completions and man pages came with it, and nothing of its making is left in the tree.
share=$work/venv/share
test -s "$share/man/man1/mmpo-fast-train.1"
test -s "$share/bash-completion/completions/mmpo-fast"
test -s "$share/zsh/site-functions/_mmpo-fast"
test -s "$share/fish/vendor_completions.d/mmpo-fast.fish"
test ! -e mmpo_fast.data
export MMPO_FAST_CACHE="$work/cache"
root=$PWD
cd "$work"
"$work/venv/bin/python" "$root/tests/python/check_package.py" "$root"
tar xzf files/*.tar.gz
./mmpo-fast-*/mmpo-fast --version
test -s mmpo-fast-*/man/man1/mmpo-fast-train.1
test -s mmpo-fast-*/completions/mmpo-fast.bash
