// Barriers in shared memory and the tensor memory accelerator. Copies happen at once or as late as
// a barrier allows, as the device says: early ones show stages that are still read, late ones show
// slices that nobody waited for.
#include "kernels/cuda/bulk_copy.cuh"

#include <algorithm>
#include <map>

#include "scheduler.h"

namespace emulation {
namespace {

struct Barrier {
  int64_t arrivals;  // that a phase needs
  int64_t missing;   // in this phase
  int64_t bytes;     // that this phase still waits for
  uint32_t parity;   // of this phase
  std::vector<Copy> copies;
};

std::map<const uint64_t*, Barrier> barriers;

Barrier& Find(const uint64_t* at) {
  const auto found = barriers.find(at);
  if (found == barriers.end()) Stop("a barrier that was not initialised");
  return found->second;
}

void EndPhaseIfComplete(Barrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  barrier.parity ^= 1;
  NoteProgress();
}

void Finish(Barrier& barrier) {
  for (const Copy& copy : barrier.copies) {
    Do({copy});
    barrier.bytes -= static_cast<int64_t>(copy.bytes);
  }
  barrier.copies.clear();
}

void Arrive(Barrier& barrier) {
  if (--barrier.missing < 0) Stop("more arrivals than a phase has");
  NoteProgress();
  EndPhaseIfComplete(barrier);
}

}  // namespace

void ForgetBarriers() { barriers.clear(); }

}  // namespace emulation

namespace lmkan::cuda {

using emulation::Find;

void InitBarrier(uint64_t* barrier, uint32_t arrivals) {
  emulation::barriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}

void FenceBarriers() {}

void Arrive(uint64_t* barrier) { emulation::Arrive(Find(barrier)); }

void ArriveWithBytes(uint64_t* barrier, uint32_t bytes) {
  Find(barrier).bytes += bytes;
  emulation::Arrive(Find(barrier));
}

void ArriveWithCopies(uint64_t* barrier) {
  emulation::Barrier& found = Find(barrier);
  for (const emulation::Copy& copy : emulation::TakeStartedCopies()) {
    found.copies.push_back(copy);
    found.bytes += static_cast<int64_t>(copy.bytes);
  }
  emulation::Arrive(found);
}

void Wait(uint64_t* barrier, uint32_t parity) {
  emulation::Barrier& found = Find(barrier);
  for (;;) {
    if (found.parity == parity && found.missing == 0) {
      emulation::Finish(found);
      emulation::EndPhaseIfComplete(found);
    }
    if (found.parity != parity) return;
    emulation::LetOthersRun();
  }
}

void CopyBox(const CUtensorMap* map, char* to, int32_t byte, int32_t cell, int32_t pair,
             uint64_t* barrier) {
  if (emulation::device.code < 90) emulation::Stop("an instruction that the code does not have");
  if (reinterpret_cast<uintptr_t>(to) % 128 != 0) emulation::Stop("a misaligned box");
  emulation::Barrier& found = Find(barrier);
  static const char kZeros[256] = {};
  const char* const slice = map->start + pair * static_cast<int64_t>(map->strides[1]);
  for (uint32_t i = 0; i < map->box[1]; ++i) {
    const uint64_t place = static_cast<uint64_t>(cell) + i;
    char* const target = to + i * map->box[0];
    uint64_t bytes = 0;
    if (place < map->sizes[1] && static_cast<uint64_t>(pair) < map->sizes[2]) {
      bytes = std::min<uint64_t>(map->box[0], map->sizes[0] - static_cast<uint64_t>(byte));
      found.copies.push_back({target, slice + place * map->strides[0] + byte, bytes});
    }
    // What lies outside of the tensor is zero, and counts.
    found.copies.push_back({target + bytes, kZeros, map->box[0] - bytes});
  }
  emulation::NoteProgress();
  if (emulation::device.copies_early) emulation::Finish(found);
}

}  // namespace lmkan::cuda
