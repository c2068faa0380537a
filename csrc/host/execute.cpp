#include "execute.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>

#include "fibre.h"

namespace host {
namespace {

constexpr unsigned kWarp = 32;
// NaN behind every shared array: a read beyond its end shows, a write is found when the block ends. AddressSanitizer
// has its own.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 64;
#endif

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error("host execution: " + message); }

unsigned environment(const char* name, unsigned otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : static_cast<unsigned>(std::strtoul(text, nullptr, 10));
}

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}
std::string text(dim3 v) { return text(uint3{v.x, v.y, v.z}); }

void shuffle(unsigned* values, size_t count, uint64_t& random) {
  for (size_t i = count; i > 1; --i) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    std::swap(values[i - 1], values[(random >> 32) * i >> 32]);
  }
}

// Where a group of threads - a block, a warp - meets.
struct Barrier {
  unsigned size = 0, arrived = 0, generation = 0;
  const char* file = nullptr;
  int line = 0;
};

struct Thread {
  Fibre fibre;
  uint3 index;
  unsigned linear;
  bool done;
  const Barrier* waits_for;
  unsigned generation;
  unsigned exchanges;
};

// Two sets of slots, used in turn: a lane that is still reading one is not overtaken by the next exchange.
struct Warp {
  Barrier barrier;
  uint64_t slot[2][kWarp];
};

struct Shared {
  std::unique_ptr<char[]> data;
  size_t bytes = 0;
  uint64_t block = 0;
};

class Block {
 public:
  void run(const std::function<void()>& kernel, const Index& where, size_t dynamic_bytes, uint64_t seed);
  void arrive(Barrier& barrier, const char* file, int line);
  void* shared(const void* site, size_t bytes);

  const std::function<void()>* kernel = nullptr;
  Index index;
  Fibre scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  Thread* current = nullptr;
  std::string error;
  size_t dynamic_bytes = 0;

 private:
  bool advance_one_warp(uint64_t& random);
  void check_guards() const;
  std::string describe_deadlock() const;

  std::unordered_map<const void*, Shared> arrays_;
  std::vector<unsigned> order_;
  uint64_t blocks_run_ = 0;
};

thread_local Block* block = nullptr;

void thread_entry() {
  (*block->kernel)();
  block->current->done = true;
  block->current->fibre.switch_to(block->scheduler);
}

void Block::arrive(Barrier& b, const char* file, int line) {
  if (b.arrived == 0) {
    b.file = file;
    b.line = line;
  } else if (b.line != line || std::strcmp(b.file, file) != 0) {
    if (error.empty()) {
      error = "divergent barrier in block " + text(index.block) + ": threads meet at " + b.file + ":" +
              std::to_string(b.line) + " and at " + file + ":" + std::to_string(line);
    }
  }
  current->waits_for = &b;
  current->generation = b.generation;
  if (++b.arrived == b.size) {
    b.arrived = 0;
    ++b.generation;
  }
  current->fibre.switch_to(scheduler);
}

void* Block::shared(const void* site, size_t bytes) {
  Shared& array = arrays_[site];
  if (array.bytes != bytes || array.data == nullptr) {
    array.data.reset(new char[std::max<size_t>(bytes + kGuard, 1)]);
    array.bytes = bytes;
    array.block = 0;
  }
  if (array.block != blocks_run_) {
    std::memset(array.data.get(), 0xff, bytes + kGuard);
    array.block = blocks_run_;
  }
  return array.data.get();
}

void Block::check_guards() const {
  for (const auto& [site, array] : arrays_) {
    const char* const guard = array.data.get() + array.bytes;
    if (array.block == blocks_run_ && !std::all_of(guard, guard + kGuard, [](char c) { return c == '\xff'; })) {
      fail("block " + text(index.block) + " wrote beyond a shared array of " + std::to_string(array.bytes) + " bytes");
    }
  }
}

std::string Block::describe_deadlock() const {
  const auto alive = std::count_if(threads.begin(), threads.end(), [](const Thread& t) { return !t.done; });
  const auto waiting = std::find_if(threads.begin(), threads.end(), [](const Thread& t) { return !t.done; });
  const Barrier& at = *waiting->waits_for;
  return "divergent barrier in block " + text(index.block) + ": " + std::to_string(at.arrived) + " of " +
         std::to_string(at.size) + " threads wait at " + at.file + ":" + std::to_string(at.line) + ", " +
         std::to_string(threads.size() - alive) + " of " + std::to_string(threads.size()) + " have ended";
}

