#!/usr/bin/env bash
# On a GPU machine: checks the kernels on hardware first, then measures them beside their peers, and writes everything into RESULTS.
# Goes on when a part fails, and says so. Needs the driver and python3; the peers need PyTorch.
#
#     run.sh RESULTS first|second|third|PART ...      each of the three within nine minutes, into one RESULTS or several:
#
#     first: machine layouts kernels goldens products train determinism
#         what there is; the emulated device's cases, every kernel, a whole model against the goldens; linear layers beside cuBLASLt's;
#         ordinary training, twice to the same bits
#     second: causal pairs head
#         attention and log-prob head beside their peers: every ratio that is asked of them
#     third: step bandwidth sanitize profile
#         a whole step and the other kernels beside their peers; compute-sanitizer; counters of the main kernels (ncu)
set -uo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
results=$(mkdir -p "${1:?usage: run.sh RESULTS [part ...]}" && cd "$1" && pwd)
command="run.sh $*"
shift
parts=
for name in ${*:-first second third}; do
  case $name in
    first) parts+=" machine layouts kernels goldens products train determinism" ;;
    second) parts+=" causal pairs head" ;;
    third) parts+=" step bandwidth sanitize profile" ;;
    *) parts+=" $name" ;;
  esac
done
# Seconds in which all of it must be done, the summary included.
limit=${MMPO_FAST_LIMIT:-525}
export MMPO_FAST_GOLDENS=$bundle/goldens MMPO_FAST_CACHE=$results/cache MMPO_FAST_REQUIRE_GPU=1 PYTHONUNBUFFERED=1 RUST_BACKTRACE=0
# cuBLASLt where it comes with PyTorch.
cublas=$(python3 -c 'import nvidia, pathlib; print(":".join(str(p) for r in nvidia.__path__ for p in pathlib.Path(r).glob("*/lib")))' 2>/dev/null || true)
export LD_LIBRARY_PATH=$cublas${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
scratch=$(mktemp -d)
# A shell of a part that is ended early may not have forgotten this trap yet.
trap '[ "$BASHPID" = $$ ] && rm -rf "$scratch"' EXIT
tar -C "$scratch" -xzf "$bundle/bin.tar.gz"
bin=$scratch/bin peers=$bundle/peers raw=$results/raw.csv
# Python packages that came along as wheels: Liger kernels, bitsandbytes.
for wheel in "$bundle"/wheels/*.whl; do
  [ -e "$wheel" ] && python3 -m zipfile -e "$wheel" "$scratch/site"
done
export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH} TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TRITON_CACHE_DIR=$scratch/triton
failed=0

# Runs one part for at most so many seconds: its output goes to RESULTS/NAME.txt, its outcome to summary.txt.
part() {
  local name=$1 seconds=$2 start=$SECONDS code
  local left=$((limit - SECONDS))
  [ "$left" -lt "$seconds" ] && seconds=$left
  if [ "$seconds" -lt 5 ]; then
    code="no time left"
  else
    # A part is a function of this script, so it runs in a shell of its own that can be ended as a whole.
    set -m
    ( "$name" ) > "$results/$name.txt" 2>&1 &
    local job=$!
    set +m
    # It holds no output of ours open: whoever reads that would wait for a sleep that outlives it.
    ( sleep "$seconds" && kill -TERM -- -$job ) > /dev/null 2>&1 &
    local watch=$!
    wait $job
    code=$?
    # What is left of it, compilers' workers for instance, would take time from the next part.
    [ "$code" -lt 128 ] || sleep 1
    kill -KILL -- -$job 2> /dev/null
    kill $watch 2> /dev/null
    wait $watch 2> /dev/null
  fi
  [ "$code" = 0 ] || failed=1
  printf '%s: exit %s, %s s\n' "$name" "$code" $((SECONDS - start)) | tee -a "$results/summary.txt"
}

clocks() {
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv,noheader ||
    echo "nvidia-smi does not say"
}

ours() { "$bin/mmpo-fast" --quiet bench "$@" --device cuda --csv "$raw"; }

machine() { nvidia-smi; cat "$bundle/commit"; "$bin/mmpo-fast" --version --verbose; python3 -m pip list 2> /dev/null; true; }

layouts() { "$bin/layouts"; }
kernels() { gpu_tests gpu 25; }
goldens() { "$bin/cuda_training" a_real_gpu --test-threads=1; }

# Every test of the kernels in a process of its own, several at once, for at most so many seconds: one that faults or never ends takes
# no other with it. gpu_tests PATTERN SECONDS [command that stands before it ...]
gpu_tests() {
  local names=$scratch/tests.txt outcomes=$scratch/outcomes.txt code
  "$bin/kernels" gpu --list --format terse 2> /dev/null | sed -n 's/: test$//p' | grep -E "$1" > "$names"
  shift
  [ -s "$names" ] || { echo "the program lists no tests"; return 1; }
  export -f gpu_test
  export bin scratch
  xargs -P 8 -I{} bash -c 'gpu_test "$@"' gpu_test {} "$@" < "$names" | tee "$outcomes"
  code=$?
  echo "$(grep -c '^ok ' "$outcomes") of $(wc -l < "$names") tests pass"
  return $code
}

# gpu_test NAME SECONDS [command ...]
gpu_test() {
  local name=$1 seconds=$2 log=$scratch/test-$BASHPID.txt code=0 why
  shift 2
  timeout -k 5 "$seconds" "$@" "$bin/kernels" --exact "$name" --nocapture > "$log" 2>&1 &
  # timeout's process group is its own: an early end of the part must be told to it.
  trap 'kill -TERM $!' TERM
  wait $! || code=$?
  case $code in
    0) echo "ok $name"; return ;;
    124 | 137) why="it did not come to an end in $seconds s" ;;
    *) why="exit $code" ;;
  esac
  # In one piece, because others print too.
  printf '%s\n' "FAILED $name: $why"$'\n'"$(grep -v '^$' "$log" | tail -n 15 | sed 's/^/    /')"
  return 1
}

# `ours ARGUMENTS` before and behind the peer's script, over the same cases.
beside() {
  local script=$1 code=0 case cases=()
  shift
  for case in $1; do cases+=(--case "$case"); done
  local calls=$2
  shift 2
  # shellcheck disable=SC2086
  {
    ours kernels "$@" "${cases[@]}" $calls || code=1
    python3 "$peers/$script" --threads 8 --csv "$raw" "${cases[@]}" $calls $peer_options || code=1
    ours kernels "$@" "${cases[@]}" $calls || code=1
  }
  return $code
}

# Plain causal sequences of head size 64, then 128.
causal() {
  local cases= model tokens peer_options=
  for model in llama-3.2-1b llama-3-8b; do
    for tokens in 4096 8192 16384 32768; do cases+=" $model:$tokens/0/0:1"; done
  done
  beside attention.py "$cases" "--warmups 20 --calls 30" --only attention_forward
}

# Pairs, in both directions, backward also with dQ in any order: the peers unpack them, or mask them as we do.
pairs() {
  local cases= model profile peer_options=
  for profile in hh-rlhf ultrafeedback long; do
    for model in llama-3.2-1b llama-3-8b; do cases+=" $model:$profile"; done
  done
  beside attention.py "$cases" "--warmups 20 --calls 30" --only attention_forward --only attention_backward
  local code=$?
  candle ops llama-3.2-1b hh-rlhf && return $code
}

# 4096 and 8192 scored tokens.
head() {
  local cases= model count
  local peer_options="--only compile --only liger --only products"
  for model in smollm2-135m llama-3.2-1b llama-3-8b; do
    for count in 8 16; do cases+=" $model:256/256/256:$count"; done
  done
  beside head.py "$cases" "--warmups 10 --calls 20" --only "logp_head forward and backward"
}

# Linear layers by our kernels and by cuBLASLt: products.txt ends with rows for src/device/cuda/product_table.rs.
products() { ours products --warmups 5 --calls 20; }

# Every kernel beside the copy of the same run, and AdamW beside its peers. Models and pairs are those of `step`, of whose time the
# summary says how much the order of dQ takes.
bandwidth() {
  local shape code=0
  for shape in smollm2-135m llama-3.2-1b; do
    ours kernels --shape "$shape" --profile ultrafeedback --calls 20 || code=1
    python3 "$peers/optimizer.py" --csv "$raw" --case "$shape:ultrafeedback" || code=1
  done
  return $code
}

# SmolLM2-135M's whole step; the peers' models are made by the same formula.
step() {
  local shape="--shape smollm2-135m --profile ultrafeedback --tokens 8192" variant code=0
  # shellcheck disable=SC2086
  {
    peer() { python3 "$peers/step.py" $shape --warmups 10 --calls 20 --variant "$1" --csv "$raw" || code=1; }
    ours step $shape || code=1
    for variant in packed sliced padded; do peer "$variant"; done
    candle step smollm2-135m ultrafeedback || code=1
    ours step $shape || code=1
    ours step --shape llama-3.2-1b --profile ultrafeedback --tokens 8192 --warmups 10 --calls 10 || code=1
    # Last, because it compiles for a minute or two.
    peer compile
  }
  return $code
}

# Where the bundle was made with MMPO_FAST_BUNDLE_CANDLE.
candle() {
  [ -x "$bin/candle-peer" ] || { echo "no candle in this bundle"; return 0; }
  "$bin/candle-peer" "$1" --device cuda --shape "$2" --profile "$3" --pairs 10 --warmups 10 --calls 20 --csv "$raw"
}

# 20 steps of the ordinary training path at SmolLM2-135M's shapes, random weights.
train() { training train; }

training() {
  local model=$scratch/model
  if [ ! -d "$model" ]; then
    cp -r "$bundle/smollm2-135m" "$model" && "$bin/random_model" "$model" || return
  fi
  "$bin/mmpo-fast" train --model "$model" --data "$bundle/pairs.jsonl" --eval-data "$bundle/eval_pairs.jsonl" \
    --output "$scratch/$1" --max-steps 20 --pairs-per-step 128 --tokens-per-micro-batch 8192 --device cuda || return
  cp "$scratch/$1/metrics.jsonl" "$results/$1-metrics.jsonl"
}

# Two runs: the same weights to the bit.
determinism() {
  [ -d "$scratch/train" ] || training train || return
  training again && cmp "$scratch/train/model/model.safetensors" "$scratch/again/model/model.safetensors" && echo "the same bits"
}

# Memory errors and races over the small shapes of the kernels' tests.
sanitize() {
  command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer here"; return 1; }
  local tool code=0
  for tool in memcheck racecheck; do
    echo "== $tool"
    gpu_tests '::gpu(_our_products|_any_order)?$' 60 compute-sanitizer --tool "$tool" --error-exitcode 9 || code=1
  done
  return $code
}

# Counters of the kernels that matter, at a size that fills the GPU.
profile() {
  command -v ncu > /dev/null || { echo "no ncu here"; return 1; }
  local metrics=gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes.sum,lts__t_sector_hit_rate.pct
  metrics+=,sm__inst_executed_pipe_tensor.sum,l1tex__data_bank_conflicts_pipe_lsu.sum,launch__registers_per_thread
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,smsp__issue_active.avg.pct_of_peak_sustained_active
  # Each case launches at a small shape first, where it is checked, and at the named one then.
  ncu --clock-control none --csv --metrics "$metrics" --launch-count 400 \
    --kernel-name 'regex:attention|product|logp_head|rms_norm|swiglu|rope|adamw' --log-file "$results/profile.csv" \
    "$bin/mmpo-fast" --quiet bench kernels --device cuda --case llama-3.2-1b:ultrafeedback --warmups 0 --calls 1 \
    --only attention_forward --only attention_backward --only "logp_head forward" --only rms_norm --only swiglu --only rope --only adamw &&
    wc -l "$results/profile.csv"
}

{
  echo "command: $command"
  echo "date: $(date -u +%Y-%m-%dT%H:%MZ)"
  echo "commit: $(cat "$bundle/commit")"
  "$bin/mmpo-fast" --version --verbose | tr '\n' ';' | sed 's/^/mmpo-fast: /; s/;$/\n/; s/;/; /g'
  python3 -c 'import torch, transformers; print(f"peers: torch {torch.__version__}, transformers {transformers.__version__}")' 2> /dev/null
  echo "before: $(clocks)"
} > "$results/about.txt"
for name in $parts; do
  case $name in
    machine) part "$name" 30 ;;
    layouts | goldens) part "$name" 60 ;;
    train | determinism) part "$name" 45 ;;
    causal | bandwidth | profile) part "$name" 100 ;;
    kernels | products) part "$name" 120 ;;
    sanitize) part "$name" 150 ;;
    pairs) part "$name" 200 ;;
    step) part "$name" 230 ;;
    head) part "$name" 260 ;;
    *) echo "run.sh: no part is called $name" >&2; failed=1 ;;
  esac
done
{
  echo "after: $(clocks)"
  sed 's/^/part /' "$results/summary.txt" 2> /dev/null
} >> "$results/about.txt"
python3 "$bundle/summary.py" "$results" > /dev/null || failed=1
exit $failed
