// Bindings of the CUDA operations, shared by dpt_hpc._C and by the tests' emulation of them.
#pragma once

#include <pybind11/pybind11.h>

#include "bind_cgconv_cuda.h"
#include "bind_gather_aggregate.h"
#include "ops.h"

namespace dpt {

inline void bind_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  const auto integers = [](uintptr_t address) { return reinterpret_cast<int64_t*>(address); };
  const auto doubles = [](uintptr_t address) { return reinterpret_cast<double*>(address); };
  const auto bytes = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  bind_cuda_gather_aggregate<float>(m, "float32");
  bind_cuda_gather_aggregate<double>(m, "float64");
  py::class_<CudaRadiusGraph>(m, "CudaRadiusGraph", py::module_local())  // beside the emulated one
      .def(py::init([=](uintptr_t positions, uintptr_t cells, uintptr_t pbc, uintptr_t atom_ptr,
                        int64_t num_structures, int64_t num_atoms, double cutoff, int32_t max_images,
                        uintptr_t fractions, uintptr_t records, uintptr_t faults) {
             return CudaRadiusGraph{doubles(positions),
                                    doubles(cells),
                                    static_cast<uint8_t*>(bytes(pbc)),
                                    integers(atom_ptr),
                                    num_structures,
                                    num_atoms,
                                    cutoff,
                                    max_images,
                                    doubles(fractions),
                                    bytes(records),
                                    static_cast<int32_t*>(bytes(faults))};
           }),
           py::kw_only(), py::arg("positions"), py::arg("cells"), py::arg("pbc"), py::arg("atom_ptr"),
           py::arg("num_structures"), py::arg("num_atoms"), py::arg("cutoff"), py::arg("max_images"),
           py::arg("fractions"), py::arg("records"), py::arg("faults"))
      .def_static("record_bytes", &CudaRadiusGraph::record_bytes)
      .def(
          "count",
          [=](const CudaRadiusGraph& graph, uintptr_t counts, uintptr_t coincident, uintptr_t stream) {
            graph.count(integers(counts), integers(coincident), bytes(stream));
          },
          py::kw_only(), py::arg("counts"), py::arg("coincident"), py::arg("stream"))
      .def(
          "select",
          [=](const CudaRadiusGraph& graph, uintptr_t counts, int64_t max_neighbors, uintptr_t offsets,
              uintptr_t distances, uintptr_t last_key, uintptr_t ties, uintptr_t stream) {
            graph.select(integers(counts), max_neighbors, integers(offsets), doubles(distances),
                         integers(last_key), integers(ties), bytes(stream));
          },
          py::kw_only(), py::arg("counts"), py::arg("max_neighbors"), py::arg("offsets"),
          py::arg("distances"), py::arg("last_key"), py::arg("ties"), py::arg("stream"))
      .def(
          "fill",
          [=](const CudaRadiusGraph& graph, uintptr_t counts, int64_t max_neighbors, uintptr_t last_key,
              uintptr_t ties, uintptr_t target_ptr, int64_t num_edges, uintptr_t edge_index,
              uintptr_t cell_shifts, uintptr_t stream) {
            graph.fill(integers(counts), max_neighbors, integers(last_key), integers(ties),
                       integers(target_ptr), num_edges, integers(edge_index),
                       static_cast<int32_t*>(bytes(cell_shifts)), bytes(stream));
          },
          py::kw_only(), py::arg("counts"), py::arg("max_neighbors"), py::arg("last_key"), py::arg("ties"),
          py::arg("target_ptr"), py::arg("num_edges"), py::arg("edge_index"), py::arg("cell_shifts"),
          py::arg("stream"));
  bind_cgconv_cuda<float>(m, "float32");
  bind_cgconv_cuda<double>(m, "float64");
}

}  // namespace dpt