void Block::run(const std::function<void()>& body, const Index& where, size_t dynamic, uint64_t seed) {
  const dim3 dim = where.block_dim;
  const unsigned count = dim.x * dim.y * dim.z;
  kernel = &body;
  index = where;
  dynamic_bytes = dynamic;
  error.clear();
  ++blocks_run_;
  if (threads.size() != count) {
    threads = std::vector<Thread>(count);
    warps.resize((count + kWarp - 1) / kWarp);
    order_.resize(warps.size());
  }
  barrier = Barrier{count};
  for (unsigned w = 0; w < warps.size(); ++w) {
    warps[w].barrier = Barrier{std::min(kWarp, count - w * kWarp)};
    std::memset(warps[w].slot, 0xff, sizeof warps[w].slot);
  }
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.fibre.prepare(thread_entry);
    thread.index = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
    thread.linear = i;
    thread.done = false;
    thread.waits_for = nullptr;
    thread.exchanges = 0;
  }
  std::iota(order_.begin(), order_.end(), 0u);
  uint64_t random = (seed + 1) * 0x9e3779b97f4a7c15ull ^
                    (uint64_t(where.block.x) << 20 | where.block.y << 10 | where.block.z) * 0xbf58476d1ce4e5b9ull;
  // One warp runs as far as it can before the next one starts: as far apart as the barriers allow. Each barrier deals
  // the warps anew.
  for (unsigned generation = barrier.generation - 1;
       std::any_of(threads.begin(), threads.end(), [](const Thread& t) { return !t.done; });) {
    if (generation != barrier.generation) {
      shuffle(order_.data(), order_.size(), random);
      generation = barrier.generation;
    }
    if (!advance_one_warp(random)) fail(describe_deadlock());
  }
  check_guards();
}

// Resumes, in random order, the threads that can run of the first warp that has any.
bool Block::advance_one_warp(uint64_t& random) {
  for (const unsigned w : order_) {
    unsigned ready[kWarp], count = 0;
    for (unsigned i = w * kWarp; i < std::min<size_t>((w + 1) * kWarp, threads.size()); ++i) {
      const Thread& thread = threads[i];
      if (!thread.done && (thread.waits_for == nullptr || thread.waits_for->generation != thread.generation))
        ready[count++] = i;
    }
    if (count == 0) continue;
    shuffle(ready, count, random);
    for (unsigned i = 0; i < count; ++i) {
      current = &threads[ready[i]];
      index.thread = current->index;
      scheduler.switch_to(current->fibre);
      if (!error.empty()) fail(error);
    }
    return true;
  }
  return false;
}

// Blocks keep the stacks of their fibres between launches.
class BlockPool {
 public:
  std::unique_ptr<Block> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Block>();
    auto taken = std::move(free_.back());
    free_.pop_back();
    return taken;
  }
  void give_back(std::unique_ptr<Block> b) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(b));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> free_;
};

void check_launch(dim3 grid, dim3 block, size_t dynamic_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64)
    fail("invalid block " + text(block) + ": a block has 1 to 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail("invalid grid " + text(grid) + ": at most (2147483647, 65535, 65535), at least 1");
  }
  if (dynamic_bytes > 227 * 1024)
    fail("invalid launch: " + std::to_string(dynamic_bytes) + " bytes of dynamic shared memory, at most 232448");
}

}  // namespace

Index& index() { return block->index; }
unsigned lane_id() { return block->current->linear % kWarp; }
void* shared_array(const void* site, size_t bytes) { return block->shared(site, bytes); }
void* dynamic_shared() { return block->shared(nullptr, block->dynamic_bytes); }
void block_barrier(const char* file, int line) { block->arrive(block->barrier, file, line); }

uint64_t exchange(unsigned mask, uint64_t value, unsigned lane, const char* file, int line) {
  Thread& me = *block->current;
  Warp& warp = block->warps[me.linear / kWarp];
  const unsigned own = me.linear % kWarp, lanes = warp.barrier.size;
  const unsigned everyone = lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1;
  if ((mask & everyone) != everyone && block->error.empty()) {
    block->error =
        std::string("a warp operation without all lanes of the warp at ") + file + ":" + std::to_string(line);
  }
  uint64_t* slot = warp.slot[me.exchanges++ % 2];
  slot[own] = value;
  block->arrive(warp.barrier, file, line);
  return slot[lane < lanes ? lane : own];
}

unsigned ballot(unsigned mask, bool predicate, const char* file, int line) {
  Thread& me = *block->current;
  const uint64_t* slot = block->warps[me.linear / kWarp].slot[me.exchanges % 2];
  exchange(mask, predicate, 0, file, line);
  unsigned votes = 0;
  for (unsigned i = 0; i < block->warps[me.linear / kWarp].barrier.size; ++i)
    votes |= static_cast<unsigned>(slot[i] & 1) << i;
  return votes;
}

void launch(dim3 grid, dim3 block_dim, size_t dynamic_bytes, const std::function<void()>& kernel) {
  check_launch(grid, block_dim, dynamic_bytes);
  static BlockPool pool;
  const unsigned seed = environment("RESNET_FUSED_HOST_SEED", 0);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::atomic<uint64_t> next = 0;
  std::mutex mutex;
  std::string error;
  const auto work = [&] {
    auto own = pool.take();
    block = own.get();
    try {
      for (uint64_t i; (i = next++) < blocks;) {
        if (seed % 2 == 1) i = blocks - 1 - i;
        const uint3 at{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                       static_cast<unsigned>(i / grid.x / grid.y)};
        own->run(kernel, {{}, at, block_dim, grid}, dynamic_bytes, seed);
      }
      pool.give_back(std::move(own));
    } catch (const std::exception& e) {  // the block's abandoned fibres go with it
      const std::lock_guard lock(mutex);
      error = e.what();
      next = blocks;
    }
    block = nullptr;
  };
  const unsigned available =
      std::max(1u, environment("RESNET_FUSED_HOST_THREADS", std::thread::hardware_concurrency()));
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < std::min<uint64_t>(available, blocks); ++i) helpers.emplace_back(work);
  work();
  for (auto& helper : helpers) helper.join();
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace host
