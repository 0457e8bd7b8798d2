// Bindings of CudaCgconv, shared by dpt_hpc._C and by the tests' emulation of it.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "ops.h"

namespace dpt {

template <class T>
void bind_cgconv_cuda(pybind11::module_& m, const char* suffix) {
  namespace py = pybind11;
  using Pass = void (*)(const CgconvGraph&, const CgconvOrders<T>&, const RadialBasis&,
                        const CgconvInputs<T>&, const CgconvTangents<T>&, const CgconvOutputs<T>&, void*);
  const auto define = [&](const char* name, Pass pass) {
    m.def((std::string(name) + suffix).c_str(),
          [pass](int64_t num_atoms, int64_t num_edges, uintptr_t target_ptr, uintptr_t source,
                 uintptr_t target, uintptr_t source_ptr, uintptr_t source_order, uintptr_t interval_ptr,
                 uintptr_t interval_order, uintptr_t chunk_ptr, int64_t chunk_edges, int64_t num_chunks,
                 uintptr_t chunk_sums, bool mean, bool spline, int64_t count, double start, double spacing,
                 double width, int64_t channels, uintptr_t a, uintptr_t b, uintptr_t lengths, uintptr_t table,
                 uintptr_t grad_y, uintptr_t along_a, uintptr_t along_b, uintptr_t along_lengths,
                 uintptr_t along_table, uintptr_t out_y, uintptr_t out_a, uintptr_t out_b,
                 uintptr_t out_lengths, uintptr_t out_table, uintptr_t stream) {
            const auto integers = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
            const auto from = [](uintptr_t address) { return reinterpret_cast<const T*>(address); };
            const auto to = [](uintptr_t address) { return reinterpret_cast<T*>(address); };
            pass({num_atoms, integers(target_ptr), integers(source), mean},
                 {num_edges, integers(target), integers(source_ptr), integers(source_order),
                  integers(interval_ptr), integers(interval_order), integers(chunk_ptr), chunk_edges,
                  num_chunks, to(chunk_sums)},
                 {spline, count, start, spacing, width},
                 {channels, from(a), from(b), from(lengths), from(table), from(grad_y)},
                 {from(along_a), from(along_b), from(along_lengths), from(along_table)},
                 {to(out_y), to(out_a), to(out_b), to(out_lengths), to(out_table)},
                 reinterpret_cast<void*>(stream));
          },
          py::kw_only(), py::arg("num_atoms"), py::arg("num_edges"), py::arg("target_ptr"), py::arg("source"),
          py::arg("target"), py::arg("source_ptr") = 0, py::arg("source_order") = 0,
          py::arg("interval_ptr") = 0, py::arg("interval_order") = 0, py::arg("chunk_ptr") = 0,
          py::arg("chunk_edges") = 0, py::arg("num_chunks") = 0, py::arg("chunk_sums") = 0, py::arg("mean"),
          py::arg("spline"), py::arg("count"), py::arg("start"), py::arg("spacing"), py::arg("width"),
          py::arg("channels"), py::arg("a"), py::arg("b"), py::arg("lengths"), py::arg("table"),
          py::arg("grad_y") = 0, py::arg("along_a") = 0, py::arg("along_b") = 0, py::arg("along_lengths") = 0,
          py::arg("along_table") = 0, py::arg("out_y") = 0, py::arg("out_a") = 0, py::arg("out_b") = 0,
          py::arg("out_lengths") = 0, py::arg("out_table") = 0, py::arg("stream"),
          py::call_guard<py::gil_scoped_release>());
  };
  define("cuda_cgconv_forward_",
         [](const auto& graph, const auto& orders, const auto& basis, const auto& in, const auto&,
            const auto& out, void* stream) { CudaCgconv::forward(graph, orders, basis, in, out, stream); });
  define("cuda_cgconv_backward_",
         [](const auto& graph, const auto& orders, const auto& basis, const auto& in, const auto&,
            const auto& out, void* stream) { CudaCgconv::backward(graph, orders, basis, in, out, stream); });
  define("cuda_cgconv_double_backward_",
         [](const auto& graph, const auto& orders, const auto& basis, const auto& in, const auto& along,
            const auto& out,
            void* stream) { CudaCgconv::double_backward(graph, orders, basis, in, along, out, stream); });
}

}  // namespace dpt
