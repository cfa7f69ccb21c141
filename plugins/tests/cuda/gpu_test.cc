// What only a GPU has: graphs, streams, and memory for offsets beyond 32 bits.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "array.h"
#include "check.h"
#include "device.h"
#include "inputs.h"
#include "lmkan/lookup2d_cuda.h"
#include "oracle.h"
#include "table.h"

namespace lmkan::test {
namespace {

// AUTO, and what the kernels offer for a table. This loads them.
std::vector<lmkan_cuda_tactic> Tactics(const lmkan_table_desc& desc) {
  std::vector<lmkan_cuda_tactic> tactics(5, LMKAN_CUDA_AUTO);
  const int32_t count = lmkan_cuda_tactics(&desc, LMKAN_FLOAT32, tactics.data() + 1, 4);
  LMKAN_EXPECT(count >= 1, "no tactic");
  tactics.resize(static_cast<size_t>(1 + count));
  return tactics;
}

void Check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", call, cudaGetErrorString(error));
  std::exit(1);
}

std::string Describe(const char* test, lmkan_dtype table_dtype, lmkan_cuda_tactic tactic) {
  return std::string(test) + ", table " + DtypeName(table_dtype) + ", tactic " +
         std::to_string(tactic);
}

// A stream that does not wait for the default one.
class Stream {
 public:
  Stream() {
    Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }
  void Wait() const { Check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

// Device memory without a copy on the host; null where there is not enough.
class DeviceBytes {
 public:
  explicit DeviceBytes(size_t size) {
    if (cudaMalloc(&data_, size) != cudaSuccess) {
      cudaGetLastError();
      data_ = nullptr;
    }
  }
  ~DeviceBytes() { cudaFree(data_); }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_ = nullptr;
};

// More than any tactic needs here.
constexpr size_t kWorkspaceBytes = 64 << 20;

void LookUp(const lmkan_table_desc& desc, lmkan_dtype dtype, const void* x, void* y, int64_t rows,
            lmkan_cuda_tactic tactic, const DeviceBytes& workspace, cudaStream_t stream,
            const std::string& label) {
  char message[256] = "";
  const lmkan_status status =
      lmkan_cuda_lookup2d(&desc, dtype, x, y, rows, tactic, workspace.data(), kWorkspaceBytes,
                          stream, message, sizeof message);
  LMKAN_EXPECT(status == LMKAN_OK, "%s: %s", label.c_str(), message);
}

// A lookup of some rows, with all that it needs in device memory.
struct Problem {
  Problem(const Shape& problem_shape, lmkan_dtype table_dtype, uint64_t seed)
      : shape(problem_shape),
        table(MakeTable(shape, table_dtype, seed)),
        entries(table.entries, Placement::kHeap),
        scales(table.scales, Placement::kHeap),
        x(MakeX(shape, LMKAN_FLOAT32, seed), Placement::kHeap),
        y(Nothing(), Placement::kHeap),
        desc{entries.data(),  table_dtype,       shape.num_pairs,
             shape.num_grids, shape.num_outputs, static_cast<const float*>(scales.data())} {
    // Other streams would not wait for the copies.
    Check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  Array Nothing() const {
    Array array(LMKAN_FLOAT32, shape.y_size());
    array.Fill(0xff);
    return array;
  }

  void Launch(lmkan_cuda_tactic tactic, cudaStream_t stream, const std::string& label) {
    LookUp(desc, LMKAN_FLOAT32, x.data(), y.data(), shape.rows, tactic, workspace, stream, label);
  }

  void Set(const Array& values, const Stream& stream) {
    Check(cudaMemcpyAsync(x.data(), values.data(), values.num_bytes(), cudaMemcpyHostToDevice,
                          stream.get()),
          "cudaMemcpyAsync");
    const size_t y_bytes = static_cast<size_t>(shape.y_size()) * sizeof(float);
    Check(cudaMemsetAsync(y.data(), 0xff, y_bytes, stream.get()), "cudaMemsetAsync");
    stream.Wait();
  }

  Shape shape;
  Table table;
  DeviceArray entries, scales, x, y;
  lmkan_table_desc desc;
  const DeviceBytes workspace{kWorkspaceBytes};
};

bool IsEqual(const Array& a, const Array& b) {
  return a.num_bytes() == b.num_bytes() && std::memcmp(a.data(), b.data(), a.num_bytes()) == 0;
}

// --- Streams and graphs
// ------------------------------------------------------------------------------------

// A lookup is launched on the stream that it is given, and always has the same bits.
void TestStreamsAndRepeats(const Shape& shape, lmkan_dtype table_dtype) {
  Problem problem(shape, table_dtype, 1);
  const Stream stream;
  const Array x = MakeX(shape, LMKAN_FLOAT32, 1);
  for (const lmkan_cuda_tactic tactic : Tactics(problem.desc)) {
    const std::string label = Describe("repeats", table_dtype, tactic);
    problem.Set(x, stream);
    problem.Launch(tactic, nullptr, label);
    const Array first = problem.y.Read();
    for (int repeat = 0; repeat < 20; ++repeat) {
      problem.Set(x, stream);
      problem.Launch(tactic, stream.get(), label);
      stream.Wait();  // for this stream alone
      LMKAN_EXPECT(IsEqual(problem.y.Read(), first), "%s: run %d differs", label.c_str(), repeat);
    }
    LMKAN_EXPECT(problem.y.NeighbourhoodIsIntact(), "%s: wrote outside of y", label.c_str());
  }
}

// A lookup comes behind what its stream has: on any other one it would read x too early.
void TestOrder(const Shape& shape) {
  Problem problem(shape, LMKAN_FLOAT32, 1);
  const Stream stream;
  const Array x = MakeX(shape, LMKAN_FLOAT32, 1);
  Array early = x;
  early.Fill(0);
  problem.Set(x, stream);
  problem.Launch(LMKAN_CUDA_AUTO, stream.get(), "order");
  stream.Wait();
  const Array expected = problem.y.Read();
  DeviceArray late(x, Placement::kHeap);
  const DeviceBytes slow(size_t{1} << 28);
  Check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  problem.Set(early, stream);
  for (int i = 0; slow.data() != nullptr && i < 20; ++i) {
    Check(cudaMemsetAsync(slow.data(), i, size_t{1} << 28, stream.get()), "cudaMemsetAsync");
  }
  Check(cudaMemcpyAsync(problem.x.data(), late.data(), x.num_bytes(), cudaMemcpyDeviceToDevice,
                        stream.get()),
        "cudaMemcpyAsync");
  problem.Launch(LMKAN_CUDA_AUTO, stream.get(), "order");
  stream.Wait();
  LMKAN_EXPECT(IsEqual(problem.y.Read(), expected), "a lookup ran before what its stream had");
}

// Captured once, replayed with other values at the same addresses.
void TestGraphs(const Shape& shape, lmkan_dtype table_dtype) {
  Problem problem(shape, table_dtype, 1);
  const Stream stream;
  for (const lmkan_cuda_tactic tactic : Tactics(problem.desc)) {
    const std::string label = Describe("graph", table_dtype, tactic);
    Check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal),
          "cudaStreamBeginCapture");
    problem.Launch(tactic, stream.get(), label);
    cudaGraph_t graph = nullptr;
    Check(cudaStreamEndCapture(stream.get(), &graph), "cudaStreamEndCapture");
    size_t num_nodes = 0;
    Check(cudaGraphGetNodes(graph, nullptr, &num_nodes), "cudaGraphGetNodes");
    LMKAN_EXPECT(num_nodes == (tactic == LMKAN_CUDA_SPLIT ? 2 : 1), "%s: %d launches",
                 label.c_str(), static_cast<int>(num_nodes));
    cudaGraphExec_t executable = nullptr;
    Check(cudaGraphInstantiateWithFlags(&executable, graph, 0), "cudaGraphInstantiateWithFlags");
    Check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    for (uint64_t seed = 2; seed < 6; ++seed) {
      const Array x = MakeX(shape, LMKAN_FLOAT32, seed);
      problem.Set(x, stream);
      Check(cudaGraphLaunch(executable, stream.get()), "cudaGraphLaunch");
      stream.Wait();
      const Array replayed = problem.y.Read();
      problem.Set(x, stream);
      problem.Launch(tactic, stream.get(), label);
      stream.Wait();
      LMKAN_EXPECT(IsEqual(replayed, problem.y.Read()), "%s: differs from a launch", label.c_str());
      if (table_dtype == LMKAN_INT8) continue;  // whose weights are rounded
      ExpectClose(shape, Evaluate(shape, x.ToDoubles(), problem.table.ToDoubles()), replayed,
                  label);
    }
    Check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
  }
}

// More rows than SPLIT's workspace has room for at a time.
void TestTurns() {
  Problem problem({8, 3, 40, 250000}, LMKAN_FLOAT32, 1);
  problem.Launch(LMKAN_CUDA_SHARED, nullptr, "turns");
  const Array expected = problem.y.Read();
  problem.Launch(LMKAN_CUDA_SPLIT, nullptr, "turns");
  const Array found = problem.y.Read();
  double largest = 0;
  for (int64_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::fabs(expected.Get(i)));
  }
  int64_t wrong = 0;
  for (int64_t i = 0; i < found.size(); ++i) {
    const double difference = found.Get(i) - expected.Get(i);
    if (!(std::fabs(difference) <= 1e-5 * largest)) ++wrong;
  }
  LMKAN_EXPECT(wrong == 0, "turns: %d values differ from SHARED's", static_cast<int>(wrong));
}

// --- Offsets
// -----------------------------------------------------------------------------------------------

bool HasRoom(const char* test, double bytes) {
  size_t available = 0, total = 0;
  Check(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
  if (static_cast<double>(available) > bytes + 1e9) return true;
  std::printf("skipped: %s needs %.1f GB of device memory, %.1f GB are free\n", test, bytes / 1e9,
              static_cast<double>(available) / 1e9);
  return false;
}

// A table of more than 2^31 float16 entries, zeros but for the last corner's.
void TestLargeTable() {
  const Shape shape = {2, 25, 1600008, 3};
  const auto table_bytes = static_cast<size_t>(shape.table_size()) * 2;
  if (!HasRoom("a large table", static_cast<double>(table_bytes))) return;
  const DeviceBytes table(table_bytes);
  if (!LMKAN_EXPECT(table.data() != nullptr, "%zu bytes were refused", table_bytes)) return;
  Check(cudaMemset(table.data(), 0, table_bytes), "cudaMemset");
  Array corner(LMKAN_FLOAT16, shape.num_outputs);
  for (int64_t o = 0; o < shape.num_outputs; ++o) corner.Set(o, static_cast<double>(o % 1021));
  Check(cudaMemcpy(table.data() + table_bytes - corner.num_bytes(), corner.data(),
                   corner.num_bytes(), cudaMemcpyHostToDevice),
        "cudaMemcpy");
  Array x_values(LMKAN_FLOAT32, shape.x_size());
  // The second pair of the middle row lies on the very last point of the grid.
  x_values.Set(6, GridPoint(25, 25));
  x_values.Set(7, GridPoint(25, 25));
  DeviceArray x(x_values, Placement::kHeap);
  Array nothing(LMKAN_FLOAT32, shape.y_size());
  nothing.Fill(0xff);
  const lmkan_table_desc desc = {table.data(), LMKAN_FLOAT16, 2, 25, shape.num_outputs, nullptr};
  const DeviceBytes workspace(kWorkspaceBytes);
  for (const lmkan_cuda_tactic tactic : Tactics(desc)) {
    DeviceArray y(nothing, Placement::kHeap);
    const std::string label = Describe("a large table", LMKAN_FLOAT16, tactic);
    LookUp(desc, LMKAN_FLOAT32, x.data(), y.data(), shape.rows, tactic, workspace, nullptr, label);
    const Array found = y.Read();
    int64_t wrong = 0;
    for (int64_t i = 0; i < found.size(); ++i) {
      const int64_t row = i / shape.num_outputs;
      const double expected = row == 1 ? static_cast<double>(i % shape.num_outputs % 1021) : 0;
      const double difference = found.Get(i) - expected;
      if (!(difference < 1e-2 && difference > -1e-2)) ++wrong;
    }
    LMKAN_EXPECT(wrong == 0, "%s: %lld of %lld values are wrong", label.c_str(),
                 static_cast<long long>(wrong), static_cast<long long>(found.size()));
  }
}

// More than 2^31 features, and as many values: their first rows, those around 2^31 bytes and
// elements, and the last ones are as in a batch of their own.
void TestLargeBatch() {
  constexpr int64_t kPart = 100;
  const Shape shape = {1, 5, 2, (int64_t{1} << 30) + 12345};
  const auto bytes = static_cast<size_t>(shape.x_size()) * 2;  // of x, and of y
  if (!HasRoom("a large batch", 2.0 * static_cast<double>(bytes))) return;
  const DeviceBytes x(bytes), y(bytes);
  if (!LMKAN_EXPECT(x.data() != nullptr && y.data() != nullptr, "%zu bytes were refused", bytes)) {
    return;
  }
  const Table table_values = MakeTable(shape, LMKAN_FLOAT32, 1);
  DeviceArray table(table_values.entries, Placement::kHeap);
  const lmkan_table_desc desc = {table.data(), LMKAN_FLOAT32, 1, 5, 2, nullptr};
  const DeviceBytes workspace(kWorkspaceBytes);
  const Shape part = {1, 5, 2, kPart};
  const Array x_values = MakeX(part, LMKAN_FLOAT16, 2);
  const Reference reference = Evaluate(part, x_values.ToDoubles(), table_values.ToDoubles());
  // Rows have 4 bytes: those around 2^31 bytes, 2^32 bytes, and at the end.
  const int64_t firsts[] = {0, (int64_t{1} << 29) - kPart / 2, (int64_t{1} << 30) - kPart / 2,
                            shape.rows - kPart};
  Check(cudaMemset(x.data(), 0, bytes), "cudaMemset");
  for (const int64_t first : firsts) {
    Check(cudaMemcpy(x.data() + 4 * first, x_values.data(), x_values.num_bytes(),
                     cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
  for (const lmkan_cuda_tactic tactic : Tactics(desc)) {
    const std::string label = Describe("a large batch", LMKAN_FLOAT32, tactic);
    Check(cudaMemset(y.data(), 0xff, bytes), "cudaMemset");
    LookUp(desc, LMKAN_FLOAT16, x.data(), y.data(), shape.rows, tactic, workspace, nullptr, label);
    for (const int64_t first : firsts) {
      Array found(LMKAN_FLOAT16, part.y_size());
      Check(
          cudaMemcpy(found.data(), y.data() + 4 * first, found.num_bytes(), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
      ExpectClose(part, reference, found, label + ", row " + std::to_string(first));
    }
  }
}

}  // namespace

void TestRealDevice(bool is_small) {
  for (const lmkan_dtype table_dtype : kTableDtypes) {
    for (const Shape& shape : {Shape{9, 5, 40, 300}, Shape{64, 13, 33, 3}, Shape{3, 26, 128, 1},
                               Shape{70, 14, 3, 300}}) {
      TestStreamsAndRepeats(shape, table_dtype);
      TestGraphs(shape, table_dtype);
    }
  }
  TestOrder({64, 13, 96, 700});
  if (is_small) return;
  TestTurns();
  TestLargeTable();
  TestLargeBatch();
}

}  // namespace lmkan::test
