#!/usr/bin/env bash
# torchrun starts two ranks on the library that stands in for NCCL: they train as one process does, and a rank that is killed
# is started again and goes on from the last checkpoint.
#     tests/reference/check_torchrun.sh PROGRAM
set -euo pipefail
program=$(realpath "$1")
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export MMPO_FAST_CACHE="$work/cache" OMP_NUM_THREADS=1

"${CXX:-c++}" -std=c++17 -O2 -fPIC -shared -ffp-contract=off -o "$work/libnccl.so.2" tests/nccl/library.cpp -lpthread

port=$((20000 + RANDOM % 10000))
options=(--model tests/goldens/base/model --data tests/goldens/pairs.jsonl --max-length 160 --max-prompt-length 64
  --pairs-per-step 4 --learning-rate 1e-3 --device cpu --threads 1 --shard states --save-steps 5)
torchrun() {
  LD_LIBRARY_PATH="$work${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" .venv/bin/torchrun --nproc-per-node 2 \
    --master-addr 127.0.0.1 --master-port "$port" "$@"
}

"$program" --quiet train "${options[@]}" --max-steps 100 --output "$work/one" >"$work/one.log"
torchrun --no-python "$program" train "${options[@]}" --max-steps 100 --output "$work/two" >"$work/two.log" 2>&1 ||
  { cat "$work/two.log" && exit 1; }

torchrun --max-restarts 2 --no-python "$program" train "${options[@]}" --max-steps 100 --resume --output "$work/cut" \
  >"$work/cut.log" 2>&1 &
launcher=$!
for _ in $(seq 600); do
  [ -e "$work/cut/checkpoints/step-000010" ] && break
  sleep 0.1
done
# The second rank.
for process in $(pgrep -f "$work/cut"); do
  if tr '\0' '\n' <"/proc/$process/environ" | grep -qx RANK=1; then kill -KILL "$process"; fi
done
wait "$launcher" || { cat "$work/cut.log" && exit 1; }
grep -q 'resuming after step' "$work/cut.log" || { echo "the run did not go on by itself" && cat "$work/cut.log" && exit 1; }
grep -q 'rank 1 on .* died' "$work/cut.log" || { echo "the rank is not named" && cat "$work/cut.log" && exit 1; }

cmp "$work/two/model/model.safetensors" "$work/cut/model/model.safetensors"
.venv/bin/python - "$work" <<'PYTHON'
import json
import sys

series = {}
for run in ["one", "two", "cut"]:
    with open(f"{sys.argv[1]}/{run}/metrics.jsonl") as lines:
        series[run] = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
assert len(series["one"]) == 100 and series["two"] == series["cut"], series
distance = max(abs(one - two) / max(1.0, abs(one)) for one, two in zip(series["one"], series["two"]))
assert distance <= 1e-3, f"losses of one process and of two ranks differ by {distance}"
print(f"torchrun: 100 steps on two ranks, losses within {distance:.1e} of one process; a killed rank cost nothing")
PYTHON
