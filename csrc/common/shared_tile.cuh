// A tile of 16-bit elements in shared memory, as attention kernels use it: rows are tokens, columns
// are the head dimension padded to 64, 96 or 128.
//
// Swizzle: the 16-byte chunks of a row are permuted by an XOR with the row number, so that the
// eight rows of an ldmatrix matrix, and the chunks of a row written by cp.async, lie in different
// banks.
//
// The fragment loads name what mma.m16n8k16 makes of them (layouts: ptx.cuh). `row` and `chunk` are
// the corner of a 16 x 16 block: rows row to row + 15, columns 8 * chunk to 8 * chunk + 15; row is
// a multiple of 8, chunk even.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace exafuse {

inline constexpr int kChunkElements = 8;  // 16 bytes

template <class T, int kRowsOf, int kColsOf>
class SharedTile {
 public:
  static constexpr int kRows = kRowsOf;
  static constexpr int kCols = kColsOf;
  static constexpr int kChunks = kCols / kChunkElements;
  static constexpr int kElements = kRows * kCols;
  static_assert(sizeof(T) == 2 && kCols % 32 == 0);

  SharedTile() = default;
  __device__ __forceinline__ explicit SharedTile(T* data)
      : data_(data), base_(ptx::smem_addr(data)) {}

  // Element offset of a chunk.
  __device__ __forceinline__ static constexpr int offset(int row, int chunk) {
    return row * kCols + (chunk ^ swizzle(row)) * kChunkElements;
  }

  __device__ __forceinline__ T* chunk(int row, int chunk) const {
    return data_ + offset(row, chunk);
  }

  // Starts copying the rows from `begin` to before `end` of a tile whose row 0 is at `source`;
  // all other rows, and the columns from head_dim on, become zero and are not read. The tile is
  // complete after cp_async_commit, cp_async_wait and a barrier. `wide`: every row starts at a
  // multiple of 16 bytes. All kThreads threads call, `tid` numbers them.
  template <int kThreads>
  __device__ __forceinline__ void load(const T* source, int64_t row_stride, int begin, int end,
                                       int head_dim, bool wide, int tid) const {
    const int chunks = head_dim / kChunkElements;
    if (!wide) {
      load_elements<kThreads>(source, row_stride, begin, end, chunks, tid);
    } else if (begin <= 0 && end >= kRows) {
      load_whole<kThreads>(source + own_offset<kThreads>(row_stride, tid), row_stride, head_dim,
                           tid);
    } else {
      for_each_own_chunk<kThreads>(tid, [&](int row, int at) {
        const bool valid = row >= begin && row < end && at < chunks;
        // The address of a chunk that is not read is that of one that may be.
        const T* from = source + (valid ? row * row_stride + at * kChunkElements : 0);
        ptx::cp_async_16(address(row, at), from, valid);
      });
    }
  }

  // Where in a source the first of the chunks lies that thread `tid` copies.
  template <int kThreads>
  __device__ __forceinline__ static int64_t own_offset(int64_t row_stride, int tid) {
    return tid / kLanesPerRow * row_stride + tid % kLanesPerRow * kChunkElements;
  }

