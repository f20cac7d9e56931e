// The extension's table of contents: one named-argument entry per function of ops.h and
// ops_backward.h. No logic.

#include <pybind11/pybind11.h>

#include <exception>

#include "common/launch.h"
#include "common/tensor.h"
#include "common/tensor_caster.h"
#include "ops.h"
#include "ops_backward.h"

// The build passes what these say; the fallbacks serve a build by hand.
#ifndef EXAFUSE_MODULE
#define EXAFUSE_MODULE _C
#endif
#ifndef EXAFUSE_VERSION
#define EXAFUSE_VERSION "unknown"
#endif
#ifndef EXAFUSE_SOURCE_HASH
#define EXAFUSE_SOURCE_HASH "unknown"
#endif
#ifndef EXAFUSE_KERNEL_HASHES
#define EXAFUSE_KERNEL_HASHES ""
#endif
#ifndef EXAFUSE_CUDA_ARCHS
#define EXAFUSE_CUDA_ARCHS ""
#endif
#ifndef EXAFUSE_CUDA_COMPILER
#define EXAFUSE_CUDA_COMPILER "gcc " __VERSION__
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

// Which sources this binary was made of, for which GPUs, and by which compiler.
py::dict build_info() {
  return py::dict("version"_a = EXAFUSE_VERSION, "source_hash"_a = EXAFUSE_SOURCE_HASH,
                  "kernel_hashes"_a = EXAFUSE_KERNEL_HASHES, "archs"_a = EXAFUSE_CUDA_ARCHS,
                  "compiler"_a = EXAFUSE_CUDA_COMPILER, "cuda"_a = exafuse::kCudaVersion,
                  "backend"_a = exafuse::kBackendName);
}

}  // namespace

PYBIND11_MODULE(EXAFUSE_MODULE, m) {
  m.doc() = "Kernels of exafuse on raw tensors: no allocation, no gradients. Use exafuse.ops.";

  // Local: the emulated extension has the same C++ types and may be loaded beside this one.
  py::register_local_exception<exafuse::NotAPlainTensor>(m, "NotAPlainTensor", PyExc_TypeError);
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const exafuse::WrongType& error) {
      py::set_error(PyExc_TypeError, error.what());
    }
  });

  m.def("build_info", &build_info);
  m.def("device_problem", &exafuse::device_problem);

  // The caller may hold other threads up only as long as it takes to read the arguments: a launch
  // can wait for room in the stream's queue.
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("rms_norm", &exafuse::rms_norm, "x"_a, "weight"_a, "eps"_a, "out"_a, no_gil);
  m.def("add_rms_norm", &exafuse::add_rms_norm, "x"_a, "residual"_a, "weight"_a, "eps"_a, "out"_a,
        "residual_out"_a, no_gil);
  m.def("rms_norm_add", &exafuse::rms_norm_add, "x"_a, "residual"_a, "weight"_a, "eps"_a, "out"_a,
        no_gil);
  m.def("qk_norm_rope", &exafuse::qk_norm_rope, "q"_a, "k"_a, "v"_a, "num_heads"_a,
        "num_kv_heads"_a, "q_weight"_a, "k_weight"_a, "cos"_a, "sin"_a, "positions"_a, "eps"_a,
        "q_out"_a, "k_out"_a, "v_out"_a, no_gil);
  m.def("qk_norm_rope_cache", &exafuse::qk_norm_rope_cache, "q"_a, "k"_a, "v"_a, "num_heads"_a,
        "num_kv_heads"_a, "q_weight"_a, "k_weight"_a, "cos"_a, "sin"_a, "positions"_a, "eps"_a,
        "k_cache"_a, "v_cache"_a, "slot_mapping"_a, "q_out"_a, no_gil);
  m.def("apply_rope", &exafuse::apply_rope, "q"_a, "k"_a, "cos"_a, "sin"_a, "positions"_a,
        "q_out"_a, "k_out"_a, no_gil);
  m.def("silu_and_mul", &exafuse::silu_and_mul, "gate"_a, "up"_a, "out"_a, no_gil);
  m.def("flash_attn_func", &exafuse::flash_attn_func, "q"_a, "k"_a, "v"_a, "softmax_scale"_a,
        "window_left"_a, "window_right"_a, "out"_a, "lse"_a, no_gil);
  m.def("flash_attn_varlen_func", &exafuse::flash_attn_varlen_func, "q"_a, "k"_a, "v"_a,
        "cu_seqlens_q"_a, "cu_seqlens_k"_a, "max_seqlen_q"_a, "softmax_scale"_a, "window_left"_a,
        "window_right"_a, "out"_a, "lse"_a, no_gil);
  m.def("vision_attn", &exafuse::vision_attn, "qkv"_a, "num_heads"_a, "num_kv_heads"_a, "cos"_a,
        "sin"_a, "cu_seqlens"_a, "max_seqlen"_a, "softmax_scale"_a, "workspace"_a, "out"_a, no_gil);
  m.def("vision_attn_workspace", &exafuse::vision_attn_workspace, "num_tokens"_a, "num_heads"_a,
        "num_kv_heads"_a, "head_dim"_a, "max_seqlen"_a);
  m.def("flash_attn_with_kvcache", &exafuse::flash_attn_with_kvcache, "q"_a, "k_cache"_a,
        "v_cache"_a, "k"_a, "v"_a, "cache_seqlens"_a, "cache_batch_idx"_a, "cache_leftpad"_a,
        "block_table"_a, "softmax_scale"_a, "window_left"_a, "window_right"_a, "cu_seqlens_q"_a,
        "max_seqlen_q"_a, "ring"_a, "workspace"_a, "out"_a, "lse"_a, no_gil);
  m.def("flash_attn_with_kvcache_workspace", &exafuse::flash_attn_with_kvcache_workspace,
        "total_q"_a, "max_seqlen_q"_a, "num_heads"_a, "head_dim"_a, "key_capacity"_a,
        "window_left"_a);

  m.def("rms_norm_backward", &exafuse::rms_norm_backward, "grad"_a, "x"_a, "weight"_a, "eps"_a,
        "grad_x"_a, "grad_weight"_a, "workspace"_a, no_gil);
  m.def("add_rms_norm_backward", &exafuse::add_rms_norm_backward, "grad"_a, "grad_residual"_a,
        "new_residual"_a, "weight"_a, "eps"_a, "grad_sum"_a, "grad_weight"_a, "workspace"_a,
        no_gil);
  m.def("rms_norm_backward_workspace", &exafuse::rms_norm_backward_workspace, "num_rows"_a,
        "hidden"_a, "element_size"_a);
  m.def("qk_norm_rope_backward", &exafuse::qk_norm_rope_backward, "grad_q"_a, "grad_k"_a,
        "grad_v"_a, "q"_a, "k"_a, "q_weight"_a, "k_weight"_a, "cos"_a, "sin"_a, "positions"_a,
        "eps"_a, "workspace"_a, "d_q"_a, "d_k"_a, "d_v"_a, "d_q_weight"_a, "d_k_weight"_a, no_gil);
  m.def("qk_norm_rope_backward_workspace", &exafuse::qk_norm_rope_backward_workspace,
        "num_tokens"_a, "head_dim"_a, "element_size"_a);
  m.def("silu_and_mul_backward", &exafuse::silu_and_mul_backward, "grad"_a, "gate"_a, "up"_a,
        "grad_gate"_a, "grad_up"_a, no_gil);
}
