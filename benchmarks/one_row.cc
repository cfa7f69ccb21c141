// Latency of one row through ONNX Runtime's C++ API, where a call costs less than from Python.
//
// Usage: one_row LIBRARY NAME=MODEL[+] ...
//
// A plus means with the library of custom operators. Every model has one input x [1, N] and one
// output y. The models take turns, so that all meet the same moods of the machine. Prints JSON:
// name -> seconds of a call, one for each turn.
#include <onnxruntime_cxx_api.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr int kTurns = 101;
constexpr int kCallsATurn = 500;

struct Model {
  std::string name;
  Ort::Session session{nullptr};
  std::vector<float> x;
  std::vector<double> seconds;
};

Model Load(const Ort::Env& env, const char* library, const std::string& argument) {
  const size_t equals = argument.find('=');
  const bool custom_ops = argument.back() == '+';
  Model model;
  model.name = argument.substr(0, equals);
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  options.SetInterOpNumThreads(1);
  if (custom_ops) options.RegisterCustomOpsLibrary(library);
  const size_t length = argument.size() - equals - 1 - (custom_ops ? 1 : 0);
  model.session = Ort::Session(env, argument.substr(equals + 1, length).c_str(), options);
  const auto info = model.session.GetInputTypeInfo(0);
  model.x.resize(static_cast<size_t>(info.GetTensorTypeAndShapeInfo().GetShape()[1]));
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (float& value : model.x) value = normal(random);
  return model;
}

// Seconds of a call, the mean of many.
double Time(Model& model) {
  const std::array<int64_t, 2> shape = {1, static_cast<int64_t>(model.x.size())};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto input = Ort::Value::CreateTensor<float>(memory, model.x.data(), model.x.size(),
                                                     shape.data(), shape.size());
  const char* const input_names[] = {"x"};
  const char* const output_names[] = {"y"};
  const Ort::RunOptions options;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCallsATurn; ++i) {
    model.session.Run(options, input_names, &input, 1, output_names, 1);
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return elapsed.count() / kCallsATurn;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3) return std::fprintf(stderr, "usage: %s LIBRARY NAME=MODEL[+] ...\n", argv[0]), 2;
  const Ort::Env env(ORT_LOGGING_LEVEL_ERROR);
  std::vector<Model> models;
  for (int i = 2; i < argc; ++i) models.push_back(Load(env, argv[1], argv[i]));
  for (Model& model : models) Time(model);  // warm-up
  for (int turn = 0; turn < kTurns; ++turn) {
    for (Model& model : models) model.seconds.push_back(Time(model));
  }
  std::printf("{");
  for (const Model& model : models) {
    std::printf("%s\"%s\": [", &model == models.data() ? "" : ",\n ", model.name.c_str());
    for (size_t i = 0; i < model.seconds.size(); ++i) {
      std::printf("%s%.4e", i == 0 ? "" : ", ", model.seconds[i]);
    }
    std::printf("]");
  }
  std::printf("}\n");
  return 0;
} catch (const Ort::Exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
