#!/usr/bin/env bash
# Builds what users install, from the tree as it is: a wheel and a tar.gz, both with the program, completions and man pages, and their
# checksums.
#
#     tools/release.sh [--as-tested] [FOLDER]        FOLDER is target/release-files by default
#
# The kernels are inside where nvcc is found (tools/setup_cuda.sh fetches it); no CUDA library is linked, the driver is loaded at run
# time. MMPO_FAST_CUDA=require fails without nvcc. Packages: maturin from PyPI, in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
# The emulated device is for tests; --as-tested keeps it in, so that nothing is compiled again.
if [ "${1:-}" = --as-tested ]; then shift; else export MMPO_FAST_EMULATED=off; fi
folder=${1:-target/release-files}
tools=target/release-tools
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
[ -x "$tools/bin/maturin" ] || {
  python3 -m venv "$tools"
  "$tools/bin/python" -m pip install --quiet --disable-pip-version-check 'maturin>=1.9,<2'
}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

cargo build --release --locked --quiet --bin mmpo-fast
program=${CARGO_TARGET_DIR:-target}/release/mmpo-fast

# maturin puts what lies in a folder of this name into the wheel: pip installs it under the environment's own share/.
data=mmpo_fast.data
scratch=$(mktemp -d)
trap 'rm -rf "$scratch" "$data"' EXIT
rm -rf "$data"
share=$data/data/share
mkdir -p "$share/bash-completion/completions" "$share/zsh/site-functions" "$share/fish/vendor_completions.d"
"$program" completions bash >"$share/bash-completion/completions/mmpo-fast"
"$program" completions zsh >"$share/zsh/site-functions/_mmpo-fast"
"$program" completions fish >"$share/fish/vendor_completions.d/mmpo-fast.fish"
"$program" man "$share/man/man1" >/dev/null

name=mmpo-fast-$version-$(uname -m)-linux
mkdir -p "$scratch/$name/completions" "$scratch/$name/man"
cp "$program" README.md LICENSE CHANGELOG.md "$scratch/$name/"
cp -r "$share/man/man1" "$scratch/$name/man/"
cp "$share/bash-completion/completions/mmpo-fast" "$scratch/$name/completions/mmpo-fast.bash"
cp "$share/zsh/site-functions/_mmpo-fast" "$scratch/$name/completions/mmpo-fast.zsh"
cp "$share/fish/vendor_completions.d/mmpo-fast.fish" "$scratch/$name/completions/mmpo-fast.fish"

# maturin looks at the libraries that the program asks for, and names the wheel for the oldest Linux that has them. It takes
# the program away while it packs it.
"$tools/bin/maturin" build --release --locked --out "$folder" --quiet
# The same files give the same archive.
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$(git log -1 --format=%ct 2>/dev/null || echo 0)" \
  -C "$scratch" -czf "$folder/$name.tar.gz" "$name"
(cd "$folder" && sha256sum ./*.whl ./*.tar.gz >SHA256SUMS)
echo "$folder"
