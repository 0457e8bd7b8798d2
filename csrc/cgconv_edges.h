// What the CUDA kernels of the CGConv message make of an edge: its filter, its gate, and the terms of each
// pass (the formulas are at the top of cgconv_rows.h). A lane owns V neighbouring channels, gate and filter.
#pragma once

#include "cgconv.h"
#include "device.h"
#include "gate.h"

namespace dpt {
namespace {

enum class Pass { kForward, kBackward, kDoubleBackward };

// V numbers that are loaded and stored at once.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
};

template <class T, int V>
__device__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

// Zero where `from` is null.
template <class T, int V>
__device__ Pack<T, V> load_or_zero(const T* from) {
  return from ? load<T, V>(from) : Pack<T, V>{};
}

template <class T, int V>
__device__ void store(T* to, const Pack<T, V>& value) {
  *reinterpret_cast<Pack<T, V>*>(to) = value;
}

// One call. Null outputs are not wanted; null tangents are zero.
template <class T>
struct Task {
  CgconvGraph graph;
  CgconvOrders<T> orders;
  CgconvInputs<T> in;
  CgconvTangents<T> along;
  CgconvOutputs<T> out;
  int count;  // of basis functions
  T start, spacing, inverse_spacing, inverse_width;

  // w_i: of the mean or the sum.
  __device__ T weight(int64_t i) const {
    if (!graph.mean) return T(1);
    const int64_t n = graph.target_ptr[i + 1] - graph.target_ptr[i];
    return n > 0 ? T(1) / T(n) : T(0);
  }
};

// Values and derivatives in the length, up to Orders - 1, of the filters of B edges.
template <class T, int V, int B, int Orders>
struct Filters {
  T g[Orders][B][V], s[Orders][B][V];
};

// The cubic pieces of the four splines that are not zero between two knots, t of the way from one to the
// next, and their derivatives in t times inverse^order.
template <class T, int Orders>
struct SplineTaps {
  T weight[Orders][4];

  __host__ __device__ SplineTaps(T t, T inverse) {
    const T r = T(1) - t;
    weight[0][0] = r * r * r * T(1. / 6);
    weight[0][1] = T(2. / 3) - t * t * (T(1) - T(0.5) * t);
    weight[0][2] = T(2. / 3) - r * r * (T(1) - T(0.5) * r);
    weight[0][3] = t * t * t * T(1. / 6);
    if constexpr (Orders > 1) {
      weight[1][0] = T(-0.5) * r * r * inverse;
      weight[1][1] = t * (T(1.5) * t - T(2)) * inverse;
      weight[1][2] = r * (T(2) - T(1.5) * r) * inverse;
      weight[1][3] = T(0.5) * t * t * inverse;
    }
    if constexpr (Orders > 2) {
      const T square = inverse * inverse;
      weight[2][0] = r * square;
      weight[2][1] = (T(3) * t - T(2)) * square;
      weight[2][2] = (T(3) * r - T(2)) * square;
      weight[2][3] = t * square;
    }
  }
};

// Lengths in knots, and the last knot before them. From -3 down and count + 1 up no spline of the table is
// left.
template <class T>
struct SplinePlace {
  T x;
  int knot;

  __host__ __device__ SplinePlace(T length, T start, T inverse, int count) : x((length - start) * inverse) {
    x = x < T(-3) ? T(-3) : x > T(count + 1) ? T(count + 1) : x;
    knot = x == x ? int(floor(x)) : 0;
  }
};

// Uniform cubic B-splines: four rows of the table per edge.
struct Splines {
  static constexpr int kScratch = 0;
  template <int>
  static constexpr int kEdges = 1;

  template <class T, int V, int B, int Orders>
  static __device__ void sum(const Task<T>& task, const T* table, const T (&length)[B], int64_t column,
                             bool active, T*, Filters<T, V, B, Orders>& out) {
    const int64_t half = task.in.channels;
#pragma unroll
    for (int e = 0; e < B; ++e) {
      const SplinePlace<T> place(length[e], task.start, task.inverse_spacing, task.count);
      const SplineTaps<T, Orders> taps(place.x - T(place.knot), task.inverse_spacing);
      Pack<T, V> g[4], s[4];
      bool inside[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int row = place.knot - 1 + m;
        inside[m] = row >= 0 && row < task.count;
        const T* from = table + int64_t(inside[m] && active ? row : 0) * 2 * half + (active ? column : 0);
        g[m] = load<T, V>(from);
        s[m] = load<T, V>(from + half);
      }
#pragma unroll
      for (int o = 0; o < Orders; ++o) {
#pragma unroll
        for (int v = 0; v < V; ++v) out.g[o][e][v] = out.s[o][e][v] = T(0);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const T w = inside[m] ? taps.weight[o][m] : T(0);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            out.g[o][e][v] += w * g[m].v[v];
            out.s[o][e][v] += w * s[m].v[v];
          }
        }
      }
    }
  }
};

