// A stack and a place to continue on it. On x86-64 a switch is a dozen instructions; elsewhere it is swapcontext.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace host {

class Fibre {
 public:
  Fibre() = default;
  Fibre(Fibre&& other) noexcept = delete;
  ~Fibre() {
    if (stack_ == nullptr) return;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
    munmap(stack_, kStackBytes);
  }

  // The next switch to this fibre starts `entry`, which must not return.
  void prepare(void (*entry)());
  // Continues `other`; returns when something switches back to this one.
  void switch_to(Fibre& other);

 private:
  static constexpr size_t kStackBytes = 64 * 1024;
  void* stack_ = nullptr;  // null: the OS thread's own stack
#ifdef __x86_64__
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#ifdef __SANITIZE_ADDRESS__
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

}  // namespace host
