// Every operation of dpt_hpc._C, with its shapes and its contract. Nothing here knows torch: the Python side
// (dpt_hpc/ops) checks dtypes, shapes and devices, allocates the results and hands in raw pointers, sizes and
// a thread count, so that one build serves every version of torch. Arrays are C-contiguous.
//
// Each family is a template over the processor level it is compiled for. bindings.cpp picks the highest level
// that the processor has; all levels give the same bits.
#pragma once

#include <cstdint>

#include "cgconv.h"
#include "gather_aggregate.h"
#include "radial_messages.h"
#include "radius_graph.h"
#include "radius_graph_cuda.h"

namespace dpt {

struct Baseline {};  // whatever the compiler targets by default
struct V3 {};        // x86-64-v3: AVX2, FMA
struct V4 {};        // x86-64-v4: AVX-512

template <class Level>
struct RadiusGraphOps {
  // Every pair within the cutoff, through every periodic image, found once and kept until `fill` has written
  // it.
  //   positions (N,3) · cells (B,3,3), rows are lattice vectors · pbc (B,3) · atom_ptr (B+1,)
  //   max_neighbors: keep the nearest so many of each target, ties by (distance, source, shift); 0 keeps all
  //   max_images: keep |shift| <= max_images on every axis; negative keeps all
  //   most_edges: more are a fault, found without keeping more than an eighth of them
  //   target_ptr (N+1,) out: the edges of target i are target_ptr[i] .. target_ptr[i + 1]
  // An edge is kept if |positions[j] + shift @ cell - positions[i]|^2 <= cutoff^2 in float64. The result has
  // the same bits for any number of threads. With a fault, target_ptr and the rows are meaningless.
  static RadiusSearch search(const double* positions, const double* cells, const uint8_t* pbc,
                             const int64_t* atom_ptr, int64_t num_structures, double cutoff,
                             int64_t max_neighbors, int64_t max_images, int64_t most_edges, int threads,
                             int64_t* target_ptr);

  // Write the edges found, sorted by (target, source, shift).
  //   edge_index (2,E) out: sources, then targets · cell_shifts (E,3) out
  static void fill(const RadiusSearch& search, const int64_t* target_ptr, int threads, int64_t* edge_index,
                   int32_t* cell_shifts);

  // The edges in the order of their sources: order[ptr[j] : ptr[j + 1]] are the edges with source j,
  // ascending (a stable counting sort).
  //   sources (E,) in [0, N) · ptr (N+1,) out · order (E,) out
  static void by_source(const int64_t* sources, int64_t num_edges, int64_t num_atoms, int64_t* ptr,
                        int64_t* order);
};

// The message of CGConv and its aggregation over the edges e = (j -> i) of each target i (types in cgconv.h):
//   y_i = mean or sum over e of sigmoid(g) softplus(s),  (g|s) = a_i + b_j + sum_k phi_k(d_e) table_k
// Nothing of shape (E, more than one) exists. The result has the same bits for any number of threads (not at
// every level: fused multiply-adds are used where the processor has them).
template <class Level>
struct CgconvOps {
  // y.
  template <class T>
  static void forward(const CgconvGraph&, const RadialBasis&, const CgconvInputs<T>&, const CgconvOutputs<T>&,
                      int threads);
  // Gradients of <grad_y, y> in a, b, lengths, table: those of them that are wanted.
  template <class T>
  static void backward(const CgconvGraph&, const RadialBasis&, const CgconvInputs<T>&,
                       const CgconvOutputs<T>&, int threads);
  // Gradients of <along, backward(grad_y, a, b, lengths, table)> in grad_y (out.y), a, b, lengths, table.
  template <class T>
  static void double_backward(const CgconvGraph&, const RadialBasis&, const CgconvInputs<T>&,
                              const CgconvTangents<T>& along, const CgconvOutputs<T>&, int threads);
};

// The same message on a GPU: pointers to device memory, all work on one stream, nothing allocated, no
// synchronisation, no atomics. The same bits every time; the rows' do not depend on other rows.
struct CudaCgconv {
  template <class T>
  static void forward(const CgconvGraph&, const CgconvOrders<T>&, const RadialBasis&, const CgconvInputs<T>&,
                      const CgconvOutputs<T>&, void* stream);
  template <class T>
  static void backward(const CgconvGraph&, const CgconvOrders<T>&, const RadialBasis&, const CgconvInputs<T>&,
                       const CgconvOutputs<T>&, void* stream);
  template <class T>
  static void double_backward(const CgconvGraph&, const CgconvOrders<T>&, const RadialBasis&,
                              const CgconvInputs<T>&, const CgconvTangents<T>& along, const CgconvOutputs<T>&,
                              void* stream);
};

}  // namespace dpt
