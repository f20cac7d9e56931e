// The kernels that test the emulator: deliberately wrong ones ("bug ..."), which must be caught,
// and correct but tricky ones ("ok ..."), which must not be. tests/test_emulator.py says which
// build catches which, and by which words.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/launch.h"
#include "common/ptx.cuh"

namespace honesty {

using namespace exafuse;

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

// Element by element; NaN is wrong wherever it stands.
inline void expect_equal(const std::vector<float>& got, const std::vector<float>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (got[i] == wanted[i]) continue;
    throw WrongResult("element " + std::to_string(i) + " is " + std::to_string(got[i]) +
                      ", expected " + std::to_string(wanted[i]));
  }
}

// 0, 1, 2, ... as floats.
inline std::vector<float> counting(int count) {
  std::vector<float> values(count);
  for (int i = 0; i < count; ++i) values[i] = static_cast<float>(i);
  return values;
}

// Most cases: one block, one input, one output.
struct InOut {
  const float* in;
  float* out;
};

// One shared array of floats.
template <int kCount>
struct Floats {
  float* values;

  template <class Arena>
  static constexpr Floats take_from(Arena& arena) {
    return {arena.template take<float, kCount>()};
  }
};

inline LaunchConfig one_block(int threads, int smem_bytes = 0) {
  return {.grid = dim3(1), .block = dim3(threads), .smem_bytes = smem_bytes};
}

}  // namespace honesty
