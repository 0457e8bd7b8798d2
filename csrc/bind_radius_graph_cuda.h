// Bindings of the CUDA radius graph.
#pragma once

#include <pybind11/pybind11.h>

#include "radius_graph_cuda.h"

namespace dpt {

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

inline void bind_radius_graph_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  using Graph = CudaRadiusGraph;
  py::class_<Graph>(m, "CudaRadiusGraph", py::module_local())  // beside the emulated one
      .def(py::init([](uintptr_t positions, uintptr_t cells, uintptr_t pbc, uintptr_t atom_ptr,
                       int64_t num_structures, int64_t num_atoms, double cutoff, int32_t max_images,
                       int64_t max_neighbors, int64_t cell_list_atoms, uintptr_t fractions, uintptr_t records,
                       uintptr_t masks, uintptr_t bins, uintptr_t bin_order, uintptr_t bin_ptr,
                       uintptr_t faults, uintptr_t coincident, uintptr_t counts, uintptr_t tallies) {
             return Graph{at<double>(positions),
                          at<double>(cells),
                          at<uint8_t>(pbc),
                          at<int64_t>(atom_ptr),
                          num_structures,
                          num_atoms,
                          cutoff,
                          max_images,
                          max_neighbors,
                          cell_list_atoms,
                          at<double>(fractions),
                          at<void>(records),
                          at<uint64_t>(masks),
                          at<int64_t>(bins),
                          at<int64_t>(bin_order),
                          at<int64_t>(bin_ptr),
                          at<int32_t>(faults),
                          at<int64_t>(coincident),
                          at<int64_t>(counts),
                          at<int64_t>(tallies)};
           }),
           py::kw_only(), py::arg("positions"), py::arg("cells"), py::arg("pbc"), py::arg("atom_ptr"),
           py::arg("num_structures"), py::arg("num_atoms"), py::arg("cutoff"), py::arg("max_images"),
           py::arg("max_neighbors"), py::arg("cell_list_atoms"), py::arg("fractions"), py::arg("records"),
           py::arg("masks"), py::arg("bins"), py::arg("bin_order"), py::arg("bin_ptr"), py::arg("faults"),
           py::arg("coincident"), py::arg("counts"), py::arg("tallies"))
      .def_static("record_bytes", &Graph::record_bytes)
      .def_static("mask_words", &Graph::mask_words)
      .def(
          "prepare", [](const Graph& graph, uintptr_t stream) { graph.prepare(at<void>(stream)); },
          py::kw_only(), py::arg("stream"))
      .def(
          "count", [](const Graph& graph, uintptr_t stream) { graph.count(at<void>(stream)); }, py::kw_only(),
          py::arg("stream"))
      .def(
          "list",
          [](const Graph& graph, uintptr_t scan, uintptr_t hits, uintptr_t stream) {
            graph.list(at<int64_t>(scan), at<int32_t>(hits), at<void>(stream));
          },
          py::kw_only(), py::arg("scan"), py::arg("hits"), py::arg("stream"))
      .def(
          "select",
          [](const Graph& graph, uintptr_t scan, uintptr_t hits, uintptr_t distances, uintptr_t last_key,
             uintptr_t ties, uintptr_t stream) {
            graph.select(at<int64_t>(scan), at<int32_t>(hits), at<double>(distances), at<int64_t>(last_key),
                         at<int64_t>(ties), at<void>(stream));
          },
          py::kw_only(), py::arg("scan"), py::arg("hits"), py::arg("distances"), py::arg("last_key"),
          py::arg("ties"), py::arg("stream"))
      .def(
          "fill",
          [](const Graph& graph, uintptr_t scan, uintptr_t hits, uintptr_t last_key, uintptr_t ties,
             int64_t num_edges, uintptr_t edge_index, uintptr_t cell_shifts, uintptr_t stream) {
            graph.fill(at<int64_t>(scan), at<int32_t>(hits), at<int64_t>(last_key), at<int64_t>(ties),
                       num_edges, at<int64_t>(edge_index), at<int32_t>(cell_shifts), at<void>(stream));
          },
          py::kw_only(), py::arg("scan"), py::arg("hits"), py::arg("last_key"), py::arg("ties"),
          py::arg("num_edges"), py::arg("edge_index"), py::arg("cell_shifts"), py::arg("stream"))
      .def_static(
          "count_sources",
          [](uintptr_t sources, int64_t num_edges, uintptr_t counts, uintptr_t stream) {
            Graph::count_sources(at<int64_t>(sources), num_edges, at<int64_t>(counts), at<void>(stream));
          },
          py::kw_only(), py::arg("sources"), py::arg("num_edges"), py::arg("counts"), py::arg("stream"))
      .def_static(
          "order_by_source",
          [](uintptr_t sources, int64_t num_edges, int64_t num_atoms, uintptr_t ptr, uintptr_t next,
             uintptr_t order, uintptr_t stream) {
            Graph::order_by_source(at<int64_t>(sources), num_edges, num_atoms, at<int64_t>(ptr),
                                   at<int64_t>(next), at<int64_t>(order), at<void>(stream));
          },
          py::kw_only(), py::arg("sources"), py::arg("num_edges"), py::arg("num_atoms"), py::arg("ptr"),
          py::arg("next"), py::arg("order"), py::arg("stream"));
}

}  // namespace dpt
