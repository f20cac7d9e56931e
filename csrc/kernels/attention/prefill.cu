// Which prefill kernel serves a device: the one place that knows them all.

#include "kernels/attention/prefill.h"
#include "kernels/attention/prefill_sm80.h"

namespace exafuse {

void launch_prefill(const AttentionParams& params, Stream stream) {
  launch_prefill_sm80(params, stream);
}

}  // namespace exafuse
