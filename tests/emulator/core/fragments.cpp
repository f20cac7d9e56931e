// Matrix fragments of the tensor cores: ldmatrix, stmatrix, movmatrix and mma.m16n8k16, after the
// tables of the PTX ISA. tests/emulator/bugs/fragments.cu holds them against plain loops.
#include <cstring>

#include "core/state.h"

namespace exafuse::emulator {

namespace {

constexpr int kMatrixRows = 8;  // rows and columns of one 8x8 matrix

uint16_t element(const uint32_t* row, int column) {
  return static_cast<uint16_t>(row[column / 2] >> (column % 2 * 16));
}

void set_element(uint32_t* row, int column, uint16_t value) {
  uint32_t& word = row[column / 2];
  const int shift = column % 2 * 16;
  word = (word & ~(0xffffu << shift)) | static_cast<uint32_t>(value) << shift;
}

// Where element `half` of register `matrix` of lane `lane` stands: lane / 4 is the row, and a lane
// holds columns 2 * (lane % 4) and the next; with trans, rows and columns change places.
struct Place {
  int lane;  // the lane that holds this row of the matrix
  int column;
};

Place place_of(int lane, int matrix, int half, bool trans) {
  const int row = lane / 4;
  const int column = lane % 4 * 2 + half;
  return trans ? Place{matrix * kMatrixRows + column, row}
               : Place{matrix * kMatrixRows + row, column};
}

// CUDA's own conversions are inline functions that the instrumented kernels use as well; the linker
// must not choose between the two builds of them.
float widen_bf16(uint32_t word, int half) {
  const uint32_t bits = half == 0 ? word << 16 : word & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float widen_fp16(uint32_t word, int half) {
  const auto bits = static_cast<uint16_t>(word >> (half * 16));
  _Float16 value;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

// Products of 16-bit numbers are exact in fp32, sums are not; the hardware's order and rounding of
// the sums are its own, so two ways of adding are on offer.
float dot(const float* a, const float* b, float c) {
  if (options().mma_in_double) {
    double sum = c;
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[k]) * b[k];
    return static_cast<float>(sum);
  }
  float sum = c;
  for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
  return sum;
}

void multiply(void* const* data, float (*widen)(uint32_t, int)) {
  float a[16][16];  // [row][k]
  float b[8][16];   // [column][k]
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MmaLane& fragment = *static_cast<MmaLane*>(data[lane]);
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {  // a[0], a[1]: rows g and g + 8; a[2], a[3]: 8 columns on
        a[group + i % 2 * 8][pair + i / 2 * 8 + half] = widen(fragment.a[i], half);
      }
      for (int i = 0; i < 2; ++i) b[group][pair + i * 8 + half] = widen(fragment.b[i], half);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MmaLane& fragment = *static_cast<MmaLane*>(data[lane]);
    float d[4];  // d may be c
    for (int i = 0; i < 4; ++i) {
      d[i] = dot(a[lane / 4 + i / 2 * 8], b[lane % 4 * 2 + i % 2], fragment.c[i]);
    }
    std::memcpy(fragment.d, d, sizeof(d));
  }
}

}  // namespace

void complete_matrix(Collective operation, void* const* data) {
  if (operation == Collective::kMovmatrixTrans) {  // as if by way of shared memory
    complete_matrix(Collective::kStmatrix, data);
    complete_matrix(Collective::kLdmatrixTrans, data);
    return;
  }
  const bool loads = operation == Collective::kLdmatrix || operation == Collective::kLdmatrixTrans;
  const bool trans =
      operation == Collective::kLdmatrixTrans || operation == Collective::kStmatrixTrans;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    MatrixLane& holder = *static_cast<MatrixLane*>(data[lane]);
    for (int matrix = 0; matrix < holder.num_matrices; ++matrix) {
      for (int half = 0; half < 2; ++half) {
        const Place place = place_of(lane, matrix, half, trans);
        uint32_t* row = static_cast<MatrixLane*>(data[place.lane])->row;
        if (loads) {
          set_element(&holder.registers[matrix], half, element(row, place.column));
        } else {
          set_element(row, place.column, element(&holder.registers[matrix], half));
        }
      }
    }
  }
}

void complete_mma(Collective operation, void* const* data) {
  multiply(data, operation == Collective::kMmaBf16 ? widen_bf16 : widen_fp16);
}

}  // namespace exafuse::emulator
