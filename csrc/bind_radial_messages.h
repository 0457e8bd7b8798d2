// Python's view of the radial messages: keyword arguments named as the fields of radial_messages.h, pointers
// as integers; an argument that is not given is null.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "radial_messages.h"

namespace dpt {
namespace {  // pybind11's types are hidden

// Reads keyword arguments, and refuses those that nobody asked for.
class Keywords {
 public:
  explicit Keywords(const pybind11::kwargs& given) : given_(given) {}

  int64_t number(const char* name) {
    ++taken_;
    return given_[name].cast<int64_t>();
  }
  template <class T>
  T* pointer(const std::string& name) {
    if (!given_.contains(name)) return nullptr;
    ++taken_;
    return reinterpret_cast<T*>(given_[name.c_str()].cast<uintptr_t>());  // NOLINT
  }
  void finish() const {
    if (taken_ != given_.size()) throw pybind11::type_error("unexpected keyword argument");
  }

 private:
  const pybind11::kwargs& given_;
  size_t taken_ = 0;
};

// All arguments of a pass, but for what the device needs beside them.
template <class T>
struct RadialMessageArguments {
  RadialMessageGraph graph;
  RadialMessageShape shape;
  RadialMessageInputs<T> in;
  RadialMessageTangents<T> along;
  RadialMessageOutputs<T> out;

  explicit RadialMessageArguments(Keywords& k)
      : graph{k.number("num_atoms"), k.pointer<const int64_t>("target_ptr"),
              k.pointer<const int64_t>("source"), k.pointer<const int64_t>("source_ptr"),
              k.pointer<const int64_t>("source_order")},
        shape{k.number("channels"), k.number("heads"),          k.number("taps_per_edge"),
              k.number("count"),    k.number("attention") != 0, k.number("oriented") != 0,
              k.number("silu") != 0},
        in{array(k, "queries"),  array(k, "keys"),       array(k, "values"),
           array(k, "vectors"),  array(k, "taps"),       k.pointer<const int32_t>("first"),
           array(k, "envelope"), array(k, "directions"), array(k, "weights"),
           array(k, "bias"),     array(k, "grad_x"),     array(k, "grad_v")},
        along{array(k, "along_queries"),    array(k, "along_keys"),    array(k, "along_values"),
              array(k, "along_vectors"),    array(k, "along_taps"),    array(k, "along_envelope"),
              array(k, "along_directions"), array(k, "along_weights"), array(k, "along_bias")},
        out{result(k, "out_x"),       result(k, "out_v"),        result(k, "out_queries"),
            result(k, "out_keys"),    result(k, "out_values"),   result(k, "out_vectors"),
            result(k, "out_taps"),    result(k, "out_envelope"), result(k, "out_directions"),
            result(k, "out_weights"), result(k, "out_bias")} {}

 private:
  static const T* array(Keywords& k, const char* name) { return k.pointer<const T>(name); }
  static T* result(Keywords& k, const char* name) { return k.pointer<T>(name); }
};

template <class Level, class T>
void bind_radial_messages(pybind11::module_& m, const std::string& suffix) {
  using Ops = RadialMessageOps<Level>;
  const auto define = [&](const char* name, auto pass) {
    m.def((name + suffix).c_str(), [pass](const pybind11::kwargs& given) {
      Keywords keywords(given);
      const RadialMessageArguments<T> a(keywords);
      const int threads = static_cast<int>(keywords.number("threads"));
      keywords.finish();
      const pybind11::gil_scoped_release released;
      pass(a, threads);
    });
  };
  using Arguments = RadialMessageArguments<T>;
  define("radial_messages_forward_",
         [](const Arguments& a, int threads) { Ops::forward(a.graph, a.shape, a.in, a.out, threads); });
  define("radial_messages_backward_",
         [](const Arguments& a, int threads) { Ops::backward(a.graph, a.shape, a.in, a.out, threads); });
  define("radial_messages_double_backward_", [](const Arguments& a, int threads) {
    Ops::double_backward(a.graph, a.shape, a.in, a.along, a.out, threads);
  });
}

}  // namespace
}  // namespace dpt
