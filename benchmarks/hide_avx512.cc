// Makes a program see a processor without AVX-512, AMX and AVX-VNNI, so that the libraries that it
// loads choose the kernels of an AVX2 machine; libc and libm, which chose theirs before, keep them.
// Preloaded:
//
//   LD_PRELOAD=hide_avx512.so program
//
// Libraries ask with the CPUID instruction. Linux makes it fault on request, where the processor
// and its hypervisor can (cpuid_fault in /proc/cpuinfo); the fault's handler then answers with
// those bits cleared. Where they can't, the program ends with status 77.
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <initializer_list>

namespace {

constexpr int kArchSetCpuid = 0x1012;  // ARCH_SET_CPUID of <asm/prctl.h>, which C libraries lack
constexpr int kUnsupported = 77;

struct Leaf {
  uint32_t eax, ebx, ecx, edx;
};

long AllowCpuid(bool allowed) { return syscall(SYS_arch_prctl, kArchSetCpuid, allowed ? 1L : 0L); }

void Clear(uint32_t* bits, std::initializer_list<int> positions) {
  for (const int position : positions) *bits &= ~(uint32_t{1} << position);
}

// Positions from Intel's manual, volume 2, CPUID.
void Hide(uint32_t leaf, uint32_t subleaf, Leaf* answer) {
  if (leaf != 7) return;
  if (subleaf == 0) {
    Clear(&answer->ebx, {16, 17, 21, 26, 27, 28, 30, 31});  // F DQ IFMA PF ER CD BW VL
    Clear(&answer->ecx, {1, 6, 11, 12, 14});                // VBMI VBMI2 VNNI BITALG VPOPCNTDQ
    Clear(&answer->edx, {2, 3, 8, 22, 23, 24, 25});         // 4VNNIW 4FMAPS VP2INTERSECT AMX FP16
  } else if (subleaf == 1) {
    Clear(&answer->eax, {4, 5, 21, 23});  // AVX-VNNI AVX512-BF16 AMX-FP16 AVX-IFMA
    Clear(&answer->edx, {4, 5, 10, 19});  // AVX-VNNI-INT8 AVX-NE-CONVERT AVX-VNNI-INT16 AVX10
  }
}

void OnFault(int signal_number, siginfo_t*, void* context) {
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint8_t* const code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (code[0] != 0x0f || code[1] != 0xa2) {  // not CPUID: a real fault, which repeats
    signal(signal_number, SIG_DFL);
    return;
  }
  const auto leaf = static_cast<uint32_t>(registers[REG_RAX]);
  const auto subleaf = static_cast<uint32_t>(registers[REG_RCX]);
  Leaf answer;
  AllowCpuid(true);
  __asm__ volatile("cpuid"
                   : "=a"(answer.eax), "=b"(answer.ebx), "=c"(answer.ecx), "=d"(answer.edx)
                   : "a"(leaf), "c"(subleaf));
  AllowCpuid(false);
  Hide(leaf, subleaf, &answer);
  registers[REG_RAX] = answer.eax;
  registers[REG_RBX] = answer.ebx;
  registers[REG_RCX] = answer.ecx;
  registers[REG_RDX] = answer.edx;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) void Install() {
  struct sigaction action = {};
  action.sa_sigaction = OnFault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  if (sigaction(SIGSEGV, &action, nullptr) == 0 && AllowCpuid(false) == 0) return;
  std::fputs("this processor or its hypervisor can't hide instruction sets\n", stderr);
  _exit(kUnsupported);
}

}  // namespace
