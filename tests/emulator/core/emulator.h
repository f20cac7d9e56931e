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
