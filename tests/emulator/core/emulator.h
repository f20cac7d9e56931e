// The emulator's interface. The first part is what the emulated ptx.cuh calls from inside a kernel,
// the second what the emulated launch.h calls from a host function. Everything behind it is
// compiled without sanitizers, so a sanitizer sees the kernels and their memory traffic but not the
// scheduler.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <source_location>
#include <string>

// The built-in variables of CUDA: plain globals, set whenever another thread runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace exafuse::emulator {

using Site = std::source_location;

// --- called by kernels --------------------------------------------------------------------------

// Ends the launch with an exception that names kernel, block, thread and source line.
[[noreturn]] void fail(const std::string& message, const Site& site);

int lane_id();

void sync_threads(const Site& site);
void named_barrier(int id, int num_threads, bool wait, const Site& site);
void sync_warp(unsigned mask, const Site& site);

enum class Collective : uint8_t {
  kShflIdx,
  kShflUp,
  kShflDown,
  kShflXor,
  kAny,
  kAll,
  kBallot,
  kMatchAny,
  kElect,
  kSetmaxnreg,
  kWgmmaWait,
  kReduceAdd,
  kReduceMinSigned,
  kReduceMinUnsigned,
  kReduceMaxSigned,
  kReduceMaxUnsigned,
  kLdmatrix,
  kLdmatrixTrans,
  kStmatrix,
  kStmatrixTrans,
  kMovmatrixTrans,
  kMmaBf16,
  kMmaFp16,
};

// What one lane brings to a shuffle, vote, match or reduction, and what it takes away.
struct Exchange {
  uint64_t value = 0;
  int argument = 0;  // source lane, delta or lane mask
  int width = 32;
  uint64_t result = 0;
};

// ldmatrix: `row` is the 16-byte row this lane read for its warp, `registers` its share of the
// fragments. stmatrix: the other way round. movmatrix: both, its rows being scratch.
struct MatrixLane {
  int num_matrices = 0;
  uint32_t row[4] = {};
  uint32_t registers[4] = {};
};

struct MmaLane {
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
  const float* c;     // [4]
  float* d;           // [4]
};

// Waits until every lane of `mask` has come to the same call with its own `lane_data` (an Exchange,
// MatrixLane or MmaLane); the last one computes all results.
void collective(Collective operation, unsigned mask, void* lane_data, const Site& site);

// Lets other threads run; spinning on an atomic goes through here.
void yield_in_atomic(const Site& site);

// True while the running thread must not touch global memory, because its kernel was launched to
// overlap its predecessor and the thread has not called griddep_wait() yet.
extern bool global_memory_forbidden;

// Slow path of every vector access: reports a misaligned address or a forbidden access.
void check_access(const void* address, int bytes, const char* what, const Site& site);

void griddep_wait();

// The shared array number `index` of the block: `bytes` at logical offset `begin`, filled with NaN.
void* shared_array(int index, int begin, int bytes, const Site& site);
uint32_t shared_address(const void* pointer, const Site& site);
// The memory behind a shared address: `bytes` inside one array, aligned to `bytes`.
void* shared_pointer(uint32_t address, int bytes, const Site& site);

// A copy in flight. It reads its source when it starts and when it lands (a source that changes in
// between is reported) and lands as late as its wait allows.
struct Copy {
  void* destination = nullptr;
  const void* source = nullptr;  // nullptr: lands as zeros
  unsigned char snapshot[16] = {};
  unsigned group = 0;
  Site site;
};
void start_copy(const Copy& copy);
void commit_copies();
// Takes out one copy that must have landed when at most `pending` groups remain in flight.
bool next_landing(unsigned pending, Copy* copy);

// --- sm_90: barriers in shared memory, the asynchronous proxy, copies of boxes, wgmma ------------

// Shared memory that a thread reads, or stores to, by address: checked against copies in flight.
// What is stored is known to the asynchronous proxy only after the thread's fence_proxy_async.
const void* shared_load(uint32_t address, int bytes, const Site& site);
void* shared_store(uint32_t address, int bytes, const Site& site);
void fence_proxy_async(const Site& site);

bool elect_one(const Site& site);
void set_max_registers(int registers, bool increase, const Site& site);

void mbarrier_init(uint32_t address, int count, const Site& site);
void fence_mbarrier_init(const Site& site);
void mbarrier_arrive(uint32_t address, const Site& site);
void mbarrier_arrive_expect_tx(uint32_t address, int bytes, const Site& site);
void mbarrier_wait(uint32_t address, uint32_t parity, const Site& site);

// A box of a tensor in global memory beside its rows of 128 bytes in shared memory, and what of it
// lies inside the tensor: bytes first_byte to end_byte of rows first_row to end_row.
struct Box {
  uint32_t smem = 0;
  int rows = 0;
  int first_row = 0, end_row = 0;
  int first_byte = 0, end_byte = 0;
  char* global = nullptr;  // of the first byte inside
  int64_t row_bytes = 0;   // from one row to the next in global memory

  int inside_bytes() const { return (end_row - first_row) * (end_byte - first_byte); }
};
inline constexpr int kBoxRowBytes = 128;

// Alone what the kernels' side and the core must do alike: a digest of words, as 64 bits each.
constexpr uint64_t add_to_digest(uint64_t digest, uint64_t word) {
  return (digest ^ word) * 0x9E3779B97F4A7C15u;
}

// Before a thread reads or writes what lies inside.
void check_box(const Box& box, const char* what, const Site& site);
// `digest`: of the bytes inside as the thread has found them. They must be the same when the load
// lands, by default when a thread waits for the barrier and no other thread can run.
void start_load(const Box& box, uint32_t barrier, uint64_t digest, const Site& site);
void start_store(const Box& box, const Site& site);
void commit_stores();
// Takes out one store of this thread that must have been read when at most `pending` groups remain.
bool next_store(unsigned pending, Box* box, const Site& site);

// d = a b, or d += a b: m64nNk16 of a warpgroup, as one lane sees it.
struct WgmmaCall {
  float* d = nullptr;  // [columns / 2]
  int columns = 0;
  const uint32_t* a = nullptr;  // [4], or nullptr: a_descriptor
  uint64_t a_descriptor = 0, b_descriptor = 0;
  bool b_depth_by_row = false;
  bool accumulate = false;
  bool is_bf16 = false;
};
void wgmma_fence(const Site& site);
void wgmma_issue(const WgmmaCall& call, const Site& site);
void wgmma_commit(const Site& site);
// `registers`: accumulators and operands in registers (each [4]) that the thread has again.
void wgmma_wait(int pending, const void* const* registers, int count, const Site& site);

// Approximate functions: the exact value, moved by up to the documented error of the instruction.
float approximate_exp2(float x, bool flush);
float approximate_log2(float x);
float approximate_rcp(float x);
float approximate_rsqrt(float x);

// --- called by host functions -------------------------------------------------------------------

struct GpuModel {
  const char* name;
  int major, minor, num_sms, max_smem_bytes;
};
const GpuModel& gpu_model();

struct LaunchRequest {
  const void* kernel = nullptr;
  void (*invoke)(const void* kernel, const void* params) = nullptr;
  const void* params = nullptr;
  dim3 grid, block;
  int smem_bytes = 0;
  bool pdl = false;
  Site site;
};

// Runs the whole grid and returns; throws std::runtime_error for what a GPU would refuse or get
// wrong.
void run(const LaunchRequest& request);

std::string kernel_name(const void* kernel);

}  // namespace exafuse::emulator