// The Gaussian of one row of the table, and its derivatives.
template <class T, int Orders>
__device__ void gaussian(const Task<T>& task, T length, int k, T (&value)[Orders]) {
  const T x = (length - (task.start + T(k) * task.spacing)) * task.inverse_width;
  value[0] = exp(T(-0.5) * x * x);
  if constexpr (Orders > 1) value[1] = -task.inverse_width * x * value[0];
  if constexpr (Orders > 2) value[2] = task.inverse_width * task.inverse_width * (x * x - T(1)) * value[0];
}

// Gaussians: all rows of the table, read once for the edges of a block. The lanes of a warp make 32 functions
// at a time and share them through `scratch`.
struct Gaussians {
  static constexpr int kScratch = kWarp;  // numbers per edge and order
  template <int Orders>
  static constexpr int kEdges = Orders == 1 ? 4 : 2;

  template <class T, int V, int B, int Orders>
  static __device__ void sum(const Task<T>& task, const T* table, const T (&length)[B], int64_t column,
                             bool active, T* scratch, Filters<T, V, B, Orders>& out) {
    const int64_t half = task.in.channels;
#pragma unroll
    for (int o = 0; o < Orders; ++o)
#pragma unroll
      for (int e = 0; e < B; ++e)
#pragma unroll
        for (int v = 0; v < V; ++v) out.g[o][e][v] = out.s[o][e][v] = T(0);
    Pack<T, B>* weights = reinterpret_cast<Pack<T, B>*>(scratch);  // (Orders, 32)
    for (int first = 0; first < task.count; first += kWarp) {
      Pack<T, B> mine[Orders];
#pragma unroll
      for (int e = 0; e < B; ++e) {
        T value[Orders];
        gaussian(task, length[e], first + lane_id(), value);
#pragma unroll
        for (int o = 0; o < Orders; ++o) mine[o].v[e] = value[o];
      }
#pragma unroll
      for (int o = 0; o < Orders; ++o) weights[o * kWarp + lane_id()] = mine[o];
      __syncwarp();
      const int last = task.count - first < kWarp ? task.count - first : kWarp;
      const T* row = table + int64_t(first) * 2 * half + column;
      for (int k = 0; active && k < last; ++k, row += 2 * half) {
        const Pack<T, V> g = load<T, V>(row), s = load<T, V>(row + half);
#pragma unroll
        for (int o = 0; o < Orders; ++o) {
          const Pack<T, B> w = weights[o * kWarp + k];
#pragma unroll
          for (int e = 0; e < B; ++e)
#pragma unroll
            for (int v = 0; v < V; ++v) {
              out.g[o][e][v] += w.v[e] * g.v[v];
              out.s[o][e][v] += w.v[e] * s.v[v];
            }
        }
      }
      __syncwarp();
    }
  }
};

// The features of one end of an edge, and their tangents in the second backward.
template <class T, int V>
struct End {
  Pack<T, V> g, s, tangent_g, tangent_s;
};

template <Pass P, class T, int V>
__device__ End<T, V> load_end(const T* features, const T* tangents, int64_t atom, int64_t channels,
                              int64_t column, bool active) {
  const int64_t at = atom * 2 * channels + column;
  End<T, V> end{};
  if (!active) return end;
  end.g = load<T, V>(features + at);
  end.s = load<T, V>(features + at + channels);
  if (P == Pass::kDoubleBackward && tangents) {
    end.tangent_g = load<T, V>(tangents + at);
    end.tangent_s = load<T, V>(tangents + at + channels);
  }
  return end;
}

// One channel of an edge, without u: the message, its gradient, and along t its tangent and its Hessian.
template <class T>
struct Terms {
  T m, m_g, m_s, tangent, h_g, h_s;
};

template <class T>
__device__ Terms<T> terms_of(T g, T s, T t_g, T t_s) {
  const Gate<T> gate(g, s);
  Terms<T> out;
  out.m = gate.sigmoid * gate.softplus;
  out.m_g = gate.d_sigmoid * gate.softplus;
  out.m_s = gate.sigmoid * gate.d_softplus;
  out.tangent = out.m_g * t_g + out.m_s * t_s;
  const T m_gs = gate.d_sigmoid * gate.d_softplus;
  out.h_g = out.m_g * gate.sign_term * t_g + m_gs * t_s;
  out.h_s = m_gs * t_g + gate.sigmoid * gate.dd_softplus * t_s;
  return out;
}

}  // namespace
}  // namespace dpt
