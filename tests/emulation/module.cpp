// The bindings of every CUDA kernel, as host C++.
#include "bindings_cuda.h"
#include "device.h"

PYBIND11_MODULE(emulated, m) {
  dpt::bind_cuda(m);
  m.def("set_seed", [](unsigned seed) { emulation::seed() = seed; });
}
