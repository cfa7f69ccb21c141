#include "log.h"

#include <atomic>
#include <cstdio>

namespace lmkan::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void SetLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
  if (finder != nullptr) logger_finder = finder;
}

void LogError(const char* line) noexcept {
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, line);
  } else {
    std::fprintf(stderr, "%s\n", line);
  }
}

}  // namespace lmkan::trt
