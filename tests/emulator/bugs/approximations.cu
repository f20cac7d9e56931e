// The approximate functions: off by no more than their documented error, but off.
#include <limits>

#include "bugs/cases.h"

namespace honesty {
namespace {

enum class Function { kExp2, kExp2Ftz, kLog2, kRcp, kRsqrt };

struct Params {
  const float* in;
  float* out;
  Function function;
};

__global__ void approximate_kernel(const __grid_constant__ Params p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const float x = p.in[i];
  switch (p.function) {
    case Function::kExp2:
      p.out[i] = ptx::exp2(x);
      break;
    case Function::kExp2Ftz:
      p.out[i] = ptx::exp2_ftz(x);
      break;
    case Function::kLog2:
      p.out[i] = ptx::log2(x);
      break;
    case Function::kRcp:
      p.out[i] = ptx::rcp(x);
      break;
    case Function::kRsqrt:
      p.out[i] = ptx::rsqrt(x);
      break;
  }
}

constexpr int kCount = 8192;

// `wanted` is the exact function, `allowed(x, exact)` the error that the ISA documents.
template <class Wanted, class Allowed>
void check(Function function, float low, float high, Wanted wanted, Allowed allowed) {
  std::vector<float> in(kCount), out(kCount);
  for (int i = 0; i < kCount; ++i) {
    in[i] = low + (high - low) * static_cast<float>(i) / static_cast<float>(kCount);
  }
  launch(approximate_kernel, {.grid = dim3(kCount / 128), .block = dim3(128)},
         {in.data(), out.data(), function});
  int off = 0;
  for (int i = 0; i < kCount; ++i) {
    const double exact = wanted(static_cast<double>(in[i]));
    expect(std::fabs(out[i] - exact) <= allowed(in[i], exact),
           "f(" + std::to_string(in[i]) + ") = " + std::to_string(out[i]));
    if (out[i] != static_cast<float>(exact)) ++off;
  }
  expect(off > kCount / 10, "the function is exact too often to show code that relies on it");
}

void within_bounds() {
  const auto relative = [](double bound) {
    return [bound](double, double exact) { return std::fabs(exact) * bound; };
  };
  const auto exp2 = [](double x) { return std::exp2(x); };
  check(Function::kExp2, -80, 80, exp2, relative(0x1p-22));
  check(Function::kExp2Ftz, -80, 80, exp2, relative(0x1p-22));
  const auto log2 = [](double x) { return std::log2(x); };
  check(Function::kLog2, 0.5f, 2.0f, log2, [](double, double) { return 0x1p-22; });
  check(Function::kLog2, 2.5f, 1e6f, log2, relative(0x1p-22));
  check(Function::kRcp, 0.1f, 900, [](double x) { return 1 / x; }, relative(0x1p-23));
  check(
      Function::kRsqrt, 0.1f, 900, [](double x) { return 1 / std::sqrt(x); },
      relative(std::pow(2.0, -22.9)));
}
const Register r1("ok approximations within their documented error", within_bounds);

void special_values() {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const auto value = [](Function function, float x) {
    float y = 0;
    launch(approximate_kernel, one_block(1), {&x, &y, function});
    return y;
  };
  expect(value(Function::kExp2, 0) == 1 && value(Function::kExp2, -kInf) == 0 &&
             value(Function::kExp2, kInf) == kInf && value(Function::kExp2, -140) > 0,
         "exp2");
  expect(value(Function::kExp2Ftz, -140) == 0 && value(Function::kExp2Ftz, -kInf) == 0, "exp2_ftz");
  expect(value(Function::kLog2, 0) == -kInf && value(Function::kLog2, 1e-40f) == -kInf &&
             std::isnan(value(Function::kLog2, -1)),
         "log2");
  expect(value(Function::kRcp, 0) == kInf && value(Function::kRcp, -1e-40f) == -kInf &&
             value(Function::kRcp, kInf) == 0,
         "rcp");
  expect(value(Function::kRsqrt, 0) == kInf && value(Function::kRsqrt, kInf) == 0 &&
             std::isnan(value(Function::kRsqrt, -1)),
         "rsqrt");
}
const Register r2("ok approximations of special values", special_values);

}  // namespace
}  // namespace honesty
