// Everything of CUDA that plain C++ lacks, as small wrappers named after the instruction. All
// inline PTX of the project lives here and, for sm_90a alone, in ptx_sm90.cuh and ptx_wgmma.cuh.
// tests/emulator has a file of the same name with the same signatures that runs on a CPU, so a
// wrapper's contract is what its comment says, not what the hardware happens to do: approximate
// functions may be off by their documented error, collectives need every lane of their mask, an
// asynchronous copy lands no earlier than its wait.
//
// Bands: shared memory, barriers, warp collectives, atomics, memory access, arithmetic, matrix
// fragments, asynchronous copies, dependent launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/launch.h"

namespace exafuse {

namespace ptx {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

// --- shared memory ------------------------------------------------------------------------------

// The block's dynamic shared memory; 1024 bytes of alignment serve the widest swizzle.
__device__ __forceinline__ unsigned char* dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char exafuse_dynamic_smem[];
  return exafuse_dynamic_smem;
}

// The address that ldmatrix, stmatrix and cp.async take.
__device__ __forceinline__ uint32_t smem_addr(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- barriers -----------------------------------------------------------------------------------

// All threads of the block; orders shared and global memory among them.
__device__ __forceinline__ void sync_threads() { __syncthreads(); }

// All lanes of the mask; orders memory among them. Shuffles and votes do not.
__device__ __forceinline__ void sync_warp(unsigned mask = kFullMask) { __syncwarp(mask); }

// Named barrier `id` (1 to 15; 0 is sync_threads) of `num_threads` threads, a multiple of 32.
__device__ __forceinline__ void bar_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Counts at the named barrier without waiting there.
__device__ __forceinline__ void bar_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// --- warp collectives ---------------------------------------------------------------------------
// Every lane of `mask` must call, at the same place. `width` (a power of two) splits the warp into
// segments that exchange among themselves.

template <class T>
__device__ __forceinline__ T shfl(T value, int src_lane, int width = kWarpSize,
                                  unsigned mask = kFullMask) {
  return __shfl_sync(mask, value, src_lane, width);
}

template <class T>
__device__ __forceinline__ T shfl_xor(T value, int lane_mask, int width = kWarpSize,
                                      unsigned mask = kFullMask) {
  return __shfl_xor_sync(mask, value, lane_mask, width);
}

template <class T>
__device__ __forceinline__ T shfl_up(T value, unsigned delta, int width = kWarpSize,
                                     unsigned mask = kFullMask) {
  return __shfl_up_sync(mask, value, delta, width);
}

template <class T>
__device__ __forceinline__ T shfl_down(T value, unsigned delta, int width = kWarpSize,
                                       unsigned mask = kFullMask) {
  return __shfl_down_sync(mask, value, delta, width);
}

__device__ __forceinline__ bool any(bool predicate, unsigned mask = kFullMask) {
  return __any_sync(mask, predicate) != 0;
}

__device__ __forceinline__ bool all(bool predicate, unsigned mask = kFullMask) {
  return __all_sync(mask, predicate) != 0;
}

__device__ __forceinline__ unsigned ballot(bool predicate, unsigned mask = kFullMask) {
  return __ballot_sync(mask, predicate);
}

// The lanes of the mask that hold the same value (32 or 64 bits).
template <class T>
__device__ __forceinline__ unsigned match_any(T value, unsigned mask = kFullMask) {
  return __match_any_sync(mask, value);
}

// Whole-mask reductions of int or unsigned in one instruction.
template <class T>
__device__ __forceinline__ T reduce_add(T value, unsigned mask = kFullMask) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return __reduce_add_sync(mask, value);
}

template <class T>
__device__ __forceinline__ T reduce_min(T value, unsigned mask = kFullMask) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return __reduce_min_sync(mask, value);
}

template <class T>
__device__ __forceinline__ T reduce_max(T value, unsigned mask = kFullMask) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return __reduce_max_sync(mask, value);
}

// --- atomics ------------------------------------------------------------------------------------
// Relaxed, on global or shared memory; each returns the value before.

// int, unsigned, unsigned long long, float.
template <class T>
__device__ __forceinline__ T atomic_add(T* address, T value) {
  return atomicAdd(address, value);
}

// int, unsigned, unsigned long long.
template <class T>
__device__ __forceinline__ T atomic_max(T* address, T value) {
  return atomicMax(address, value);
}

template <class T>
__device__ __forceinline__ T atomic_cas(T* address, T expected, T desired) {
  return atomicCAS(address, expected, desired);
}

template <class T>
__device__ __forceinline__ T atomic_exch(T* address, T value) {
  return atomicExch(address, value);
}

// --- memory access ------------------------------------------------------------------------------

// Through the read-only cache: the kernel must not write this memory.
template <class T>
__device__ __forceinline__ T ldg(const T* address) {
  return __ldg(address);
}

// One access of sizeof(Word) = 2, 4, 8 or 16 bytes at an address aligned to as much. `Word` is an
// unsigned integer or vector type, whatever the memory holds; kernels reach these through Vec
// (vec.cuh).
template <class Word>
__device__ __forceinline__ Word load_word(const void* address) {
  return *static_cast<const Word*>(address);
}

// The same through the read-only cache: the kernel must not write this memory. The compiler may
// move these above stores, which it cannot do with load_word.
template <class Word>
__device__ __forceinline__ Word load_word_readonly(const void* address) {
  return __ldg(static_cast<const Word*>(address));
}

