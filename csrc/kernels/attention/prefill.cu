// Which prefill kernel serves a call: the one place that knows them all.

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "common/tensor_map.h"
#include "kernels/attention/prefill.h"
#include "kernels/attention/prefill_sm80.h"
#include "kernels/attention/prefill_sm90.h"

namespace exafuse {
namespace {

// EXAFUSE_ATTENTION=sm80 or sm90 forces a kernel, sm90:128x176 one of its tiles too, queries first.
struct Choice {
  std::string_view kernel;
  PrefillTile tile;
};

Choice forced_choice() {
  const char* text = std::getenv("EXAFUSE_ATTENTION");
  if (text == nullptr || *text == '\0') return {};
  const std::string_view value(text);
  PrefillTile tile;
  if (value == "sm80" || value == "sm90") return {value, tile};
  char rest = 0;
  if (std::sscanf(text, "sm90:%dx%d%c", &tile.queries, &tile.keys, &rest) == 2) {
    return {value.substr(0, 4), tile};
  }
  throw std::invalid_argument(
      "EXAFUSE_ATTENTION: expected sm80, sm90 or sm90:128x128 (the tile, "
      "queries first), got " +
      std::string(value));
}

}  // namespace

void launch_prefill(const AttentionParams& params, bool cached, Stream stream) {
  if (params.batch == 0 || params.seqlen_q == 0) return;
  const Choice forced = forced_choice();
  // Code for sm_90a runs on no other GPU.
  const bool is_sm90 = current_device().arch() == 90;
  const bool takes = is_sm90 && prefill_sm90_takes(params);
  if (forced.kernel == "sm80" || (forced.kernel.empty() && !takes)) {
    launch_prefill_sm80(params, stream);
    return;
  }
  if (!takes) {
    throw std::invalid_argument(
        is_sm90
            ? "EXAFUSE_ATTENTION=sm90: expected q, k and v that are not empty, whose rows start "
              "at multiples of 16 bytes and whose strides are not zero"
            : "EXAFUSE_ATTENTION=sm90: this GPU is sm_" + std::to_string(current_device().arch()));
  }
  const PrefillTile tile =
      forced.tile.queries != 0 ? forced.tile : prefill_tile_sm90(params, cached);
  if ((params.ring || params.block_table != nullptr) && tile.keys != kKeyTile) {
    throw std::invalid_argument("EXAFUSE_ATTENTION: rings and pages take tiles of " +
                                std::to_string(kKeyTile) + " keys, got " +
                                std::to_string(tile.keys));
  }
  launch_prefill_sm90(params, tile, stream);
}

}  // namespace exafuse
