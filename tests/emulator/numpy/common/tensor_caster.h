// numpy.ndarray -> Tensor, for the ThreadSanitizer build, which runs without torch. The twin of
// csrc/common/tensor_caster.h: bfloat16 arrives as uint16, everything else under its own dtype.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "common/tensor.h"

namespace exafuse {

inline DType dtype_of(const pybind11::dtype& dtype) {
  switch (dtype.normalized_num()) {
    case pybind11::dtype::num_of<uint16_t>():
      return DType::kBFloat16;
    case pybind11::dtype::num_of<float>():
      return DType::kFloat32;
    case pybind11::dtype::num_of<int32_t>():
      return DType::kInt32;
    case pybind11::dtype::num_of<int64_t>():
      return DType::kInt64;
    default:
      return dtype.kind() == 'f' && dtype.itemsize() == 2 ? DType::kFloat16 : DType::kOther;
  }
}

// Borrows: the array must outlive the result. Strides in elements are kept for the next 64 tensors,
// many more than one call takes.
inline Tensor tensor_from_python(pybind11::handle source) {
  constexpr int kKept = 64;
  static thread_local int64_t kept_strides[kKept][Tensor::kMaxDims];
  static thread_local int next = 0;
  if (!pybind11::isinstance<pybind11::array>(source)) {
    Tensor nothing;
    nothing.wrong_type = Py_TYPE(source.ptr())->tp_name;
    return nothing;
  }
  const auto array = pybind11::reinterpret_borrow<pybind11::array>(source);
  int64_t* strides = kept_strides[next++ % kKept];
  if (array.ndim() > Tensor::kMaxDims) throw NotAPlainTensor("an array of more than 8 dimensions");
  int64_t step = 1;
  for (pybind11::ssize_t dim = array.ndim() - 1; dim >= 0; --dim) {
    // Where there are no elements, numpy's strides are 0; torch's are those of a dense tensor.
    strides[dim] = array.size() > 0 ? array.strides(dim) / array.itemsize() : step;
    step *= array.shape(dim) > 0 ? array.shape(dim) : 1;
  }
  Tensor tensor;
  tensor.data = const_cast<void*>(array.data());
  tensor.shape = array.shape();
  tensor.strides = strides;
  tensor.ndim = static_cast<int>(array.ndim());
  tensor.dtype = dtype_of(array.dtype());
  return tensor;
}

inline Real real_from_python(pybind11::handle source) {
  if (!PyFloat_Check(source.ptr()) && !PyLong_Check(source.ptr())) {
    return {0, Py_TYPE(source.ptr())->tp_name};
  }
  return {source.cast<double>(), nullptr};
}

inline Count count_from_python(pybind11::handle source) {
  if (!PyLong_Check(source.ptr())) return {0, Py_TYPE(source.ptr())->tp_name};
  return {source.cast<int64_t>(), nullptr};
}

}  // namespace exafuse

namespace pybind11::detail {

template <>
struct type_caster<exafuse::Tensor> {
  PYBIND11_TYPE_CASTER(exafuse::Tensor, const_name("numpy.ndarray"));

  bool load(handle source, bool) {
    value = exafuse::tensor_from_python(source);
    return true;
  }
};

template <>
struct type_caster<exafuse::Real> {
  PYBIND11_TYPE_CASTER(exafuse::Real, const_name("float"));

  bool load(handle source, bool) {
    value = exafuse::real_from_python(source);
    return true;
  }
};

template <>
struct type_caster<exafuse::Count> {
  PYBIND11_TYPE_CASTER(exafuse::Count, const_name("int"));

  bool load(handle source, bool) {
    value = exafuse::count_from_python(source);
    return true;
  }
};

}  // namespace pybind11::detail
