// The emulator's twin of csrc/common/ptx.cuh: the same names and signatures, run by fibers on a
// CPU. Every function that can go wrong takes the place it was called from, so that a report names
// it. What touches the kernel's memory (loads, stores, atomics, landing copies) stands here and is
// instrumented by the sanitizers like the kernel itself; everything else is behind core/emulator.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/launch.h"
#include "core/emulator.h"

namespace exafuse {

namespace ptx {

using emulator::Site;

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

// --- shared memory
// ----------------------------------------------------------------------------------

inline uint32_t smem_addr(const void* pointer, const Site& site = Site::current()) {
  return emulator::shared_address(pointer, site);
}

// --- barriers
// ---------------------------------------------------------------------------------------

inline void sync_threads(const Site& site = Site::current()) { emulator::sync_threads(site); }

inline void sync_warp(unsigned mask = kFullMask, const Site& site = Site::current()) {
  emulator::sync_warp(mask, site);
}

inline void bar_sync(int id, int num_threads, const Site& site = Site::current()) {
  emulator::named_barrier(id, num_threads, true, site);
}

inline void bar_arrive(int id, int num_threads, const Site& site = Site::current()) {
  emulator::named_barrier(id, num_threads, false, site);
}

// --- warp collectives
// -------------------------------------------------------------------------------

namespace detail {

template <class T>
T exchange(emulator::Collective operation, T value, int argument, int width, unsigned mask,
           const Site& site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    emulator::fail("shuffle width " + std::to_string(width) + ": expected a power of two up to 32",
                   site);
  }
  emulator::Exchange lane{.argument = argument, .width = width};
  std::memcpy(&lane.value, &value, sizeof(T));
  emulator::collective(operation, mask, &lane, site);
  std::memcpy(&value, &lane.result, sizeof(T));
  return value;
}

inline uint64_t vote(emulator::Collective operation, uint64_t value, unsigned mask,
                     const Site& site) {
  emulator::Exchange lane{.value = value};
  emulator::collective(operation, mask, &lane, site);
  return lane.result;
}

template <class T>
T reduce(emulator::Collective if_signed, emulator::Collective if_unsigned, T value, unsigned mask,
         const Site& site) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  const auto operation = std::is_signed_v<T> ? if_signed : if_unsigned;
  return static_cast<T>(vote(operation, static_cast<unsigned>(value), mask, site));
}

}  // namespace detail

template <class T>
T shfl(T value, int src_lane, int width = kWarpSize, unsigned mask = kFullMask,
       const Site& site = Site::current()) {
  return detail::exchange(emulator::Collective::kShflIdx, value, src_lane, width, mask, site);
}

template <class T>
T shfl_xor(T value, int lane_mask, int width = kWarpSize, unsigned mask = kFullMask,
           const Site& site = Site::current()) {
  return detail::exchange(emulator::Collective::kShflXor, value, lane_mask & 31, width, mask, site);
}

template <class T>
T shfl_up(T value, unsigned delta, int width = kWarpSize, unsigned mask = kFullMask,
          const Site& site = Site::current()) {
  return detail::exchange(emulator::Collective::kShflUp, value, delta & 31, width, mask, site);
}

template <class T>
T shfl_down(T value, unsigned delta, int width = kWarpSize, unsigned mask = kFullMask,
            const Site& site = Site::current()) {
  return detail::exchange(emulator::Collective::kShflDown, value, delta & 31, width, mask, site);
}

inline bool any(bool predicate, unsigned mask = kFullMask, const Site& site = Site::current()) {
  return detail::vote(emulator::Collective::kAny, predicate, mask, site) != 0;
}

inline bool all(bool predicate, unsigned mask = kFullMask, const Site& site = Site::current()) {
  return detail::vote(emulator::Collective::kAll, predicate, mask, site) != 0;
}

