// A libcuda.so.1 without a GPU behind it: what Triton's own driver and launchers call, with the checks that a real one
// makes before anything runs - the binary's architecture, registers, shared memory, grids, tensor maps - and no launch.
// cuGetErrorString says what was wrong.

#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_NAME 256

struct CUfunc_st {
  char name[MAX_NAME];
  int registers, dynamic_shared;
};

static int arch = 90, shared_optin = 227 * 1024, multiprocessors = 132;
static long launches, tensor_maps;
static char reason[1024] = "no error";

static CUresult fail(const char* what, const char* name, long value, long limit) {
  snprintf(reason, sizeof reason, "%s%s%s: %ld, limit %ld", name, *name ? ": " : "", what, value, limit);
  return CUDA_ERROR_INVALID_VALUE;
}

EXPORT void dry_set(int capability, int shared, int count) {
  arch = capability;
  shared_optin = shared;
  multiprocessors = count;
}
EXPORT long dry_launches(void) { return launches; }
EXPORT long dry_tensor_maps(void) { return tensor_maps; }

// ---- the device ----

EXPORT CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = (CUcontext)1, CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult error, const char** text) { return *text = reason, CUDA_SUCCESS; }

EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = arch / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = arch % 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_optin; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_optin + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr*)value = pointer, CUDA_SUCCESS;  // whatever memory a tensor has stands for the device's
}

// ---- modules ----

EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  const Elf64_Ehdr* header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return fail("no cubin", "", 0, 0);
  // ABI 8 (CUDA 13) keeps the architecture in the second byte of the flags, older ones in the first.
  const int built = header->e_ident[EI_ABIVERSION] >= 8 ? header->e_flags >> 8 & 0xff : header->e_flags & 0xff;
  if (built != arch) return fail("the binary's architecture", "", built, arch);
  return *module = (CUmodule)image, CUDA_SUCCESS;  // Triton keeps the image
}
EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const char* image = (const char*)module;
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + header->e_shoff);
  const char* names = image + sections[header->e_shstrndx].sh_offset;
  struct CUfunc_st* found = calloc(1, sizeof *found);
  snprintf(found->name, sizeof found->name, "%s", name);
  int exists = 0;
  for (int i = 0; i < header->e_shnum; ++i) {
    const char* section = names + sections[i].sh_name;
    if (!strncmp(section, ".text.", 6) && !strcmp(section + 6, name)) exists = 1;
    if (strcmp(section, ".nv.info")) continue;
    // Entries of format, attribute, size and value; attribute 0x2f is a function's symbol and its number of registers.
    const unsigned char *entry = (const unsigned char*)image + sections[i].sh_offset, *end = entry + sections[i].sh_size;
    for (; entry < end; entry += 4 + (entry[0] == 4 ? entry[2] | entry[3] << 8 : 0)) {
      const int count = entry[0] == 4 && entry[1] == 0x2f ? entry[8] | entry[9] << 8 : 0;
      if (count > found->registers) found->registers = count;
    }
  }
  if (!exists || !found->registers) return fail("no such kernel in the binary", name, 0, 0);
  return *function = found, CUDA_SUCCESS;
}

static int max_threads(const struct CUfunc_st* function) {
  const int granule = (function->registers + 7) / 8 * 8 * 32;  // registers are given to warps, eight to a lane
  const int warps = 65536 / granule / 4 * 4;                   // and warps to four partitions
  return warps * 32 < 1024 ? warps * 32 : 1024;
}

EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = max_threads(function); break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return fail("attribute", function->name, attribute, 0);
  if (value > shared_optin) return fail("shared memory", function->name, value, shared_optin);
  function->dynamic_shared = value;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
  return *clusters = 1, CUDA_SUCCESS;
}

// ---- tensor maps: the requirements of the driver API's page on cuTensorMapEncodeTiled ----

EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
  static const int widths[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const int spans[] = {0, 32, 64, 128};
  if ((unsigned)type >= sizeof widths / sizeof *widths) return fail("data type", "tensor map", type, 12);
  if (rank < 1 || rank > 5) return fail("rank", "tensor map", rank, 5);
  if ((uintptr_t)address % 16) return fail("address modulo 16", "tensor map", (uintptr_t)address % 16, 0);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return fail("interleave", "tensor map", interleave, 0);
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32) return fail("size of a dimension", "tensor map", sizes[i], 1l << 32);
    if (box[i] < 1 || box[i] > 256) return fail("box", "tensor map", box[i], 256);
    if (steps[i] < 1 || steps[i] > 8) return fail("step", "tensor map", steps[i], 8);
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40))
      return fail("stride in bytes", "tensor map", strides[i], 1l << 40);
  }
  const long inner = (long)box[0] * widths[type];
  if (inner % 16) return fail("bytes of the inner box modulo 16", "tensor map", inner % 16, 0);
  if ((unsigned)swizzle > 3) return fail("swizzle", "tensor map", swizzle, 3);
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && inner > spans[swizzle])
    return fail("bytes of the inner box under its swizzle", "tensor map", inner, spans[swizzle]);
  memset(map, 0, sizeof *map);
  ++tensor_maps;
  return CUDA_SUCCESS;
}

// ---- launches ----

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  const char* name = function->name;
  const int threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  const int shared = config->sharedMemBytes;
  if (config->gridDimX < 1 || config->gridDimX > 2147483647u) return fail("grid x", name, config->gridDimX, 2147483647);
  if (config->gridDimY < 1 || config->gridDimY > 65535) return fail("grid y", name, config->gridDimY, 65535);
  if (config->gridDimZ < 1 || config->gridDimZ > 65535) return fail("grid z", name, config->gridDimZ, 65535);
  if (threads > max_threads(function)) return fail("threads of a block", name, threads, max_threads(function));
  if (shared > 48 * 1024 && shared > function->dynamic_shared)
    return fail("dynamic shared memory beyond what the function asked for", name, shared, function->dynamic_shared);
  ++launches;
  return CUDA_SUCCESS;
}
