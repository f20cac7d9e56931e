// Matrix fragments held against plain loops, and wrong kernels that mix their indices up. The
// layouts here are written down from the PTX ISA's formulas once more, apart from the emulator's
// own.
#include <type_traits>

#include "bugs/cases.h"

namespace honesty {
namespace {

constexpr int kLanes = 32;
constexpr int kRows = 8;  // rows and columns of one 8x8 matrix

// --- ldmatrix and stmatrix
// ------------------------------------------------------------------------

struct Matrices {
  uint16_t* elements;  // [matrices, 8, 8]

  template <class Arena>
  static constexpr Matrices take_from(Arena& arena) {
    return {arena.template take<uint16_t, 4 * kRows * kRows>()};
  }
};

struct MatrixParams {
  const uint16_t* in;  // [4, 8, 8]
  uint32_t* out;       // [lanes, 4]: what each lane received; or [4, 8, 8] as words
};

template <int kCount, bool kTrans>
__device__ void load(uint32_t (&r)[kCount], uint32_t row) {
  if constexpr (kCount == 1) kTrans ? ptx::ldmatrix_x1_trans(r, row) : ptx::ldmatrix_x1(r, row);
  if constexpr (kCount == 2) kTrans ? ptx::ldmatrix_x2_trans(r, row) : ptx::ldmatrix_x2(r, row);
  if constexpr (kCount == 4) kTrans ? ptx::ldmatrix_x4_trans(r, row) : ptx::ldmatrix_x4(r, row);
}

template <int kCount, bool kTrans>
__device__ void store(uint32_t row, const uint32_t (&r)[kCount]) {
  if constexpr (kCount == 1) kTrans ? ptx::stmatrix_x1_trans(row, r) : ptx::stmatrix_x1(row, r);
  if constexpr (kCount == 2) kTrans ? ptx::stmatrix_x2_trans(row, r) : ptx::stmatrix_x2(row, r);
  if constexpr (kCount == 4) kTrans ? ptx::stmatrix_x4_trans(row, r) : ptx::stmatrix_x4(row, r);
}

template <int kCount, bool kTrans>
__global__ void ldmatrix_kernel(const __grid_constant__ MatrixParams p) {
  SharedArena arena;
  const auto shared = Matrices::take_from(arena);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 4 * kRows * kRows; i += kLanes) shared.elements[i] = p.in[i];
  ptx::sync_threads();
  uint32_t r[kCount];
  load<kCount, kTrans>(r, ptx::smem_addr(shared.elements + lane % (kCount * kRows) * kRows));
  for (int i = 0; i < kCount; ++i) p.out[lane * 4 + i] = r[i];
}

template <int kCount, bool kTrans>
__global__ void stmatrix_kernel(const __grid_constant__ MatrixParams p) {
  SharedArena arena;
  const auto shared = Matrices::take_from(arena);
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t r[kCount];
  for (int i = 0; i < kCount; ++i) {
    r[i] = p.in[2 * (lane * 4 + i)] | static_cast<uint32_t>(p.in[2 * (lane * 4 + i) + 1]) << 16;
  }
  store<kCount, kTrans>(ptx::smem_addr(shared.elements + lane % (kCount * kRows) * kRows), r);
  ptx::sync_threads();
  for (int i = lane; i < kCount * kRows * kRows; i += kLanes) p.out[i] = shared.elements[i];
}

std::vector<uint16_t> numbered(int count) {
  std::vector<uint16_t> values(count);
  for (int i = 0; i < count; ++i) values[i] = static_cast<uint16_t>(1000 + 7 * i);
  return values;
}

// Register i of lane l holds elements (l / 4, 2 * (l % 4)) and (l / 4, 2 * (l % 4) + 1) of matrix
// i.
int element_index(int lane, int matrix, int half, bool trans) {
  const int row = lane / 4;
  const int column = 2 * (lane % 4) + half;
  return matrix * kRows * kRows + (trans ? column * kRows + row : row * kRows + column);
}

template <int kCount, bool kTrans>
void check_ldmatrix() {
  const std::vector<uint16_t> in = numbered(4 * kRows * kRows);
  std::vector<uint32_t> out(kLanes * 4);
  launch(ldmatrix_kernel<kCount, kTrans>, one_block(kLanes, shared_bytes<Matrices>()),
         {in.data(), out.data()});
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < kCount; ++i) {
      const uint32_t low = in[element_index(lane, i, 0, kTrans)];
      const uint32_t high = in[element_index(lane, i, 1, kTrans)];
      expect(out[lane * 4 + i] == (low | high << 16), "ldmatrix: lane " + std::to_string(lane));
    }
  }
}

