// A graph and numbers for the programs of this folder, and a kernel that misses a barrier: the sanitizer must
// report it.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "device.h"

namespace {

using namespace dpt;

__global__ void without_a_barrier(int* out) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = shared[threadIdx.x ^ kWarp];
}

inline int race() {
  std::vector<int> out(2 * kWarp);
  launch(without_a_barrier, Grid{1, 2 * kWarp, int64_t(out.size() * sizeof(int))}, nullptr, out.data());
  return 0;
}

constexpr int64_t kAtoms = 2, kNeighbors = 10, kEdges = kAtoms * kNeighbors;

template <class T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> out(static_cast<size_t>(count));
  for (size_t k = 0; k < out.size(); ++k) out[k] = std::cos(T(k));
  return out;
}

// All edges of an atom come from the next one.
struct Ring {
  std::vector<int64_t> ptr, target, source;
  std::vector<int64_t> order;  // by source
  std::vector<int64_t> every;  // 0, 1, ...

  Ring() : order(kEdges), every(kEdges) {
    std::iota(every.begin(), every.end(), 0);
    for (int64_t i = 0; i <= kAtoms; ++i) ptr.push_back(i * kNeighbors);
    for (int64_t e : every) {
      target.push_back(e / kNeighbors);
      source.push_back((e / kNeighbors + 1) % kAtoms);
      order[size_t(e)] = (e + kEdges - kNeighbors) % kEdges;
    }
  }
};

}  // namespace
