// Stacks and the switch between them: some instructions of assembly, and what each sanitizer wants
// to be told about it.
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <new>

#include "core/state.h"

#if defined(EXAFUSE_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(EXAFUSE_EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator's context switch is written for x86-64 Linux"
#endif

// Saves the callee-saved registers on the stack that is left and takes them from the one entered.
asm(R"(
.text
.hidden exafuse_emulator_switch
.globl exafuse_emulator_switch
.type exafuse_emulator_switch, @function
exafuse_emulator_switch:
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
.size exafuse_emulator_switch, . - exafuse_emulator_switch
)");
extern "C" void exafuse_emulator_switch(void** save, void* load);

namespace exafuse::emulator {

// Frames under a sanitizer are several times as large.
#if defined(EXAFUSE_EMULATOR_ASAN) || defined(EXAFUSE_EMULATOR_TSAN)
const size_t kStackBytes = 256 * 1024;
#else
const size_t kStackBytes = 64 * 1024;
#endif

namespace {

// Twice the threads of a block: see prepare_stack's caller.
Stack stacks[2 * kMaxThreads];
// Large, so that a frame with a big local array does not step over it; costs address space only.
constexpr size_t kGuardBytes = 1024 * 1024;

#if defined(EXAFUSE_EMULATOR_ASAN)
char* host_stack_memory = nullptr;
size_t host_stack_bytes = 0;
Stack* host_stack = nullptr;
#elif defined(EXAFUSE_EMULATOR_TSAN)
void* allocator_fiber = nullptr;
void* janitor_fiber = nullptr;
#endif

void map_stack(Stack* stack) {
  void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack->memory = static_cast<char*>(memory) + kGuardBytes;
#if defined(EXAFUSE_EMULATOR_TSAN)
  stack->tsan_fiber = __tsan_create_fiber(0);
#endif
}

}  // namespace

Stack* prepare_stack(int number, void (*entry)()) {
  Stack* stack = &stacks[number];
  if (stack->memory == nullptr) map_stack(stack);
#if defined(EXAFUSE_EMULATOR_ASAN)
  __asan_unpoison_memory_region(stack->memory, kStackBytes);
  stack->asan_fake_stack = nullptr;
#endif
  // From the top: a null return address for `entry` (8 bytes past a multiple of 16, as after a
  // call), the address that the switch returns to, six registers.
  void** top = reinterpret_cast<void**>(stack->memory + kStackBytes) - 3;
  top[0] = nullptr;
  top[-1] = reinterpret_cast<void*>(entry);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  stack->stack_pointer = top - 7;
  return stack;
}

void discard_stacks(void* launch_ended) {
  static_cast<void>(launch_ended);
  for (Stack& stack : stacks) {
    if (stack.memory == nullptr) continue;
#if defined(EXAFUSE_EMULATOR_TSAN)
    // What the thread did until it was abandoned lies before whatever the host does next.
    void* host = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(stack.tsan_fiber, __tsan_switch_to_fiber_no_sync);
    memory_release(launch_ended);
    __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(stack.tsan_fiber);
#elif defined(EXAFUSE_EMULATOR_ASAN)
    __asan_unpoison_memory_region(stack.memory, kStackBytes);
#endif
    munmap(stack.memory - kGuardBytes, kStackBytes + kGuardBytes);
    stack = Stack();
  }
}

bool is_guard_page(const void* address) {
  const char* byte = static_cast<const char*>(address);
  for (const Stack& stack : stacks) {
    if (stack.memory != nullptr && byte >= stack.memory - kGuardBytes && byte < stack.memory) {
      return true;
    }
  }
  return false;
}

void enter_fibers(Stack* host) {
#if defined(EXAFUSE_EMULATOR_ASAN)
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  void* memory = nullptr;
  pthread_attr_getstack(&attributes, &memory, &host_stack_bytes);
  pthread_attr_destroy(&attributes);
  host_stack_memory = static_cast<char*>(memory);
  host_stack = host;
#elif defined(EXAFUSE_EMULATOR_TSAN)
  host->tsan_fiber = __tsan_get_current_fiber();
  if (allocator_fiber == nullptr) {
    allocator_fiber = __tsan_create_fiber(0);
    janitor_fiber = __tsan_create_fiber(0);
  }
#else
  static_cast<void>(host);
#endif
}

void switch_stack(Stack* from, Stack* to, bool from_is_done) {
#if defined(EXAFUSE_EMULATOR_ASAN)
  const bool to_host = to == host_stack;
  __sanitizer_start_switch_fiber(from_is_done ? nullptr : &from->asan_fake_stack,
                                 to_host ? host_stack_memory : to->memory,
                                 to_host ? host_stack_bytes : kStackBytes);
#elif defined(EXAFUSE_EMULATOR_TSAN)
  __tsan_switch_to_fiber(to->tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  static_cast<void>(from_is_done);
  exafuse_emulator_switch(&from->stack_pointer, to->stack_pointer);
#if defined(EXAFUSE_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(from->asan_fake_stack, nullptr, nullptr);
#endif
}

void arrived_on_new_stack() {
#if defined(EXAFUSE_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

#if defined(EXAFUSE_EMULATOR_TSAN)

void memory_release(void* object) { __tsan_release(object); }
void memory_acquire(void* object) { __tsan_acquire(object); }

void* allocate_for_block(size_t bytes, void* launch_started, void* block_started) {
  void* host = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(allocator_fiber, __tsan_switch_to_fiber_no_sync);
  memory_acquire(launch_started);
  void* memory = std::aligned_alloc(1024, bytes);
  memory_release(block_started);
  __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync);
  return memory;
}

void free_after_block(void* memory, void* block_ended) {
  void* host = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(janitor_fiber, __tsan_switch_to_fiber_no_sync);
  memory_acquire(block_ended);
  std::free(memory);
  __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync);
}

#else

void memory_release(void*) {}
void memory_acquire(void*) {}
void* allocate_for_block(size_t bytes, void*, void*) { return std::aligned_alloc(1024, bytes); }
void free_after_block(void* memory, void*) { std::free(memory); }

#endif

}  // namespace exafuse::emulator
