#include "bind_gather_aggregate.h"
#include "bind_radial_messages.h"
#include "bindings_cuda.h"
#include "ops.h"

#include <pybind11/pybind11.h>

#include <limits>
#include <string>

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT: tensor.data_ptr() arrives as an integer
}

template <class Level>
void bind_radius_graph(py::module_& m) {
  using Ops = dpt::RadiusGraphOps<Level>;
  m.def(
      "radius_search",
      [](uintptr_t positions, uintptr_t cells, uintptr_t pbc, uintptr_t atom_ptr, int64_t num_structures,
         double cutoff, int64_t max_neighbors, int64_t max_images, int threads, uintptr_t target_ptr,
         int64_t most_edges) {
        return Ops::search(pointer<const double>(positions), pointer<const double>(cells),
                           pointer<const uint8_t>(pbc), pointer<const int64_t>(atom_ptr), num_structures,
                           cutoff, max_neighbors, max_images, most_edges, threads,
                           pointer<int64_t>(target_ptr));
      },
      py::arg("positions"), py::arg("cells"), py::arg("pbc"), py::arg("atom_ptr"), py::arg("num_structures"),
      py::arg("cutoff"), py::arg("max_neighbors"), py::arg("max_images"), py::arg("threads"),
      py::arg("target_ptr"), py::arg("most_edges") = std::numeric_limits<int32_t>::max(),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "radius_fill",
      [](const dpt::RadiusSearch& search, uintptr_t target_ptr, int threads, uintptr_t edge_index,
         uintptr_t cell_shifts) {
        Ops::fill(search, pointer<const int64_t>(target_ptr), threads, pointer<int64_t>(edge_index),
                  pointer<int32_t>(cell_shifts));
      },
      py::arg("search"), py::arg("target_ptr"), py::arg("threads"), py::arg("edge_index"),
      py::arg("cell_shifts"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "edges_by_source",
      [](uintptr_t sources, int64_t num_edges, int64_t num_atoms, uintptr_t ptr, uintptr_t order) {
        Ops::by_source(pointer<const int64_t>(sources), num_edges, num_atoms, pointer<int64_t>(ptr),
                       pointer<int64_t>(order));
      },
      py::arg("sources"), py::arg("num_edges"), py::arg("num_atoms"), py::arg("ptr"), py::arg("order"),
      py::call_guard<py::gil_scoped_release>());
}

template <class Level, class T>
void bind_cgconv(py::module_& m, const char* suffix) {
  using Ops = dpt::CgconvOps<Level>;
  using Pass = void (*)(const dpt::CgconvGraph&, const dpt::RadialBasis&, const dpt::CgconvInputs<T>&,
                        const dpt::CgconvTangents<T>&, const dpt::CgconvOutputs<T>&, int);
  const auto define = [&](const char* name, Pass pass) {
    m.def((std::string(name) + suffix).c_str(),
          [pass](int64_t num_atoms, uintptr_t target_ptr, uintptr_t source, bool mean, bool spline,
                 int64_t count, double start, double spacing, double width, int64_t channels, uintptr_t a,
                 uintptr_t b, uintptr_t lengths, uintptr_t table, uintptr_t grad_y, uintptr_t along_a,
                 uintptr_t along_b, uintptr_t along_lengths, uintptr_t along_table, uintptr_t out_y,
                 uintptr_t out_a, uintptr_t out_b, uintptr_t out_lengths, uintptr_t out_table, int threads) {
            pass({num_atoms, pointer<const int64_t>(target_ptr), pointer<const int64_t>(source), mean},
                 {spline, count, start, spacing, width},
                 {channels, pointer<const T>(a), pointer<const T>(b), pointer<const T>(lengths),
                  pointer<const T>(table), pointer<const T>(grad_y)},
                 {pointer<const T>(along_a), pointer<const T>(along_b), pointer<const T>(along_lengths),
                  pointer<const T>(along_table)},
                 {pointer<T>(out_y), pointer<T>(out_a), pointer<T>(out_b), pointer<T>(out_lengths),
                  pointer<T>(out_table)},
                 threads);
          },
          py::kw_only(), py::arg("num_atoms"), py::arg("target_ptr"), py::arg("source"), py::arg("mean"),
          py::arg("spline"), py::arg("count"), py::arg("start"), py::arg("spacing"), py::arg("width"),
          py::arg("channels"), py::arg("a"), py::arg("b"), py::arg("lengths"), py::arg("table"),
          py::arg("grad_y") = 0, py::arg("along_a") = 0, py::arg("along_b") = 0, py::arg("along_lengths") = 0,
          py::arg("along_table") = 0, py::arg("out_y") = 0, py::arg("out_a") = 0, py::arg("out_b") = 0,
          py::arg("out_lengths") = 0, py::arg("out_table") = 0, py::arg("threads"),
          py::call_guard<py::gil_scoped_release>());
  };
  define("cgconv_forward_",
         [](const auto& graph, const auto& basis, const auto& in, const auto&, const auto& out, int threads) {
           Ops::forward(graph, basis, in, out, threads);
         });
  define("cgconv_backward_",
         [](const auto& graph, const auto& basis, const auto& in, const auto&, const auto& out, int threads) {
           Ops::backward(graph, basis, in, out, threads);
         });
  define("cgconv_double_backward_",
         [](const auto& graph, const auto& basis, const auto& in, const auto& along, const auto& out,
            int threads) { Ops::double_backward(graph, basis, in, along, out, threads); });
}

template <class Level>
void bind(py::module_ m) {
  bind_cgconv<Level, float>(m, "float32");
  bind_cgconv<Level, double>(m, "float64");
  dpt::bind_gather_aggregate<Level, float>(m, "float32");
  dpt::bind_gather_aggregate<Level, double>(m, "float64");
  dpt::bind_radial_messages<Level, float>(m, "float32");
  dpt::bind_radial_messages<Level, double>(m, "float64");
  bind_radius_graph<Level>(m);
}

}  // namespace

