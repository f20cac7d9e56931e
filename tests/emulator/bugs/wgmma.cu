// Products of a warpgroup held against plain loops, and wrong uses of them. The layouts here are
// written down from the PTX ISA once more, apart from the emulator's own.
#include "bugs/cases.h"
#include "common/ptx_sm90.cuh"

namespace honesty {
namespace {

constexpr int kThreads = 128;
constexpr int kM = 64;      // rows of operand a
constexpr int kDepth = 64;  // four steps of 16
constexpr int kPanel = 64;  // elements of a row of shared memory
constexpr int kMaxPanels = 3;

enum class Layout { kSharedAlongRow, kSharedByRow, kRegisters };

// Rows of 128 bytes.
struct alignas(1024) Rows {
  uint16_t elements[8 * kPanel];
};

struct Operands {
  Rows* a;  // [64, depth]
  Rows* b;  // [columns, depth], or panels of [depth, 64 columns]

  template <class Arena>
  static constexpr Operands take_from(Arena& arena) {
    Operands operands{};
    operands.a = arena.template take<Rows, kM / 8>();
    operands.b = arena.template take<Rows, kMaxPanels * kPanel / 8>();
    return operands;
  }
};

template <class T>
struct ProductParams {
  const T* a;  // [64, depth]
  const T* b;  // [depth, columns]
  float* d;    // [64, columns], added to
};

// What a kernel does wrong.
enum class Wrong {
  kNothing,
  kNoFence,
  kNoCommit,
  kNoWait,
  kNotNamed,
  kOperandNotNamed,
  kStillInFlight,
  kWritten,
  kOperandWritten,
  kStepTooLong,
  kNoProxyFence,
  kMixedProducts,
  kLoneWarp,
};

// Element `column` of row `row` of a panel, in bytes from its start.
__device__ int place_in_panel(int row, int column) {
  return row * 128 + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2;
}

template <class T>
__device__ void store_pair(uint32_t panel, int row, int column, T low, T high) {
  ptx::st_shared(panel + place_in_panel(row, column),
                 ptx::pack2<T>(static_cast<float>(low), static_cast<float>(high)));
}

template <class T, int kN, Layout kLayout>
__device__ void fill_operands(const ProductParams<T>& p, uint32_t a, uint32_t b) {
  const int tid = static_cast<int>(threadIdx.x);
  for (int i = 2 * tid; i < kM * kDepth; i += 2 * kThreads) {
    store_pair(a, i / kDepth, i % kDepth, p.a[i], p.a[i + 1]);
  }
  for (int i = 2 * tid; i < kDepth * kN; i += 2 * kThreads) {
    if constexpr (kLayout == Layout::kSharedAlongRow) {
      const int column = i / kDepth;
      const int k = i % kDepth;
      store_pair(b, column, k, p.b[k * kN + column], p.b[(k + 1) * kN + column]);
    } else {
      const int column = i % kN;
      const uint32_t panel = b + column / kPanel * kDepth * 128;
      store_pair(panel, i / kN, column % kPanel, p.b[i], p.b[i + 1]);
    }
  }
}

template <class T, int kN, Layout kLayout, Wrong kWrong>
__global__ void product_kernel(const __grid_constant__ ProductParams<T> p) {
  SharedArena arena;
  const auto shared = Operands::take_from(arena);
  const uint32_t a = ptx::smem_addr(shared.a);
  const uint32_t b = ptx::smem_addr(shared.b);
  fill_operands<T, kN, kLayout>(p, a, b);
  if constexpr (kWrong != Wrong::kNoProxyFence) ptx::fence_proxy_async();
  ptx::sync_threads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = 16 * warp + lane / 4;
  if (kWrong == Wrong::kLoneWarp && warp == 2) return;

  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) {
    d[i] = p.d[(row + 8 * (i / 2 % 2)) * kN + 8 * (i / 4) + lane % 4 * 2 + i % 2];
  }
  uint32_t registers[kDepth / 16][4];
  for (int step = 0; step < kDepth / 16; ++step) {
    for (int i = 0; i < 4; ++i) {
      const T* pair = p.a + (row + i % 2 * 8) * kDepth + 16 * step + lane % 4 * 2 + i / 2 * 8;
      registers[step][i] = ptx::pack2<T>(static_cast<float>(pair[0]), static_cast<float>(pair[1]));
    }
  }
  if constexpr (kWrong != Wrong::kNoFence) ptx::wgmma_fence();
  for (int step = 0; step < kDepth / 16; ++step) {
    const int along = kWrong == Wrong::kStepTooLong ? 64 : 32;
    const uint64_t left = ptx::wgmma_descriptor(a + step * along, 0);
    const int taken = kWrong == Wrong::kMixedProducts && warp == 3 ? 0 : step;
    if constexpr (kLayout == Layout::kSharedAlongRow) {
      ptx::wgmma_ss<T, kN>(d, left, ptx::wgmma_descriptor(b + taken * along, 0), true);
    } else {
      const uint64_t right = ptx::wgmma_descriptor(b + taken * 2048, kDepth * 128);
      if constexpr (kLayout == Layout::kSharedByRow) {
        ptx::wgmma_ss<T, kN, ptx::WgmmaB::kDepthByRow>(d, left, right, true);
      } else {
        ptx::wgmma_rs<T, kN>(d, registers[step], right, true);
      }
    }
  }
  if constexpr (kWrong == Wrong::kNoCommit) return;
  ptx::wgmma_commit();
  if constexpr (kWrong == Wrong::kNoWait) return;
  if constexpr (kWrong == Wrong::kStillInFlight) ptx::wgmma_wait<1>(d, registers);
  if constexpr (kWrong == Wrong::kWritten) {
    for (float& one : d) one *= 0.5f;
  }
  if constexpr (kWrong == Wrong::kOperandWritten) registers[1][2] ^= 1;
  if constexpr (kWrong == Wrong::kNotNamed) {
    ptx::wgmma_wait<0>(registers);
  } else if constexpr (kWrong == Wrong::kOperandNotNamed) {
    ptx::wgmma_wait<0>(d);
  } else {
    ptx::wgmma_wait<0>(d, registers);
  }
  for (int i = 0; i < kN / 2; ++i) {
    p.d[(row + 8 * (i / 2 % 2)) * kN + 8 * (i / 4) + lane % 4 * 2 + i % 2] = d[i];
  }
}

// Small whole numbers: every sum is exact.
template <class T>
std::vector<T> small_numbers(int count, uint32_t seed) {
  std::vector<T> values(count);
  for (T& value : values) {
    seed = seed * 1664525 + 1013904223;
    value = static_cast<T>(static_cast<float>(seed >> 24) / 4 - 32);
  }
  return values;
}

template <class T, int kN, Layout kLayout, Wrong kWrong = Wrong::kNothing>
void check_product() {
  const std::vector<T> a = small_numbers<T>(kM * kDepth, 1);
  const std::vector<T> b = small_numbers<T>(kDepth * kN, 2);
  std::vector<float> d = counting(kM * kN);
  std::vector<float> wanted = d;
  for (int row = 0; row < kM; ++row) {
    for (int column = 0; column < kN; ++column) {
      for (int k = 0; k < kDepth; ++k) {
        wanted[row * kN + column] +=
            static_cast<float>(a[row * kDepth + k]) * static_cast<float>(b[k * kN + column]);
      }
    }
  }
  launch(product_kernel<T, kN, kLayout, kWrong>, one_block(kThreads, shared_bytes<Operands>()),
         {a.data(), b.data(), d.data()});
  expect_equal(d, wanted);
}

template <class T, Layout kLayout>
void check_all_widths() {
  check_product<T, 64, kLayout>();
  check_product<T, 96, kLayout>();
  check_product<T, 128, kLayout>();
  check_product<T, 160, kLayout>();
  check_product<T, 176, kLayout>();
  check_product<T, 192, kLayout>();
}

using BFloat = __nv_bfloat16;
using enum Layout;

const Register o1("ok wgmma bf16, b along rows", check_all_widths<BFloat, kSharedAlongRow>);
const Register o2("ok wgmma bf16, b by rows", check_all_widths<BFloat, kSharedByRow>);
const Register o3("ok wgmma bf16, a in registers", check_all_widths<BFloat, kRegisters>);
const Register o4("ok wgmma fp16, b along rows", check_all_widths<__half, kSharedAlongRow>);
const Register o5("ok wgmma fp16, b by rows", check_all_widths<__half, kSharedByRow>);
const Register o6("ok wgmma fp16, a in registers", check_all_widths<__half, kRegisters>);

template <Wrong kWrong>
constexpr Case kWrongCase = check_product<BFloat, 96, kRegisters, kWrong>;

const Register b1("bug wgmma without a fence", kWrongCase<Wrong::kNoFence>);
const Register b2("bug wgmma never committed", kWrongCase<Wrong::kNoCommit>);
const Register b3("bug wgmma never awaited", kWrongCase<Wrong::kNoWait>);
const Register b4("bug wgmma accumulator not named", kWrongCase<Wrong::kNotNamed>);
const Register b5("bug wgmma operand not named", kWrongCase<Wrong::kOperandNotNamed>);
const Register b6("bug wgmma accumulator in flight", kWrongCase<Wrong::kStillInFlight>);
const Register b7("bug wgmma accumulator written in flight", kWrongCase<Wrong::kWritten>);
const Register b8("bug wgmma operand written in flight", kWrongCase<Wrong::kOperandWritten>);
const Register b9("bug wgmma operand stored without a fence", kWrongCase<Wrong::kNoProxyFence>);
const Register b10("bug wgmma of different operands", kWrongCase<Wrong::kMixedProducts>);
const Register b11("bug wgmma of three warps", kWrongCase<Wrong::kLoneWarp>);
const Register b12("bug wgmma step of 64 bytes",
                   check_product<BFloat, 96, kSharedAlongRow, Wrong::kStepTooLong>);

}  // namespace
}  // namespace honesty
