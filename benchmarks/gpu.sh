#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes, from a bare checkout: looks for what it needs, builds the extension for
# the GPU that is there, runs every CUDA test, compute-sanitizer on small inputs, then the benchmarks, and writes one JSON
# file.
#
#   bash benchmarks/gpu.sh                  # writes build/gpu/gpu.json
#   DEVICE=cpu bash benchmarks/gpu.sh       # the same stages, small, on the CPU: tries the script, measures nothing
#
# Needs python3 with torch and numpy, Python's headers (Python.h), cmake, ninja or make, a C++ compiler and nvcc. Without
# compute-sanitizer its two stages fail, and the others run. No network, MPI, DeepSpeed or pip.
#   PYTHON=python3.12     another Python
#   WHEELS=folder         wheels of what that Python lacks (pybind11, pytest, iniconfig, pluggy, packaging, pygments); they
#                         are only unpacked
#   OUT=folder            where gpu.json and the logs go
#   EXTENSION=file.so     a built extension, instead of building one
#   DEADLINE=540          seconds for everything; a stage gets what is left, if that is less than its own limit
set -uo pipefail
cd "$(dirname "$0")/.." || exit

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
python=$(realpath -s "$(command -v "$python")") # without resolving links, which make a virtual environment
root=$PWD
out=$(mkdir -p "${OUT:-build/gpu}" && realpath "${OUT:-build/gpu}")
work=$(mkdir -p "build/gpu-$device" && realpath "build/gpu-$device")
site=$work/site
scale=1
[ "$device" = cuda ] || scale=4 # a try on any machine, however busy
deadline=$((scale * ${DEADLINE:-540}))
rm -rf "$site" "$out/stages" "$out/machine.json" "$out/measured.json"
mkdir -p "$site"
export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
command -v nvcc > /dev/null || export PATH=$PATH:/usr/local/cuda/bin
failed=0

# stage NAME SECONDS COMMAND...: runs it with a limit of its own, and writes gpu.json anew, so that results so far stay.
# Returns its exit status, 124 if it took too long.
stage() {
  local name=$1 limit=$((scale * $2)) left=$((deadline - SECONDS - 10)) status=0 start=$SECONDS # 10: to kill, and to write
  shift 2
  [ "$limit" -le "$left" ] || limit=$((left > 0 ? left : 0))
  printf '\n== %s (at most %d s)\n' "$name" "$limit"
  # `timeout` runs programs, not functions.
  if [ "$limit" -gt 0 ]; then
    timeout --kill-after=5 "$limit" bash -c 'set -euo pipefail; "$@"' stage "$@" > "$out/$name.log" 2>&1 || status=$?
  else
    echo "not run: the $deadline s for everything are over" > "$out/$name.log"
    status=124
  fi
  tail -n 6 "$out/$name.log"
  printf '== %s: exit status %d, %d s\n' "$name" "$status" $((SECONDS - start))
  printf '%s\t%d\t%d\n' "$name" "$status" $((SECONDS - start)) >> "$out/stages"
  [ "$status" -eq 0 ] || failed=1
  "$python" benchmarks/gpu_result.py "$out"
  return "$status"
}

