#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes, from a bare checkout: builds the extension for the GPU that is there,
# runs every CUDA test, compute-sanitizer on small inputs, then the benchmarks, and writes one JSON file.
#
#   bash benchmarks/gpu.sh                  # writes build/gpu/gpu.json
#   DEVICE=cpu bash benchmarks/gpu.sh       # the same stages, small, on the CPU: tries the script, measures nothing
#
# Needs python3 with torch and numpy, cmake, a C++ compiler and nvcc. No network, MPI, DeepSpeed or pip.
#   PYTHON=python3.12     another Python
#   WHEELS=folder         wheels of what that Python lacks (pybind11, pytest, iniconfig, pluggy, packaging, pygments); they
#                         are only unpacked
#   OUT=folder            where gpu.json and the logs go
#   EXTENSION=file.so     a built extension, instead of building one
set -uo pipefail
cd "$(dirname "$0")/.." || exit

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
python=$(realpath -s "$(command -v "$python")") # without resolving links, which make a virtual environment
root=$PWD
out=$(mkdir -p "${OUT:-build/gpu}" && realpath "${OUT:-build/gpu}")
work=$(mkdir -p "build/gpu-$device" && realpath "build/gpu-$device")
site=$work/site
rm -rf "$site" "$out/stages" "$out/measured.json"
mkdir -p "$site"
export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1
failed=0

# stage NAME SECONDS COMMAND...: runs it with a limit of its own, and writes gpu.json anew, so that results so far stay.
stage() {
  local name=$1 limit=$2 status=0 start=$SECONDS
  shift 2
  [ "$device" = cuda ] || limit=$((4 * limit)) # a try on any machine, however busy
  printf '\n== %s (at most %d s)\n' "$name" "$limit"
  # `timeout` runs programs, not functions.
  timeout --kill-after=5 "$limit" bash -c 'set -euo pipefail; "$@"' stage "$@" > "$out/$name.log" 2>&1 || status=$?
  tail -n 6 "$out/$name.log"
  printf '== %s: exit status %d, %d s\n' "$name" "$status" $((SECONDS - start))
  printf '%s\t%d\t%d\n' "$name" "$status" $((SECONDS - start)) >> "$out/stages"
  [ "$status" -eq 0 ] || failed=1
  "$python" benchmarks/gpu_result.py "$out"
}

# shellcheck disable=SC2329 # called by name, as the functions below
build() {
  for wheel in "${WHEELS:-/nonexistent}"/*.whl; do
    if [ -e "$wheel" ]; then "$python" -m zipfile -e "$wheel" "$site"; fi
  done
  cp -r dpt_hpc "$site/"
  # An editable install in this Python must not hide what is built here: its hook imports this module.
  : > "$site/_editable_skbc_dpt_hpc.py"
  rm -f "$site"/dpt_hpc/_C*.so
  if [ -n "${EXTENSION:-}" ]; then
    cp "$EXTENSION" "$site/dpt_hpc/"
    return
  fi
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
  "$python" -c "from dpt_hpc import _C; assert _C.has_cuda == ('$device' == 'cuda'); print('built for', '$device')"
}

# The tests of a real GPU bring no fixtures of tests/conftest.py, which wants the whole of dpt_hpc.
# shellcheck disable=SC2329
cuda_tests() {
  local tests=("$root"/tests/test_cuda*.py)
  [ "$device" = cuda ] || tests=("$root/tests/test_radius_graph.py" -k "nasty_systems and 2.5")
  # From another folder: `python -m` would find the sources here, which have no extension, before $site.
  (cd "$work" && "$python" -m pytest -q --noconftest -p no:cacheprovider -c "$root/pyproject.toml" "${tests[@]}") |
    tee "$out/pytest.log"
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

export -f build cuda_tests sanitizer measurements
export python root device out work site

stage build 150 build
stage tests 120 cuda_tests
stage memcheck 60 sanitizer memcheck
stage racecheck 60 sanitizer racecheck
stage measurements 130 measurements

printf '\n%s in %d s: %s\n' "$([ $failed -eq 0 ] && echo 'All stages passed' || echo 'NOT all stages passed')" "$SECONDS" "$out/gpu.json"
exit $failed
