#!/usr/bin/env bash
# Pack what a machine without a network lacks beside torch into one folder, to be carried to it with the working tree:
#   python/    unpacked wheels: put on PYTHONPATH by gpu.sh
#   liburing/  its header and archive: unpacked to / by gpu.sh build, where liburing.h is missing there; libaio/ likewise
# Example: PYTHON_VERSION=3.12 benchmarks/gpu_carry.sh build/gpu_carry
# The machine's Python is given, not this one's; PACKAGES adds names. WITH_DEEPSPEED=1 adds the peer of the comparison
# (it compiles its AdamW and its drive I/O there, at first use). NBYTES_MAX (60 MB) bounds the folder.
set -euo pipefail
cd "$(dirname "$0")/.."
CARRY=${1:-build/gpu_carry}
PYTHON=${PYTHON:-python3}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
MACHINE=${MACHINE:-x86_64}
NBYTES_MAX=${NBYTES_MAX:-60000000}
PACKAGES=${PACKAGES:-"pydantic pydantic-core annotated-types typing-inspection"}
if [ "${WITH_DEEPSPEED:-}" = 1 ]; then PACKAGES="$PACKAGES hjson"; fi

rm -rf "$CARRY"
mkdir -p "$CARRY/wheels" "$CARRY/python" "$CARRY/liburing" "$CARRY/libaio"

# pydantic-core belongs to one version of pydantic: let pip choose both together, for the machine that is meant.
platforms=()
for glibc in 17 27 28; do platforms+=(--platform "manylinux_2_${glibc}_$MACHINE"); done
platforms+=(--platform "manylinux2014_$MACHINE")
# shellcheck disable=SC2086  # several names
"$PYTHON" -m pip download -q --disable-pip-version-check --only-binary=:all: --implementation cp \
  --python-version "$PYTHON_VERSION" "${platforms[@]}" --dest "$CARRY/wheels" $PACKAGES
if [ "${WITH_DEEPSPEED:-}" = 1 ]; then
  DS_BUILD_OPS=0 "$PYTHON" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir "$CARRY/wheels" deepspeed || echo "DeepSpeed cannot be packed here; going on without it"
fi
for wheel in "$CARRY"/wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$CARRY/python"; done
rm -rf "$CARRY/wheels"

if command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
  (cd "$CARRY/liburing" && apt-get -q download liburing-dev liburing2 >/dev/null) ||
    echo "liburing cannot be downloaded here; the POSIX backend will be built there"
  if [ "${WITH_DEEPSPEED:-}" = 1 ]; then  # its library has two names
    (cd "$CARRY/libaio" && apt-get -q download libaio-dev >/dev/null &&
      { apt-get -q download libaio1t64 || apt-get -q download libaio1; } >/dev/null 2>&1) ||
      echo "libaio cannot be downloaded here; DeepSpeed will not use drives there"
  fi
else
  echo "no apt-get here; the POSIX backend will be built there"
fi

nbytes=$(du -sb "$CARRY" | cut -f1)
echo "$CARRY: $((nbytes / 1000000)) MB: $(ls "$CARRY/python" | grep -c dist-info) packages, $(ls "$CARRY/liburing" | wc -l) files of liburing"
if [ "$nbytes" -gt "$NBYTES_MAX" ]; then
  echo "that is more than NBYTES_MAX=$NBYTES_MAX"
  exit 1
fi
