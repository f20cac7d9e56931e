// The kernel of hopper.h held against attention in double precision, row by row, and once for each
// of its mistakes.
#include "bugs/cases.h"
#include "bugs/hopper.h"

namespace honesty {
namespace {

using T = __nv_bfloat16;

constexpr int kNumQueries = 2 * kHopperQueries;
constexpr int kNumKeys = 4 * kHopperKeys + 37;
constexpr int kSlots = kNumKeys + 20;  // rows of k and v
// What bf16 probabilities and outputs may be off by, as a share of a row's length.
constexpr double kTolerance = 8e-3;

std::vector<T> noise(int rows, uint32_t seed) {
  std::vector<T> values(rows * kHeadDim);
  for (T& value : values) {
    seed = seed * 1664525 + 1013904223;
    value = static_cast<T>(static_cast<float>(seed >> 8) * 0x1p-22f - 2);
  }
  return values;
}

struct Problem {
  std::vector<T> q = noise(kNumQueries, 1);
  std::vector<T> k = noise(kSlots, 2);
  std::vector<T> v = noise(kSlots, 3);
  std::vector<double> wanted = std::vector<double>(kNumQueries * kHeadDim);
  std::vector<T> first_result;  // of the correct kernel
  float scale_log2 = 0.1f;

  Problem() {
    for (int row = 0; row < kNumQueries; ++row) attend(row);
    // No key, and all the same in the tensors that the copies read.
    const auto nothing = static_cast<T>(NAN);
    std::fill(k.begin() + kNumKeys * kHeadDim, k.end(), nothing);
    std::fill(v.begin() + kNumKeys * kHeadDim, v.end(), nothing);
  }

  void attend(int row) {
    double* out = wanted.data() + row * kHeadDim;
    double sum = 0;
    for (int key = 0; key < kNumKeys; ++key) {
      double score = 0;
      for (int i = 0; i < kHeadDim; ++i) {
        score += static_cast<double>(static_cast<float>(q[row * kHeadDim + i])) *
                 static_cast<double>(static_cast<float>(k[key * kHeadDim + i]));
      }
      const double prob = std::exp2(score * scale_log2);
      sum += prob;
      for (int i = 0; i < kHeadDim; ++i) {
        out[i] += prob * static_cast<double>(static_cast<float>(v[key * kHeadDim + i]));
      }
    }
    for (int i = 0; i < kHeadDim; ++i) out[i] /= sum;
  }
};

Problem& problem() {
  static Problem one;
  return one;
}

TensorMap map_of(std::vector<T>& values, int box_rows) {
  const auto rows = static_cast<int64_t>(values.size()) / kHeadDim;
  return make_tensor_map({.data = values.data(),
                          .dtype = DType::kBFloat16,
                          .columns = kHeadDim,
                          .rows = rows,
                          .heads = 1,
                          .batch = 1,
                          .row_stride = kHeadDim,
                          .head_stride = rows * kHeadDim,
                          .batch_stride = rows * kHeadDim,
                          .box_rows = box_rows});
}

std::vector<T> run(Mistake mistake) {
  Problem& given = problem();
  std::vector<T> out(kNumQueries * kHeadDim, static_cast<T>(NAN));
  HopperParams params{.q = map_of(given.q, kHopperQueries),
                      .k = map_of(given.k, kHopperKeys),
                      .v = map_of(given.v, kHopperKeys),
                      .out = map_of(out, kHopperQueries / 2),
                      .num_queries = kNumQueries,
                      .num_keys = kNumKeys,
                      .scale_log2 = given.scale_log2,
                      .mistake = mistake};
  launch(hopper_kernel, one_block(kHopperThreads, shared_bytes<HopperShared>()), params);
  for (int row = 0; row < kNumQueries; ++row) {
    double error = 0, length = 0;
    for (int i = row * kHeadDim; i < (row + 1) * kHeadDim; ++i) {
      const double difference = static_cast<double>(static_cast<float>(out[i])) - given.wanted[i];
      error += difference * difference;
      length += given.wanted[i] * given.wanted[i];
    }
    const double relative = std::sqrt(error / length);
    expect(relative <= kTolerance, "row " + std::to_string(row) + " is off by " +
                                       std::to_string(relative) + " of its length");
  }
  return out;
}

// The same bits in every schedule.
void correct() {
  const std::vector<T> out = run(Mistake::kNone);
  std::vector<T>& first = problem().first_result;
  if (first.empty()) first = out;
  expect(std::memcmp(out.data(), first.data(), out.size() * sizeof(T)) == 0,
         "another result than that of the first run");
}

template <Mistake kMistake>
void wrong() {
  run(kMistake);
}

using enum Mistake;

const Register ok("ok hopper attention", correct);
const Register b1("bug hopper mbarriers without a fence", wrong<kNoInitFence>);
const Register b2("bug hopper keys not empty", wrong<kNoWaitForEmptyKeys>);
const Register b3("bug hopper half the bytes expected", wrong<kHalfTheBytes>);
const Register b4("bug hopper parity of empty keys", wrong<kInvertedParity>);
const Register b5("bug hopper empty count of one", wrong<kEmptyCountOfOne>);
const Register b6("bug hopper values behind the last key", wrong<kNoCleaning>);
const Register b7("bug hopper products without a fence", wrong<kNoWgmmaFence>);
const Register b8("bug hopper queries not awaited", wrong<kNoWaitForQueries>);
const Register b9("bug hopper values not awaited", wrong<kNoWaitForValues>);
const Register b10("bug hopper wait for one group too few", wrong<kOneGroupTooMany>);
const Register b11("bug hopper keys released early", wrong<kEarlyReleaseOfKeys>);
const Register b12("bug hopper values released early", wrong<kEarlyReleaseOfValues>);
const Register b13("bug hopper release by one warp of four", wrong<kReleaseByOneWarp>);
const Register b14("bug hopper turn not passed", wrong<kTurnNotPassed>);
const Register b15("bug hopper barrier inside a turn", wrong<kBarrierInsideTurn>);
const Register b16("bug hopper strides swapped", wrong<kStridesSwapped>);
const Register b17("bug hopper step of 64 bytes", wrong<kStepOf64Bytes>);
const Register b18("bug hopper adds to old scores", wrong<kAddsToOldScores>);
const Register b19("bug hopper output rescaled in flight", wrong<kRescaleInFlight>);
const Register b20("bug hopper output rescaled after the fence", wrong<kRescaleAfterFence>);
const Register b21("bug hopper probs packed in flight", wrong<kPackInFlight>);
const Register b22("bug hopper output without a fence", wrong<kNoProxyFence>);
const Register b23("bug hopper output not swizzled", wrong<kNotSwizzled>);
const Register b24("bug hopper output not awaited", wrong<kStoreNotAwaited>);

}  // namespace
}  // namespace honesty
