// Arguments of the fused CGConv message (ops.h).
#pragma once

#include <cstdint>

namespace dpt {

// phi_k(d), k < count: uniform cubic B-splines centred on start + k * spacing (4 taps each), or Gaussians
// exp(-0.5 ((d - start - k * spacing) / width)^2).
struct RadialBasis {
  bool spline;
  int64_t count;
  double start, spacing, width;
};

struct CgconvGraph {
  int64_t num_atoms;          // N
  const int64_t* target_ptr;  // (N+1,) edges of target i: target_ptr[i] .. target_ptr[i + 1]
  const int64_t* source;      // (E,)
  bool mean;                  // over the neighbours (0 where there are none), or the sum
};

// On a GPU: further orders of the edges. The gradient of the table sums chunks of edges first, in
// `chunk_sums`, then the chunks in their order. With Gaussians a chunk is any run of edges; with splines, a
// run of those edges whose lengths lie between the same two knots: interval k, of count + 5, is the one from
// knot k - 3 on; the first and the last are open.
template <class T>
struct CgconvOrders {
  int64_t num_edges;            // E, below 2^31
  const int64_t* target;        // (E,)
  const int64_t* source_ptr;    // (N+1,) the edges of source j: source_order[source_ptr[j]] ..
  const int64_t* source_order;  // (E,)
  // These only where the gradient of the table is wanted; the next three only with splines.
  const int64_t* interval_ptr;    // (count+6,) the edges of interval k: interval_order[interval_ptr[k]] ..
  const int64_t* interval_order;  // (E,)
  const int64_t* chunk_ptr;       // (count+6,) the chunks of interval k: chunk_ptr[k] ..
  int64_t chunk_edges;            // the most edges of a chunk
  int64_t num_chunks;             // all of them, or more
  T* chunk_sums;                  // (num_chunks, 4 | count, 2F) workspace
};

// F channels; a row of 2F holds the gate, then the filter.
template <class T>
struct CgconvInputs {
  int64_t channels;  // F
  const T* a;        // (N,2F) of the targets
  const T* b;        // (N,2F) of the sources
  const T* lengths;  // (E,)
  const T* table;    // (count,2F) filter weights
  const T* grad_y;   // (N,F), null in the forward pass
};

// Directions of the second backward: cotangents of the results of the first; null is zero.
template <class T>
struct CgconvTangents {
  const T* a;        // (N,2F)
  const T* b;        // (N,2F)
  const T* lengths;  // (E,)
  const T* table;    // (count,2F)
};

// Results; null is not wanted.
template <class T>
struct CgconvOutputs {
  T* y;        // (N,F): y, or the gradient of grad_y
  T* a;        // (N,2F)
  T* b;        // (N,2F)
  T* lengths;  // (E,)
  T* table;    // (count,2F)
};

}  // namespace dpt
