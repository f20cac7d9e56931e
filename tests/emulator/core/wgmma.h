// Products of a warpgroup, between the two files that play them: wgmma.cpp keeps the books,
// wgmma_operand.cpp reads operands from shared memory and multiplies.
#pragma once

#include "core/state.h"

namespace exafuse::emulator {

inline constexpr int kWgmmaRows = 16;  // of one warp's share
inline constexpr int kWgmmaDepth = 16;
inline constexpr int kMaxWgmmaColumns = 256;

// An operand in shared memory, as its descriptor says: rows of 128 bytes, in groups of eight, each
// row's 16-byte chunks permuted by XOR with the row number modulo 8.
struct WgmmaOperand {
  uint32_t start = 0;         // shared address of the first element's row
  uint32_t first_chunk = 0;   // of the first row
  uint32_t panel_bytes = 0;   // between panels of 64 elements, if the depth goes by rows
  bool depth_by_row = false;  // else along the rows
  int extent = 0;             // rows of operand a, columns of operand b
  const char* panels[kMaxWgmmaColumns / 64] = {};
};

// Reads a descriptor of ptx::wgmma_descriptor, and fails where it says what no operand can be.
// `first_row`: rows to leave out at the beginning.
WgmmaOperand read_descriptor(uint64_t descriptor, bool depth_by_row, int first_row, int extent,
                             const char* what, const Site& site);
// Fails where a thread has stored and not fenced.
void check_operand_is_clean(const WgmmaOperand& operand, const char* what, const Site& site);
// The latest moment at which any byte of the operand was written.
uint64_t operand_written_at(const WgmmaOperand& operand);
// As float [depth, extent].
void widen_operand(const WgmmaOperand& operand, bool is_bf16, float* values);
// Operand a of a warp, from the registers [4] of its lanes, as float [depth, rows].
void widen_registers(const uint32_t (&registers)[kWarpSize][4], bool is_bf16, float* values);

// d [rows, columns] = a b, or d += a b, with a [depth, rows] and b [depth, columns].
void multiply(const float* a, const float* b, bool accumulate, float* d, int columns);

// --- what is in flight (wgmma.cpp) --------------------------------------------------------------

inline constexpr int kWarpsOfGroup = 4;
// Of a warp in flight.
inline constexpr uint64_t kMaxProducts = 128;
inline constexpr uint64_t kMaxGroups = 64;
inline constexpr int kMaxAccumulators = 8;

struct WgmmaProduct {
  WgmmaCall call;  // of the lane that came first
  Site site;
  uint64_t issued_at = 0;
  int accumulator = 0;
  WgmmaOperand a, b;
  const uint32_t* registers[kWarpSize];
  uint32_t values[kWarpSize][4];  // of the registers when they were given
};

struct WgmmaAccumulator {
  bool in_flight = false;
  int columns = 0;
  uint32_t lanes = 0;  // that have given theirs
  float* d[kWarpSize];
  uint64_t newest = 0;  // product
  Site site;
  float values[kWgmmaRows * kMaxWgmmaColumns];
};

struct WgmmaLane {
  uint64_t issued = 0;
  uint64_t committed = 0;
  bool fenced = false;
};

// Products and groups are numbered from the beginning of the block.
struct WgmmaWarp {
  WgmmaLane lanes[kWarpSize];
  uint64_t issued = 0;
  uint64_t computed = 0;
  uint64_t completed = 0;
  uint64_t groups = 0;
  uint64_t completed_groups = 0;
  uint64_t ends[kMaxGroups];  // of groups: the number of products before it
  int commits[kMaxGroups];    // lanes that have closed it
};

// Of each warp of the block.
extern WgmmaWarp wgmma_warps[kMaxWarps];
extern WgmmaProduct wgmma_products[kMaxWarps][kMaxProducts];
extern WgmmaAccumulator wgmma_accumulators[kMaxWarps][kMaxAccumulators];

inline WgmmaProduct& wgmma_product(int warp, uint64_t number) {
  return wgmma_products[warp][number % kMaxProducts];
}

// What a lane's register `i` of an accumulator in flight holds. NaN, which no arithmetic loses, so
// that a read comes out, and a number that arithmetic changes, so that a write is seen, take turns
// from register to register and by seed.
inline uint32_t wgmma_poison(int i) {
  constexpr uint32_t kPoisons[] = {0x7fc0dead, 0x7d4c1dad};
  return kPoisons[(i + options().seed) % 2];
}

// Where pair `i` of a lane's registers stands in [rows, columns].
inline int wgmma_place(int lane, int i, int columns) {
  return (lane / 4 + i % 2 * 8) * columns + i / 2 * 8 + lane % 4 * 2;
}

// Computes a warp's products before number `end`, as far as that has not been done
// (wgmma_wait.cpp).
void compute_wgmma(int warp, uint64_t end);

}  // namespace exafuse::emulator
