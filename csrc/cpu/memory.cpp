#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

namespace resnet_fused::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20, kPage = 4096;
constexpr size_t kMostKept = size_t{256} << 20;

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, void*> kept;  // by size
  std::unordered_map<void*, size_t> taken;
  size_t bytes_kept = 0;
};

Pool& pool() {
  static Pool* made = new Pool;  // never destroyed: results may outlive the library's statics
  return *made;
}

}  // namespace

void* take(size_t bytes) {
  const size_t unit = bytes < kHugePage ? kPage : kHugePage;
  bytes = (bytes + unit - 1) / unit * unit;
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  void* memory;
  auto found = p.kept.lower_bound(bytes);
  if (found != p.kept.end() && found->first <= 2 * bytes) {
    found = std::prev(p.kept.upper_bound(found->first));  // the last one given back: it is the likeliest in the cache
    bytes = found->first;
    memory = found->second;
    p.kept.erase(found);
    p.bytes_kept -= bytes;
  } else {
    memory = std::aligned_alloc(unit, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    if (unit == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);  // where the system gives them on request
  }
  p.taken[memory] = bytes;
  return memory;
}

void give_back(void* memory) noexcept {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  const auto found = p.taken.find(memory);
  const size_t bytes = found->second;
  p.taken.erase(found);
  if (p.bytes_kept + bytes > kMostKept) {
    std::free(memory);
    return;
  }
  p.kept.emplace(bytes, memory);
  p.bytes_kept += bytes;
}

}  // namespace resnet_fused::cpu
