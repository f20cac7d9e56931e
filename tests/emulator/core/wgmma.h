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

// d [rows, columns] += a b, with a [depth, rows] and b [depth, columns].
void multiply_accumulate(const float* a, const float* b, float* d, int columns);

}  // namespace exafuse::emulator
