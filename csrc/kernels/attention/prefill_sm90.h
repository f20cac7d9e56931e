// The prefill kernel of sm_90.
#pragma once

#include "common/tensor.h"
#include "kernels/attention/params.h"

namespace exafuse {

// Queries and keys that a block works on at a time.
struct PrefillTile {
  int queries = 0;
  int keys = 0;

  bool operator==(const PrefillTile&) const = default;
};

// The tile that serves a call. `cached`: the keys lie in a cache, whose rows of slots may be rings
// or pages of a multiple of kKeyTile.
PrefillTile prefill_tile_sm90(const AttentionParams& params, bool cached);

// Whether tensor maps can describe q, k and v.
bool prefill_sm90_takes(const AttentionParams& params);

// For calls that it takes, on a GPU of sm_90. A tile that is not compiled for the head dimension is
// a std::invalid_argument.
void launch_prefill_sm90(const AttentionParams& params, PrefillTile tile, Stream stream);

}  // namespace exafuse