# One sentence for each thing that is missing.
# shellcheck disable=SC2329 # called by name, as the functions below
preflight() {
  local missing=0 modules=(torch numpy pytest) programs=() compiler=${CXX:-c++} wheel module program
  for wheel in "${WHEELS:-/nonexistent}"/*.whl; do
    if [ -e "$wheel" ]; then "$python" -m zipfile -e "$wheel" "$site"; fi
  done
  if [ -z "${EXTENSION:-}" ]; then
    modules+=(pybind11)
    programs=(cmake "${compiler%% *}")
    [ "$device" = cpu ] || programs+=("${CUDACXX:-nvcc}")
    command -v ninja > /dev/null || programs+=(make)
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2> /dev/null || {
      echo "Python.h of $python is missing: no WHEELS bring it, install python3-dev or name another PYTHON."
      missing=1
    }
  fi
  for module in "${modules[@]}"; do
    (cd "$work" && "$python" -c "import $module") || {
      echo "$python cannot import $module: put its wheel, and those it needs, into a folder and name that, WHEELS=folder."
      missing=1
    }
  done
  for program in "${programs[@]}"; do
    command -v "$program" > /dev/null || {
      echo "$program is not on the PATH: no WHEELS bring it, install it."
      missing=1
    }
  done
  if [ "$device" = cuda ]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
      echo "This torch finds no GPU: a torch built with CUDA for this driver is needed, in $python or in WHEELS."
      missing=1
    }
  fi
  return "$missing"
}

# shellcheck disable=SC2329
build() {
  cp -r dpt_hpc "$site/"
  # An editable install in this Python must not hide what is built here: its hook imports this module.
  : > "$site/_editable_skbc_dpt_hpc.py"
  rm -f "$site"/dpt_hpc/_C*.so
  if [ -n "${EXTENSION:-}" ]; then
    cp "$EXTENSION" "$site/dpt_hpc/"
  else
    compile
  fi
  # From another folder: `python -c` would find the sources here, which have no extension, before $site.
  cd "$work" || return
  "$python" -c "
from dpt_hpc import _C
assert _C.__file__.startswith('$site'), _C.__file__
assert _C.has_cuda or '$device' == 'cpu', 'built without CUDA'
print(_C.__file__, 'with CUDA' if _C.has_cuda else 'without CUDA')"
}

# shellcheck disable=SC2329
compile() {
  local options=(-DDPT_HPC_CUDA=OFF)
  if [ "$device" = cuda ]; then
    local capability='import torch; print("%d%d" % torch.cuda.get_device_capability())'
    options=(-DDPT_HPC_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$("$python" -c "$capability")")
  fi
  if command -v ninja > /dev/null; then options+=(-G Ninja); fi
  cmake -S . -B "$work/cmake" "${options[@]}" -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
  cmake --build "$work/cmake" --target _C --parallel "$(nproc)"
  cp "$work"/cmake/_C*.so "$site/dpt_hpc/"
}

# The tests of a real GPU bring no fixtures of tests/conftest.py, which wants the whole of dpt_hpc.
# shellcheck disable=SC2329
cuda_tests() {
  local tests=("$root"/tests/test_cuda*.py)
  [ "$device" = cuda ] || tests=("$root/tests/test_radius_graph.py" -k "nasty_systems and 2.5")
  # From another folder, as in build. A test that hangs tells where, once a minute.
  (cd "$work" && "$python" -m pytest -v -o faulthandler_timeout=60 --noconftest -p no:cacheprovider \
    -c "$root/pyproject.toml" "${tests[@]}") | tee "$out/pytest.log"
  grep -q '[0-9] passed' "$out/pytest.log" # tests that are all skipped prove nothing
}

# shellcheck disable=SC2329
sanitizer() {
  if [ "$device" = cpu ]; then
    "$python" benchmarks/gpu.py small --device cpu
    return
  fi
  local program
  program=$(command -v compute-sanitizer || command -v "$(dirname "$(realpath "$(command -v nvcc)")")/compute-sanitizer") || {
    echo "compute-sanitizer is not installed beside nvcc"
    return 1
  }
  # Our kernels alone: they are all in the namespace dpt. The caching allocator would hide accesses beyond a tensor.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$1" --kernel-name kns=dpt --error-exitcode 9 \
    "$python" benchmarks/gpu.py small
}

# shellcheck disable=SC2329
measurements() {
  "$python" benchmarks/gpu.py measure "$out/measured.json" --device "$device"
}

export -f preflight build compile cuda_tests sanitizer measurements
export python root device out work site

stage preflight 60 preflight || {
  printf '\nSomething is missing: %s\n' "$out/gpu.json"
  exit 1
}
stage build 150 build
stage tests 120 cuda_tests
stage memcheck 60 sanitizer memcheck
stage racecheck 60 sanitizer racecheck
stage measurements 130 measurements

printf '\n%s in %d s: %s\n' "$([ $failed -eq 0 ] && echo 'All stages passed' || echo 'NOT all stages passed')" "$SECONDS" "$out/gpu.json"
exit $failed