inline unsigned ballot(bool predicate, unsigned mask = kFullMask,
                       const Site& site = Site::current()) {
  return static_cast<unsigned>(detail::vote(emulator::Collective::kBallot, predicate, mask, site));
}

template <class T>
unsigned match_any(T value, unsigned mask = kFullMask, const Site& site = Site::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned>(detail::vote(emulator::Collective::kMatchAny, bits, mask, site));
}

template <class T>
T reduce_add(T value, unsigned mask = kFullMask, const Site& site = Site::current()) {
  using enum emulator::Collective;
  return detail::reduce(kReduceAdd, kReduceAdd, value, mask, site);
}

template <class T>
T reduce_min(T value, unsigned mask = kFullMask, const Site& site = Site::current()) {
  using enum emulator::Collective;
  return detail::reduce(kReduceMinSigned, kReduceMinUnsigned, value, mask, site);
}

template <class T>
T reduce_max(T value, unsigned mask = kFullMask, const Site& site = Site::current()) {
  using enum emulator::Collective;
  return detail::reduce(kReduceMaxSigned, kReduceMaxUnsigned, value, mask, site);
}

// --- memory access
// ----------------------------------------------------------------------------------

namespace detail {

inline void check_access(const void* address, int bytes, const char* what, const Site& site) {
  if (emulator::global_memory_forbidden ||
      reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) != 0) {
    emulator::check_access(address, bytes, what, site);
  }
}

}  // namespace detail

template <class T>
T ldg(const T* address, const Site& site = Site::current()) {
  detail::check_access(address, sizeof(T), "ldg", site);
  return *address;
}

template <class Word>
Word load_word(const void* address, const Site& site = Site::current()) {
  detail::check_access(address, sizeof(Word), "a load", site);
  return *static_cast<const Word*>(address);
}

template <class Word>
Word load_word_readonly(const void* address, const Site& site = Site::current()) {
  return load_word<Word>(address, site);
}

template <class Word>
void store_word(void* address, Word word, const Site& site = Site::current()) {
  detail::check_access(address, sizeof(Word), "a store", site);
  *static_cast<Word*>(address) = word;
}

inline void store_shared(void* address, uint4 word, const Site& site = Site::current()) {
  detail::check_access(address, sizeof(word), "a store", site);
  *static_cast<uint4*>(address) = word;
}

// --- atomics
// ----------------------------------------------------------------------------------------

namespace detail {

// Replaces the value by `update` of it, in one step; returns the value before.
template <class T, class Update>
T atomic_update(T* address, Update update, const Site& site) {
  check_access(address, sizeof(T), "an atomic", site);
  emulator::yield_in_atomic(site);
  T before;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  T after = update(before);
  while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
    after = update(before);
  }
  return before;
}

}  // namespace detail

template <class T>
T atomic_add(T* address, T value, const Site& site = Site::current()) {
  return detail::atomic_update(address, [=](T before) { return before + value; }, site);
}

template <class T>
T atomic_max(T* address, T value, const Site& site = Site::current()) {
  return detail::atomic_update(
      address, [=](T before) { return before > value ? before : value; }, site);
}

template <class T>
T atomic_cas(T* address, T expected, T desired, const Site& site = Site::current()) {
  return detail::atomic_update(
      address, [=](T before) { return before == expected ? desired : before; }, site);
}

template <class T>
T atomic_exch(T* address, T value, const Site& site = Site::current()) {
  return detail::atomic_update(address, [=](T) { return value; }, site);
}

// --- arithmetic
// -------------------------------------------------------------------------------------

