// Kernels for processors with AVX2, FMA and F16C. This file alone is compiled for them.
#include "accumulate.h"
#include "avx2_vector.h"
#include "find_cells_avx2.h"

namespace lmkan::cpu {
namespace {

// Eight vectors of sums are as many as hide the latency of an addition.
void AccumulateOneRowOfFloats(const AccumulateRowArgs& args) {
  if (args.width == 2 * Avx2Vector::kLanes) {
    return AccumulateOneRowOfBlocks<Avx2Vector, float, 2, 4>(args);
  }
  if (args.width == kMaxBlockOutputs) {
    return AccumulateOneRowOfBlocks<Avx2Vector, float, 4, 2>(args);
  }
  AccumulateOneRow<Avx2Vector, float>(args);
}

}  // namespace

const KernelSet kAvx2Kernels = {
    "avx2",
    Avx2Vector::kLanes,
    {FindCellsAvx2<float>, FindCellsAvx2<Float16>, FindCellsAvx2<BFloat16>},
    RoundWeights<Avx2Vector>,
    {Accumulate<Avx2Vector, float>, Accumulate<Avx2Vector, Float16>,
     Accumulate<Avx2Vector, BFloat16>, Accumulate<Avx2Vector, Int8Pair>,
     AccumulateCompact<Avx2Vector>},
    {AccumulateOneRowOfFloats, AccumulateOneRow<Avx2Vector, Float16>,
     AccumulateOneRow<Avx2Vector, BFloat16>, AccumulateOneRow<Avx2Vector, Int8Pair>,
     AccumulateOneRowOfCompact<Avx2Vector>},
    {64, 1, 1, 1, 1},
    int64_t{32} << 20,  // where caches no longer hold it
    {StoreRows<Avx2Vector, float>, StoreRows<Avx2Vector, Float16>, StoreRows<Avx2Vector, BFloat16>},
};

}  // namespace lmkan::cpu
