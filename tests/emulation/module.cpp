#include "bindings_cuda.h"

PYBIND11_MODULE(emulated, m) {
  dpt::bind_cuda(m);
}
