#include "instructions.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace resnet_fused::cpu {
namespace {

// Linux gives a process AMX's registers when it asks.
bool asks_for_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25, kAll = kBfloat16 | kTiles | kInt8;
  return (edx & kAll) == kAll && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The widest vectors that PyTorch was told to use.
std::string_view capability() {
  const char* most = std::getenv("ATEN_CPU_CAPABILITY");
  return most != nullptr ? most : "";
}

struct Instructions {
  bool avx2 = capability() != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && capability() != "avx2" && __builtin_cpu_supports("avx512f") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq");
  bool bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16");
  bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  bool amx = bfloat16 && vnni && asks_for_tiles();
};

const Instructions& instructions() {
  static const Instructions found;
  return found;
}

}  // namespace

const Kernels* kernels_for(ScalarType x) {
  const Instructions& found = instructions();
  if (x == ScalarType::Byte) return found.vnni ? &avx512_kernels : nullptr;
  if (x == ScalarType::BFloat16 ? found.bfloat16 : found.avx512) return &avx512_kernels;
  return found.avx2 ? &avx2_kernels : nullptr;
}

// AVX-512's other kernels are compiled for the instructions of bfloat16, too.
const Kernels* other_kernels() { return kernels_for(ScalarType::BFloat16); }

bool has_amx() { return instructions().amx; }

}  // namespace resnet_fused::cpu
