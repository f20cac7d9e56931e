// One sequence of an attention call: where its queries and keys lie, and which keys exist. All that
// the device alone knows (offsets, lengths, rows, pages) is brought into range here, so that no
// later address leaves the buffers, whatever these hold.
#pragma once

#include <cstdint>

#include "common/mask.cuh"
#include "kernels/attention/params.h"

namespace exafuse {

__device__ __forceinline__ int clamp_to(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

class Sequence {
 public:
  __device__ __forceinline__ Sequence(const AttentionParams& params, int index)
      : params_(params), index_(index) {
    first_query_ = 0;
    seqlen_q_ = params.seqlen_q;
    if (params.cu_seqlens_q != nullptr) {
      first_query_ = clamp_to(params.cu_seqlens_q[index], 0, params.total_q);
      const int end = clamp_to(params.cu_seqlens_q[index + 1], first_query_, params.total_q);
      seqlen_q_ = end - first_query_ < params.seqlen_q ? end - first_query_ : params.seqlen_q;
    }
    if (params.cu_seqlens_k != nullptr) {
      first_slot_ = clamp_to(params.cu_seqlens_k[index], 0, params.total_k);
      keys_.end =
          clamp_to(params.cu_seqlens_k[index + 1], first_slot_, params.total_k) - first_slot_;
      return;
    }
    key_row_ = index;
    if (params.cache_batch_idx != nullptr) {
      key_row_ = clamp_to(params.cache_batch_idx[index], 0, params.key_rows - 1);
    }
    const int64_t capacity = params.key_capacity();
    int64_t seen = capacity;
    if (params.cache_seqlens != nullptr) {
      seen = int64_t{params.cache_seqlens[index]} + params.appended;
      // A negative length is no length: the sequence is inactive.
      if (params.cache_seqlens[index] < 0) seen = 0;
      const int64_t most = params.ring ? INT32_MAX : capacity;
      if (seen > most) seen = most;
    }
    if (params.key_rows == 0) seen = 0;
    keys_.end = static_cast<int>(seen);
    if (params.cache_leftpad != nullptr) {
      keys_.begin = clamp_to(params.cache_leftpad[index], 0, keys_.end);
    }
  }

  __device__ __forceinline__ int seqlen_q() const { return seqlen_q_; }
  __device__ __forceinline__ KeyRange keys() const { return keys_; }

  // What query `query` (0 to seqlen_q - 1) sees.
  __device__ __forceinline__ KeyRange visible(int query) const {
    return visible_keys(keys_, params_.window, int64_t{keys_.end} - seqlen_q_ + query);
  }

  // What the queries from `first` to `last` see together.
  __device__ __forceinline__ KeyRange visible(int first, int last) const {
    return {visible(first).begin, visible(last).end};
  }

  // Element offset of a row of q, out or lse.
  __device__ __forceinline__ int64_t query_offset(const AttentionStrides& strides, int query,
                                                  int head) const {
    return index_ * strides.batch + (int64_t{first_query_} + query) * strides.row +
           head * strides.head;
  }

  // Element offset in k or v of the key at absolute position `position`; the keys that follow, up
  // to the next multiple of kKeyTile, follow at strides.row.
  __device__ __forceinline__ int64_t key_offset(const AttentionStrides& strides, int position,
                                                int kv_head) const {
    int64_t row = key_row_;
    int64_t slot = int64_t{first_slot_} + position;
    if (params_.block_table != nullptr) {
      const int page = position / params_.slots;
      row = clamp_to(params_.block_table[index_ * params_.block_table_stride + page], 0,
                     params_.key_rows - 1);
      slot = position - page * params_.slots;
    } else if (params_.ring) {
      slot = position % params_.slots;
    }
    return row * strides.batch + slot * strides.row + kv_head * strides.head;
  }

 private:
  const AttentionParams& params_;
  int index_;
  int first_query_ = 0;
  int seqlen_q_ = 0;
  int key_row_ = 0;
  int first_slot_ = 0;
  KeyRange keys_;
};

}  // namespace exafuse
