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