// dpt_hpc._C holds the functions of the highest level that this processor runs; each level that it runs is
// also a submodule (baseline, v3, v4), for the tests that compare their bits.
PYBIND11_MODULE(_C, m) {
  py::class_<dpt::RadiusFault> fault(m, "RadiusFault");
  fault.def_readonly("kind", &dpt::RadiusFault::kind)
      .def_readonly("structure", &dpt::RadiusFault::structure)
      .def_readonly("target", &dpt::RadiusFault::target)
      .def_readonly("source", &dpt::RadiusFault::source)
      .def_readonly("value", &dpt::RadiusFault::value);
  py::enum_<dpt::RadiusFault::Kind>(fault, "Kind")
      .value("NONE", dpt::RadiusFault::None)
      .value("POSITIONS", dpt::RadiusFault::Positions)
      .value("CELL", dpt::RadiusFault::Cell)
      .value("IMAGES", dpt::RadiusFault::Images)
      .value("COINCIDENT", dpt::RadiusFault::Coincident)
      .value("EDGES", dpt::RadiusFault::Edges);
  py::class_<dpt::RadiusSearch>(m, "RadiusSearch")
      .def_readonly("fault", &dpt::RadiusSearch::fault)
      .def_readonly("num_edges", &dpt::RadiusSearch::num_edges)
      .def_readonly("num_truncated", &dpt::RadiusSearch::num_truncated);
#if defined(DPT_CUDA)
  m.attr("has_cuda") = true;
  dpt::bind_cuda(m);
#else
  m.attr("has_cuda") = false;
#endif
  void (*highest)(py::module_) = nullptr;
  const auto offer = [&](const char* level, bool runs_here, void (*bind_level)(py::module_)) {
    if (!runs_here) return;
    bind_level(m.def_submodule(level));
    m.attr("level") = level;
    highest = bind_level;
  };
  offer("baseline", true, bind<dpt::Baseline>);
#if defined(DPT_HAS_V3)
  offer("v3", __builtin_cpu_supports("x86-64-v3"), bind<dpt::V3>);
#endif
#if defined(DPT_HAS_V4)
  offer("v4", __builtin_cpu_supports("x86-64-v3") && __builtin_cpu_supports("x86-64-v4"), bind<dpt::V4>);
#endif
  highest(m);
}
