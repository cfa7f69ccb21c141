#!/usr/bin/env bash
# Builds, checks and times the CUDA kernels on the GPU of this machine.
# Usage: run.sh OUTPUT_FOLDER [UPSTREAM]
set -euo pipefail
output=$(mkdir -p "$1" && cd "$1" && pwd)
upstream=${2:-}
root=$(cd "$(dirname "$0")/../.." && pwd)
build="$root/build/gpu"

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader | tee "$output/gpu.txt"
cmake -S "$root" -B "$build" -DLMKAN_BUILD_ONNXRUNTIME=OFF -DLMKAN_BUILD_CUDA=ON -DLMKAN_BUILD_CUDA_TESTS=ON \
  -DCMAKE_CUDA_ARCHITECTURES=native > "$output/build.log"
cmake --build "$build" --parallel >> "$output/build.log"

tests=$(find "$build" -name cuda_lookup_gpu -type f)
"$tests" | tee "$output/tests.txt"
for tool in memcheck racecheck initcheck; do
  compute-sanitizer --tool "$tool" --error-exitcode 1 "$tests" > "$output/$tool.txt" 2>&1 && echo "$tool: clean" || { echo "$tool: FAILED"; tail -20 "$output/$tool.txt"; }
done

# What the layers, the plugin and the engines do on a GPU, as far as they are installed.
if python3 -c "import lmkan_deploy, pytest" 2> /dev/null; then
  (cd "$root" && python3 -m pytest -q -rs tests/test_upstream.py tests/test_tensorrt_plugin.py \
    tests/test_engine_runner.py) | tee "$output/python_tests.txt" || echo "Python tests: FAILED"
else
  echo "Python tests: left out, since lmkan_deploy or pytest is not installed" | tee "$output/python_tests.txt"
fi

if [ -n "$upstream" ]; then
  rm -rf "$build/upstream" && cp -r "$upstream" "$build/upstream"
  (cd "$build/upstream" && python3 setup.py -q build_ext --inplace > "$output/upstream.log" 2>&1)
fi
PYTHONPATH="$root${upstream:+:$build/upstream}" python3 "$root/benchmarks/gpu/compare.py" \
  "$(find "$build" -name liblmkan_cuda.so)" "$output/timings.json" ${upstream:+--upstream}
