#!/usr/bin/env bash
# On a machine with one NVIDIA GPU: build, test and measure, also without a network. Stages, in this order by default:
#   build    the extension, with the python3 that has torch; liburing where its header is, or from what gpu_carry.sh has
#            packed; otherwise the POSIX backend. Beside it, 90 GB of host memory are touched once (gpu_touch.py)
#   rates    bus, drive, DRAM, AdamW, matrix products: the profile that the stages after it compare with
#   train    a full fine-tune of 1 B and of 3 B parameters in 8 GB of device memory, against everything on the GPU
#   tests    the tests marked `gpu`
#   giant    layers of GPT-3 175B and Llama 70B in 24 GB, measured beside the simulator (the whole models' figures follow
#            without a GPU: gpu_giant.py --whole-of)
#   profile  gaps, copies and waiting calls in a steady step
#   hf       what train does for Llama 3.2 of 1 B parameters, as `transformers` has it, its loss computed in chunks
#   sweep    8k to 128k tokens a step
#   peer     DeepSpeed ZeRO-3, where it can be imported
#   compile  blocks compiled by torch.compile, here and in plain torch (only when named)
# Any of them can be named: benchmarks/gpu.sh build rates train. One table of all rows comes last (gpu_table.py).
#
# All of it takes at most SECONDS_MAX (540), which is short for all rows; docs/gpu.md has a plan for half an hour: 520 for
# build rates train, 520 for build tests giant profile, 480 for build hf sweep, and another 520 for build rates compile peer.
# A stage gets its weight's share of what is left when it begins, so that fast stages leave time to slow ones and a stage
# alone has all of it; LIMIT=... bounds each. What a stage has not finished then is missing in the table; rows that were
# made stay. The exit status is that of the first stage that failed.
#
# RESULTS  directory of the JSON files (default: $OUT, else benchmarks/results)     PYTHON    default python3
# STORAGE  directory on the drive that is measured and trained on (default: .)      CARRY     default build/gpu_carry
# PROFILE  of this machine, written by rates (default: build/gpu_hardware.json; where it is not there, the one of this card
#          in CARRY or in CARRY/rows.tgz, which is what the call that ran rates has brought back)
# ALLOCATOR  PYTORCH_CUDA_ALLOC_CONF
# COMMIT   what the rows call the source, where there is no git
# TINY=1   no GPU and seconds: to see that all stages run
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-${OUT:-benchmarks/results}}
STORAGE=${STORAGE:-.}
CARRY=${CARRY:-build/gpu_carry}
PROFILE=${PROFILE:-$PWD/build/gpu_hardware.json}
SECONDS_MAX=${SECONDS_MAX:-540}
ALL=(build rates train tests giant profile hf sweep peer)
declare -A WEIGHT=([build]=16 [tests]=16 [rates]=16 [train]=26 [giant]=24 [profile]=12 [hf]=16 [sweep]=24 [peer]=8 [compile]=20)
declare -A AT_LEAST=([build]=200)

device=(--device cuda --storage "$STORAGE")
[ -z "${TINY:-}" ] || device=(--device emulated --tiny --storage "$STORAGE")

# Each stage: commands whose last argument group bounds their time. $1 is the stage's seconds.
build() {
  local status=0
  if [ -z "${TINY:-}" ]; then  # beside compiling: what touches memory first pays for it
    "$PYTHON" benchmarks/gpu_touch.py --seconds "$(($1 / 2))" &
    # shellcheck disable=SC2064  # this process
    trap "kill $! 2>/dev/null" EXIT
  fi
  build_extension || status=$?
  wait
  return $status
}

