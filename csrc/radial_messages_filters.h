// Filters of the radial messages: sums over the window of radial functions that reaches an edge, and the sums
// of their transpose. Included by radial_messages_rows.h, whose notation it uses.
#pragma once

#include "simd.h"

namespace dpt {
namespace {

enum class Pass { kForward, kBackward, kDoubleBackward };

// Edges that are computed at once: what one vector of the level holds at least.
template <class T>
constexpr int kBlock = Simd<T>::kLanes < 4 ? Simd<T>::kLanes : 4;

// Blocks that are taken through each step together, so that the steps' latencies overlap.
constexpr int kStrip = 4;

// The filter weights of a group of channels, [v][row][part][lane], v < vectors.
template <class T>
struct FilterTable {
  int64_t vectors;                     // of a group, per part
  int64_t count;                       // K, the rows
  int64_t pitch;                       // of the transposed tables
  const T *weights, *weights_t;        // tangents or null
  const T *transposed, *transposed_t;  // [v][part][lane] of `pitch` columns, null where not needed
  const T *bias, *bias_t;              // [v][part][lane], null is zero
};

template <class T, int P>
constexpr int64_t kRow = P * Simd<T>::kLanes;  // numbers in a row

// B-splines and alike: M = 4 taps of each edge, in rows of its own. Tables are handed in from vector v on.
template <class T, int EB>
struct FourTaps {
  static constexpr bool kByEdge = true;  // sums over edges are best made edge by edge
  const T *taps, *taps_t;                // (EB,4)
  const int64_t* base;                   // (EB,) the edge's first row times kRow
  T* to_taps;                            // (EB,4), added to

  // out[p][e] += sum_m taps_em weights[first_e + m]
  template <int P>
  DPT_INLINE void sum(const T* weights, const T* w, Vec<T> (&out)[P][EB]) const {
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) {
      const T* from = weights + base[e];
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p)
          out[p][e] += w[4 * e + m] * load(from + m * kRow<T, P> + p * Simd<T>::kLanes);
    }
  }
  // table[first_e + m] += taps_em a[p] of one edge
  template <int P>
  DPT_INLINE void add_edge(T* table, int e, const Vec<T> (&a)[P]) const {
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        T* place = table + base[e] + m * kRow<T, P> + p * Simd<T>::kLanes;
        store(place, load(place) + taps[4 * e + m] * a[p]);
      }
  }
  // The same with taps_t_em b[p] on top.
  template <int P>
  DPT_INLINE void add_edge(T* table, int e, const Vec<T> (&a)[P], const Vec<T> (&b)[P]) const {
    if (!taps_t) return add_edge<P>(table, e, a);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        T* place = table + base[e] + m * kRow<T, P> + p * Simd<T>::kLanes;
        store(place, load(place) + taps[4 * e + m] * a[p] + taps_t[4 * e + m] * b[p]);
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
                rows[p * EB + e] *
                load(weights + base[e] + (v * table.count + m) * kRow<T, P> + p * Simd<T>::kLanes);
    add_lane_sums<T, 4 * EB>(sums, to_taps);
  }
};

// Any number of taps: the edges of a block share the columns from the first to the last that one of them has.
template <class T, int EB>
struct SharedTaps {
  static constexpr bool kByEdge = false;
  int64_t first, count;    // columns with a tap, or a tangent, that is not zero
  const T *taps, *taps_t;  // (count,EB)
  int64_t all_first, all;  // columns of the gradient: vectors of all windows of the block
  T* to_taps;              // (EB,all), added to

  template <int P>
  DPT_INLINE void sum(const T* weights, const T* w, Vec<T> (&out)[P][EB]) const {
    const T* from = weights + first * kRow<T, P>;
    for (int64_t m = 0; m < count; ++m, from += kRow<T, P>, w += EB) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const Vec<T> x = load(from + p * Simd<T>::kLanes);
#pragma GCC unroll 4
        for (int e = 0; e < EB; ++e) out[p][e] += w[e] * x;
      }
    }
  }
  // table[first + m] += sum_e w_me a[p][e], w one of taps and taps_t
  template <int P>
  DPT_INLINE void add(T* table, const T* w, const Vec<T> (&a)[P][EB]) const {
    T* to = table + first * kRow<T, P>;
    for (int64_t m = 0; m < count; ++m, to += kRow<T, P>, w += EB) {
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
          const Vec<T> x = load_any<T>(from), y = load_any<T>(from + lanes);
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
        store_any<T>(to, load_any<T>(to) + sums[0][e]);
        if (both) store_any<T>(to + lanes, load_any<T>(to + lanes) + sums[1][e]);
      }
    }
  }
};

template <class T>
struct GroupTask {
  FilterTable<T> table;
  bool silu;
  const T *target, *source, *source_t;               // of atom 0, in this group
  T* result;                                         // likewise
  T *source_sums, *table_sums, *bias_sums;           // null where not wanted
  int64_t target_pitch, source_pitch, result_pitch;  // from atom to atom
  bool want_taps;
};

