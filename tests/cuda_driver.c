// A libcuda.so.1 that writes down the calls that capture and launch a graph. NVIDIA's Python bindings look up every
// function through cuGetProcAddress.

#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { kSuccess = 0, kNotFound = 500, kCaptureUnsupported = 900 };

static int Begin(uintptr_t stream, int mode) {
  printf("cuStreamBeginCapture %#lx %d\n", (unsigned long)stream, mode);
  fflush(stdout);
  return stream == 0xBAD ? kCaptureUnsupported : kSuccess;
}

static int End(uintptr_t stream, uintptr_t* graph) {
  printf("cuStreamEndCapture %#lx\n", (unsigned long)stream);
  fflush(stdout);
  *graph = 0xA;
  return kSuccess;
}

static int Instantiate(uintptr_t* executable, uintptr_t graph, unsigned long long flags) {
  printf("cuGraphInstantiate %#lx %llu\n", (unsigned long)graph, flags);
  fflush(stdout);
  *executable = 0xB;
  return kSuccess;
}

static int Launch(uintptr_t executable, uintptr_t stream) {
  printf("cuGraphLaunch %#lx %#lx\n", (unsigned long)executable, (unsigned long)stream);
  fflush(stdout);
  return kSuccess;
}

static int Destroy(uintptr_t graph) {
  printf("cuGraphDestroy %#lx\n", (unsigned long)graph);
  fflush(stdout);
  return kSuccess;
}

static int DestroyExecutable(uintptr_t executable) {
  printf("cuGraphExecDestroy %#lx\n", (unsigned long)executable);
  fflush(stdout);
  return kSuccess;
}

static int Nothing(void) { return kSuccess; }

static int Version(int* version) {
  *version = 13000;
  return kSuccess;
}

int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status);

static const struct {
  const char* name;
  void* function;
} kFunctions[] = {
    {"cuStreamBeginCapture", Begin},
    {"cuStreamEndCapture", End},
    {"cuGraphInstantiate", Instantiate},
    {"cuGraphInstantiateWithFlags", Instantiate},
    {"cuGraphLaunch", Launch},
    {"cuGraphDestroy", Destroy},
    {"cuGraphExecDestroy", DestroyExecutable},
    {"cuInit", Nothing},
    {"cuDriverGetVersion", Version},
    {"cuGetProcAddress", cuGetProcAddress_v2},
    {"cuGetProcAddress_v2", cuGetProcAddress_v2},
};

int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
  (void)version, (void)flags;
  *function = NULL;
  for (size_t i = 0; i < sizeof(kFunctions) / sizeof(kFunctions[0]); ++i) {
    if (strcmp(name, kFunctions[i].name) == 0) *function = kFunctions[i].function;
  }
  if (status != NULL) *status = *function == NULL ? 1 : 0;
  return *function == NULL ? kNotFound : kSuccess;
}

int cuDriverGetVersion(int* version) { return Version(version); }
int cuInit(unsigned flags) { return (void)flags, kSuccess; }