// To global memory. Spelled out, because the compiler splits a plain store of a vector type into
// four where it cannot prove that the pieces belong together.
template <class Word>
__device__ __forceinline__ void store_word(void* address, Word word) {
  const auto global = __cvta_generic_to_global(address);
  if constexpr (sizeof(Word) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(word.x), "r"(word.y),
                 "r"(word.z), "r"(word.w)
                 : "memory");
  } else if constexpr (sizeof(Word) == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(global), "r"(word.x), "r"(word.y)
                 : "memory");
  } else {
    *static_cast<Word*>(address) = word;
  }
}

// 16 bytes to shared memory, at an address aligned to as much.
__device__ __forceinline__ void store_shared(void* address, uint4 word) {
  *static_cast<uint4*>(address) = word;
}

// --- arithmetic ---------------------------------------------------------------------------------

// 2^x; relative error at most 2^-22, subnormal arguments and results kept.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// As exp2, with subnormal results flushed to zero: one instruction.
__device__ __forceinline__ float exp2_ftz(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x); absolute error at most 2^-22 for x in [0.5, 2], relative error 2^-22 elsewhere;
// subnormals count as zero.
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x; error at most 1 ulp; subnormals count as zero.
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / sqrt(x); relative error at most 2^-22.9; subnormals count as zero.
__device__ __forceinline__ float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a * b + c, rounded once.
__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

__device__ __forceinline__ double fma(double a, double b, double c) { return __fma_rn(a, b, c); }

__device__ __forceinline__ __nv_bfloat162 fma(__nv_bfloat162 a, __nv_bfloat162 b,
                                              __nv_bfloat162 c) {
  return __hfma2(a, b, c);
}

__device__ __forceinline__ __half2 fma(__half2 a, __half2 b, __half2 c) { return __hfma2(a, b, c); }

// The smaller / larger number; a NaN loses against a number.
__device__ __forceinline__ float min(float a, float b) { return fminf(a, b); }

__device__ __forceinline__ float max(float a, float b) { return fmaxf(a, b); }

// Two floats rounded to nearest even and packed, `low` in the lower half: the order of mma
// fragments.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  uint32_t packed;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// --- matrix fragments ---------------------------------------------------------------------------
// 8x8 matrices of 16-bit elements in shared memory. `row` is the address of one 16-byte row: lane l
// gives row l % 8 of matrix l / 8 (lanes beyond the last matrix are ignored but must hold a valid
// address). Register i of lane l receives elements 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4 of
// matrix i; with _trans, of the transposed matrix.

__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&r)[1], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The inverse of ldmatrix; sm_90 and later only.
__device__ __forceinline__ void stmatrix_x1(uint32_t row, const uint32_t (&r)[1]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(row), "r"(r[0])
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void stmatrix_x2(uint32_t row, const uint32_t (&r)[2]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(r[0]),
               "r"(r[1])
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void stmatrix_x1_trans(uint32_t row, const uint32_t (&r)[1]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(row), "r"(r[0])
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void stmatrix_x2_trans(uint32_t row, const uint32_t (&r)[2]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row),
               "r"(r[0]), "r"(r[1])
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  __trap();
#endif
}

// Transposes an 8x8 matrix of 16-bit elements between the registers of a warp: lane l gives
// elements 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4, and receives those of the transposed
// matrix.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t r) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
  return transposed;
}

// d = a * b + c for one warp: a is 16x16 row-major, b 16x8 column-major, c and d 16x8 fp32. T is
// __nv_bfloat16 or __half. With g = lane / 4 and t = lane % 4: a[0] holds row g, columns 2t and 2t
// + 1; a[1] row g + 8; a[2] and a[3] the same rows, columns + 8; b[0] rows 2t and 2t + 1 of column
// g, b[1] rows + 8; c[0], c[1] row g, columns 2t and 2t + 1; c[2], c[3] row g + 8.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], const float (&c)[4]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  }
}

// --- asynchronous copies ------------------------------------------------------------------------

// Starts a copy of 16 aligned bytes to shared memory, past the L1 cache. Where `valid` is false
// nothing is read and the destination becomes zero. The bytes are there after the wait for their
// group, for other threads after a barrier as well.
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* gmem, bool valid = true) {
  const int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem),
               "r"(source_bytes)
               : "memory");
}

// Closes the group of copies started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the kPending newest groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- dependent launch ---------------------------------------------------------------------------
// Does nothing before sm_90, or when the kernel was launched without LaunchConfig::pdl.

// Returns once the preceding kernel of the stream has finished and its memory is visible. Every
// thread calls it before it first touches global memory, reading or writing.
__device__ __forceinline__ void griddep_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start as soon as all blocks have come here or ended.
__device__ __forceinline__ void griddep_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ptx

// Hands out the arrays of a block's dynamic shared memory, in order; launch.h says how the host
// arrives at the same total.
class SharedArena {
 public:
  __device__ __forceinline__ SharedArena() : base_(ptx::dynamic_smem()) {}

  template <class T, int kCount>
  constexpr T* take() {
    const int begin = align_shared(bytes_, shared_alignment<T>());
    bytes_ = begin + kCount * static_cast<int>(sizeof(T));
    return reinterpret_cast<T*>(base_ + begin);
  }

 private:
  unsigned char* base_;
  int bytes_ = 0;
};

}  // namespace exafuse
