// What the tensor cores of sm_90 read and how they multiply, after the tables of the PTX ISA;
// tests/emulator/bugs/wgmma.cu holds it against plain loops.
#include <cstring>

#include "core/wgmma.h"

namespace exafuse::emulator {

namespace {

constexpr uint32_t kChunk = 16;       // bytes that the swizzle keeps together
constexpr uint32_t kRow = 128;        // bytes
constexpr uint32_t kAtom = 8 * kRow;  // the pattern's period
constexpr int kPanelColumns = static_cast<int>(kRow) / 2;
constexpr uint32_t kDepthBytes = 2 * kWgmmaDepth;  // along a row

uint32_t bits(uint64_t word, int first, int count) {
  return static_cast<uint32_t>(word >> first & ((uint64_t{1} << count) - 1));
}

int num_panels(const WgmmaOperand& operand) {
  if (!operand.depth_by_row) return 1;
  return (operand.extent + kPanelColumns - 1) / kPanelColumns;
}

// Bytes from a panel's start to where chunk `chunk` of its row `row` lies.
uint32_t offset_of(uint32_t row, uint32_t chunk) { return row * kRow + (chunk ^ row % 8) * kChunk; }

// Calls visit(address, bytes) for everything that the operand reads.
template <class Visit>
void each_run(const WgmmaOperand& operand, Visit visit) {
  if (!operand.depth_by_row) {
    // The two chunks of a row's depth stay a pair.
    for (uint32_t row = 0; row < static_cast<uint32_t>(operand.extent); ++row) {
      const uint32_t pair = offset_of(row, operand.first_chunk) & ~(kDepthBytes - 1);
      visit(operand.start + pair, kDepthBytes);
    }
    return;
  }
  for (int panel = 0; panel < num_panels(operand); ++panel) {
    const uint32_t begin = operand.start + panel * operand.panel_bytes;
    const int columns = operand.extent - panel * kPanelColumns;
    if (columns >= kPanelColumns) {
      visit(begin, kWgmmaDepth * kRow);
      continue;
    }
    for (uint32_t row = 0; row < kWgmmaDepth; ++row) {
      for (uint32_t chunk = 0; chunk < 2 * columns / kChunk; ++chunk) {
        visit(begin + offset_of(row, chunk), kChunk);
      }
    }
  }
}

// CUDA's own conversions are inline functions that the instrumented kernels use as well; the linker
// must not choose between the two builds of them.
inline float widen_bf16(uint16_t element) {
  const uint32_t word = static_cast<uint32_t>(element) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

inline float widen_fp16(uint16_t element) {
  // Exponents are 112 apart; the product makes normal what is subnormal in fp16.
  uint32_t word = static_cast<uint32_t>(element & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  value *= 0x1p112f;
  std::memcpy(&word, &value, sizeof(word));
  if ((element & 0x7c00) == 0x7c00) word |= 0x7f800000u;  // infinities and NaN
  word |= static_cast<uint32_t>(element & 0x8000) << 16;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

template <float (*kWiden)(uint16_t)>
void widen_along_rows(const WgmmaOperand& operand, float* values) {
  for (int row = 0; row < operand.extent; ++row) {
    for (uint32_t half = 0; half < 2; ++half) {
      uint16_t chunk[8];
      const uint32_t offset = offset_of(row, operand.first_chunk + half);
      std::memcpy(chunk, operand.panels[0] + offset, sizeof(chunk));
      for (int i = 0; i < 8; ++i) values[(8 * half + i) * operand.extent + row] = kWiden(chunk[i]);
    }
  }
}

template <float (*kWiden)(uint16_t)>
void widen_by_rows(const WgmmaOperand& operand, float* values) {
  for (uint32_t row = 0; row < kWgmmaDepth; ++row) {
    for (int column = 0; column < operand.extent; column += 8) {
      uint16_t chunk[8];
      const uint32_t offset = offset_of(row, column % kPanelColumns / 8);
      std::memcpy(chunk, operand.panels[column / kPanelColumns] + offset, sizeof(chunk));
      float* out = values + row * operand.extent + column;
      for (int i = 0; i < 8; ++i) out[i] = kWiden(chunk[i]);
    }
  }
}

void multiply_in_double(const float* a, const float* b, bool accumulate, float* d, int columns) {
  for (int row = 0; row < kWgmmaRows; ++row) {
    for (int column = 0; column < columns; ++column) {
      float& element = d[row * columns + column];
      double sum = accumulate ? element : 0.0f;
      for (int k = 0; k < kWgmmaDepth; ++k) {
        sum += static_cast<double>(a[k * kWgmmaRows + row]) * b[k * columns + column];
      }
      element = static_cast<float>(sum);
    }
  }
}

using Vector = float __attribute__((vector_size(32), aligned(4), may_alias));

// Sums in the order of the depth, in lanes of a vector that never meet: the same bits with any
// width of registers. Contraction would change them, so no clone has it.
__attribute__((target_clones("avx2", "default"))) void multiply_in_single(const float* a,
                                                                          const float* b,
                                                                          bool accumulate, float* d,
                                                                          int columns) {
  constexpr int kRows = 8;  // sums that go on side by side
  constexpr int kWidth = 8;
  for (int row = 0; row < kWgmmaRows; row += kRows) {
    for (int column = 0; column < columns; column += kWidth) {
      Vector sums[kRows];
      for (int i = 0; i < kRows; ++i) {
        sums[i] = accumulate ? *reinterpret_cast<const Vector*>(d + (row + i) * columns + column)
                             : Vector{};
      }
      for (int k = 0; k < kWgmmaDepth; ++k) {
        const Vector right = *reinterpret_cast<const Vector*>(b + k * columns + column);
        const float* left = a + k * kWgmmaRows + row;
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) sums[i] += left[i] * right;
      }
      for (int i = 0; i < kRows; ++i) {
        *reinterpret_cast<Vector*>(d + (row + i) * columns + column) = sums[i];
      }
    }
  }
}

}  // namespace

WgmmaOperand read_descriptor(uint64_t descriptor, bool depth_by_row, int first_row, int extent,
                             const char* what, const Site& site) {
  const auto refuse = [&](const std::string& why) {
    fail(format("%s of wgmma, descriptor 0x%016llx: %s", what,
                static_cast<unsigned long long>(descriptor), why.c_str()),
         site);
  };
  const uint32_t address = bits(descriptor, 0, 14) * kChunk;
  const uint32_t leading = bits(descriptor, 16, 14) * kChunk;
  const uint32_t stride = bits(descriptor, 32, 14) * kChunk;
  if (bits(descriptor, 62, 2) != 1) {
    refuse(format("swizzle mode %u, expected 1 (128 bytes)", bits(descriptor, 62, 2)));
  }
  if (bits(descriptor, 49, 3) != 0) {
    refuse("a base offset, expected 0: the operand's atoms start at multiples of 1024 bytes");
  }
  if ((descriptor & 0x3ff1c000c000c000u) != 0) {
    refuse("bits that mean nothing are set, or an address beyond 256 KiB");
  }
  if (stride != kAtom) {
    refuse(format("%u bytes between groups of eight rows, expected %u", stride, kAtom));
  }
  const uint32_t inside = address % kAtom;
  if (depth_by_row) {
    if (inside != 0) refuse(format("starts %u bytes into an atom of 8 rows, expected 0", inside));
    if (extent > kPanelColumns && (leading == 0 || leading % kAtom != 0)) {
      refuse(format("%u bytes between panels, expected a multiple of %u", leading, kAtom));
    }
  } else if (inside % kDepthBytes != 0 || inside >= kRow) {
    refuse(
        format("starts %u bytes into an atom; it must start inside the first row of an atom, at "
               "a multiple of %u bytes",
               inside, kDepthBytes));
  }
  WgmmaOperand operand{.start = address - inside + first_row * kRow,
                       .first_chunk = inside / kChunk,
                       .panel_bytes = leading,
                       .depth_by_row = depth_by_row,
                       .extent = extent};
  const int bytes = static_cast<int>(kRow) * (depth_by_row ? kWgmmaDepth : extent);
  for (int panel = 0; panel < num_panels(operand); ++panel) {
    operand.panels[panel] = shared_bytes_at(operand.start + panel * leading, bytes, site);
  }
  return operand;
}

void check_operand_is_clean(const WgmmaOperand& operand, const char* what, const Site& site) {
  each_run(operand, [&](uint32_t address, int bytes) { check_clean(address, bytes, what, site); });
}

uint64_t operand_written_at(const WgmmaOperand& operand) {
  uint64_t latest = 0;
  each_run(operand, [&](uint32_t address, int bytes) {
    const uint64_t moment = written_at(address, bytes);
    latest = moment > latest ? moment : latest;
  });
  return latest;
}

void widen_operand(const WgmmaOperand& operand, bool is_bf16, float* values) {
  if (operand.depth_by_row) {
    is_bf16 ? widen_by_rows<widen_bf16>(operand, values)
            : widen_by_rows<widen_fp16>(operand, values);
  } else {
    is_bf16 ? widen_along_rows<widen_bf16>(operand, values)
            : widen_along_rows<widen_fp16>(operand, values);
  }
}

void widen_registers(const uint32_t (&registers)[kWarpSize][4], bool is_bf16, float* values) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < 4; ++i) {  // a[0], a[1]: rows g and g + 8; a[2], a[3]: 8 columns on
      const int row = lane / 4 + i % 2 * 8;
      for (int half = 0; half < 2; ++half) {
        const int k = lane % 4 * 2 + half + i / 2 * 8;
        const auto element = static_cast<uint16_t>(registers[lane][i] >> (16 * half));
        values[k * kWgmmaRows + row] = is_bf16 ? widen_bf16(element) : widen_fp16(element);
      }
    }
  }
}

void multiply(const float* a, const float* b, bool accumulate, float* d, int columns) {
  const auto how = options().mma_in_double ? multiply_in_double : multiply_in_single;
  how(a, b, accumulate, d, columns);
}

}  // namespace exafuse::emulator
