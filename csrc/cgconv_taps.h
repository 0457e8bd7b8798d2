// Filters of the CGConv message: sums over the basis functions that reach an edge, and the sums of their
// transpose. Included by cgconv_rows.h, whose notation it uses.
#pragma once

#include "simd.h"

namespace dpt {
namespace {

// One call with packed arrays. Null outputs are not wanted; null alpha, beta, delta and theta are zero.
template <class T>
struct RowTask {
  int64_t padded;  // P
  bool mean;
  const int64_t* target_ptr;
  const int64_t* source;
  const T* length;
  int64_t count;  // of basis functions
  T start, spacing, width;
  T window;  // Gaussians further than this from an edge's length are below rounding
  const T *a, *b, *table;
  const T* y;  // Y, not weighted
  const T *alpha, *beta, *delta, *theta;
  T* out_y;       // (N,P) y, or the gradient of Y
  T* out_a;       // (N,2P)
  T* out_length;  // (E,)
};

// Buffers for the longest row, reused from row to row.
template <class T>
struct RowScratch {
  int64_t* edge;  // edges of the row, in order of length
  T* length;      // of those
  T* delta;       // of those
  int64_t* base;  // splines: row of the first tap, times 2P
  T* weights;     // splines: 3 x n x 4, values, slopes and curvatures; Gaussians: 3 x 4 x padded count
  T* rows;        // 4 x P: u, and sums over the row
};

// Splines: four taps per edge.
template <class T, int EB>
struct SplineTaps {
  const T* weights[3];
  const int64_t* base;
  int64_t stride;  // 2P

  template <int Order>
  DPT_INLINE void sum(const T* table, int64_t column, Vec<T> (&g)[EB], Vec<T> (&s)[EB]) const {
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) {
      const T* row = table + base[e] + column;
      const T* filter = row + stride / 2;
      const T* w = weights[Order] + 4 * e;
      g[e] = w[0] * load(row);
      s[e] = w[0] * load(filter);
#pragma GCC unroll 3
      for (int m = 1; m < 4; ++m) {
        g[e] += w[m] * load(row + m * stride);
        s[e] += w[m] * load(filter + m * stride);
      }
    }
  }
  // table += sum_e phi_e x_e + phi'_e z_e, the second only where Slopes.
  template <bool Slopes>
  DPT_INLINE void add(T* table, int64_t column, const Vec<T> (&xg)[EB], const Vec<T> (&xs)[EB],
                      const Vec<T> (&zg)[EB], const Vec<T> (&zs)[EB]) const {
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) {
      T* row = table + base[e] + column;
      T* filter = row + stride / 2;
      const T *w = weights[0] + 4 * e, *w1 = weights[1] + 4 * e;
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        Vec<T> g = load(row + m * stride) + w[m] * xg[e], s = load(filter + m * stride) + w[m] * xs[e];
        if constexpr (Slopes) {
          g += w1[m] * zg[e];
          s += w1[m] * zs[e];
        }
        store(row + m * stride, g);
        store(filter + m * stride, s);
      }
    }
  }
};

// Gaussians: all columns of the window that the edges of a block share.
template <class T, int EB>
struct GaussianTaps {
  const T* weights[3];
  int64_t first, last;  // columns [first, last)
  int64_t pitch;        // of weights, from edge to edge
  int64_t stride;       // 2P

  template <int Order>
  DPT_INLINE void sum(const T* table, int64_t column, Vec<T> (&g)[EB], Vec<T> (&s)[EB]) const {
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) g[e] = s[e] = Vec<T>{};
    const T* w = weights[Order];
    const T* row = table + column;
    for (int64_t k = first; k < last; ++k) {
      const Vec<T> tg = load(row + k * stride), ts = load(row + k * stride + stride / 2);
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e) {
        g[e] += w[e * pitch + k] * tg;
        s[e] += w[e * pitch + k] * ts;
      }
    }
  }
  template <bool Slopes>
  DPT_INLINE void add(T* table, int64_t column, const Vec<T> (&xg)[EB], const Vec<T> (&xs)[EB],
                      const Vec<T> (&zg)[EB], const Vec<T> (&zs)[EB]) const {
    T* row = table + column;
    for (int64_t k = first; k < last; ++k) {
      Vec<T> g = load(row + k * stride), s = load(row + k * stride + stride / 2);
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e) {
        const T w = weights[0][e * pitch + k];
        g += w * xg[e];
        s += w * xs[e];
        if constexpr (Slopes) {
          const T w1 = weights[1][e * pitch + k];
          g += w1 * zg[e];
          s += w1 * zs[e];
        }
      }
      store(row + k * stride, g);
      store(row + k * stride + stride / 2, s);
    }
  }
};

