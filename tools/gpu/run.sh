#!/usr/bin/env bash
# On a GPU machine: checks the kernels on hardware, then times a training run. Goes on when a part fails, and says so.
#
#     run.sh RESULTS [part ...]      parts: machine layouts kernels goldens bandwidth train determinism sanitize; all of them if none is named
set -uo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
results=$(mkdir -p "${1:?usage: run.sh RESULTS [part ...]}" && cd "$1" && pwd)
shift
parts=${*:-machine layouts kernels goldens bandwidth train determinism sanitize}
export MMPO_FAST_GOLDENS=$bundle/goldens MMPO_FAST_CACHE=$results/cache MMPO_FAST_REQUIRE_GPU=1
# cuBLASLt where it comes with PyTorch.
cublas=$(python3 -c 'import nvidia, pathlib; print(":".join(str(p) for r in nvidia.__path__ for p in pathlib.Path(r).glob("*/lib")))' 2>/dev/null || true)
export LD_LIBRARY_PATH=$cublas${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tar -C "$scratch" -xzf "$bundle/bin.tar.gz"
bin=$scratch/bin
failed=0

# Runs one part: its output goes to RESULTS/NAME.txt, its outcome to the summary.
part() {
  local name=$1 start=$SECONDS
  shift
  "$@" > "$results/$name.txt" 2>&1
  local code=$?
  [ $code -eq 0 ] || failed=1
  printf '%s: exit %s, %s s\n' "$name" "$code" $((SECONDS - start)) | tee -a "$results/summary.txt"
}

machine() { nvidia-smi && cat "$bundle/commit" && "$bin/mmpo-fast" --version --verbose; }
# Whether the hardware does what the emulated device does; compute capability 9.0 alone.
layouts() { "$bin/layouts"; }
kernels() { "$bin/kernels" gpu --test-threads=1; }
goldens() { "$bin/cuda_training" a_real_gpu --test-threads=1; }

# Memory-bound kernels beside the copy bandwidth of the same run, at the four models' widths.
bandwidth() { "$bin/memory_bound" > "$results/memory_bound.csv" && cat "$results/memory_bound.csv"; }

# 20 steps of the ordinary training path at SmolLM2-135M's shapes, random weights.
train() {
  local model=$scratch/model
  if [ ! -d "$model" ]; then
    cp -r "$bundle/smollm2-135m" "$model" && "$bin/random_model" "$model" || return
  fi
  "$bin/mmpo-fast" train --model "$model" --data "$bundle/pairs.jsonl" --eval-data "$bundle/eval_pairs.jsonl" \
    --output "$scratch/$1" --max-steps 20 --pairs-per-step 128 --tokens-per-micro-batch 8192 --device cuda || return
  cp "$scratch/$1/metrics.jsonl" "$results/$1-metrics.jsonl"
}

# The same run again: the same weights to the bit.
determinism() {
  train train && mv "$scratch/train" "$scratch/first" && train train &&
    cmp "$scratch/first/model/model.safetensors" "$scratch/train/model/model.safetensors" && echo "the same bits"
}

sanitize() {
  command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer here"; return 1; }
  local tool
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$bin/cuda_training" a_real_gpu --test-threads=1 || return
  done
}

for name in $parts; do
  case $name in
    train) part train train train && rm -rf "$scratch/train" ;;
    machine | layouts | kernels | goldens | bandwidth | determinism | sanitize) part "$name" "$name" ;;
    *) echo "run.sh: no part is called $name" >&2; failed=1 ;;
  esac
done
exit $failed
