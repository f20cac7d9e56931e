// The emulator's twin of csrc/common/ptx_sm90.cuh: the same names and signatures. As in ptx.cuh,
// what touches the kernel's memory stands here, where the sanitizers see it; the rest is behind
// core/emulator.h. Copies of boxes write shared memory there, unseen: the clock of the asynchronous
// proxy watches it more closely than a sanitizer could.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/tensor_map.h"

namespace exafuse {

namespace ptx {

// --- shared memory
// ----------------------------------------------------------------------------------

inline void st_shared(uint32_t smem, uint32_t word, const Site& site = Site::current()) {
  *static_cast<uint32_t*>(emulator::shared_store(smem, sizeof(word), site)) = word;
}

inline void st_shared(uint32_t smem, uint4 word, const Site& site = Site::current()) {
  *static_cast<uint4*>(emulator::shared_store(smem, sizeof(word), site)) = word;
}

inline uint4 ld_shared(uint32_t smem, const Site& site = Site::current()) {
  return *static_cast<const uint4*>(emulator::shared_load(smem, sizeof(uint4), site));
}

// --- warps
// ------------------------------------------------------------------------------------------

inline bool elect_one(const Site& site = Site::current()) { return emulator::elect_one(site); }

template <int kRegisters>
void setmaxnreg_dec(const Site& site = Site::current()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  emulator::set_max_registers(kRegisters, false, site);
}

template <int kRegisters>
void setmaxnreg_inc(const Site& site = Site::current()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  emulator::set_max_registers(kRegisters, true, site);
}

// --- barriers in shared memory
// ----------------------------------------------------------------------

inline void mbarrier_init(uint32_t barrier, int count, const Site& site = Site::current()) {
  emulator::mbarrier_init(barrier, count, site);
}

inline void fence_mbarrier_init(const Site& site = Site::current()) {
  emulator::fence_mbarrier_init(site);
}

inline void mbarrier_arrive(uint32_t barrier, const Site& site = Site::current()) {
  emulator::mbarrier_arrive(barrier, site);
}

inline void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes,
                                      const Site& site = Site::current()) {
  emulator::mbarrier_arrive_expect_tx(barrier, bytes, site);
}

inline void mbarrier_wait(uint32_t barrier, uint32_t parity, const Site& site = Site::current()) {
  emulator::mbarrier_wait(barrier, parity, site);
}

inline void fence_proxy_async(const Site& site = Site::current()) {
  emulator::fence_proxy_async(site);
}

// --- copies of whole boxes
// --------------------------------------------------------------------------

namespace detail {

inline constexpr int kElementBytes = 2;

// Cuts [first, first + count) to what lies in [0, size); both ends relative to `first`.
inline void clip(int64_t first, int count, int64_t size, int* begin, int* end) {
  *begin = static_cast<int>(first >= 0 ? 0 : -first < count ? -first : count);
  const int64_t rest = size - first;
  *end = static_cast<int>(rest <= *begin ? *begin : rest < count ? rest : count);
}

inline emulator::Box box_of(const TensorMap& map, uint32_t smem, int column, int row, int head,
                            int batch) {
  const TensorMapSpec& spec = map.spec;
  emulator::Box box{.smem = smem, .rows = spec.box_rows};
  box.row_bytes = kElementBytes * spec.row_stride;
  if (head < 0 || head >= spec.heads || batch < 0 || batch >= spec.batch) return box;
  int first_column = 0, end_column = 0;
  clip(column, kBoxColumns, spec.columns, &first_column, &end_column);
  clip(row, spec.box_rows, spec.rows, &box.first_row, &box.end_row);
  box.first_byte = kElementBytes * first_column;
  box.end_byte = kElementBytes * end_column;
  if (box.inside_bytes() == 0) {
    box.end_row = box.first_row;
    return box;
  }
  box.global =
      static_cast<char*>(spec.data) +
      kElementBytes * (batch * spec.batch_stride + head * spec.head_stride +
                       (int64_t{row} + box.first_row) * spec.row_stride + column + first_column);
  return box;
}

// Reads all that lies inside, in the name of the thread; the core's digest of the same bytes is the
// same.
template <class Word>
uint64_t digest(const emulator::Box& box) {
  uint64_t sum = 0;
  for (int row = 0; row < box.end_row - box.first_row; ++row) {
    const auto* words = reinterpret_cast<const Word*>(box.global + row * box.row_bytes);
    const int count = (box.end_byte - box.first_byte) / static_cast<int>(sizeof(Word));
    for (int i = 0; i < count; ++i) sum = emulator::add_to_digest(sum, words[i]);
  }
  return sum;
}

// Where byte `byte` of a row lies: chunks of 16 bytes are permuted by bits of the address.
inline uint32_t swizzled(uint32_t smem, int row, int byte) {
  const uint32_t address = smem + row * emulator::kBoxRowBytes + byte;
  return address ^ (address >> 3 & 0x70);
}

template <class Word>
void land_store(const emulator::Box& box, const Site& site) {
  for (int row = box.first_row; row < box.end_row; ++row) {
    char* global = box.global + (row - box.first_row) * box.row_bytes;
    for (int byte = box.first_byte; byte < box.end_byte; byte += sizeof(Word)) {
      const void* shared = emulator::shared_load(swizzled(box.smem, row, byte), sizeof(Word), site);
      *reinterpret_cast<Word*>(global + byte - box.first_byte) = *static_cast<const Word*>(shared);
    }
  }
}

// Whether words of 8 bytes tile the inside of a box, on both sides.
inline bool is_wide(const emulator::Box& box) {
  return box.first_byte % 8 == 0 && box.end_byte % 8 == 0 &&
         reinterpret_cast<uintptr_t>(box.global) % 8 == 0;
}

}  // namespace detail

inline void tma_load(uint32_t smem, const TensorMap& map, uint32_t barrier, int column, int row,
                     int head, int batch, const Site& site = Site::current()) {
  const emulator::Box box = detail::box_of(map, smem, column, row, head, batch);
  emulator::check_box(box, "tma_load", site);
  const uint64_t digest =
      detail::is_wide(box) ? detail::digest<uint64_t>(box) : detail::digest<uint16_t>(box);
  emulator::start_load(box, barrier, digest, site);
}

inline void tma_store(const TensorMap& map, uint32_t smem, int column, int row, int head, int batch,
                      const Site& site = Site::current()) {
  emulator::start_store(detail::box_of(map, smem, column, row, head, batch), site);
}

inline void tma_store_commit() { emulator::commit_stores(); }

template <int kPending>
void tma_store_wait_read(const Site& site = Site::current()) {
  static_assert(kPending >= 0);
  emulator::Box box;
  while (emulator::next_store(kPending, &box, site)) {
    if (detail::is_wide(box)) {
      detail::land_store<uint64_t>(box, site);
    } else {
      detail::land_store<uint16_t>(box, site);
    }
  }
}

// --- matrix products of a warpgroup
// -----------------------------------------------------------------

inline uint64_t wgmma_descriptor(uint32_t smem, int panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kRowGroup = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kRowGroup | static_cast<uint64_t>(panel_bytes >> 4) << 16 | (smem >> 4);
}

inline void wgmma_fence(const Site& site = Site::current()) { emulator::wgmma_fence(site); }

inline void wgmma_commit(const Site& site = Site::current()) { emulator::wgmma_commit(site); }

enum class WgmmaB : uint8_t { kDepthAlongRow, kDepthByRow };

namespace detail {

template <class T, int kN>
emulator::WgmmaCall wgmma_call(float (&d)[kN / 2], uint64_t b, bool accumulate) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(kN == 64 || kN == 96 || kN == 128 || kN == 160 || kN == 176 || kN == 192);
  return {.d = d,
          .columns = kN,
          .b_descriptor = b,
          .accumulate = accumulate,
          .is_bf16 = std::is_same_v<T, __nv_bfloat16>};
}

// The arrays that a wait names, one pointer for each accumulator and each operand.
struct Registers {
  static constexpr int kMax = 64;