// Puts the edges [begin, end) in the order of a coarse bin of their lengths (stable), so that neighbours in
// that order read the same rows of the table, and Gaussian windows are shared. The order depends on the row
// alone.
template <class T>
DPT_INLINE void sort_row(const RowTask<T>& task, int64_t begin, int64_t end, RowScratch<T>& scratch) {
  constexpr int kBins = 64;
  int64_t offset[kBins + 1] = {};
  const T scale = T(kBins) / (task.spacing * T(task.count));
  const auto bin = [&](T length) {
    const T x = (length - task.start) * scale;
    return x >= T(kBins - 1) ? kBins - 1 : x > T(0) ? static_cast<int>(x) : 0;  // NaN: 0
  };
  for (int64_t e = begin; e < end; ++e) ++offset[bin(task.length[e]) + 1];
  for (int k = 1; k <= kBins; ++k) offset[k] += offset[k - 1];
  for (int64_t e = begin; e < end; ++e) {
    const int64_t slot = offset[bin(task.length[e])]++;
    scratch.edge[slot] = e;
    scratch.length[slot] = task.length[e];
    scratch.delta[slot] = task.delta ? task.delta[e] : T(0);
  }
}

// Uniform cubic B-splines: four taps per edge; those outside the table have weight zero.
template <class T>
DPT_INLINE void spline_weights(const RowTask<T>& task, int64_t n, RowScratch<T>& scratch) {
  const T inverse = T(1) / task.spacing;
  T *value = scratch.weights, *slope = value + 4 * n, *curvature = slope + 4 * n;
  const T last = T(task.count);
  for (int64_t e = 0; e < n; ++e) {
    const T x = (scratch.length[e] - task.start) * inverse;
    const T clamped = x < T(-3) ? T(-3) : x > last + T(3) ? last + T(3) : x;  // beyond, all taps are zero
    const int64_t knot = clamped == clamped ? static_cast<int64_t>(clamped + T(4)) - 4 : 0;
    const T t = clamped - T(knot), r = T(1) - t;
    const T v[4] = {r * r * r * T(1. / 6), T(2. / 3) - t * t * (T(1) - T(0.5) * t),
                    T(2. / 3) - r * r * (T(1) - T(0.5) * r), t * t * t * T(1. / 6)};
    const T s[4] = {T(-0.5) * r * r, t * (T(1.5) * t - T(2)), r * (T(2) - T(1.5) * r), T(0.5) * t * t};
    const T c[4] = {r, T(3) * t - T(2), T(3) * r - T(2), t};
    const int64_t first = knot - 1, most = task.count - 4;
    const int64_t base = first < 0 ? 0 : first > most ? most : first;
    for (int m = 0; m < 4; ++m) {
      const int64_t tap = base + m - first;
      const bool inside = tap >= 0 && tap < 4;
      value[4 * e + m] = inside ? v[tap] : T(0);
      slope[4 * e + m] = inside ? s[tap] * inverse : T(0);
      curvature[4 * e + m] = inside ? c[tap] * (inverse * inverse) : T(0);
    }
    scratch.base[e] = base * 2 * task.padded;
  }
}

// Gaussians of EB edges, on the columns that matter to any of them.
template <class T, int EB>
DPT_INLINE GaussianTaps<T, EB> gaussian_taps(const RowTask<T>& task, const T* length, T* weights,
                                             int orders) {
  constexpr int lanes = Simd<T>::kLanes;
  const int64_t pitch = (task.count + lanes - 1) / lanes * lanes;
  GaussianTaps<T, EB> taps{{weights, weights + 4 * pitch, weights + 8 * pitch}, 0, 0, pitch, 2 * task.padded};
  T low = length[0], high = length[0];
  bool finite = true;
  for (int e = 0; e < EB; ++e) {
    low = length[e] < low ? length[e] : low;
    high = length[e] > high ? length[e] : high;
    finite = finite && length[e] - length[e] == T(0);
  }
  const T inverse = T(1) / task.spacing, count = T(task.count);
  T first = (low - task.window - task.start) * inverse,
    last = (high + task.window - task.start) * inverse + T(2);
  first = finite && first > T(0) ? first : T(0);
  last = finite && last < count ? last : count;
  taps.first = static_cast<int64_t>(first < count ? first : count);
  taps.last = static_cast<int64_t>(last > T(0) ? last : T(0));
  const T over = T(1) / task.width;
  Vec<T> ramp;
  for (int k = 0; k < lanes; ++k) ramp[k] = T(k);
  for (int64_t k = taps.first / lanes * lanes; k < taps.last; k += lanes) {
    const Vec<T> centre = (ramp + T(k)) * task.spacing + task.start;
    for (int e = 0; e < EB; ++e) {
      const Vec<T> x = (length[e] - centre) * over;
      const Vec<T> value = exponential<T>(at_least<T>(T(-0.5) * x * x, -Simd<T>::kBound));
      store(weights + e * pitch + k, value);
      if (orders > 1) store(weights + (4 + e) * pitch + k, -over * x * value);
      if (orders > 2) store(weights + (8 + e) * pitch + k, (over * over) * (x * x - T(1)) * value);
    }
  }
  return taps;
}

}  // namespace
}  // namespace dpt