template <int kCount, bool kTrans>
void check_stmatrix() {
  const std::vector<uint16_t> in = numbered(8 * kLanes);
  std::vector<uint32_t> out(4 * kRows * kRows);
  launch(stmatrix_kernel<kCount, kTrans>, one_block(kLanes, shared_bytes<Matrices>()),
         {in.data(), out.data()});
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < kCount; ++i) {
      for (int half = 0; half < 2; ++half) {
        expect(out[element_index(lane, i, half, kTrans)] == in[2 * (lane * 4 + i) + half],
               "stmatrix: lane " + std::to_string(lane));
      }
    }
  }
}

const Register m1("ok ldmatrix x1", check_ldmatrix<1, false>);
const Register m2("ok ldmatrix x2", check_ldmatrix<2, false>);
const Register m3("ok ldmatrix x4", check_ldmatrix<4, false>);
const Register m4("ok ldmatrix x1 trans", check_ldmatrix<1, true>);
const Register m5("ok ldmatrix x2 trans", check_ldmatrix<2, true>);
const Register m6("ok ldmatrix x4 trans", check_ldmatrix<4, true>);
const Register m7("ok stmatrix x1", check_stmatrix<1, false>);
const Register m8("ok stmatrix x2", check_stmatrix<2, false>);
const Register m9("ok stmatrix x4", check_stmatrix<4, false>);
const Register m10("ok stmatrix x1 trans", check_stmatrix<1, true>);
const Register m11("ok stmatrix x2 trans", check_stmatrix<2, true>);
const Register m12("ok stmatrix x4 trans", check_stmatrix<4, true>);

// --- movmatrix
// ------------------------------------------------------------------------------------

struct MoveParams {
  const uint16_t* in;  // [8, 8]
  uint16_t* out;       // [8, 8]: its transpose
};

// Fragments gathered and stored by rows; kWrong leaves the transposition out.
template <bool kWrong>
__global__ void movmatrix_kernel(const __grid_constant__ MoveParams p) {
  const int place = 2 * static_cast<int>(threadIdx.x);  // row l / 4, column 2 * (l % 4)
  const uint32_t word = p.in[place] | static_cast<uint32_t>(p.in[place + 1]) << 16;
  const uint32_t moved = kWrong ? word : ptx::movmatrix_trans(word);
  p.out[place] = static_cast<uint16_t>(moved);
  p.out[place + 1] = static_cast<uint16_t>(moved >> 16);
}

template <bool kWrong>
void check_movmatrix() {
  const std::vector<uint16_t> in = numbered(kRows * kRows);
  std::vector<uint16_t> out(kRows * kRows);
  launch(movmatrix_kernel<kWrong>, one_block(kLanes), {in.data(), out.data()});
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kRows; ++column) {
      expect(out[row * kRows + column] == in[column * kRows + row],
             "movmatrix: row " + std::to_string(row) + ", column " + std::to_string(column));
    }
  }
}

const Register v1("ok movmatrix trans", check_movmatrix<false>);
const Register v2("bug movmatrix left out", check_movmatrix<true>);

// --- mma
// ------------------------------------------------------------------------------------------

constexpr int kM = 16, kN = 8, kK = 16;

template <class T>
struct MmaParams {
  const T* a;      // [16, 16]
  const T* b;      // [8, 16]: column n of B is row n here
  const float* c;  // [16, 8]
  float* d;        // [16, 8]
};

template <class T>
uint32_t pair_at(const T* low) {
  uint32_t word;
  std::memcpy(&word, low, sizeof(word));
  return word;
}

// Fragments gathered by the formulas of the PTX ISA; kWrong exchanges a[1] and a[2].
template <class T, bool kWrong>
__global__ void mma_kernel(const __grid_constant__ MmaParams<T> p) {
  const int g = static_cast<int>(threadIdx.x) / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  uint32_t a[4] = {pair_at(p.a + g * kK + 2 * t), pair_at(p.a + (g + 8) * kK + 2 * t),
                   pair_at(p.a + g * kK + 2 * t + 8), pair_at(p.a + (g + 8) * kK + 2 * t + 8)};
  if (kWrong) {
    const uint32_t other = a[1];
    a[1] = a[2];
    a[2] = other;
  }
  const uint32_t b[2] = {pair_at(p.b + g * kK + 2 * t), pair_at(p.b + g * kK + 2 * t + 8)};
  const float c[4] = {p.c[g * kN + 2 * t], p.c[g * kN + 2 * t + 1], p.c[(g + 8) * kN + 2 * t],
                      p.c[(g + 8) * kN + 2 * t + 1]};
  float d[4];
  ptx::mma_m16n8k16<T>(d, a, b, c);
  p.d[g * kN + 2 * t] = d[0];
  p.d[g * kN + 2 * t + 1] = d[1];
  p.d[(g + 8) * kN + 2 * t] = d[2];
  p.d[(g + 8) * kN + 2 * t + 1] = d[3];
}

