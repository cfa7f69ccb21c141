#!/usr/bin/env bash
# Builds, checks and times the CUDA kernels on the GPU of this machine; README.md says what comes out.
# Usage: run.sh OUTPUT_FOLDER [UPSTREAM], a checkout of upstream whose extension is built in place.
# Exits with 1 where anything failed or was cut off. SECONDS_LEFT=N: ends within N seconds (default 570).
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: $0 OUTPUT_FOLDER [UPSTREAM]" >&2; exit 2; }
output=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
upstream=${2:+$(cd "$2" && pwd)} || exit 2
root=$(cd "$(dirname "$0")/../.." && pwd)
build="$root/build/gpu"
python=${PYTHON:-python3}
deadline=$((SECONDS + ${SECONDS_LEFT:-570}))
export PYTHONUNBUFFERED=1
command -v nvcc > /dev/null || PATH=$PATH:/usr/local/cuda/bin
mkdir -p "$build"
rm -f "$output"/{gpu,build,checks,timings,verdicts}.txt

failed=0
verdicts=()
verdict() { # NAME WORDS...
  echo "== $*" | tee -a "$output/checks.txt"
  verdicts+=("$*")
}

# Runs a command for so many seconds at most, keeps what it prints, and notes how it ended.
step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS left=$((deadline - SECONDS)) file="$output/checks.txt" status
  [ "$name" != timings ] || file="$output/timings.txt"
  shift 2
  if ((left < 10)); then
    failed=1
    verdict "$name: left out, no time was left"
    return 1
  fi
  timeout --kill-after=5 $((limit < left ? limit : left)) "$@" 2>&1 | tee -a "$file"
  status=${PIPESTATUS[0]}
  case $status in
    0) verdict "$name: passed, $((SECONDS - began)) s" ;;
    124 | 137) failed=1; verdict "$name: CUT OFF after $((SECONDS - began)) s" ;;
    *) failed=1; verdict "$name: FAILED with status $status, $((SECONDS - began)) s" ;;
  esac
  return "$status"
}

# Output goes to a file alone, but for its end if the command fails.
quietly() { # COMMAND...
  "$@" >> "$output/build.txt" 2>&1 || { tail -n 20 "$output/build.txt"; return 1; }
}

imports() { (cd / && "$python" -c "$1") > /dev/null 2>&1; }

# --- The GPU -------------------------------------------------------------------------------------------

export CUDA_DEVICE_ORDER=PCI_BUS_ID # that of nvidia-smi
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
query() { nvidia-smi -i "$CUDA_VISIBLE_DEVICES" --query-gpu="$1" --format=csv,noheader; }
query name,driver_version,clocks.max.sm,memory.total | tee "$output/gpu.txt"
capability=$(query compute_cap)
if ! [[ $capability =~ ^[0-9]+\.[0-9]+$ ]]; then
  echo "expected a compute capability such as 9.0 from nvidia-smi, found \"$capability\"" >&2
  exit 2
fi

# --- The kernels ---------------------------------------------------------------------------------------

# The operators for ONNX Runtime's CUDA provider are built where they can run.
with_onnxruntime=OFF
if imports "import onnxruntime as o; assert 'CUDAExecutionProvider' in o.get_available_providers()"; then
  with_onnxruntime=ON
fi
configure() {
  quietly cmake -S "$root" -B "$build" -DLMKAN_BUILD_CUDA=ON -DLMKAN_BUILD_CUDA_TESTS=ON \
    "-DLMKAN_BUILD_ONNXRUNTIME=$with_onnxruntime" "-DCMAKE_CUDA_ARCHITECTURES=${capability//./}-real" \
    -DPython3_EXECUTABLE="$(command -v "$python")"
}
compile() { # TARGETS...
  quietly cmake --build "$build" --parallel "$(nproc)" --target "$@"
}
build_kernels() {
  configure && compile lmkan_cuda cuda_lookup_gpu
}
export -f quietly configure compile build_kernels
export output root build capability python with_onnxruntime
if [ $with_onnxruntime = ON ] && ! timeout 60 bash -c configure; then
  with_onnxruntime=OFF
  verdict "onnxruntime: its headers are missing"
fi
tests='' library=''
if step build 240 bash -c build_kernels; then
  tests=$(find "$build" -name cuda_lookup_gpu -type f)
  library=$(find "$build" -name liblmkan_cuda.so -type f)
fi

# --- Values, times, and all else while there is time ---------------------------------------------------

if [ -n "$tests" ]; then
  step lookups 120 "$tests"
fi

with_upstream=()
if [ -n "$upstream" ]; then
  if compgen -G "$upstream/lmKAN_kernels*.so" > /dev/null; then
    with_upstream=(--upstream)
  else
    failed=1
    verdict "upstream: no lmKAN_kernels*.so in $upstream; times are without it"
  fi
fi
if [ -n "$library" ]; then
  PYTHONPATH="$root${upstream:+:$upstream}${PYTHONPATH:+:$PYTHONPATH}" step timings 330 \
    "$python" "$root/benchmarks/gpu/compare.py" "$library" "$output/timings.json" ${with_upstream[@]+"${with_upstream[@]}"}
fi

if [ $with_onnxruntime = ON ] && imports "import pytest, torch"; then
  # The tests register the library of this folder.
  mkdir -p "$build/lib"
  if step onnxruntime_build 120 bash -c "compile lmkan_onnxruntime_cuda"; then
    find "$build" -name liblmkan_onnxruntime_cuda.so -type f -exec ln -sf {} "$build/lib/" \;
    LMKAN_DEPLOY_LIBRARY_DIR="$build/lib" step onnxruntime_tests 120 env -C "$root" \
      "$python" -m pytest -q -rs -p no:cacheprovider -m gpu tests/test_onnxruntime_cuda.py
  fi
else
  verdict "onnxruntime_tests: left out, since onnxruntime-gpu with its headers, PyTorch and pytest are not all there"
fi

# From the root of a checkout the package can always be imported: what counts is whether it is installed.
if imports "import importlib.metadata as m; m.distribution('lmkan-deploy'); import pytest"; then
  # All that have GPU tests, but for what ran above.
  mapfile -t files < <(grep -l 'mark\.gpu$' "$root"/tests/test_*.py | grep -v test_onnxruntime_cuda)
  if ! imports "import tensorrt_rtx"; then
    mapfile -t files < <(printf '%s\n' "${files[@]}" | grep -v /test_tensorrt_plugin_)
    verdict "python_tests: those of the plugin are left out, since tensorrt_rtx is not installed"
  fi
  step python_tests 150 env -C "$root" "$python" -m pytest -q -rs -p no:cacheprovider -m gpu \
    --deselect tests/test_cuda.py::test_lookups_on_a_gpu "${files[@]}"
else
  verdict "python_tests: left out, since lmkan-deploy or pytest is not installed"
fi

if [ -z "$tests" ]; then
  :
elif command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck; do
    step $tool 120 compute-sanitizer --tool $tool --error-exitcode 1 "$tests" small
  done
else
  verdict "sanitizer: left out, since compute-sanitizer is not there"
fi

# --- Once more, for whoever sees the end alone ---------------------------------------------------------

if [ -f "$output/timings.txt" ]; then
  sed -n '/^Summary/,$p' "$output/timings.txt"
fi
echo
printf '%s\n' "${verdicts[@]}" | tee "$output/verdicts.txt"
exit $failed
