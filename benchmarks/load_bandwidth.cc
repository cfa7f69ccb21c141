// Bytes a second that one thread loads from working sets of several sizes, in runs of consecutive
// cache lines at random places: the access pattern of a lookup, without its arithmetic. JSON on
// stdout: working set in bytes -> bytes a second.
#include <immintrin.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

namespace {

constexpr size_t kLine = 64;
constexpr size_t kRunLines = 4;  // 256 bytes: 64 float32 outputs of one corner
constexpr size_t kRuns = 4096;

using Clock = std::chrono::steady_clock;

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

// Loads all runs once; the sum keeps the loads alive.
__attribute__((noinline, target("avx2"))) float LoadRuns(const float* data,
                                                         const std::vector<uint32_t>& starts) {
  constexpr size_t kVectors = kRunLines * kLine / sizeof(__m256);
  __m256 sums[kVectors];
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  for (const uint32_t start : starts) {
    for (size_t v = 0; v < kVectors; ++v) {
      sums[v] = _mm256_add_ps(sums[v], _mm256_loadu_ps(data + start + v * 8));
    }
  }
  float total = 0.0f;
  for (const __m256 sum : sums) total += _mm256_cvtss_f32(sum);
  return total;
}

double BytesPerSecond(size_t bytes) {
  const std::unique_ptr<float, FreeMemory> data(
      static_cast<float*>(std::aligned_alloc(2 << 20, (bytes + (2 << 20) - 1) >> 21 << 21)));
  const size_t floats = bytes / sizeof(float);
  for (size_t i = 0; i < floats; ++i) data.get()[i] = 1.0f;
  std::mt19937 random(0);
  std::vector<uint32_t> starts(kRuns);
  const size_t places = bytes / (kRunLines * kLine);
  const auto draw = [&] {
    for (uint32_t& start : starts) {
      start = static_cast<uint32_t>(random() % places * kRunLines * kLine / sizeof(float));
    }
  };
  double best = 0.0;
  volatile float sink = 0.0f;
  for (int repeat = 0; repeat < 50; ++repeat) {
    // New places each time where they do not all fit: otherwise the set would shrink to the runs.
    draw();
    if (bytes <= kRuns * kRunLines * kLine) sink = sink + LoadRuns(data.get(), starts);
    const auto begin = Clock::now();
    sink = sink + LoadRuns(data.get(), starts);
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    const double rate = static_cast<double>(kRuns * kRunLines * kLine) / seconds;
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace

int main() {
  std::printf("{");
  const char* separator = "";
  for (size_t bytes = size_t{8} << 10; bytes <= size_t{256} << 20; bytes *= 2) {
    std::printf("%s\"%zu\": %.0f", separator, bytes, BytesPerSecond(bytes));
    separator = ", ";
  }
  std::printf("}\n");
}