  template <int kCount>
  void add(const float (&accumulator)[kCount]) {
    pointers[count++] = accumulator;
  }
  template <int kCount, int kEach>
  void add(const uint32_t (&operands)[kCount][kEach]) {
    static_assert(kCount <= kMax / 2);
    for (const auto& operand : operands) pointers[count++] = operand;
  }

  const void* pointers[kMax] = {};
  int count = 0;
};

template <class... Arrays>
void wgmma_wait(int pending, const Site& site, const Arrays&... arrays) {
  Registers registers;
  (registers.add(arrays), ...);
  emulator::wgmma_wait(pending, registers.pointers, registers.count, site);
}

}  // namespace detail

template <class T, int kN, WgmmaB kLayout = WgmmaB::kDepthAlongRow>
void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate,
              const Site& site = Site::current()) {
  emulator::WgmmaCall call = detail::wgmma_call<T, kN>(d, b, accumulate);
  call.a_descriptor = a;
  call.b_depth_by_row = kLayout == WgmmaB::kDepthByRow;
  emulator::wgmma_issue(call, site);
}

template <class T, int kN>
void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
              const Site& site = Site::current()) {
  emulator::WgmmaCall call = detail::wgmma_call<T, kN>(d, b, accumulate);
  call.a = a;
  call.b_depth_by_row = true;
  emulator::wgmma_issue(call, site);
}

// One overload for each number of arrays: after a pack no place could be taken by default.
template <int kPending>
void wgmma_wait(const Site& site = Site::current()) {
  detail::wgmma_wait(kPending, site);
}
template <int kPending, class A>
void wgmma_wait(A& a, const Site& site = Site::current()) {
  detail::wgmma_wait(kPending, site, a);
}
template <int kPending, class A, class B>
void wgmma_wait(A& a, B& b, const Site& site = Site::current()) {
  detail::wgmma_wait(kPending, site, a, b);
}
template <int kPending, class A, class B, class C>
void wgmma_wait(A& a, B& b, C& c, const Site& site = Site::current()) {
  detail::wgmma_wait(kPending, site, a, b, c);
}

}  // namespace ptx

}  // namespace exafuse