  // load() of all rows, wide, in a few additions: `own_source` is the source at own_offset.
  template <int kThreads>
  __device__ __forceinline__ void load_whole(const T* own_source, int64_t row_stride, int head_dim,
                                             int tid) const {
    static_assert(kThreads % kLanesPerRow == 0 && kRows % kRowsPerPass<kThreads> == 0);
    const int64_t step = kRowsPerPass<kThreads> * row_stride;
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsPerPass<kThreads>; ++pass) {
#pragma unroll
      for (int part = 0; part < kChunks / kLanesPerRow; ++part) {
        const int row = tid / kLanesPerRow + pass * kRowsPerPass<kThreads>;
        const int at = tid % kLanesPerRow + part * kLanesPerRow;
        ptx::cp_async_16(address(row, at), own_source + part * kLanesPerRow * kChunkElements,
                         at * kChunkElements < head_dim);
      }
      own_source += step;
    }
  }

  // Whether a chunk that this thread loaded holds a NaN or an infinity. The thread's own copies
  // have landed; no barrier is needed.
  template <int kThreads>
  __device__ __forceinline__ bool has_non_finite(int tid) const {
    uint32_t found = 0;
    for_each_own_chunk<kThreads>(tid, [&](int row, int at) {
      const uint4 word = ptx::load_word<uint4>(chunk(row, at));
      found |= non_finite(word.x) | non_finite(word.y) | non_finite(word.z) | non_finite(word.w);
    });
    return found != 0;
  }

  // Moves the NaN and infinities of the chunks that this thread loaded to the same place of `rest`.
  // Each of the two tiles has zero where the other has the element.
  template <int kThreads>
  __device__ __forceinline__ void split_non_finite(const SharedTile& rest, int tid) const {
    for_each_own_chunk<kThreads>(tid, [&](int row, int at) {
      uint4 word = ptx::load_word<uint4>(chunk(row, at));
      const uint4 bad{word.x & non_finite(word.x), word.y & non_finite(word.y),
                      word.z & non_finite(word.z), word.w & non_finite(word.w)};
      word = uint4{word.x ^ bad.x, word.y ^ bad.y, word.z ^ bad.z, word.w ^ bad.w};
      ptx::store_shared(chunk(row, at), word);
      ptx::store_shared(rest.chunk(row, at), bad);
    });
  }

  // Operand a, 16 x 16: a row of the tile is a row of the matrix.
  __device__ __forceinline__ void load_a(uint32_t (&a)[4], int row, int chunk_at) const {
    ptx::ldmatrix_x4(a, corner(row, chunk_at) + upright(chunk_at));
  }

  // Operand a, 16 x 16, transposed: a column of the tile is a row of the matrix.
  __device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], int row, int chunk_at) const {
    ptx::ldmatrix_x4_trans(a, corner(row, chunk_at) + sideways(chunk_at));
  }

  // Operand b twice, 16 x 8 each: a row of the tile is a column of the matrix (q k^T). The first is
  // made of the rows row to row + 7, the second of the eight that follow.
  __device__ __forceinline__ void load_b(uint32_t (&first)[2], uint32_t (&second)[2], int row,
                                         int chunk_at) const {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, corner(row, chunk_at) + sideways(chunk_at));
    split(b, first, second);
  }

  // Operand b twice, 16 x 8 each: a row of the tile is a row of the matrix (p v). The first is made
  // of the columns of chunk_at, the second of the chunk that follows.
  __device__ __forceinline__ void load_b_trans(uint32_t (&first)[2], uint32_t (&second)[2], int row,
                                               int chunk_at) const {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, corner(row, chunk_at) + upright(chunk_at));
    split(b, first, second);
  }

  // The two elements of a row that belong to the columns of this thread's accumulators of chunk_at.
  __device__ __forceinline__ Vec<T, 2> load_two(int row, int chunk_at) const {
    return Vec<T, 2>::template load<true>(chunk(row, chunk_at) + 2 * (lane_id() % 4));
  }

  // Writes an accumulator c, 16 x 8: rows row to row + 15, columns of `chunk_at`, rounded.
  __device__ __forceinline__ void store_c(const float (&c)[4], int row, int chunk_at) const {
    const int lane = lane_id();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* const at = chunk(row + 8 * half + lane / 4, chunk_at) + 2 * (lane % 4);
      *reinterpret_cast<uint32_t*>(at) = ptx::pack2<T>(c[2 * half], c[2 * half + 1]);
    }
  }

 private:
  // Lanes side by side copy a row, so that a thread's chunks share their columns and, but for a
  // multiple of the tile's period, their place in the swizzle.
  static constexpr int kLanesPerRow = kChunks % 8 == 0 ? 8 : 4;
  template <int kThreads>
  static constexpr int kRowsPerPass = kThreads / kLanesPerRow;

  // Calls body(row, chunk) for the chunks that thread `tid` copies.
  // They are few registers' work at a time: kernels are full when they come here.
  template <int kThreads, class Body>
  __device__ __forceinline__ static void for_each_own_chunk(int tid, Body body) {
    static_assert(kThreads % kLanesPerRow == 0 && kRows % kRowsPerPass<kThreads> == 0);
#pragma unroll 1
    for (int pass = 0; pass < kRows / kRowsPerPass<kThreads>; ++pass) {
#pragma unroll
      for (int part = 0; part < kChunks / kLanesPerRow; ++part) {
        body(tid / kLanesPerRow + pass * kRowsPerPass<kThreads>,
             tid % kLanesPerRow + part * kLanesPerRow);
      }
    }
  }

  template <int kThreads>
  __device__ __forceinline__ void load_elements(const T* source, int64_t row_stride, int begin,
                                                int end, int chunks, int tid) const {
    for_each_own_chunk<kThreads>(tid, [&](int row, int at) {
      auto vec = Vec<T, kChunkElements>::zero();
      if (row >= begin && row < end && at < chunks) {
        vec = Vec<T, kChunkElements>::template load<false>(source + row * row_stride +
                                                           at * kChunkElements);
      }
      vec.store_shared(chunk(row, at));
    });
  }

  // All bits of each half of `two` that is a NaN or an infinity.
  __device__ __forceinline__ static uint32_t non_finite(uint32_t two) {
    constexpr uint32_t kExponent = std::is_same_v<T, __nv_bfloat16> ? 0x7f80u : 0x7c00u;
    const uint32_t low = (two & kExponent) == kExponent ? 0xffffu : 0;
    const uint32_t high = (two & kExponent << 16) == kExponent << 16 ? 0xffff0000u : 0;
    return low | high;
  }

  __device__ __forceinline__ static int lane_id() {
    return static_cast<int>(threadIdx.x) % ptx::kWarpSize;
  }

  __device__ __forceinline__ uint32_t address(int row, int chunk_at) const {
    return base_ + bytes(offset(row, chunk_at));
  }

  __device__ __forceinline__ static constexpr uint32_t bytes(int elements) {
    return static_cast<uint32_t>(elements * static_cast<int>(sizeof(T)));
  }

  // Rows of 128 bytes or a multiple: eight rows cycle through all chunks of a 128-byte line. Rows
  // of 192 bytes already alternate between the halves of a line; pairs of rows take turns within.
  static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : 4;  // chunks that trade places
  __device__ __forceinline__ static constexpr int swizzle(int row) {
    return kPeriod == 8 ? row & 7 : row >> 1 & 3;
  }

  // The address of a chunk for ldmatrix, in three parts: the corner of the block, a constant but
  // for the tile; the lane's place in the block, the same for all blocks; and the chunk within a
  // period, whose XOR is a constant, too. Left to itself the compiler keeps an address for every
  // block.
  __device__ __forceinline__ uint32_t corner(int row, int chunk_at) const {
    return base_ + bytes(row * kCols + chunk_at / kPeriod * kPeriod * kChunkElements);
  }
  __device__ __forceinline__ static uint32_t in_block(int row, int chunk, int chunk_at) {
    return bytes(offset(row, chunk)) ^ bytes(chunk_at % kPeriod * kChunkElements);
  }
  // Matrices 0 and 1 one below the other, 2 and 3 to their right.
  __device__ __forceinline__ static uint32_t upright(int chunk_at) {
    return in_block(lane_id() % 16, lane_id() / 16, chunk_at);
  }
  // Matrices 0 and 1 side by side, 2 and 3 below.
  __device__ __forceinline__ static uint32_t sideways(int chunk_at) {
    return in_block(lane_id() / 16 * 8 + lane_id() % 8, lane_id() / 8 % 2, chunk_at);
  }

  __device__ __forceinline__ static void split(const uint32_t (&both)[4], uint32_t (&first)[2],
                                               uint32_t (&second)[2]) {
    first[0] = both[0];
    first[1] = both[1];
    second[0] = both[2];
    second[1] = both[3];
  }

  T* data_ = nullptr;
  uint32_t base_ = 0;  // of data_, as ldmatrix and cp.async take it
};

}  // namespace exafuse
