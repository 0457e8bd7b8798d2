#include "ops.h"

#include <pybind11/pybind11.h>

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
      "edges_by_source",
      [](uintptr_t sources, int64_t num_edges, int64_t num_atoms, uintptr_t ptr, uintptr_t order) {
        Ops::by_source(pointer<const int64_t>(sources), num_edges, num_atoms, pointer<int64_t>(ptr),
                       pointer<int64_t>(order));
      },
      py::arg("sources"), py::arg("num_edges"), py::arg("num_atoms"), py::arg("ptr"), py::arg("order"),
      py::call_guard<py::gil_scoped_release>());
}

template <class Level>
void bind(py::module_ m) {
  bind_radius_graph<Level>(m);
}

}  // namespace

// dpt_hpc._C holds the functions of the highest level that this processor runs; each level that it runs is
// also a submodule (baseline, v3, v4), for the tests that compare their bits.
PYBIND11_MODULE(_C, m) {
  m.attr("has_cuda") = false;
  m.attr("level") = "baseline";
  bind<dpt::Baseline>(m.def_submodule("baseline"));
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("x86-64-v3");
  const bool v4 = v3 && __builtin_cpu_supports("x86-64-v4");
  if (v3) bind<dpt::V3>(m.def_submodule("v3"));
  if (v4) bind<dpt::V4>(m.def_submodule("v4"));
  if (v4) {
    m.attr("level") = "v4";
    bind<dpt::V4>(m);
  } else if (v3) {
    m.attr("level") = "v3";
    bind<dpt::V3>(m);
  } else {
    bind<dpt::Baseline>(m);
  }
#else
  bind<dpt::Baseline>(m);
#endif
}
