// The instructions of sm_90a, as ptx.cuh has those of every GPU: barriers in shared memory, copies
// of whole boxes (TMA), matrix products of a warpgroup (wgmma), and what goes with them.
// tests/emulator has a file of the same name with the same signatures.
//
// Shared memory is named by addresses from ptx::smem_addr. TMA and wgmma read and write it through
// the asynchronous proxy: what a thread has stored itself is visible to them only after its
// fence_proxy_async, and to be seen by the emulator it must have been stored by st_shared,
// store_shared or stmatrix. What they have written is visible after mbarrier_wait, what they have
// read may be overwritten after wgmma_wait or tma_store_wait_read.
//
// Sources that include this are named *_sm90.cu and are compiled for sm_90a alone.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/ptx_wgmma.cuh"
#include "common/tensor_map.h"

namespace exafuse {

namespace ptx {

// --- shared memory ------------------------------------------------------------------------------

__device__ __forceinline__ void st_shared(uint32_t smem, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(smem), "r"(word) : "memory");
}

// At a multiple of 16 bytes.
__device__ __forceinline__ void st_shared(uint32_t smem, uint4 word) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
}

// At a multiple of 16 bytes.
__device__ __forceinline__ uint4 ld_shared(uint32_t smem) {
  uint4 word;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "r"(smem)
               : "memory");
  return word;
}

// --- warps --------------------------------------------------------------------------------------

// True in one lane of a whole warp.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected = 0;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(elected));
  return elected != 0;
}

// Registers of a thread from here on: 24 to 256, a multiple of 8, the same in all four warps of a
// warpgroup. Fewer give registers back to the block, more wait until it has them.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- barriers in shared memory ------------------------------------------------------------------
// An mbarrier is 8 bytes of shared memory. A phase is over when `count` arrivals have come and all
// bytes that were announced have landed; the next one begins at once.

// One thread; before any other use fence_mbarrier_init and a barrier of the block.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to the asynchronous proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives and announces `bytes` of copies to come.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is over: 0 for the first, 1 for the second, 0 for the third.
// On a fresh barrier a wait for parity 1 returns at once.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nwait:\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\nbra wait;\ndone:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Between what this thread stored to shared memory and what the asynchronous proxy does there after
// the next barrier.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- copies of whole boxes ----------------------------------------------------------------------
// One thread issues. `map` is a kernel parameter (never a copy of one). The shared side of a box is
// rows of 128 bytes from a multiple of 1024 bytes, each row's 16-byte chunks permuted by XOR with
// the row number modulo 8. Coordinates count elements and may lie outside: loads give zeros there,
// stores leave out.

__device__ __forceinline__ void tma_load(uint32_t smem, const TensorMap& map, uint32_t barrier,
                                         int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap& map, uint32_t smem, int column, int row,
                                          int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(smem), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but the newest kPending groups of this thread have read shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// --- matrix products of a warpgroup -------------------------------------------------------------
// Four warps multiply 64 rows. Operands in shared memory are panels: rows of 128 bytes (64
// elements), swizzled as a box is. Accumulators and operands in registers belong to the product
// from its start until the wgmma_wait that names them: not read, not written, not copied.
//
// Accumulator d[kCols / 2] of m64nN: warp w of the warpgroup, with g = lane / 4 and t = lane % 4,
// holds in d[i] row 16w + g + 8 * (i / 2 % 2), column 8 * (i / 4) + 2t + i % 2. Operand a[4] as in
// mma_m16n8k16.

// What a product needs to know of an operand in shared memory. `smem` lies within the first row of
// eight. `panel_bytes`: between panels, for operands whose rows are the depth of the product.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t smem, int panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kRowGroup = uint64_t{1024 >> 4} << 32;  // eight rows further
  return kSwizzle128 | kRowGroup | static_cast<uint64_t>(panel_bytes >> 4) << 16 | (smem >> 4);
}

// Before the first product of a group: orders register accesses, and earlier stores, before it.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of products since the last commit.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// How the rows of operand b lie in shared memory: its columns side by side there (keys of q k^T,
// whose depth runs along a row), or its depth row by row (values of p v).
enum class WgmmaB : uint8_t { kDepthAlongRow, kDepthByRow };

// d = a b, or d += a b: 64 x kN, depth 16. kN: 64, 96, 128, 160, 176 or 192. T is __nv_bfloat16 or
// __half. Operand a, 64 x 16, from shared memory, its depth along the rows.
template <class T, int kN, WgmmaB kLayout = WgmmaB::kDepthAlongRow>
__device__ __forceinline__ void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b,
                                         bool accumulate) {
  detail::Wgmma<T, kN>::template ss<kLayout == WgmmaB::kDepthByRow>(d, a, b, accumulate);
}

// The same with operand a from registers; b's depth goes by rows.
template <class T, int kN>
__device__ __forceinline__ void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                         bool accumulate) {
  detail::Wgmma<T, kN>::rs(d, a, b, accumulate);
}

namespace detail {

// Keeps the compiler from moving uses of `registers` across the wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount, int kEach>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount][kEach]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
  }
}

}  // namespace detail

// Waits until at most the newest kPending groups are in flight; `registers` are the accumulators
// and the operands in registers that this makes the thread's own again.
template <int kPending, class... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (detail::pin(registers), ...);
}

}  // namespace ptx

}  // namespace exafuse
