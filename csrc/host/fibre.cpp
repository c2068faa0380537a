#include "fibre.h"

namespace host {

#ifdef __x86_64__
// Saves the callee-saved registers of the System V ABI on the current stack, leaves its pointer in *save, and continues
// on `load`.
extern "C" void resnet_fused_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden resnet_fused_switch_stack
.globl resnet_fused_switch_stack
.type resnet_fused_switch_stack, @function
resnet_fused_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size resnet_fused_switch_stack, .-resnet_fused_switch_stack
)");
#endif

namespace {

thread_local void (*start)() = nullptr;
#ifdef __SANITIZE_ADDRESS__
thread_local Fibre* previous = nullptr;
#endif

}  // namespace

void Fibre::prepare(void (*entry)()) {
  if (stack_ == nullptr) {
    stack_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack_ == MAP_FAILED) {
      stack_ = nullptr;
      throw std::bad_alloc();
    }
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack_, kStackBytes);
  bottom_ = stack_;
  size_ = kStackBytes;
#endif
  start = entry;
  // An AddressSanitizer build must tell the runtime that the switch has ended before anything else runs on the new
  // stack.
  constexpr auto begin = [] {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &previous->bottom_, &previous->size_);
#endif
    start();
  };
#ifdef __x86_64__
  // Six saved registers, the address to return to, and a null return address that keeps the stack aligned as after a
  // call.
  auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack_) + kStackBytes) - 8;
  for (int i = 0; i < 8; ++i) top[i] = 0;
  top[6] = reinterpret_cast<uintptr_t>(static_cast<void (*)()>(begin));
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, begin, 0);
#endif
}

void Fibre::switch_to(Fibre& other) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  previous = this;
  __sanitizer_start_switch_fiber(&fake_stack, other.bottom_, other.size_);
#endif
#ifdef __x86_64__
  resnet_fused_switch_stack(&stack_pointer_, other.stack_pointer_);
#else
  swapcontext(&context_, &other.context_);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &previous->bottom_, &previous->size_);
#endif
}

}  // namespace host
