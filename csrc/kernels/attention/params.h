// One attention call as its kernels see it, whichever public op it came from: queries packed or
// not, keys in a tensor, a packed tensor, or a cache (contiguous, ring or paged).
#pragma once

#include <cstdint>

#include "common/mask.cuh"
#include "common/tensor.h"

namespace exafuse {

// Rings and pages hold a multiple of this many slots, and key tiles start at absolute multiples of
// their size, which divides it: a tile lies in one piece.
inline constexpr int kKeyTile = 128;

// Strides in elements of [batch, row, head, head_dim]; a packed tensor has batch stride 0.
struct AttentionStrides {
  int64_t batch = 0;
  int64_t row = 0;
  int64_t head = 0;
};

struct AttentionParams {
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;
  float* lse = nullptr;  // null: not wanted
  AttentionStrides q_strides;
  AttentionStrides k_strides;  // batch: of a row of the cache; row: of a slot
  AttentionStrides v_strides;
  AttentionStrides out_strides;
  AttentionStrides lse_strides;

  int batch = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int gqa_group_size = 0;
  int head_dim = 0;

  // Queries: seqlen_q of every sequence, or packed.
  int seqlen_q = 0;  // an upper bound where packed
  int total_q = 0;
  const int32_t* cu_seqlens_q = nullptr;  // null: not packed

  // Keys. Packed: cu_seqlens_k, of total_k. Otherwise `slots` in each of `key_rows` rows.
  const int32_t* cu_seqlens_k = nullptr;
  int total_k = 0;
  int key_rows = 0;
  int slots = 0;                             // per row or page
  const int32_t* cache_seqlens = nullptr;    // tokens seen; null: all slots
  int appended = 0;                          // of this call, not counted in cache_seqlens
  const int32_t* cache_batch_idx = nullptr;  // null: row b for sequence b
  const int32_t* cache_leftpad = nullptr;    // first position that exists
  const int32_t* block_table = nullptr;      // [batch, max_pages]
  int64_t block_table_stride = 0;
  int max_pages = 0;
  bool ring = false;

  Window window;
  float scale_log2 = 0;   // softmax_scale * log2(e), > 0
  bool wide = false;      // rows of q, k and v start at multiples of 16 bytes
  bool out_wide = false;  // rows of out do
  DType dtype = DType::kOther;

  // The most keys that a sequence may hold, as far as the host knows.
  constexpr int64_t key_capacity() const {
    return cu_seqlens_k != nullptr  ? total_k
           : block_table != nullptr ? static_cast<int64_t>(slots) * max_pages
                                    : slots;
  }
};

}  // namespace exafuse
