// Kernels of sm_90's barriers in shared memory and copies of boxes, right and wrong.
#include "bugs/cases.h"
#include "common/ptx_sm90.cuh"

namespace honesty {
namespace {

// A warp loads boxes, four warps add one to what lies in them, one thread stores them. Two stages.
constexpr int kStages = 2;
constexpr int kRows = 16;
constexpr int kThreads = 32 + 128;
constexpr int kBoxBytes = kRows * 128;
constexpr int kTensorRows = 5 * kRows + 3;  // the last box reaches beyond

struct alignas(1024) Stage {
  uint16_t elements[kRows * kBoxColumns];
};

struct Layout {
  Stage* stages;
  uint64_t* full;
  uint64_t* empty;

  template <class Arena>
  static constexpr Layout take_from(Arena& arena) {
    Stage* stages = arena.template take<Stage, kStages>();
    uint64_t* full = arena.template take<uint64_t, kStages>();
    return {stages, full, arena.template take<uint64_t, kStages>()};
  }
};

struct Params {
  TensorMap in;
  TensorMap out;
  int columns;
  int boxes;
};

// What is wrong with a kernel.
enum class Wrong : uint8_t {
  kNothing,
  kNoInitFence,
  kNoInitBarrier,
  kNoEmptyWait,
  kNoFullWait,
  kSkippedWait,
  kHalfTheBytes,
  kTwiceTheBytes,
  kNoProxyFence,
  kNoStoreWait,
  kStageReleasedEarly,
  kParity,
  kCountTooLow,
  kCountTooHigh,
};

template <Wrong kWrong>
__device__ void produce(const Params& p, const Layout& shared) {
  if (!ptx::elect_one()) return;
  for (int i = 0; i < p.boxes; ++i) {
    const int stage = i % kStages;
    const uint32_t parity = i / kStages % 2;
    if (kWrong != Wrong::kNoEmptyWait) {
      ptx::mbarrier_wait(ptx::smem_addr(&shared.empty[stage]),
                         kWrong == Wrong::kParity ? parity : parity ^ 1);
    }
    const uint32_t full = ptx::smem_addr(&shared.full[stage]);
    ptx::mbarrier_arrive_expect_tx(full, kWrong == Wrong::kHalfTheBytes    ? kBoxBytes / 2
                                         : kWrong == Wrong::kTwiceTheBytes ? kBoxBytes * 2
                                                                           : kBoxBytes);
    ptx::tma_load(ptx::smem_addr(&shared.stages[stage]), p.in, full, 0, i * kRows, 0, 0);
  }
}

template <Wrong kWrong>
__device__ void consume(const Params& p, const Layout& shared) {
  const int tid = static_cast<int>(threadIdx.x) - 32;
  for (int i = 0; i < p.boxes; ++i) {
    const int stage = i % kStages;
    const uint32_t empty = ptx::smem_addr(&shared.empty[stage]);
    const bool waits = !(kWrong == Wrong::kNoFullWait || (kWrong == Wrong::kSkippedWait && i == 2));
    if (waits) ptx::mbarrier_wait(ptx::smem_addr(&shared.full[stage]), i / kStages % 2);
    const uint32_t words = ptx::smem_addr(&shared.stages[stage]) + 16 * tid;
    uint4 word = ptx::ld_shared(words);
    if (kWrong == Wrong::kStageReleasedEarly && tid % 32 == 0) ptx::mbarrier_arrive(empty);
    word = {word.x + 0x10001, word.y + 0x10001, word.z + 0x10001, word.w + 0x10001};
    ptx::st_shared(words, word);
    if (kWrong != Wrong::kNoProxyFence) ptx::fence_proxy_async();
    ptx::bar_sync(1, 128);
    if (tid < 32 && ptx::elect_one()) {
      ptx::tma_store(p.out, ptx::smem_addr(&shared.stages[stage]), 0, i * kRows, 0, 0);
      ptx::tma_store_commit();
      if (kWrong != Wrong::kNoStoreWait) ptx::tma_store_wait_read<0>();
    }
    ptx::bar_sync(1, 128);
    if (kWrong != Wrong::kStageReleasedEarly && tid % 32 == 0) ptx::mbarrier_arrive(empty);
  }
}

template <Wrong kWrong>
__global__ void increment_kernel(const __grid_constant__ Params p) {
  SharedArena arena;
  const auto shared = Layout::take_from(arena);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(ptx::smem_addr(&shared.full[i]), 1);
      ptx::mbarrier_init(ptx::smem_addr(&shared.empty[i]), kWrong == Wrong::kCountTooLow    ? 1
                                                           : kWrong == Wrong::kCountTooHigh ? 5
                                                                                            : 4);
    }
    if (kWrong != Wrong::kNoInitFence) ptx::fence_mbarrier_init();
  }
  if (kWrong != Wrong::kNoInitBarrier) ptx::sync_threads();
  if (threadIdx.x < 32) {
    produce<kWrong>(p, shared);
  } else {
    consume<kWrong>(p, shared);
  }
}