// Filters of a block and what their derivatives need: F, act'(z), Ft, act''(z) zt, each [v][part][EB].
template <class T>
struct Filters {
  Vec<T>*value, *slope, *tangent, *bend;
};

template <class T, int EB, int P, Pass Which, class Taps>
DPT_INLINE void make_filters(const GroupTask<T>& task, const Taps& taps, int64_t v, const Filters<T>& out) {
  constexpr int lanes = Simd<T>::kLanes;
  const FilterTable<T>& table = task.table;
  const int64_t column = v * P * lanes, block = v * table.count * P * lanes;
  Vec<T> z[P][EB];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    const Vec<T> start = table.bias ? load(table.bias + column + p * lanes) : Vec<T>{};
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) z[p][e] = start;
  }
  taps.template sum<P>(table.weights + block, taps.taps, z);
  if (task.silu) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e) {
        const Silu<T> act(z[p][e]);
        const int64_t k = (v * P + p) * EB + e;
        out.value[k] = act.value();
        if constexpr (Which != Pass::kForward) out.slope[k] = act.slope();
        if constexpr (Which == Pass::kDoubleBackward) out.bend[k] = act.curvature();
      }
  } else {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e) out.value[(v * P + p) * EB + e] = z[p][e];
  }
  if constexpr (Which == Pass::kDoubleBackward) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Vec<T> start = table.bias_t ? load(table.bias_t + column + p * lanes) : Vec<T>{};
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e) z[p][e] = start;
    }
    if (taps.taps_t) taps.template sum<P>(table.weights + block, taps.taps_t, z);
    if (table.weights_t) taps.template sum<P>(table.weights_t + block, taps.taps, z);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e) {
        const int64_t k = (v * P + p) * EB + e;
        if (task.silu) out.bend[k] *= z[p][e];
        out.tangent[k] = task.silu ? out.slope[k] * z[p][e] : z[p][e];
      }
  }
}

// Adds what the rows to z of a block, g (and h, which takes the place of g in the second backward), give to
// weights and bias, where that is not done edge by edge, and to taps.
template <class T, int EB, int P, Pass Which, class Taps>
DPT_INLINE void to_filters(const GroupTask<T>& task, const Taps& taps, const Vec<T>* g, const Vec<T>* h) {
  constexpr int lanes = Simd<T>::kLanes;
  constexpr bool second = Which == Pass::kDoubleBackward;
  const FilterTable<T>& table = task.table;
  if constexpr (!Taps::kByEdge) {
    for (int64_t v = 0; v < table.vectors; ++v) {
      const int64_t column = v * P * lanes;
      Vec<T> rows[P][EB];
      const auto take = [&](const Vec<T>* from) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
          for (int e = 0; e < EB; ++e) rows[p][e] = from[(v * P + p) * EB + e];
      };
      if (second && task.table_sums && taps.taps_t) {
        take(g);
        taps.template add<P>(task.table_sums + table.count * column, taps.taps_t, rows);
      }
      take(second ? h : g);
      if (task.table_sums) taps.template add<P>(task.table_sums + table.count * column, taps.taps, rows);
      if (task.bias_sums) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          Vec<T> sum = load(task.bias_sums + column + p * lanes);
#pragma GCC unroll 4
          for (int e = 0; e < EB; ++e) sum += rows[p][e];
          store(task.bias_sums + column + p * lanes, sum);
        }
      }
    }
  }
  if (task.want_taps) {
    taps.template project<P>(table, false, second ? h : g);
    if (second && table.weights_t) taps.template project<P>(table, true, g);
  }
}

// The rows to F of one edge in vector v become rows to z; they are kept for to_filters or, edge by edge,
// added.
template <class T, int EB, int P, Pass Which, class Taps>
DPT_INLINE void edge_to_filters(const GroupTask<T>& task, const Taps& taps, const Filters<T>& f, int64_t v,
                                int e, Vec<T> (&g)[P], Vec<T> (&h)[P], Vec<T>* all_g, Vec<T>* all_h) {
  constexpr int lanes = Simd<T>::kLanes;
  constexpr bool second = Which == Pass::kDoubleBackward;
  if (task.silu) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const int64_t k = (v * P + p) * EB + e;
      if constexpr (second) h[p] = h[p] * f.slope[k] + g[p] * f.bend[k];
      g[p] *= f.slope[k];
    }
  }
  if constexpr (Taps::kByEdge) {
    if (task.table_sums) {
      T* table_sums = task.table_sums + v * task.table.count * P * lanes;
      if constexpr (second)
        taps.template add_edge<P>(table_sums, e, h, g);
      else
        taps.template add_edge<P>(table_sums, e, g);
    }
    if (task.bias_sums) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        T* place = task.bias_sums + (v * P + p) * lanes;
        store(place, load(place) + (second ? h[p] : g[p]));
      }
    }
    if (!task.want_taps) return;
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    all_g[(v * P + p) * EB + e] = g[p];
    if constexpr (second) all_h[(v * P + p) * EB + e] = h[p];
  }
}

}  // namespace
}  // namespace dpt
