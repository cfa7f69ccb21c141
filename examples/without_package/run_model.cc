// An exported model with the compiled operator, in C++ with nothing but ONNX Runtime.
//
// Usage: run_model LIBRARY MODEL
#define ORT_API_MANUAL_INIT  // so that the headers may be newer than the library
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <cstdio>

int main(int argc, char** argv) try {
  if (argc != 3) return std::fprintf(stderr, "usage: %s LIBRARY MODEL\n", argv[0]), 2;

  Ort::InitApi(OrtGetApiBase()->GetApi(17));  // all that is used here is in ONNX Runtime 1.17

  Ort::Env env;
  Ort::SessionOptions options;
  options.RegisterCustomOpsLibrary(argv[1]);
  Ort::Session session(env, argv[2], options);

  // One methane molecule, C and four H in Å: a tetrahedron, its first bond stretched by a tenth.
  std::array<float, 15> positions = {0,      0,      0,     0.69f,  0.69f,  0.69f,  0.63f, -0.63f,
                                     -0.63f, -0.63f, 0.63f, -0.63f, -0.63f, -0.63f, 0.63f};
  const std::array<int64_t, 3> shape = {1, 5, 3};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto input = Ort::Value::CreateTensor<float>(memory, positions.data(), positions.size(),
                                                     shape.data(), shape.size());
  Ort::AllocatorWithDefaultOptions allocator;
  const auto input_name = session.GetInputNameAllocated(0, allocator);
  const auto output_name = session.GetOutputNameAllocated(0, allocator);
  const char* const input_names[] = {input_name.get()};
  const char* const output_names[] = {output_name.get()};
  const auto outputs = session.Run(Ort::RunOptions{}, input_names, &input, 1, output_names, 1);
  std::printf("%.6f eV\n", outputs[0].GetTensorData<float>()[0]);
  return 0;
} catch (const Ort::Exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
