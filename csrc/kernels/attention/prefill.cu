// Which prefill kernel serves a device: the one place that knows them all.

#include "kernels/attention/prefill.h"
#include "kernels/attention/prefill_sm80.h"

namespace exafuse {

void launch_prefill(const AttentionParams& params, Stream stream) {
  if (params.batch == 0 || params.seqlen_q == 0) return;
  launch_prefill_sm80(params, stream);
}

}  // namespace exafuse
