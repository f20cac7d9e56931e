// Boxes of tensors in shared memory: where every element goes, and what must not happen to it.
#include "bugs/cases.h"
#include "common/ptx_sm90.cuh"

namespace honesty {
namespace {

constexpr int kRows = 16;
constexpr int kBytes = kRows * 128;
constexpr int kThreads = kBytes / 16;

struct alignas(1024) BoxImage {
  uint16_t elements[kRows * kBoxColumns];
};

struct Layout {
  BoxImage* box;
  uint64_t* full;

  template <class Arena>
  static constexpr Layout take_from(Arena& arena) {
    BoxImage* box = arena.template take<BoxImage, 1>();
    return {box, arena.template take<uint64_t, 2>()};
  }
};

struct Params {
  TensorMap in;
  TensorMap out;
  int column, row, head, batch;
  uint16_t* values;  // of `in`
  uint4* image;      // [kThreads]
};

__device__ void init_barrier(const Layout& shared) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(ptx::smem_addr(shared.full), 1);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
}

__device__ void load_box(const Params& p, const Layout& shared) {
  const uint32_t full = ptx::smem_addr(shared.full);
  ptx::mbarrier_arrive_expect_tx(full, kBytes);
  ptx::tma_load(ptx::smem_addr(shared.box), p.in, full, p.column, p.row, p.head, p.batch);
}

// --- a box from a tensor, as it lies in shared memory, and back into another tensor
// --------------------------------------------------------------------------------------

__global__ void round_trip_kernel(const __grid_constant__ Params p) {
  SharedArena arena;
  const auto shared = Layout::take_from(arena);
  const int tid = static_cast<int>(threadIdx.x);
  init_barrier(shared);
  if (tid == 0) load_box(p, shared);
  ptx::mbarrier_wait(ptx::smem_addr(shared.full), 0);
  p.image[tid] = ptx::ld_shared(ptx::smem_addr(shared.box) + 16 * tid);
  if (tid == 0) {
    ptx::tma_store(p.out, ptx::smem_addr(shared.box), p.column, p.row, p.head, p.batch);
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  }
}

constexpr int kColumns = 88, kTensorRows = 37, kHeads = 3, kBatch = 2;
constexpr int kRowStride = 96, kHeadStride = kRowStride * kTensorRows + 8;
constexpr int kBatchStride = kHeadStride * kHeads + 16;
constexpr uint16_t kUntouched = 0xabcd;

TensorMapSpec spec_of(std::vector<uint16_t>& values) {
  return {.data = values.data(),
          .dtype = DType::kBFloat16,
          .columns = kColumns,
          .rows = kTensorRows,
          .heads = kHeads,
          .batch = kBatch,
          .row_stride = kRowStride,
          .head_stride = kHeadStride,
          .batch_stride = kBatchStride,
          .box_rows = kRows};
}

std::vector<uint16_t> tensor() {
  std::vector<uint16_t> values(kBatch * kBatchStride);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i * 7919 % 65521);
  return values;
}

// Where an element of the box lies in the tensor, or -1.
int offset_in_tensor(const Params& p, int row, int column) {
  const int r = p.row + row, c = p.column + column;
  const bool inside = r >= 0 && r < kTensorRows && c >= 0 && c < kColumns && p.head >= 0 &&
                      p.head < kHeads && p.batch >= 0 && p.batch < kBatch;
  return inside ? p.batch * kBatchStride + p.head * kHeadStride + r * kRowStride + c : -1;
}

void round_trip(int column, int row, int head, int batch) {
  std::vector<uint16_t> in = tensor(), out(in.size(), kUntouched), wanted = out;
  std::vector<uint4> image(kThreads);
  const Params p{.in = make_tensor_map(spec_of(in)),
                 .out = make_tensor_map(spec_of(out)),
                 .column = column,
                 .row = row,
                 .head = head,
                 .batch = batch,
                 .values = nullptr,
                 .image = image.data()};
  launch(round_trip_kernel, one_block(kThreads, shared_bytes<Layout>()), p);
  const auto* found = reinterpret_cast<const uint16_t*>(image.data());
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kBoxColumns; ++c) {
      const int at = offset_in_tensor(p, r, c);
      if (at >= 0) wanted[at] = in[at];
      const int place = r * kBoxColumns + (c / 8 ^ r % 8) * 8 + c % 8;
      expect(found[place] == (at >= 0 ? in[at] : 0),
             "row " + std::to_string(r) + ", column " + std::to_string(c) + " of the box at " +
                 std::to_string(row) + ", " + std::to_string(column));
    }
  }
  expect(out == wanted, "the tensor that the box was stored to");
}

