// The radial messages of radial_messages.h on a GPU: pointers to device memory, all work on one stream,
// nothing allocated, no synchronisation, no atomics. The same bits every time; a row's do not depend on other
// rows.
#pragma once

#include "radial_messages.h"

namespace dpt {

// Further orders of the edges, and the workspace of the filter weights' gradient.
struct RadialMessageOrders {
  int64_t num_edges;      // E
  const int64_t* target;  // (E,)
  // These only where the gradient of the weights or of the bias is wanted:
  const int64_t* first_ptr;    // (K+1,) the edges with first = k: first_order[first_ptr[k]] ..
  const int64_t* first_order;  // (E,) stable
  void* workspace;             // workspace_bytes()
};

struct CudaRadialMessages {
  static constexpr int64_t kMostEdges = 8192;  // whose rows to the filters the workspace holds at once

  // Of the workspace; `second`: of the second backward. Elements of `element` bytes.
  static int64_t workspace_bytes(const RadialMessageShape&, int64_t num_edges, bool second, int64_t element);

  template <class T>
  static void forward(const RadialMessageGraph&, const RadialMessageOrders&, const RadialMessageShape&,
                      const RadialMessageInputs<T>&, const RadialMessageOutputs<T>&, void* stream);
  template <class T>
  static void backward(const RadialMessageGraph&, const RadialMessageOrders&, const RadialMessageShape&,
                       const RadialMessageInputs<T>&, const RadialMessageOutputs<T>&, void* stream);
  template <class T>
  static void double_backward(const RadialMessageGraph&, const RadialMessageOrders&,
                              const RadialMessageShape&, const RadialMessageInputs<T>&,
                              const RadialMessageTangents<T>& along, const RadialMessageOutputs<T>&,
                              void* stream);
};

}  // namespace dpt
