#include "cpu_table.h"

#include <cstdio>
#include <cstring>

#include "check.h"

namespace lmkan::test {
namespace {

constexpr lmkan_isa kIsas[] = {LMKAN_ISA_PORTABLE, LMKAN_ISA_AVX2, LMKAN_ISA_AVX512};

// The status of a table that is right in everything but, perhaps, its instruction set.
lmkan_status TryIsa(lmkan_isa isa, std::string* name_or_message) {
  const float data[16] = {};
  const lmkan_table_desc desc = {data, LMKAN_FLOAT32, 1, 3, 1, nullptr};
  lmkan_cpu_table* table = nullptr;
  char message[256] = "";
  const lmkan_status status =
      lmkan_cpu_table_create(&desc, LMKAN_COPY, isa, &table, message, sizeof message);
  const TableHandle handle(table);
  *name_or_message = status == LMKAN_OK ? lmkan_cpu_table_isa(table) : message;
  return status;
}

}  // namespace

const char* IsaName(lmkan_isa isa) {
  switch (isa) {
    case LMKAN_ISA_PORTABLE:
      return "portable";
    case LMKAN_ISA_AVX2:
      return "avx2";
    case LMKAN_ISA_AVX512:
      return "avx512";
    default:
      return "auto";
  }
}

const char* OwnershipName(lmkan_ownership ownership) {
  return ownership == LMKAN_COPY ? "copy" : "borrow";
}

bool ProcessorHas(lmkan_isa isa) {
  if (isa == LMKAN_ISA_PORTABLE) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == LMKAN_ISA_AVX2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

TableHandle CreateTable(const Table& table, lmkan_ownership ownership, lmkan_isa isa) {
  return CreateTable(table.shape, table.dtype(), table.entries.data(), table.scales_or_null(),
                     ownership, isa);
}

TableHandle CreateTable(const Shape& shape, lmkan_dtype dtype, const void* data,
                        const float* scales, lmkan_ownership ownership, lmkan_isa isa) {
  const lmkan_table_desc desc = {data,  dtype, shape.num_pairs, shape.num_grids, shape.num_outputs,
                                 scales};
  lmkan_cpu_table* table = nullptr;
  char message[256] = "";
  const lmkan_status status =
      lmkan_cpu_table_create(&desc, ownership, isa, &table, message, sizeof message);
  LMKAN_EXPECT(status == LMKAN_OK && table != nullptr, "status %d for %s, %s, %s, %s: %s",
               static_cast<int>(status), shape.ToString().c_str(), DtypeName(dtype),
               OwnershipName(ownership), IsaName(isa), message);
  return TableHandle(table);
}

bool Lookup(const lmkan_cpu_table* table, lmkan_dtype dtype, const void* x, void* y, int64_t rows,
            int64_t num_tasks) {
  for (int64_t task = 0; task < num_tasks; ++task) {
    char message[256] = "";
    const lmkan_status status =
        lmkan_cpu_lookup2d(table, dtype, x, y, rows, task, num_tasks, message, sizeof message);
    if (!LMKAN_EXPECT(status == LMKAN_OK, "status %d of task %lld of %lld of %lld rows: %s",
                      static_cast<int>(status), static_cast<long long>(task),
                      static_cast<long long>(num_tasks), static_cast<long long>(rows), message)) {
      return false;
    }
  }
  return true;
}

int RunForIsa(int argc, char** argv, const std::function<void(lmkan_isa)>& test) {
  for (const lmkan_isa isa : kIsas) {
    if (argc != 2 || std::strcmp(argv[1], IsaName(isa)) != 0) continue;
    std::string answer;
    const lmkan_status status = TryIsa(isa, &answer);
    if (!ProcessorHas(isa)) {
      LMKAN_EXPECT(status == LMKAN_UNSUPPORTED && !answer.empty(), "status %d, \"%s\" for %s",
                   static_cast<int>(status), answer.c_str(), IsaName(isa));
      const int result = Finish();
      std::printf("%s is not supported by the processor: its kernels were not tested\n",
                  IsaName(isa));
      return result == 0 ? kSkipped : result;
    }
    if (LMKAN_EXPECT(status == LMKAN_OK && answer == IsaName(isa), "status %d, \"%s\" for %s",
                     static_cast<int>(status), answer.c_str(), IsaName(isa))) {
      test(isa);
    }
    return Finish();
  }
  std::fprintf(stderr, "expected one argument: portable, avx2 or avx512\n");
  return 2;
}

std::string Describe(lmkan_isa isa, lmkan_dtype table_dtype, lmkan_dtype x_dtype,
                     lmkan_ownership ownership) {
  return std::string(IsaName(isa)) + ", table " + DtypeName(table_dtype) + ", x " +
         DtypeName(x_dtype) + ", " + OwnershipName(ownership);
}

}  // namespace lmkan::test
