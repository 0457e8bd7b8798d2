// Bindings of CudaRadialMessages, shared by dpt_hpc._C and by the tests' emulation of it.
#pragma once

#include "bind_radial_messages.h"
#include "radial_messages_cuda.h"

namespace dpt {

template <class T>
void bind_radial_messages_cuda(pybind11::module_& m, const std::string& suffix) {
  using Arguments = RadialMessageArguments<T>;
  using Ops = CudaRadialMessages;
  const auto define = [&](const char* name, auto pass) {
    m.def((name + suffix).c_str(), [pass](const pybind11::kwargs& given) {
      Keywords keywords(given);
      const Arguments a(keywords);
      const RadialMessageOrders orders{
          keywords.number("num_edges"), keywords.pointer<const int64_t>("target"),
          keywords.pointer<const int64_t>("first_ptr"), keywords.pointer<const int64_t>("first_order"),
          keywords.pointer<void>("workspace")};
      void* const stream = keywords.pointer<void>("stream");
      keywords.finish();
      const pybind11::gil_scoped_release released;
      pass(a, orders, stream);
    });
  };
  define("cuda_radial_messages_forward_",
         [](const Arguments& a, const RadialMessageOrders& orders, void* stream) {
           Ops::forward(a.graph, orders, a.shape, a.in, a.out, stream);
         });
  define("cuda_radial_messages_backward_",
         [](const Arguments& a, const RadialMessageOrders& orders, void* stream) {
           Ops::backward(a.graph, orders, a.shape, a.in, a.out, stream);
         });
  define("cuda_radial_messages_double_backward_",
         [](const Arguments& a, const RadialMessageOrders& orders, void* stream) {
           Ops::double_backward(a.graph, orders, a.shape, a.in, a.along, a.out, stream);
         });
}

inline void bind_radial_messages_workspace(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "cuda_radial_messages_workspace_bytes",
      [](int64_t channels, bool attention, bool oriented, int64_t num_edges, bool second, int64_t element) {
        return CudaRadialMessages::workspace_bytes({channels, 1, 1, 1, attention, oriented, false}, num_edges,
                                                   second, element);
      },
      py::kw_only(), py::arg("channels"), py::arg("attention"), py::arg("oriented"), py::arg("num_edges"),
      py::arg("second"), py::arg("element"));
}

}  // namespace dpt
