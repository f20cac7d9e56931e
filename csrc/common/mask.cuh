// Which keys a query sees. Every mask of the project is two bounds per query, so kernels know
// before they load anything which tiles matter, which of those are seen whole, and which need a
// test per element.
//
// With n keys (tokens seen) and seqlen_q queries at their end, query j stands at position
// n - seqlen_q + j and sees the keys from its position - left to its position + right that exist. A
// bound of -1 is open; causal attention is right = 0.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace exafuse {

struct Window {
  int left = -1;
  int right = -1;
};

// Key positions from begin to before end; empty where end <= begin.
struct KeyRange {
  int begin = 0;
  int end = 0;

  __device__ __forceinline__ bool contains(int position) const {
    return position >= begin && position < end;
  }
  __device__ __forceinline__ bool empty() const { return end <= begin; }
};

// What a query at `position` sees of the keys that exist. Both bounds grow with the position, so
// queries from i to j see together from begin(i) to end(j).
__device__ __forceinline__ KeyRange visible_keys(KeyRange existing, Window window,
                                                 int64_t position) {
  KeyRange range = existing;
  if (window.left >= 0 && position - window.left > range.begin) {
    range.begin = static_cast<int>(position - window.left < range.end ? position - window.left
                                                                      : int64_t{range.end});
  }
  if (window.right >= 0 && position + window.right + 1 < range.end) {
    range.end = static_cast<int>(position + window.right + 1 > 0 ? position + window.right + 1 : 0);
  }
  return range;
}

}  // namespace exafuse
