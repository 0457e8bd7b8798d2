// Filters of the radial messages: sums over the window of radial functions that reaches an edge, and the sums
// of their transpose. Included by radial_messages_rows.h, whose notation it uses.
#pragma once

#include "simd.h"

namespace dpt {
namespace {

// Edges that are computed at once: what one vector of the level holds at least.
template <class T>
constexpr int kBlock = Simd<T>::kLanes < 4 ? Simd<T>::kLanes : 4;

// The filter weights of a group of channels. Rows are [v][part][lane], v < vectors.
template <class T>
struct FilterTable {
  int64_t vectors;                     // of a group, per part
  int64_t row;                         // numbers in a row: vectors * parts * lanes
  int64_t pitch;                       // of the transposed tables
  const T *weights, *weights_t;        // (K,row); tangents or null
  const T *transposed, *transposed_t;  // (row,pitch), null where not needed
  const T *bias, *bias_t;              // (row,); bias_t null where zero
};

// B-splines and alike: M = 4 taps of each edge, in rows of its own.
template <class T, int EB>
struct FourTaps {
  const T *taps, *taps_t;  // (EB,4)
  const int64_t* base;     // (EB,) the edge's first row times `row`
  T* to_taps;              // (EB,4), added to

  // out[p][e] += sum_m taps_em weights[first_e + m]
  template <int P>
  DPT_INLINE void sum(const T* weights, const T* w, int64_t row, int64_t column, Vec<T> (&out)[P][EB]) const {
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) {
      const T* from = weights + base[e] + column;
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) out[p][e] += w[4 * e + m] * load(from + m * row + p * Simd<T>::kLanes);
    }
  }
  // table[first_e + m] += taps_em a[p][e]
  template <int P>
  DPT_INLINE void add(T* table, int64_t row, int64_t column, const Vec<T> (&a)[P][EB]) const {
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e)
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          T* place = table + base[e] + column + m * row + p * Simd<T>::kLanes;
          store(place, load(place) + taps[4 * e + m] * a[p][e]);
        }
  }
  // The same with taps_t_em b[p][e] on top.
  template <int P>
  DPT_INLINE void add(T* table, int64_t row, int64_t column, const Vec<T> (&a)[P][EB],
                      const Vec<T> (&b)[P][EB]) const {
    if (!taps_t) return add<P>(table, row, column, a);
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e)
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          T* place = table + base[e] + column + m * row + p * Simd<T>::kLanes;
          store(place, load(place) + taps[4 * e + m] * a[p][e] + taps_t[4 * e + m] * b[p][e]);
        }
  }
  // to_taps_em += <rows[v][p][e], weights[first_e + m]>
  template <int P>
  DPT_INLINE void project(const FilterTable<T>& table, bool tangents, const Vec<T>* rows) const {
    const T* weights = tangents ? table.weights_t : table.weights;
    Vec<T> sums[4 * EB] = {};
    for (int64_t v = 0; v < table.vectors; ++v, rows += P * EB)
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e)
#pragma GCC unroll 4
        for (int m = 0; m < 4; ++m)
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p)
            sums[4 * e + m] +=
                rows[p * EB + e] * load(weights + base[e] + m * table.row + (v * P + p) * Simd<T>::kLanes);
    add_lane_sums<T, 4 * EB>(sums, to_taps);
  }
};

// Any number of taps: the edges of a block share the columns from the first to the last that one of them has.
template <class T, int EB>
struct SharedTaps {
  int64_t first, count;    // columns with a tap, or a tangent, that is not zero
  const T *taps, *taps_t;  // (count,EB)
  int64_t all_first, all;  // columns of the gradient: vectors of all windows of the block
  T* to_taps;              // (EB,all), added to

  template <int P>
  DPT_INLINE void sum(const T* weights, const T* w, int64_t row, int64_t column, Vec<T> (&out)[P][EB]) const {
    const T* from = weights + first * row + column;
    for (int64_t m = 0; m < count; ++m, from += row, w += EB) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const Vec<T> x = load(from + p * Simd<T>::kLanes);
#pragma GCC unroll 4
        for (int e = 0; e < EB; ++e) out[p][e] += w[e] * x;
      }
    }
  }
  template <int P>
  DPT_INLINE void add(T* table, int64_t row, int64_t column, const Vec<T> (&a)[P][EB]) const {
    add_one<P>(table + first * row + column, row, taps, a);
  }
  template <int P>
  DPT_INLINE void add(T* table, int64_t row, int64_t column, const Vec<T> (&a)[P][EB],
                      const Vec<T> (&b)[P][EB]) const {
    add_one<P>(table + first * row + column, row, taps, a);
    if (taps_t) add_one<P>(table + first * row + column, row, taps_t, b);
  }
  template <int P>
  DPT_INLINE void add_one(T* to, int64_t row, const T* w, const Vec<T> (&a)[P][EB]) const {
    for (int64_t m = 0; m < count; ++m, to += row, w += EB) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        Vec<T> value = load(to + p * Simd<T>::kLanes);
#pragma GCC unroll 4
        for (int e = 0; e < EB; ++e) value += w[e] * a[p][e];
        store(to + p * Simd<T>::kLanes, value);
      }
    }
  }
  // With the columns in the lanes there is no sum over lanes: a product of matrices.
  template <int P>
  DPT_INLINE void project(const FilterTable<T>& table, bool tangents, const Vec<T>* rows) const {
    constexpr int lanes = Simd<T>::kLanes;
    const T* weights = (tangents ? table.transposed_t : table.transposed) + all_first;
    const T* row = reinterpret_cast<const T*>(rows);
    for (int64_t k = 0; k < all; k += 2 * lanes) {
      const bool both = k + lanes < all;
      Vec<T> sums[2][EB] = {};
      for (int64_t part = 0; part < table.vectors * P; ++part)
        for (int64_t c = 0; c < lanes; ++c) {
          const T* from = weights + (part * lanes + c) * table.pitch + k;
          const Vec<T> x = load_any(from), y = load_any(from + lanes);
#pragma GCC unroll 4
          for (int e = 0; e < EB; ++e) {
            const T w = row[(part * EB + e) * lanes + c];
            sums[0][e] += w * x;
            sums[1][e] += w * y;
          }
        }
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e) {
        T* to = to_taps + e * all + k;
        store_any(to, load_any(to) + sums[0][e]);
        if (both) store_any(to + lanes, load_any(to + lanes) + sums[1][e]);
      }
    }
  }
  static DPT_INLINE Vec<T> load_any(const T* p) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static DPT_INLINE void store_any(T* p, Vec<T> v) { __builtin_memcpy(p, &v, sizeof v); }
};

}  // namespace
}  // namespace dpt
