// Messages whose filters come from a window of radial functions: the equivariant transformer's attention
// message, its neighbour embedding, SchNet's continuous-filter convolution and PaiNN's message.
//
// An edge e = (j -> i) carries `taps`, the values of the few radial functions that are not zero on it, and
// `first`, the index of the first of them. How they follow from the edge's length is not known here.
// clang-format off: one formula a line
//
//   z_e  = sum_{m < M} taps_em weights[first_e + m] + bias
//   F_e  = silu(z_e) or z_e                                   columns [F^k|F^x|F^1|F^2]
//   s_eh = sum_{c in h} q_ic k_jc F^k_ec                      c belongs to head h = c / (channels / heads)
//   a_eh = silu(s_eh) envelope_e                              envelope_e alone where there is no attention
//   X_i  = sum_e a_eh v^x_jc F^x_ec
//   V_i  = sum_e (vec_j v^1_jc F^1_ec + direction_e v^2_jc F^2_ec)
//
// F^k is there with attention only, F^1 and F^2 with vectors only: weights and bias have n C columns,
// n = attention + 1 + 2 vectors. A null envelope is 1, a null bias 0.
//
// First backward, x_i and v_i being the cotangents of X_i and V_i:
//   ab_h = sum_{c in h} x_i v^x F^x      sb = ab envelope silu'(s)
//   w^1  = v_i . vec_j                   w^2 = v_i . direction
//   rows to F: r^k = sb q k, r^x = a x_i v^x, r^1 = w^1 v^1, r^2 = w^2 v^2
//   rows to z: gz = r act'(z)
//   to q_i: sb k F^k                     to k_j: sb q F^k
//   to v^x_j: a x_i F^x                  to v^1_j: w^1 F^1              to v^2_j: w^2 F^2
//   to vec_j: v_i v^1 F^1                to direction: sum_c v_i v^2 F^2
//   to envelope: sum_h ab silu(s)        to taps_m: <gz, weights[first + m]>
//   to weights[first + m]: sum_e taps_m gz                              to bias: sum_e gz
//
// Second backward, along tangents (suffix t) of all those results:
//   zt = sum_m (taps_t weights + taps weights_t) + bias_t               Ft = act'(z) zt
//   st = sum_{c in h} ((qt k + q kt) F^k + q k Ft^k)
//   at = silu'(s) st envelope + silu(s) envelope_t
//   W  = v F, Wt = vt F + v Ft, for each of x, 1, 2                     ah = sum_{c in h} x_i Wt^x
//   sh = ab (silu''(s) st envelope + silu'(s) envelope_t) + ah envelope silu'(s)
//   wh^x = x_i at                        wh^1 = v_i . vec_t             wh^2 = v_i . direction_t
//   to x_i: at W^x + a Wt^x              to v_i: vec_t W^1 + vec Wt^1 + direction_t W^2 + direction Wt^2
//   to q_i: sh k F^k + sb (kt F^k + k Ft^k)
//   to k_j: sh q F^k + sb (qt F^k + q Ft^k)
//   to v^x_j: wh^x F^x + a x_i Ft^x      to v^1_j: wh^1 F^1 + w^1 Ft^1  to v^2_j: likewise
//   to vec_j: v_i Wt^1                   to direction: sum_c v_i Wt^2
//   to envelope: sum_h (ab silu'(s) st + ah silu(s))
//   rh^k = sh q k + sb (qt k + q kt), rh^x = wh^x v^x + a x_i vt^x, rh^1 = wh^1 v^1 + w^1 vt^1, rh^2 likewise
//   gz2  = rh act'(z) + r act''(z) zt
//   to taps_m: <gz2, weights[first + m]> + <gz, weights_t[first + m]>
//   to weights[first + m]: sum_e (taps_m gz2 + taps_t gz)               to bias: sum_e gz2
// clang-format on
#pragma once

#include <cstdint>

namespace dpt {

struct RadialMessageGraph {
  int64_t num_atoms;            // N
  const int64_t* target_ptr;    // (N+1,) edges of target i: target_ptr[i] .. target_ptr[i + 1]
  const int64_t* source;        // (E,)
  const int64_t* source_ptr;    // (N+1,) edges out of j: source_order[source_ptr[j] .. source_ptr[j + 1]];
  const int64_t* source_order;  // (E,)   both null on the CPU, which does not need them
};

struct RadialMessageShape {
  int64_t channels;  // C, a multiple of heads
  int64_t heads;     // H, 1 without attention
  int64_t taps;      // M, the radial functions in an edge's window
  int64_t count;     // K >= M, all of them; 0 <= first <= K - M
  bool attention;    // queries and keys are there
  bool vectors;      // vectors and directions are there
  bool silu;         // of the filters, or the identity
};

// Null where absent.
template <class T>
struct RadialMessageInputs {
  const T* queries;      // (N,C)
  const T* keys;         // (N,C)
  const T* values;       // (N,C) or, with vectors, (N,3C): [v^x|v^1|v^2]
  const T* vectors;      // (N,3,C)
  const T* taps;         // (E,M)
  const int32_t* first;  // (E,)
  const T* envelope;     // (E,)
  const T* directions;   // (E,3)
  const T* weights;      // (K,nC)
  const T* bias;         // (nC,)
  const T* grad_x;       // (N,C), null in the forward pass
  const T* grad_v;       // (N,3,C), likewise
};

// Cotangents of the results of the first backward, of the shapes of the inputs; null is zero.
template <class T>
struct RadialMessageTangents {
  const T *queries, *keys, *values, *vectors, *taps, *envelope, *directions, *weights, *bias;
};

// Results; null is not wanted.
template <class T>
struct RadialMessageOutputs {
  T* x;  // (N,C): X, or the gradient of grad_x
  T* v;  // (N,3,C): V, or the gradient of grad_v
  T *queries, *keys, *values, *vectors, *taps, *envelope, *directions, *weights, *bias;  // as the inputs
};

// The result has the same bits for any number of threads (not at every level).
template <class Level>
struct RadialMessageOps {
  // X and V.
  template <class T>
  static void forward(const RadialMessageGraph&, const RadialMessageShape&, const RadialMessageInputs<T>&,
                      const RadialMessageOutputs<T>&, int threads);
  // Gradients of <grad_x, X> + <grad_v, V> in every input: those of them that are wanted.
  template <class T>
  static void backward(const RadialMessageGraph&, const RadialMessageShape&, const RadialMessageInputs<T>&,
                       const RadialMessageOutputs<T>&, int threads);
  // Gradients of <along, backward(...)> in grad_x, grad_v (out.x, out.v) and every input.
  template <class T>
  static void double_backward(const RadialMessageGraph&, const RadialMessageShape&,
                              const RadialMessageInputs<T>&, const RadialMessageTangents<T>& along,
                              const RadialMessageOutputs<T>&, int threads);
};

}  // namespace dpt
