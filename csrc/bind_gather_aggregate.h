// Bindings of the general pair (gather_aggregate.h), on the CPU and on a GPU: the same arguments, but threads
// on one and a stream on the other.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "gather_aggregate.h"

namespace dpt {

template <class T, class Gather, class Product>
void define_gather_aggregate(pybind11::module_& m, const std::string& prefix, const std::string& suffix,
                             const char* where, Gather gather, Product product) {
  namespace py = pybind11;
  const auto integers = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
  const auto numbers = [](uintptr_t address) { return reinterpret_cast<T*>(address); };
  m.def((prefix + "gather_aggregate_" + suffix).c_str(),
        [=](int64_t num_rows, uintptr_t ptr, uintptr_t edge, uintptr_t other, int64_t channels, bool shared,
            uintptr_t weights, uintptr_t features, uintptr_t out, intptr_t place) {
          gather({num_rows, integers(ptr), integers(edge), integers(other)}, channels, shared,
                 numbers(weights), numbers(features), numbers(out), place);
        },
        py::kw_only(), py::arg("num_rows"), py::arg("ptr"), py::arg("edge") = 0, py::arg("other"),
        py::arg("channels"), py::arg("shared"), py::arg("weights"), py::arg("features"), py::arg("out"),
        py::arg(where), py::call_guard<py::gil_scoped_release>());
  m.def((prefix + "edge_product_" + suffix).c_str(),
        [=](int64_t num_edges, uintptr_t target, uintptr_t source, int64_t channels, bool shared,
            uintptr_t targets, uintptr_t sources, uintptr_t out, intptr_t place) {
          product({num_edges, integers(target), integers(source)}, channels, shared, numbers(targets),
                  numbers(sources), numbers(out), place);
        },
        py::kw_only(), py::arg("num_edges"), py::arg("target"), py::arg("source"), py::arg("channels"),
        py::arg("shared"), py::arg("targets"), py::arg("sources"), py::arg("out"), py::arg(where),
        py::call_guard<py::gil_scoped_release>());
}

template <class Level, class T>
void bind_gather_aggregate(pybind11::module_& m, const char* suffix) {
  using Ops = GatherAggregateOps<Level>;
  define_gather_aggregate<T>(
      m, "", suffix, "threads",
      [](const GatherRows& rows, int64_t channels, bool shared, const T* weights, const T* features, T* out,
         intptr_t threads) {
        Ops::template gather_aggregate<T>(rows, channels, shared, weights, features, out, int(threads));
      },
      [](const EdgeEnds& ends, int64_t channels, bool shared, const T* targets, const T* sources, T* out,
         intptr_t threads) {
        Ops::template edge_product<T>(ends, channels, shared, targets, sources, out, int(threads));
      });
}

template <class T>
void bind_cuda_gather_aggregate(pybind11::module_& m, const char* suffix) {
  define_gather_aggregate<T>(
      m, "cuda_", suffix, "stream",
      [](const GatherRows& rows, int64_t channels, bool shared, const T* weights, const T* features, T* out,
         intptr_t stream) {
        cuda_gather_aggregate<T>(rows, channels, shared, weights, features, out,
                                 reinterpret_cast<void*>(stream));
      },
      [](const EdgeEnds& ends, int64_t channels, bool shared, const T* targets, const T* sources, T* out,
         intptr_t stream) {
        cuda_edge_product<T>(ends, channels, shared, targets, sources, out, reinterpret_cast<void*>(stream));
      });
}

}  // namespace dpt
