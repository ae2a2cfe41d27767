#!/usr/bin/env bash
# Kernels on the CPU beside PyTorch and candle, ours before and behind the peers, into benches/results/<date>-<machine>/. Needs .venv
# (tests/reference/setup.sh). candle takes part where it is built: cargo build --release --package candle-peer.
#
#     bash benches/run_cpu_kernels.sh [MACHINE]
set -euo pipefail
cd "$(dirname "$0")/.."
processor=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -1)
machine=${1:-$(printf '%s-%s-threads-kernels' "$processor" "$(nproc)" | tr '[:upper:] ' '[:lower:]-' | tr -cd 'a-z0-9-')}
results=benches/results/$(date +%F)-$machine
mkdir -p "$results"
raw=$results/raw.csv
rm -f "$raw"
cargo build --release --locked --bin mmpo-fast

shapes="--shape smollm2-135m --profile hh-rlhf --pairs 2"
{
  echo "command: benches/run_cpu_kernels.sh $*"
  echo "date: $(date -u +%Y-%m-%dT%H:%MZ)"
  echo "commit: $(git rev-parse HEAD)$(git diff --quiet HEAD || echo ' with uncommitted changes')"
  echo "machine: $processor, $(nproc) CPUs; $(uname -sr)"
  echo "versions: $(target/release/mmpo-fast --version), $(rustc --version), $(.venv/bin/python -c 'import torch; print("torch", torch.__version__)')"
  echo "load average before: $(cut -d' ' -f1 /proc/loadavg)"
} > "$results/about.txt"
# shellcheck disable=SC2086
ours() { target/release/mmpo-fast --quiet bench kernels --device cpu $shapes --threads "$(nproc)" --csv "$raw" > /dev/null; }
ours
for peer in attention head optimizer; do
  # shellcheck disable=SC2086
  .venv/bin/python -W ignore "benches/peers/$peer.py" --device cpu $shapes --threads "$(nproc)" --csv "$raw"
done
if [ -x target/release/candle-peer ]; then
  # shellcheck disable=SC2086
  target/release/candle-peer ops $shapes --threads "$(nproc)" --calls 7 --csv "$raw"
fi
ours
echo "load average after: $(cut -d' ' -f1 /proc/loadavg)" >> "$results/about.txt"
python3 benches/summary.py "$results" > /dev/null
echo "$results/README.md"
