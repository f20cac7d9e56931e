// Approximate instructions: the exact value moved by a pseudo-random share of the error that the
// PTX ISA documents, so that code which relies on exact results fails here and not on some GPU. The
// share is a function of the argument alone: every schedule sees the same bits.
#include <cmath>
#include <cstring>
#include <limits>

#include "core/state.h"

namespace exafuse::emulator {

namespace {

constexpr float kSmallestNormal = std::numeric_limits<float>::min();

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// In [-1, 1], from the bits of the argument.
double share(float x, uint32_t function) {
  uint64_t hash = (static_cast<uint64_t>(function) << 32 | bits_of(x)) * 0x9E3779B97F4A7C15u;
  hash ^= hash >> 29;
  hash *= 0xBF58476D1CE4E5B9u;
  hash ^= hash >> 32;
  return static_cast<double>(hash >> 11) / 0x1p52 - 1.0;
}

float flushed(float x) { return std::fabs(x) < kSmallestNormal ? std::copysign(0.0f, x) : x; }

// The exact value moved by at most `error` of itself; the rounding to fp32 is part of the error.
float moved(double exact, float x, uint32_t function, double error) {
  if (!std::isfinite(exact) || exact == 0 || options().exact_approximations) {
    return static_cast<float>(exact);
  }
  return static_cast<float>(exact * (1.0 + share(x, function) * (error - 0x1p-24)));
}

}  // namespace

float approximate_exp2(float x, bool flush) {
  if (flush) x = flushed(x);
  if (x == 0) return 1.0f;
  const float y = moved(std::exp2(static_cast<double>(x)), x, 1, 0x1p-22);
  return flush ? flushed(y) : y;
}

float approximate_log2(float x) {
  x = flushed(x);
  const double exact = std::log2(static_cast<double>(x));
  if (x >= 0.5f && x <= 2.0f) {
    if (options().exact_approximations) return static_cast<float>(exact);
    return static_cast<float>(exact + share(x, 2) * (0x1p-22 - 0x1p-25));
  }
  return moved(exact, x, 2, 0x1p-22);
}

float approximate_rcp(float x) {
  x = flushed(x);
  const double exact = 1.0 / static_cast<double>(x);
  const auto nearest = static_cast<float>(exact);
  if (!std::isfinite(nearest) || nearest == 0 || options().exact_approximations) {
    return flushed(nearest);
  }
  // Within 1 ulp lie the two neighbours of the exact value; take the farther one half of the time.
  const bool is_above = static_cast<double>(nearest) > exact;
  const float limit =
      is_above ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity();
  const bool take_farther = share(x, 3) > 0 && static_cast<double>(nearest) != exact;
  return flushed(take_farther ? std::nextafter(nearest, limit) : nearest);
}

float approximate_rsqrt(float x) {
  x = flushed(x);
  return moved(1.0 / std::sqrt(static_cast<double>(x)), x, 4, 0x1p-22 * 0.5359);  // 2^-22.9
}

}  // namespace exafuse::emulator