inline float exp2(float x) { return emulator::approximate_exp2(x, false); }
inline float exp2_ftz(float x) { return emulator::approximate_exp2(x, true); }
inline float log2(float x) { return emulator::approximate_log2(x); }
inline float rcp(float x) { return emulator::approximate_rcp(x); }
inline float rsqrt(float x) { return emulator::approximate_rsqrt(x); }

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
// In double a product of 16-bit numbers is exact and the sum rounds far below the result's last
// bit.
inline __nv_bfloat162 fma(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  const auto one = [](__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
    return __double2bfloat16(static_cast<double>(float(x)) * float(y) + float(z));
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}
inline __half2 fma(__half2 a, __half2 b, __half2 c) {
  const auto one = [](__half x, __half y, __half z) {
    return __double2half(static_cast<double>(float(x)) * float(y) + float(z));
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}

inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

template <class T>
uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  T halves[2];
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    halves[0] = __float2bfloat16_rn(low);
    halves[1] = __float2bfloat16_rn(high);
  } else {
    halves[0] = __float2half_rn(low);
    halves[1] = __float2half_rn(high);
  }
  uint32_t packed;
  std::memcpy(&packed, halves, sizeof(packed));
  return packed;
}

// --- matrix fragments
// -------------------------------------------------------------------------------

namespace detail {

// Each lane reads (writes) the row whose address it gives, in its own name; the exchange between
// rows and fragments goes around the sanitizers. The address is checked in lanes that give none,
// too.
template <int kCount>
void ldmatrix(emulator::Collective operation, uint32_t (&r)[kCount], uint32_t row,
              const Site& site) {
  emulator::MatrixLane lane{.num_matrices = kCount};
  const auto* words = static_cast<const uint32_t*>(emulator::shared_pointer(row, 16, site));
  if (emulator::lane_id() < 8 * kCount) {
    for (int i = 0; i < 4; ++i) lane.row[i] = words[i];
  }
  emulator::collective(operation, kFullMask, &lane, site);
  for (int i = 0; i < kCount; ++i) r[i] = lane.registers[i];
}

template <int kCount>
void stmatrix(emulator::Collective operation, uint32_t row, const uint32_t (&r)[kCount],
              const Site& site) {
  if (emulator::gpu_model().major < 9) {
    emulator::fail("stmatrix needs sm_90, the emulated GPU is older", site);
  }
  emulator::MatrixLane lane{.num_matrices = kCount};
  for (int i = 0; i < kCount; ++i) lane.registers[i] = r[i];
  auto* words = static_cast<uint32_t*>(emulator::shared_pointer(row, 16, site));
  emulator::collective(operation, kFullMask, &lane, site);
  if (emulator::lane_id() < 8 * kCount) {
    for (int i = 0; i < 4; ++i) words[i] = lane.row[i];
  }
}

}  // namespace detail

inline void ldmatrix_x1(uint32_t (&r)[1], uint32_t row, const Site& site = Site::current()) {
  detail::ldmatrix(emulator::Collective::kLdmatrix, r, row, site);
}

inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t row, const Site& site = Site::current()) {
  detail::ldmatrix(emulator::Collective::kLdmatrix, r, row, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, const Site& site = Site::current()) {
  detail::ldmatrix(emulator::Collective::kLdmatrix, r, row, site);
}

inline void ldmatrix_x1_trans(uint32_t (&r)[1], uint32_t row, const Site& site = Site::current()) {
  detail::ldmatrix(emulator::Collective::kLdmatrixTrans, r, row, site);
}

inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row, const Site& site = Site::current()) {
  detail::ldmatrix(emulator::Collective::kLdmatrixTrans, r, row, site);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row, const Site& site = Site::current()) {
  detail::ldmatrix(emulator::Collective::kLdmatrixTrans, r, row, site);
}

inline void stmatrix_x1(uint32_t row, const uint32_t (&r)[1], const Site& site = Site::current()) {
  detail::stmatrix(emulator::Collective::kStmatrix, row, r, site);
}

inline void stmatrix_x2(uint32_t row, const uint32_t (&r)[2], const Site& site = Site::current()) {
  detail::stmatrix(emulator::Collective::kStmatrix, row, r, site);
}

inline void stmatrix_x4(uint32_t row, const uint32_t (&r)[4], const Site& site = Site::current()) {
  detail::stmatrix(emulator::Collective::kStmatrix, row, r, site);
}

