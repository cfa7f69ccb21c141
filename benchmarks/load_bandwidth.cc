// Bytes a second that one thread loads from working sets of several sizes, in runs of consecutive
// cache lines at random places, in huge pages where there are any: the access pattern of a lookup,
// without its arithmetic. JSON on stdout: working set in bytes -> bytes a second.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr size_t kLine = 64;
constexpr size_t kRunLines = 4;  // 256 bytes: 64 float32 outputs of one corner
constexpr size_t kRuns = 4096;

using Clock = std::chrono::steady_clock;

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

// Loads all runs once, with the widest vectors there are. Assembly, because sums to keep the loads
// alive would be slower than they are.
__attribute__((noinline)) void LoadRuns(const float* data, const std::vector<uint32_t>& starts) {
  static_assert(kRunLines * kLine == 256, "what is written out below");
  static const bool has_avx512 = __builtin_cpu_supports("avx512f");
  if (has_avx512) {
    for (const uint32_t start : starts) {
      __asm__ volatile(
          "vmovups (%0), %%zmm0\n vmovups 64(%0), %%zmm1\n"
          "vmovups 128(%0), %%zmm2\n vmovups 192(%0), %%zmm3"
          :
          : "r"(data + start)
          : "xmm0", "xmm1", "xmm2", "xmm3", "memory");
    }
    __asm__ volatile("vzeroupper" : : : "xmm0", "xmm1", "xmm2", "xmm3");
    return;
  }
  for (const uint32_t start : starts) {
    __asm__ volatile(
        "vmovups (%0), %%ymm0\n vmovups 32(%0), %%ymm1\n"
        "vmovups 64(%0), %%ymm2\n vmovups 96(%0), %%ymm3\n"
        "vmovups 128(%0), %%ymm4\n vmovups 160(%0), %%ymm5\n"
        "vmovups 192(%0), %%ymm6\n vmovups 224(%0), %%ymm7"
        :
        : "r"(data + start)
        : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "memory");
  }
  __asm__ volatile("vzeroupper" : : : "xmm0", "xmm1", "xmm2", "xmm3");
}

double BytesPerSecond(size_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t allocated = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const std::unique_ptr<float, FreeMemory> data(
      static_cast<float*>(std::aligned_alloc(kHugePage, allocated)));
  if (data == nullptr) {
    std::fprintf(stderr, "no memory for %zu bytes\n", allocated);
    std::exit(1);
  }
#if defined(__linux__)
  madvise(data.get(), allocated, MADV_HUGEPAGE);  // as tables from 4 MB on
#endif
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
  for (int repeat = 0; repeat < 50; ++repeat) {
    // New places each time where they do not all fit: otherwise the set would shrink to the runs.
    draw();
    if (bytes <= kRuns * kRunLines * kLine) LoadRuns(data.get(), starts);
    const auto begin = Clock::now();
    LoadRuns(data.get(), starts);
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