// Elements of 16 bits in a tensor of `columns` that lies within rows of `stride`.
TensorMapSpec spec_of(std::vector<uint16_t>& values, int columns, int stride) {
  return {.data = values.data(),
          .dtype = DType::kFloat16,
          .columns = columns,
          .rows = kTensorRows,
          .heads = 1,
          .batch = 1,
          .row_stride = stride,
          .box_rows = kRows};
}

template <Wrong kWrong>
void increment_columns(int columns, int boxes = 6) {
  constexpr int kStride = 88;
  constexpr uint16_t kUntouched = 0xabcd;
  std::vector<uint16_t> in(kTensorRows * kStride), out(in.size(), kUntouched);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i * 7 % 65521);
  launch(increment_kernel<kWrong>, one_block(kThreads, shared_bytes<Layout>()),
         {make_tensor_map(spec_of(in, columns, kStride)),
          make_tensor_map(spec_of(out, columns, kStride)), columns, boxes});
  for (int row = 0; row < kTensorRows; ++row) {
    for (int column = 0; column < kStride; ++column) {
      const size_t at = row * kStride + column;
      const bool inside = column < columns && column < kBoxColumns && row < boxes * kRows;
      // Halves of a word are added together: an all-ones element carries into the next one.
      const auto wanted = static_cast<uint16_t>(inside ? in[at] + 1 : kUntouched);
      expect(out[at] == wanted, "row " + std::to_string(row) + ", column " +
                                    std::to_string(column) + " is " + std::to_string(out[at]) +
                                    ", expected " + std::to_string(wanted));
    }
  }
}

template <Wrong kWrong>
void increment() {
  increment_columns<kWrong>(kBoxColumns);
}

void increment_ragged() {
  increment_columns<Wrong::kNothing>(40);
  increment_columns<Wrong::kNothing>(43);
  increment_columns<Wrong::kNothing>(88, 1);
}
const Register r1("ok boxes through two stages", increment<Wrong::kNothing>);
const Register r2("ok boxes at the edge of a tensor", increment_ragged);
const Register r3("bug mbarrier without fence_mbarrier_init", increment<Wrong::kNoInitFence>);
const Register r4("bug mbarrier without a barrier of the block", increment<Wrong::kNoInitBarrier>);
const Register r5("bug box refilled without waiting", increment<Wrong::kNoEmptyWait>);
const Register r6("bug box read without waiting", increment<Wrong::kNoFullWait>);
const Register r7("bug one phase left out", increment<Wrong::kSkippedWait>);
const Register r8("bug fewer bytes announced than copied", increment<Wrong::kHalfTheBytes>);
const Register r9("bug more bytes announced than copied", increment<Wrong::kTwiceTheBytes>);
const Register r10("bug store of a box without proxy fence", increment<Wrong::kNoProxyFence>);
const Register r11("bug store of a box not waited for", increment<Wrong::kNoStoreWait>);
const Register r12("bug box released before it was used", increment<Wrong::kStageReleasedEarly>);
const Register r13("bug parity of the empty wait", increment<Wrong::kParity>);
const Register r14("bug mbarrier count too low", increment<Wrong::kCountTooLow>);
const Register r15("bug mbarrier count too high", increment<Wrong::kCountTooHigh>);

}  // namespace
}  // namespace honesty
