// A tile of 16-bit elements in shared memory, as attention kernels use it: rows are tokens, columns
// are the head dimension padded to 64, 96 or 128.
//
// Swizzle: the 16-byte chunks of a row are permuted by an XOR with the row number, so that the
// eight rows of an ldmatrix matrix, and the chunks of a row written by cp.async, lie in different
// banks.
//
// The fragment loads name what mma.m16n8k16 makes of them (layouts: ptx.cuh). `row` and `chunk` are
// the corner of a 16 x 16 block: rows row to row + 15, columns 8 * chunk to 8 * chunk + 15.
#pragma once

#include <cstdint>

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
  __device__ __forceinline__ explicit SharedTile(T* data) : data_(data) {}

  // Element offset of a chunk.
  __device__ __forceinline__ static constexpr int offset(int row, int chunk) {
    // Rows of 128 bytes or a multiple: eight rows cycle through all chunks of a 128-byte line. Rows
    // of 192 bytes already alternate between the halves of a line; pairs of rows take turns within.
    const int swizzled = kChunks % 8 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
    return row * kCols + swizzled * kChunkElements;
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
    constexpr int kTotal = kRows * kChunks;
    static_assert(kTotal % kThreads == 0);
    const int last_chunk = head_dim / kChunkElements;
    if (wide) {
#pragma unroll
      for (int i = 0; i < kTotal / kThreads; ++i) {
        const int row = (i * kThreads + tid) / kChunks;
        const int at = (i * kThreads + tid) % kChunks;
        const bool valid = row >= begin && row < end && at < last_chunk;
        // The address of a chunk that is not read is that of one that may be.
        const T* from = source + (valid ? row * row_stride + at * kChunkElements : 0);
        ptx::cp_async_16(ptx::smem_addr(chunk(row, at)), from, valid);
      }
    } else {
#pragma unroll 1
      for (int i = tid; i < kTotal; i += kThreads) {
        const int row = i / kChunks;
        const int at = i % kChunks;
        auto vec = Vec<T, kChunkElements>::zero();
        if (row >= begin && row < end && at < last_chunk) {
          vec = Vec<T, kChunkElements>::template load<false>(source + row * row_stride +
                                                             at * kChunkElements);
        }
        vec.store_shared(chunk(row, at));
      }
    }
  }

  // Operand a, 16 x 16: a row of the tile is a row of the matrix.
  __device__ __forceinline__ void load_a(uint32_t (&a)[4], int row, int chunk_at) const {
    const int lane = lane_id();
    ptx::ldmatrix_x4(a, address(row + lane % 16, chunk_at + lane / 16));
  }

  // Operand a, 16 x 16, transposed: a column of the tile is a row of the matrix.
  __device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], int row, int chunk_at) const {
    const int lane = lane_id();
    ptx::ldmatrix_x4_trans(a, address(row + lane / 16 * 8 + lane % 8, chunk_at + lane / 8 % 2));
  }

  // Operand b twice, 16 x 8 each: a row of the tile is a column of the matrix (q k^T). The first is
  // made of the rows row to row + 7, the second of the eight that follow.
  __device__ __forceinline__ void load_b(uint32_t (&first)[2], uint32_t (&second)[2], int row,
                                         int chunk_at) const {
    const int lane = lane_id();
    uint32_t b[4];
    ptx::ldmatrix_x4(b, address(row + lane / 16 * 8 + lane % 8, chunk_at + lane / 8 % 2));
    split(b, first, second);
  }

  // Operand b twice, 16 x 8 each: a row of the tile is a row of the matrix (p v). The first is made
  // of the columns of chunk_at, the second of the chunk that follows.
  __device__ __forceinline__ void load_b_trans(uint32_t (&first)[2], uint32_t (&second)[2], int row,
                                               int chunk_at) const {
    const int lane = lane_id();
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, address(row + lane % 16, chunk_at + lane / 16));
    split(b, first, second);
  }

 private:
  __device__ __forceinline__ static int lane_id() {
    return static_cast<int>(threadIdx.x) % ptx::kWarpSize;
  }

  __device__ __forceinline__ uint32_t address(int row, int chunk_at) const {
    return ptx::smem_addr(chunk(row, chunk_at));
  }

  __device__ __forceinline__ static void split(const uint32_t (&both)[4], uint32_t (&first)[2],
                                               uint32_t (&second)[2]) {
    first[0] = both[0];
    first[1] = both[1];
    second[0] = both[2];
    second[1] = both[3];
  }

  T* data_ = nullptr;
};

}  // namespace exafuse
