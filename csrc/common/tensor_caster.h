// torch.Tensor -> Tensor, through the C function table that torch publishes for DLPack consumers
// (`torch.Tensor.__dlpack_c_exchange_api__`, torch >= 2.10). The only file that knows torch exists,
// and it needs no torch header: the structs below are the part of DLPack 1.x that the table is made
// of.
//
// Only torch.Tensor itself and nn.Parameter are taken. Subclasses (fake tensors, DTensor, quantised
// wrappers) and tensors without plain memory throw NotAPlainTensor. Anything else becomes a Tensor
// that carries the name of its type, because the argument's own name is known only to the check
// that meets it; numbers likewise. `load` never returns false: pybind11's message would print every
// tensor of the call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "common/tensor.h"

namespace exafuse {

namespace dlpack {

enum : int32_t { kCPU = 1, kCUDA = 2 };
enum : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct DLDevice {
  int32_t type;
  int32_t index;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  ExchangeApi* previous;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object)();
  void (*managed_tensor_to_py_object)();
  int (*dltensor_from_py_object)(void* py_object, DLTensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_index, void** out);
};

}  // namespace dlpack

// What the caster needs of torch, looked up once.
struct TorchTypes {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  PyObject* is_neg;  // the name, interned
  const dlpack::ExchangeApi* api;

  // Leaked on purpose: torch's types outlive every call.
  static const TorchTypes& get() {
    namespace py = pybind11;
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<TorchTypes> storage;
    return storage
        .call_once_and_store_result([] {
          py::object tensor = py::module_::import("torch").attr("Tensor");
          py::object parameter = py::module_::import("torch.nn").attr("Parameter");
          if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) {
            throw py::import_error("exafuse needs torch >= 2.10 (the DLPack exchange table)");
          }
          py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
          void* api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
          if (api == nullptr) throw py::error_already_set();
          const auto* table = static_cast<const dlpack::ExchangeApi*>(api);
          if (table->major != 1) {
            throw py::import_error("this torch speaks DLPack " + std::to_string(table->major) +
                                   ", exafuse needs DLPack 1");
          }
          return TorchTypes{reinterpret_cast<PyTypeObject*>(tensor.release().ptr()),
                            reinterpret_cast<PyTypeObject*>(parameter.release().ptr()),
                            PyUnicode_InternFromString("is_neg"), table};
        })
        .get_stored();
  }
};

inline Stream current_torch_stream(Device device) {
  if (device.type != DeviceType::kCUDA) return nullptr;
  void* stream = nullptr;
  if (TorchTypes::get().api->current_work_stream(dlpack::kCUDA, device.index, &stream) != 0) {
    const pybind11::gil_scoped_acquire gil;
    throw pybind11::error_already_set();
  }
  return stream;
}

inline DType dtype_of(dlpack::DLDataType dtype) {
  if (dtype.lanes != 1) return DType::kOther;
  if (dtype.code == dlpack::kBfloat && dtype.bits == 16) return DType::kBFloat16;
  if (dtype.code == dlpack::kFloat && dtype.bits == 16) return DType::kFloat16;
  if (dtype.code == dlpack::kFloat && dtype.bits == 32) return DType::kFloat32;
  if (dtype.code == dlpack::kInt && dtype.bits == 32) return DType::kInt32;
  if (dtype.code == dlpack::kInt && dtype.bits == 64) return DType::kInt64;
  return DType::kOther;
}

inline Device device_of(dlpack::DLDevice device) {
  if (device.type == dlpack::kCPU) return {DeviceType::kCPU, 0};
  if (device.type == dlpack::kCUDA) return {DeviceType::kCUDA, device.index};
  return {DeviceType::kOther, device.index};
}

// Borrows: the object must outlive the result.
inline Tensor tensor_from_python(PyObject* object) {
  const TorchTypes& torch = TorchTypes::get();
  PyTypeObject* type = Py_TYPE(object);
  if (type != torch.tensor && type != torch.parameter) {
    if (PyType_IsSubtype(type, torch.tensor)) throw NotAPlainTensor(type->tp_name);
    Tensor nothing;
    nothing.wrong_type = type->tp_name;
    return nothing;
  }
  dlpack::DLTensor source{};
  if (torch.api->dltensor_from_py_object(object, &source) != 0) {
    PyErr_Clear();
    throw NotAPlainTensor("a tensor without plain memory");
  }
  Tensor tensor;
  tensor.data = static_cast<char*>(source.data) + source.byte_offset;
  tensor.shape = source.shape;
  tensor.strides = source.strides;
  tensor.ndim = source.ndim;
  tensor.dtype = dtype_of(source.dtype);
  tensor.device = device_of(source.device);
  tensor.stream_of = &current_torch_stream;
  if (source.data == nullptr && tensor.numel() != 0) {
    throw NotAPlainTensor("a tensor without plain memory");
  }
  // A pending negation is not in the bytes. (A pending conjugation exists for complex dtypes only.)
  PyObject* is_neg = PyObject_CallMethodNoArgs(object, torch.is_neg);
  if (is_neg == nullptr) throw pybind11::error_already_set();
  Py_DECREF(is_neg);
  if (is_neg == Py_True) throw NotAPlainTensor("a tensor with a pending negation");
  return tensor;
}

// No conversion by __float__ or __index__: on a tensor that would wait for its device.
inline Real real_from_python(PyObject* object) {
  if (!PyFloat_Check(object) && !PyLong_Check(object)) return {0, Py_TYPE(object)->tp_name};
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return {value, nullptr};
}

inline Count count_from_python(PyObject* object) {
  if (!PyLong_Check(object)) return {0, Py_TYPE(object)->tp_name};
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return {value, nullptr};
}

}  // namespace exafuse

namespace pybind11::detail {

template <>
struct type_caster<exafuse::Tensor> {
  PYBIND11_TYPE_CASTER(exafuse::Tensor, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    value = exafuse::tensor_from_python(source.ptr());
    return true;
  }
};

template <>
struct type_caster<exafuse::Real> {
  PYBIND11_TYPE_CASTER(exafuse::Real, const_name("float"));

  bool load(handle source, bool) {
    value = exafuse::real_from_python(source.ptr());
    return true;
  }
};

template <>
struct type_caster<exafuse::Count> {
  PYBIND11_TYPE_CASTER(exafuse::Count, const_name("int"));

  bool load(handle source, bool) {
    value = exafuse::count_from_python(source.ptr());
    return true;
  }
};

}  // namespace pybind11::detail
