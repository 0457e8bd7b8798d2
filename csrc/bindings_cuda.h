// Bindings of the CUDA operations, shared by dpt_hpc._C and by the tests' emulation of them.
#pragma once

#include "bind_cgconv_cuda.h"
#include "bind_gather_aggregate.h"
#include "bind_radial_messages_cuda.h"
#include "bind_radius_graph_cuda.h"

namespace dpt {

inline void bind_cuda(pybind11::module_& m) {
  bind_radius_graph_cuda(m);
  bind_cuda_gather_aggregate<float>(m, "float32");
  bind_cuda_gather_aggregate<double>(m, "float64");
  bind_radial_messages_cuda<float>(m, "float32");
  bind_radial_messages_cuda<double>(m, "float64");
  bind_radial_messages_workspace(m);
  bind_cgconv_cuda<float>(m, "float32");
  bind_cgconv_cuda<double>(m, "float64");
}

}  // namespace dpt