build_extension() {
  for library in liburing libaio; do
    if [ ! -e "/usr/include/$library.h" ] && compgen -G "$CARRY/$library/*.deb" >/dev/null; then
      for package in "$CARRY/$library"/*.deb; do dpkg -x "$package" / || true; done
      ldconfig || true
    fi
  done
  if "$PYTHON" -c 'import offload._C' 2>/dev/null && [ -z "$(find csrc setup.py -newer offload/_C.*.so)" ]; then
    echo "the extension is here already"
    return
  fi
  "$PYTHON" -c 'import torch, pybind11; print("torch", torch.__version__, "CUDA", torch.version.cuda)' &&
    "$PYTHON" setup.py -q build_ext --inplace && "$PYTHON" -m offload.cli doctor --storage "$STORAGE"
}

tests() {  # only files that have such tests: others need packages that a bare machine may lack. Late copies take time: last
  local workers=() bounded=() files status=0 end=$((SECONDS + $1))
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 4)
  # What has failed by then is told; a stage that is stopped tells nothing.
  "$PYTHON" -c 'import pytest_timeout; pytest_timeout.SESSION_TIMEOUT_KEY' 2>/dev/null && bounded=(--session-timeout)
  mapfile -t files < <(grep -rlE "mark\.gpu|import .*\bCUDA\b" tests --include='test_*.py' | grep -v test_probe | sort)
  mapfile -t files < <(grep -L sleepy_copies "${files[@]}"; grep -l sleepy_copies "${files[@]}")
  export CUBLAS_WORKSPACE_CONFIG=:4096:8
  run_tests "${workers[@]}" "${bounded[@]/%/=$(($1 * 8 / 10))}" "${files[@]}" || status=$?
  run_tests "${bounded[@]/%/=$((end - SECONDS))}" tests/integration/test_probe.py || status=$?  # it measures
  return $status
}

run_tests() { "$PYTHON" -m pytest -q --tb=short -p no:cacheprovider -m gpu "$@"; }

rates() {
  "$PYTHON" benchmarks/gpu_rates.py "${device[@]}" --seconds "$(($1 * 6 / 10))" --profile "$PROFILE" --json "$RESULTS/gpu_rates.json"
}

carried_profile() {  # a machine that went cold has lost its profile; of another card none is taken. $1 is the card
  local found
  [ ! -e "$PROFILE" ] || return 0
  found=$(cat "$CARRY/gpu_hardware.json" 2>/dev/null || tar -xzOf "$CARRY/rows.tgz" ./gpu_hardware.json 2>/dev/null) || return 0
  if grep -qF "\"name\": \"$1\"" <<<"$found"; then
    mkdir -p "$(dirname "$PROFILE")" && echo "$found" >"$PROFILE" && echo "the profile is the one in $CARRY"
  else
    echo "the profile in $CARRY is not of $1: it is left there; run the stage rates"
  fi
}

train() {
  local end=$((SECONDS + $1)) status=0
  run_train 1b 32768 gpu,gpu-keep,host,storage,host+streamed,host+noplan "$(($1 * 4 / 10))" gpu_train_1b || status=$?
  run_train 3b 32768 gpu,host,storage "$(((end - SECONDS) * 6 / 10))" gpu_train_3b --micro-tokens 4096 || status=$?
  run_train 1b 32768 storage+all "$((end - SECONDS))" gpu_train_1b_storage --steps 1 --row-seconds 300 \
    --plain-of "$RESULTS/gpu_train_1b.json" || status=$?
  return $status
}

hf() { run_train 1b 32768,65536 gpu,host,storage "$1" gpu_train_hf_1b --family transformers; }

sweep() {  # the ends first
  local end=$((SECONDS + $1)) status=0
  run_train 1b 131072,8192,65536,16384 gpu,host,storage,host+plan "$(($1 * 8 / 10))" gpu_sweep --device-memory-gb 10 \
    --storage-from-tokens 32768 || status=$?
  run_train 3b 131072 gpu,host "$((end - SECONDS))" gpu_sweep_3b --device-memory-gb 10 --micro-tokens 4096 || status=$?
  return $status
}

compile() { run_train 1b 32768 gpu,host,gpu+compile,host+compile "$1" gpu_compile; }

peer() {
  if ! "$PYTHON" -c 'import deepspeed' 2>/dev/null; then
    echo "DeepSpeed cannot be imported here: no rows of it"
    return 0
  fi
  run_train 1b 32768 deepspeed-cpu,deepspeed-nvme "$1" gpu_peer
}

run_train() {  # model, tokens a step, placements, seconds, name of the file, more options
  "$PYTHON" benchmarks/gpu_train.py "${device[@]}" --model "$1" --tokens-per-step "$2" --placements "$3" \
    --seconds "$4" --profile "$PROFILE" --json "$RESULTS/$5.json" "${@:6}"
}

giant() {  # with all state in host memory; then one of 175b's layers on the drive, where time and room allow
  local end=$((SECONDS + $1)) status=0 slice=$RESULTS/gpu_giant_175b.json
  run_giant gpt3-175b "$(($1 * 5 / 10))" "$slice" || status=$?
  run_giant llama-70b "$(((end - SECONDS) * 7 / 10))" "$RESULTS/gpu_giant_70b.json" || status=$?
  [ ! -e "$slice" ] || run_giant gpt3-175b "$((end - SECONDS))" "$RESULTS/gpu_giant_175b_storage.json" \
    --in-host 0.5 --steps 1 --warm-up 1 --rates-of "$slice" || status=$?
  return $status
}

run_giant() {  # model, seconds, file, more options
  local profile=()
  [ -e "$PROFILE" ] && profile=(--profile "$PROFILE")
  [ "$2" -lt 1 ] || timeout "$2" "$PYTHON" benchmarks/gpu_giant.py "${device[@]}" "${profile[@]}" --drives "" \
    --model "$1" --seconds "$2" --json "$3" "${@:4}"
}

profile() {  # with more tokens too, where the turn of two steps is a smaller part
  local end=$((SECONDS + $1)) status=0
  run_profile 32768 gpu,host,storage "$(($1 * 6 / 10))" gpu_profile || status=$?
  run_profile 131072 host "$((end - SECONDS))" gpu_profile_128k --device-memory-gb 10 || status=$?
  return $status
}

run_profile() {  # tokens a step, placements, seconds, name of the file, more options
  "$PYTHON" benchmarks/gpu_profile.py "${device[@]}" --tokens-per-step "$1" --placements "$2" --seconds "$3" \
    --profile "$PROFILE" --json "$RESULTS/$4.json" "${@:5}"
}

if [ "${1:-}" = --stage ]; then  # one stage in a process of its own, which `timeout` can end
  trap 'exit 143' TERM  # once its command has ended, which may have much page-locked memory to give back
  "$2" "$3"
  exit
fi

[ $# -gt 0 ] || set -- "${ALL[@]}"
for stage in "$@"; do
  [ -n "${WEIGHT[$stage]:-}" ] || { echo "no stage $stage; the stages are ${ALL[*]}"; exit 2; }
done
if [ -z "${TINY:-}" ]; then
  command -v nvidia-smi >/dev/null || { echo "no NVIDIA driver found; this script needs a GPU, or TINY=1"; exit 1; }
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
  carried_profile "$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
fi
mkdir -p "$RESULTS"
export PYTHON RESULTS STORAGE CARRY PROFILE TINY PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if ! "$PYTHON" -c 'import pydantic' 2>/dev/null; then  # what is installed goes before what is carried
  case $CARRY in /*) ;; *) CARRY=$PWD/$CARRY ;; esac
  export PYTHONPATH=$PYTHONPATH:$CARRY/python
fi
export PYTORCH_CUDA_ALLOC_CONF=${ALLOCATOR-expandable_segments:True} OFFLOAD_PROFILE=$PROFILE
if [ -z "${TINY:-}" ] && ! "$PYTHON" -c 'import torch; torch.empty(1 << 24, device="cuda")' 2>/dev/null; then
  echo "no device memory with PYTORCH_CUDA_ALLOC_CONF=$PYTORCH_CUDA_ALLOC_CONF: going on without it"
  unset PYTORCH_CUDA_ALLOC_CONF
fi

result=0
while [ $# -gt 0 ]; do
  stage=$1 weights=0
  for later in "$@"; do weights=$((weights + WEIGHT[$later])); done
  shift
  left=$((SECONDS_MAX - SECONDS)) limit=$(((SECONDS_MAX - SECONDS) * WEIGHT[$stage] / weights))
  least=${AT_LEAST[$stage]:-0}
  [ "$limit" -ge "$least" ] || limit=$((least < left ? least : left))
  [ -z "${LIMIT:-}" ] || [ "$limit" -le "$LIMIT" ] || limit=$LIMIT
  if [ "$limit" -lt 4 ]; then
    echo "== $stage: not run, no time is left of $SECONDS_MAX s"
    [ $result -ne 0 ] || result=124
    continue
  fi
  echo "== $stage (at most $limit s)"
  begin=$SECONDS
  timeout --kill-after=10 "$limit" bash "$0" --stage "$stage" "$((limit - 3))"
  status=$?
  rm -rf "${STORAGE:?}"/offload-gpu-*  # of a stage that was stopped
  case $status in
    0) echo "== $stage: done in $((SECONDS - begin)) s" ;;
    124 | 137) echo "== $stage: stopped after $limit s; what it has made so far is in $RESULTS" ;;
    *) echo "== $stage: failed ($status) after $((SECONDS - begin)) s" ;;
  esac
  [ $result -ne 0 ] || result=$status
done
[ ! -e "$PROFILE" ] || cp "$PROFILE" "$RESULTS/gpu_hardware.json"
echo "== all rows in $RESULTS"
"$PYTHON" benchmarks/gpu_table.py "$RESULTS"
if [ -n "${OUT:-}" ] && [ "$RESULTS" = "$OUT" ]; then  # one file is easier to fetch from a rented machine
  packed=$(mktemp)  # elsewhere: tar fails where its own file changes the directory
  tar -C "$RESULTS" -czf "$packed" --exclude=rows.tgz . && mv "$packed" "$RESULTS/rows.tgz" && rm -f "$RESULTS"/*.json
fi
exit $result