template <class T>
struct Operands {
  T* a;  // [16, 16]
  T* b;  // [16, 8] if transposed on the way, else [8, 16]

  template <class Arena>
  static constexpr Operands take_from(Arena& arena) {
    return {arena.template take<T, kM * kK>(), arena.template take<T, kN * kK>()};
  }
};

// The same through shared memory: ldmatrix x4 gives the four parts of A in the order of its
// fragment; B is either stored by columns, or by rows (kByRows) and transposed while loading
// (kTrans).
template <class T, bool kByRows, bool kTrans>
__global__ void ldmatrix_mma_kernel(const __grid_constant__ MmaParams<T> p) {
  SharedArena arena;
  const auto shared = Operands<T>::take_from(arena);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < kM * kK; i += kLanes) shared.a[i] = p.a[i];
  for (int i = lane; i < kN * kK; i += kLanes) {
    shared.b[kByRows ? i % kK * kN + i / kK : i] = p.b[i];
  }
  ptx::sync_threads();
  uint32_t a[4], b[2];
  ptx::ldmatrix_x4(a, ptx::smem_addr(shared.a + lane % 16 * kK + lane / 16 * 8));
  if (kByRows) {
    const uint32_t row = ptx::smem_addr(shared.b + lane % 16 * kN);
    kTrans ? ptx::ldmatrix_x2_trans(b, row) : ptx::ldmatrix_x2(b, row);
  } else {
    ptx::ldmatrix_x2(b, ptx::smem_addr(shared.b + lane % 8 * kK + lane / 8 % 2 * 8));
  }
  float d[4] = {};
  ptx::mma_m16n8k16<T>(d, a, b, d);
  for (int i = 0; i < 4; ++i) {
    p.d[(lane / 4 + i / 2 * 8) * kN + lane % 4 * 2 + i % 2] = d[i];
  }
}

template <class T>
void check_mma(void (*kernel)(MmaParams<T>), int smem_bytes, bool adds) {
  std::vector<T> a(kM * kK), b(kN * kK);
  std::vector<float> c(kM * kN), d(kM * kN), wanted(kM * kN);
  // Small integers: every product and sum is exact.
  for (int i = 0; i < kM * kK; ++i) a[i] = static_cast<T>(static_cast<float>(i * 7 % 23 - 11));
  for (int i = 0; i < kN * kK; ++i) b[i] = static_cast<T>(static_cast<float>(i * 5 % 19 - 9));
  for (int i = 0; i < kM * kN; ++i) c[i] = static_cast<float>(i);
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      float sum = adds ? c[m * kN + n] : 0;
      for (int k = 0; k < kK; ++k) {
        sum += static_cast<float>(a[m * kK + k]) * static_cast<float>(b[n * kK + k]);
      }
      wanted[m * kN + n] = sum;
    }
  }
  launch(kernel, one_block(kLanes, smem_bytes), {a.data(), b.data(), c.data(), d.data()});
  expect_equal(d, wanted);
}

using Bf16 = __nv_bfloat16;

const Register f1("ok mma bf16", [] { check_mma<Bf16>(mma_kernel<Bf16, false>, 0, true); });
const Register f2("ok mma fp16", [] { check_mma<__half>(mma_kernel<__half, false>, 0, true); });
const Register f3("ok ldmatrix and mma, B by columns", [] {
  check_mma<Bf16>(ldmatrix_mma_kernel<Bf16, false, false>, shared_bytes<Operands<Bf16>>(), false);
});
const Register f4("ok ldmatrix and mma, B by rows", [] {
  check_mma<__half>(ldmatrix_mma_kernel<__half, true, true>, shared_bytes<Operands<__half>>(),
                    false);
});
const Register f5("bug fragment registers exchanged",
                  [] { check_mma<Bf16>(mma_kernel<Bf16, true>, 0, true); });
const Register f6("bug ldmatrix without trans", [] {
  check_mma<Bf16>(ldmatrix_mma_kernel<Bf16, true, false>, shared_bytes<Operands<Bf16>>(), false);
});

}  // namespace
}  // namespace honesty