void round_trips() {
  for (const int column : {0, 8, 64, 3, -5, -64, 80, 87, 200}) round_trip(column, 5, 1, 1);
  for (const int row : {0, -4, -16, 21, 30, 36, 37}) round_trip(0, row, 2, 0);
  round_trip(0, 0, -1, 0);
  round_trip(0, 0, 3, 0);
  round_trip(0, 0, 0, 2);
}
const Register r1("ok boxes inside, across and outside a tensor", round_trips);

// A map of one row more than there is.
void map_too_large() {
  std::vector<uint16_t> in(kRows * kBoxColumns), out = in;
  std::vector<uint4> image(kThreads);
  const auto spec = [](std::vector<uint16_t>& values, int rows) -> TensorMapSpec {
    return {.data = values.data(),
            .dtype = DType::kBFloat16,
            .columns = kBoxColumns,
            .rows = rows,
            .heads = 1,
            .batch = 1,
            .row_stride = kBoxColumns,
            .box_rows = kRows};
  };
  launch(round_trip_kernel, one_block(kThreads, shared_bytes<Layout>()),
         {make_tensor_map(spec(in, kRows + 1)), make_tensor_map(spec(out, kRows)), 0, 1, 0, 0,
          nullptr, image.data()});
}
const Register r2("bug tensor map larger than its tensor", map_too_large);

void two_blocks_store_one_box() {
  std::vector<uint16_t> in = tensor(), out = in;
  std::vector<uint4> image(kThreads);
  const int bytes = shared_bytes<Layout>();
  launch(round_trip_kernel, {.grid = dim3(2), .block = dim3(kThreads), .smem_bytes = bytes},
         {make_tensor_map(spec_of(in)), make_tensor_map(spec_of(out)), 0, 0, 0, 0, nullptr,
          image.data()});
}
const Register r3("bug two blocks store one box", two_blocks_store_one_box);

// --- one wrong step
// --------------------------------------------------------------------------------

enum class Step : uint8_t {
  kBoxNotAligned,
  kTwoLoadsIntoOneBox,
  kStoreUnderLoad,
  kPlainStoreUnderLoad,
  kTensorChanges,
  kLoadNotWaitedFor,
  kStoreNotWaitedFor,
  kStoreNotCommitted,
  kBoxChangesUnderStore,
  kOneThreadFences,
  kStoreSharedNotFenced,
  kStmatrixNotFenced,
  kBarrierOverwritten,
  kBarrierInitialisedTwice,
  kBarrierNotAligned,
  kLoadBeforeDependency,
};

__device__ void store_box(const Params& p, const Layout& shared) {
  ptx::tma_store(p.out, ptx::smem_addr(shared.box), 0, 0, 0, 0);
}

