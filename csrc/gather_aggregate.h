// The pair that any message passing can be written with, and that is closed under differentiation:
//   gather_aggregate  y_r = sum over the edges e of row r of w_e * x_other(e)
//   edge_product      p_e = t_target(e) * x_source(e)
// The gradient of the sum in the weights is the product, in the features the sum over the transposed graph;
// the gradients of the product are sums. Weights are (E,F) or (E,1): then the product is the scalar product
// of the two rows.
//
// Results have the same bits for any number of threads, at every processor level and on a GPU: each sum runs
// over its edges in their order, a scalar product over channels c by 32 partial sums of the c with the same
// c % 32 that are then added as a tree, and no multiply-add is fused.
#pragma once

#include <cstdint>

namespace dpt {

constexpr int kPartialSums = 32;  // of a scalar product

// The edges of each row: in (ptr[r] .. ptr[r + 1]), through `edge` where that is not null. By target: null
// and the sources; by source: RadiusGraph.by_source and the targets.
struct GatherRows {
  int64_t num_rows;      // N
  const int64_t* ptr;    // (N+1,)
  const int64_t* edge;   // (E,) or null
  const int64_t* other;  // (E,) the atom at the other end of each edge
};

struct EdgeEnds {
  int64_t num_edges;      // E
  const int64_t* target;  // (E,)
  const int64_t* source;  // (E,)
};

template <class Level>
struct GatherAggregateOps {
  // weights (E,F) or, where `shared`, (E,1) · features (N,F) · out (N,F)
  template <class T>
  static void gather_aggregate(const GatherRows&, int64_t channels, bool shared, const T* weights,
                               const T* features, T* out, int threads);
  // targets, sources (N,F) · out (E,F) or, where `shared`, (E,1)
  template <class T>
  static void edge_product(const EdgeEnds&, int64_t channels, bool shared, const T* targets, const T* sources,
                           T* out, int threads);
};

// The same on a GPU: pointers to device memory, one kernel on the stream, nothing allocated.
template <class T>
void cuda_gather_aggregate(const GatherRows&, int64_t channels, bool shared, const T* weights,
                           const T* features, T* out, void* stream);
template <class T>
void cuda_edge_product(const EdgeEnds&, int64_t channels, bool shared, const T* targets, const T* sources,
                       T* out, void* stream);

}  // namespace dpt
