// Every operation of dpt_hpc._C, with its shapes and its contract. Nothing here knows torch: the Python side
// (dpt_hpc/ops) checks dtypes, shapes and devices, allocates the results and hands in raw pointers, sizes and
// a thread count, so that one build serves every version of torch. Arrays are C-contiguous.
//
// Each family is a template over the processor level it is compiled for. bindings.cpp picks the highest level
// that the processor has; all levels give the same bits.
#pragma once

#include <cstdint>

namespace dpt {

struct Baseline {};  // whatever the compiler targets by default
struct V3 {};        // x86-64-v3: AVX2, FMA
struct V4 {};        // x86-64-v4: AVX-512

template <class Level>
struct RadiusGraphOps {
  // The edges in the order of their sources: order[ptr[j] : ptr[j + 1]] are the edges with source j,
  // ascending (a stable counting sort).
  //   sources (E,) in [0, N) · ptr (N+1,) out · order (E,) out
  static void by_source(const int64_t* sources, int64_t num_edges, int64_t num_atoms, int64_t* ptr,
                        int64_t* order);
};

}  // namespace dpt