template <Step kStep>
__global__ void step_kernel(const __grid_constant__ Params p) {
  SharedArena arena;
  const auto shared = Layout::take_from(arena);
  const uint32_t box = ptx::smem_addr(shared.box);
  const uint32_t full = ptx::smem_addr(shared.full);
  const int tid = static_cast<int>(threadIdx.x);
  const bool leads = tid == 0;
  init_barrier(shared);
  switch (kStep) {
    case Step::kBoxNotAligned:
      if (leads) ptx::mbarrier_arrive_expect_tx(full, kBytes);
      if (leads) ptx::tma_load(box + 128, p.in, full, 0, 0, 0, 0);
      break;
    case Step::kTwoLoadsIntoOneBox:
      if (leads) ptx::mbarrier_arrive_expect_tx(full, 2 * kBytes);
      if (leads) ptx::tma_load(box, p.in, full, 0, 0, 0, 0);
      if (leads) ptx::tma_load(box, p.in, full, 0, 0, 1, 0);
      ptx::mbarrier_wait(full, 0);
      break;
    case Step::kStoreUnderLoad:
    case Step::kPlainStoreUnderLoad:
      if (leads) load_box(p, shared);
      if (leads && kStep == Step::kStoreUnderLoad) ptx::st_shared(box + 64, 1u);
      if (leads && kStep == Step::kPlainStoreUnderLoad) shared.box->elements[32] = 1;
      ptx::mbarrier_wait(full, 0);
      break;
    case Step::kTensorChanges:
      if (leads) load_box(p, shared);
      if (leads) p.values[3] += 1;
      ptx::mbarrier_wait(full, 0);
      break;
    case Step::kLoadNotWaitedFor:
      if (leads) load_box(p, shared);
      break;
    case Step::kStoreNotWaitedFor:
    case Step::kStoreNotCommitted:
      if (leads) store_box(p, shared);
      if (leads && kStep == Step::kStoreNotWaitedFor) ptx::tma_store_commit();
      if (leads && kStep == Step::kStoreNotCommitted) ptx::tma_store_wait_read<0>();
      break;
    case Step::kBoxChangesUnderStore:
      if (leads) store_box(p, shared);
      if (leads) ptx::tma_store_commit();
      ptx::sync_threads();
      ptx::st_shared(box + 16 * tid, uint4{});
      ptx::sync_threads();
      if (leads) ptx::tma_store_wait_read<0>();
      break;
    case Step::kOneThreadFences:
      ptx::st_shared(box + 16 * tid, uint4{});
      ptx::sync_threads();
      if (leads) ptx::fence_proxy_async();
      if (leads) store_box(p, shared);
      break;
    case Step::kStoreSharedNotFenced:
      ptx::store_shared(shared.box->elements + 8 * tid, uint4{});
      ptx::sync_threads();
      if (leads) store_box(p, shared);
      break;
    case Step::kStmatrixNotFenced:
      if (tid < 32) ptx::stmatrix_x1(box + 128 * (tid % 8), {0u});
      ptx::sync_threads();
      if (leads) store_box(p, shared);
      break;
    case Step::kBarrierOverwritten:
      if (leads) shared.full[0] = 0;
      ptx::sync_threads();
      if (leads) ptx::mbarrier_arrive(full);
      break;
    case Step::kBarrierInitialisedTwice:
      if (leads) ptx::mbarrier_init(full, 1);
      break;
    case Step::kBarrierNotAligned:
      if (leads) ptx::mbarrier_init(full + 4, 1);
      break;
    case Step::kLoadBeforeDependency:
      if (leads) load_box(p, shared);
      ptx::griddep_wait();
      ptx::mbarrier_wait(full, 0);
      break;
  }
}

template <Step kStep>
void step() {
  std::vector<uint16_t> in = tensor(), out = in;
  LaunchConfig config = one_block(kThreads, shared_bytes<Layout>());
  config.pdl = kStep == Step::kLoadBeforeDependency;
  launch(step_kernel<kStep>, config,
         {make_tensor_map(spec_of(in)), make_tensor_map(spec_of(out)), 0, 0, 0, 0, in.data(),
          nullptr});
}
const Register s1("bug box not at a multiple of 1024", step<Step::kBoxNotAligned>);
const Register s2("bug two loads into one box", step<Step::kTwoLoadsIntoOneBox>);
const Register s3("bug store into a box in flight", step<Step::kStoreUnderLoad>);
const Register s4("bug plain store into a box in flight", step<Step::kPlainStoreUnderLoad>);
const Register s5("bug tensor changes while a box is in flight", step<Step::kTensorChanges>);
const Register s6("bug load of a box nobody waits for", step<Step::kLoadNotWaitedFor>);
const Register s7("bug thread exits with a box unread", step<Step::kStoreNotWaitedFor>);
const Register s8("bug store of a box not committed", step<Step::kStoreNotCommitted>);
const Register s9("bug box changes before it is read", step<Step::kBoxChangesUnderStore>);
const Register s10("bug proxy fence of one thread for all", step<Step::kOneThreadFences>);
const Register s11("bug store_shared without proxy fence", step<Step::kStoreSharedNotFenced>);
const Register s12("bug stmatrix without proxy fence", step<Step::kStmatrixNotFenced>);
const Register s13("bug mbarrier written over", step<Step::kBarrierOverwritten>);
const Register s14("bug mbarrier initialised twice", step<Step::kBarrierInitialisedTwice>);
const Register s15("bug mbarrier not at a multiple of 8", step<Step::kBarrierNotAligned>);
const Register s16("bug box loaded before griddep_wait", step<Step::kLoadBeforeDependency>);

}  // namespace
}  // namespace honesty