inline void stmatrix_x1_trans(uint32_t row, const uint32_t (&r)[1],
                              const Site& site = Site::current()) {
  detail::stmatrix(emulator::Collective::kStmatrixTrans, row, r, site);
}

inline void stmatrix_x2_trans(uint32_t row, const uint32_t (&r)[2],
                              const Site& site = Site::current()) {
  detail::stmatrix(emulator::Collective::kStmatrixTrans, row, r, site);
}

inline void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4],
                              const Site& site = Site::current()) {
  detail::stmatrix(emulator::Collective::kStmatrixTrans, row, r, site);
}

inline uint32_t movmatrix_trans(uint32_t r, const Site& site = Site::current()) {
  emulator::MatrixLane lane{.num_matrices = 1};
  lane.registers[0] = r;
  emulator::collective(emulator::Collective::kMovmatrixTrans, kFullMask, &lane, site);
  return lane.registers[0];
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const float (&c)[4], const Site& site = Site::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  emulator::MmaLane lane{.a = a, .b = b, .c = c, .d = d};
  emulator::collective(std::is_same_v<T, __nv_bfloat16> ? emulator::Collective::kMmaBf16
                                                        : emulator::Collective::kMmaFp16,
                       kFullMask, &lane, site);
}

// --- asynchronous copies
// ----------------------------------------------------------------------------

namespace detail {

inline constexpr unsigned char kPoison = 0xFF;

struct alignas(16) Bytes16 {
  unsigned char byte[16];
};

inline void land(const emulator::Copy& copy) {
  auto* destination = static_cast<Bytes16*>(copy.destination);
  const Bytes16 found = *destination;
  for (unsigned char byte : found.byte) {
    if (byte != kPoison) {
      emulator::fail("the destination of an asynchronous copy was written while it was in flight",
                     copy.site);
    }
  }
  Bytes16 bytes{};
  if (copy.source != nullptr) {
    bytes = *static_cast<const Bytes16*>(copy.source);
    if (std::memcmp(bytes.byte, copy.snapshot, sizeof(bytes)) != 0) {
      emulator::fail("the source of an asynchronous copy changed while it was in flight",
                     copy.site);
    }
  }
  *destination = bytes;
}

}  // namespace detail

inline void cp_async_16(uint32_t smem, const void* gmem, bool valid = true,
                        const Site& site = Site::current()) {
  emulator::Copy copy{.destination = emulator::shared_pointer(smem, 16, site), .site = site};
  detail::check_access(gmem, 16, "cp_async_16", site);
  if (valid) {
    copy.source = gmem;
    const auto bytes = *static_cast<const detail::Bytes16*>(gmem);
    std::memcpy(copy.snapshot, bytes.byte, sizeof(bytes));
  }
  detail::Bytes16 poison;
  std::memset(poison.byte, detail::kPoison, sizeof(poison));
  *static_cast<detail::Bytes16*>(copy.destination) = poison;
  emulator::start_copy(copy);
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int kPending>
void cp_async_wait() {
  static_assert(kPending >= 0);
  emulator::Copy copy;
  while (emulator::next_landing(kPending, &copy)) detail::land(copy);
}

// --- dependent launch
// -------------------------------------------------------------------------------

inline void griddep_wait() { emulator::griddep_wait(); }

inline void griddep_launch_dependents() {}

}  // namespace ptx

class SharedArena {
 public:
  template <class T, int kCount>
  T* take(const std::source_location& site = std::source_location::current()) {
    const int begin = align_shared(bytes_, shared_alignment<T>());
    const int size = kCount * static_cast<int>(sizeof(T));
    bytes_ = begin + size;
    return static_cast<T*>(emulator::shared_array(index_++, begin, size, site));
  }

 private:
  int bytes_ = 0;
  int index_ = 0;
};

}  // namespace exafuse
