// Memory faults of a kernel (a wild pointer, a stack overflow, a division by zero) become failures
// of the launch. The handler does not throw: it makes the faulting fiber continue in land() on a
// stack of its own, which composes the report and goes back to the host for good.
#include <signal.h>
#include <ucontext.h>

#include <stdexcept>

#include "core/state.h"

namespace exafuse::emulator {

#if defined(EXAFUSE_EMULATOR_ASAN) || defined(EXAFUSE_EMULATOR_TSAN)

// The sanitizer's own report says more.
void catch_faults() {}
void release_faults() {}

#else

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
constexpr size_t kLandingBytes = 256 * 1024;

struct sigaction previous[3];
stack_t previous_stack;
alignas(16) char handler_stack[64 * 1024];
alignas(16) char landing_stack[kLandingBytes];

int fault_signal = 0;
void* fault_address = nullptr;
void* fault_instruction = nullptr;

[[noreturn]] void land() {
  std::string message;
  if (fault_signal == SIGFPE) {
    message = "integer division by zero";
  } else if (is_guard_page(fault_address)) {
    message = "stack overflow of a thread";
  } else {
    message = format("memory fault at address %p", fault_address);
  }
  void* frames[] = {fault_instruction};
  abandon_launch(std::make_exception_ptr(std::runtime_error(report(message, nullptr, frames, 1))));
}

void handle(int signal, siginfo_t* info, void* context) {
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  if (current == nullptr) {  // not ours: let the default action or the previous handler have it
    release_faults();
    return;
  }
  fault_signal = signal;
  fault_address = info->si_addr;
  fault_instruction = reinterpret_cast<void*>(registers[REG_RIP]);
  registers[REG_RIP] = reinterpret_cast<greg_t>(land);
  registers[REG_RSP] = reinterpret_cast<greg_t>(landing_stack + kLandingBytes - 8);
}

}  // namespace

void catch_faults() {
  stack_t alternate{};
  alternate.ss_sp = handler_stack;
  alternate.ss_size = sizeof(handler_stack);
  sigaltstack(&alternate, &previous_stack);
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &previous[i]);
}

void release_faults() {
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

#endif

}  // namespace exafuse::emulator
