// The kernels that test the emulator: deliberately wrong ones, which must be caught, and correct but
// tricky ones, which must not be. tests/test_emulator.py says which build catches which.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/launch.h"
#include "common/ptx.cuh"

namespace honesty {

// Runs one case; throws WrongResult if the kernel's output is not what it must be.
using Case = void (*)();

struct WrongResult : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Registers a case under its name when the module is loaded.
struct Register {
  Register(const char* name, Case run);
};

inline void expect(bool condition, const std::string& what) {
  if (!condition) throw WrongResult(what);
}

}  // namespace honesty
