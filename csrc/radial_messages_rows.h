// The radial messages (formulas and notation in radial_messages.h) of a block of edges in one group of
// channels: forward, first and second backward. Included by radial_messages_tile.h.
//
// A group is a head, or, without attention, as many channels as a vector has lanes; its channels are padded
// to whole vectors with zeros. Node arrays are packed as (atom, group, v, part, lane).
#pragma once

#include "radial_messages_filters.h"

namespace dpt {
namespace {

enum class Pass { kForward, kBackward, kDoubleBackward };

// Parts of the packed rows of targets (in and out); sources have [k, x, 1, 2 | vec (3)], those that are
// there.
constexpr int kTargetParts = 6, kResultParts = 5;
enum TargetPart { kQuery, kGradX, kGradV, kQueryTangent = 5 };
enum ResultPart { kX, kV, kQueryGradient = 4 };

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

// The edges of a block.
template <class T, int EB>
struct BlockEdges {
  const int64_t *source, *target;      // (EB,)
  const T *envelope, *envelope_t;      // (EB,)
  const T *directions, *directions_t;  // (EB,3)
  T* geometry;                         // (4,EB), added to: to directions, to envelope; null where not wanted
};

template <class T, bool Attention, bool Vectors>
struct Parts {
  static constexpr int kX = Attention, kOne = kX + 1, kTwo = kX + 2;  // of filters and sources; the key is 0
  static constexpr int kFilters = Attention + 1 + 2 * Vectors;
  static constexpr int kVector = kFilters, kSource = kFilters + 3 * Vectors;
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
  const int64_t column = v * P * lanes;
  Vec<T> z[P][EB];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    const Vec<T> start = table.bias ? load(table.bias + column + p * lanes) : Vec<T>{};
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) z[p][e] = start;
  }
  taps.template sum<P>(table.weights, taps.taps, table.row, column, z);
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
    if (taps.taps_t) taps.template sum<P>(table.weights, taps.taps_t, table.row, column, z);
    if (table.weights_t) taps.template sum<P>(table.weights_t, taps.taps, table.row, column, z);
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

// Turns rows to F (r, and rh in the second backward) into rows to z (gz, gz2) and adds what they give to
// taps, weights and bias.
template <class T, int EB, int P, Pass Which, class Taps>
DPT_INLINE void to_filters(const GroupTask<T>& task, const Taps& taps, const Filters<T>& f, Vec<T>* r,
                           Vec<T>* rh) {
  constexpr int lanes = Simd<T>::kLanes;
  constexpr bool second = Which == Pass::kDoubleBackward;
  const FilterTable<T>& table = task.table;
  for (int64_t v = 0; v < table.vectors; ++v) {
    Vec<T> g[P][EB], h[P][EB];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e) {
        const int64_t k = (v * P + p) * EB + e;
        g[p][e] = r[k];
        if constexpr (second) h[p][e] = rh[k];
        if (task.silu) {
          if constexpr (second) rh[k] = h[p][e] = h[p][e] * f.slope[k] + g[p][e] * f.bend[k];
          r[k] = g[p][e] = g[p][e] * f.slope[k];
        }
      }
    const int64_t column = v * P * lanes;
    if (task.table_sums) {
      if constexpr (second)
        taps.template add<P>(task.table_sums, table.row, column, h, g);
      else
        taps.template add<P>(task.table_sums, table.row, column, g);
    }
    if (task.bias_sums) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        Vec<T> sum = load(task.bias_sums + column + p * lanes);
#pragma GCC unroll 4
        for (int e = 0; e < EB; ++e) sum += second ? h[p][e] : g[p][e];
        store(task.bias_sums + column + p * lanes, sum);
      }
    }
  }
  if (task.want_taps) {
    taps.template project<P>(table, false, second ? rh : r);
    if (second && table.weights_t) taps.template project<P>(table, true, r);
  }
}

// Weights of a block's messages in a group, one lane for each edge.
template <class T>
struct Attended {
  T a[Simd<T>::kLanes], at[Simd<T>::kLanes];   // a and its tangent
  T sb[Simd<T>::kLanes], sh[Simd<T>::kLanes];  // cotangents of s
  T silu[Simd<T>::kLanes];                     // of s
  T fh[Simd<T>::kLanes];                       // to envelope, without the part of ah
};

template <class T, int EB, bool Attention, bool Vectors, Pass Which, class Taps>
DPT_INLINE void message_block(const GroupTask<T>& task, const BlockEdges<T, EB>& edges, const Taps& taps,
                              const Filters<T>& f, Vec<T>* r, Vec<T>* rh) {
  using S = Parts<T, Attention, Vectors>;
  constexpr int lanes = Simd<T>::kLanes, P = S::kFilters, SP = S::kSource;
  constexpr bool backward = Which != Pass::kForward, second = Which == Pass::kDoubleBackward;
  const int64_t nv = task.table.vectors;
  const T *target[EB], *source[EB], *source_t[EB];
  T *result[EB], *to_source[EB];
#pragma GCC unroll 4
  for (int e = 0; e < EB; ++e) {
    target[e] = task.target + edges.target[e] * task.target_pitch;
    result[e] = task.result + edges.target[e] * task.result_pitch;
    const int64_t offset = edges.source[e] * task.source_pitch;
    source[e] = task.source + offset;
    source_t[e] = second ? task.source_t + offset : nullptr;
    to_source[e] = task.source_sums ? task.source_sums + offset : nullptr;
  }

  // Filters, and the sums over the channels of a head.
  Vec<T> s[EB] = {}, st[EB] = {}, ab[EB] = {}, ah[EB] = {};
  for (int64_t v = 0; v < nv; ++v) {
    make_filters<T, EB, P, Which>(task, taps, v, f);
    const Vec<T>* value = f.value + v * P * EB;
    const Vec<T>* tangent = f.tangent + v * P * EB;
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) {
      const T *at = target[e] + v * kTargetParts * lanes, *from = source[e] + v * SP * lanes;
      if constexpr (Attention) {
        const Vec<T> q = load(at + kQuery * lanes), k = load(from), kF = k * value[e];
        s[e] += q * kF;
        if constexpr (second) {
          const Vec<T> qt = load(at + kQueryTangent * lanes), kt = load(source_t[e] + v * SP * lanes);
          st[e] += qt * kF + q * (kt * value[e] + k * tangent[e]);
        }
      }
      if constexpr (backward) {
        const Vec<T> x = load(at + kGradX * lanes), vx = load(from + S::kX * lanes);
        const Vec<T> Fx = value[S::kX * EB + e];
        ab[e] += x * (vx * Fx);
        if constexpr (second)
          ah[e] += x * (load(source_t[e] + (v * SP + S::kX) * lanes) * Fx + vx * tangent[S::kX * EB + e]);
      }
    }
  }
  Attended<T> w;
  const Vec<T> envelope = load_repeated<T, EB>(edges.envelope);
  const Vec<T> envelope_t = second ? load_repeated<T, EB>(edges.envelope_t) : Vec<T>{};
  Vec<T> fh{};
  if constexpr (Attention) {
    const Silu<T> act(lane_sums<T, EB>(s));
    const Vec<T> value = act.value();
    store(w.a, value * envelope);
    if constexpr (backward) {
      const Vec<T> slope = act.slope(), ab_sum = lane_sums<T, EB>(ab), to_silu = ab_sum * envelope;
      store(w.sb, to_silu * slope);
      fh = ab_sum * value;
      if constexpr (second) {
        const Vec<T> st_sum = lane_sums<T, EB>(st), ah_sum = lane_sums<T, EB>(ah), slope_t = slope * st_sum;
        store(w.at, slope_t * envelope + value * envelope_t);
        store(w.sh, to_silu * (act.curvature() * st_sum) + slope * (ab_sum * envelope_t + ah_sum * envelope));
        fh = ab_sum * slope_t + ah_sum * value;
      }
    }
  } else {
    store(w.a, envelope);
    if constexpr (second) store(w.at, envelope_t);
    if constexpr (backward) fh = lane_sums<T, EB>(second ? ah : ab);
  }

  // Everything else, channel by channel.
  Vec<T> to_direction[4 * EB] = {};
  for (int64_t v = 0; v < nv; ++v) {
    const Vec<T>* value = f.value + v * P * EB;
    const Vec<T>* tangent = f.tangent + v * P * EB;
    Vec<T>* row = r + v * P * EB;
    Vec<T>* row_h = rh + v * P * EB;
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) {
      const T *at = target[e] + v * kTargetParts * lanes, *from = source[e] + v * SP * lanes;
      T* out = result[e] + v * kResultParts * lanes;
      const T* from_t = second ? source_t[e] + v * SP * lanes : nullptr;
      const auto add = [&](int part, Vec<T> value) __attribute__((always_inline)) {
        store(out + part * lanes, load(out + part * lanes) + value);
      };
      Vec<T> gradient[SP];
      if constexpr (Attention && backward) {
        const Vec<T> q = load(at + kQuery * lanes), k = load(from), F = value[e];
        const Vec<T> sbq = w.sb[e] * q, sbk = w.sb[e] * k;
        row[e] = sbq * k;
        if constexpr (!second) {
          add(kQueryGradient, sbk * F);
          gradient[0] = sbq * F;
        } else {
          const Vec<T> qt = load(at + kQueryTangent * lanes), kt = load(from_t), Ft = tangent[e];
          const Vec<T> to_k = w.sh[e] * q + w.sb[e] * qt, to_q = w.sh[e] * k + w.sb[e] * kt;
          add(kQueryGradient, to_q * F + sbk * Ft);
          gradient[0] = to_k * F + sbq * Ft;
          row_h[e] = to_k * k + sbq * kt;
        }
      }
      {
        const Vec<T> vx = load(from + S::kX * lanes), F = value[S::kX * EB + e];
        if constexpr (!backward) {
          add(kX, w.a[e] * (vx * F));
        } else {
          const Vec<T> x = load(at + kGradX * lanes), wb = w.a[e] * x;
          row[S::kX * EB + e] = wb * vx;
          if constexpr (!second) {
            gradient[S::kX] = wb * F;
          } else {
            const Vec<T> vt = load(from_t + S::kX * lanes), Ft = tangent[S::kX * EB + e], wh = w.at[e] * x;
            add(kX, w.at[e] * (vx * F) + w.a[e] * (vt * F + vx * Ft));
            gradient[S::kX] = wh * F + wb * Ft;
            row_h[S::kX * EB + e] = wh * vx + wb * vt;
          }
        }
      }
      if constexpr (Vectors) {
        const T *d = edges.directions + 3 * e, *dt = edges.directions_t + 3 * e;
        const Vec<T> v1 = load(from + S::kOne * lanes), v2 = load(from + S::kTwo * lanes);
        const Vec<T> F1 = value[S::kOne * EB + e], F2 = value[S::kTwo * EB + e];
        if constexpr (!backward) {
          const Vec<T> w1 = v1 * F1, w2 = v2 * F2;
#pragma GCC unroll 3
          for (int c = 0; c < 3; ++c) add(kV + c, load(from + (S::kVector + c) * lanes) * w1 + d[c] * w2);
        } else {
          Vec<T> vb[3], vec[3], dot1{}, dot2{};
#pragma GCC unroll 3
          for (int c = 0; c < 3; ++c) {
            vb[c] = load(at + (kGradV + c) * lanes);
            vec[c] = load(from + (S::kVector + c) * lanes);
            dot1 += vb[c] * vec[c];
            dot2 += d[c] * vb[c];
          }
          row[S::kOne * EB + e] = dot1 * v1;
          row[S::kTwo * EB + e] = dot2 * v2;
          Vec<T> w1, w2;
          if constexpr (!second) {
            w1 = v1 * F1, w2 = v2 * F2;
            gradient[S::kOne] = dot1 * F1;
            gradient[S::kTwo] = dot2 * F2;
          } else {
            const Vec<T> t1 = load(from_t + S::kOne * lanes), t2 = load(from_t + S::kTwo * lanes);
            const Vec<T> F1t = tangent[S::kOne * EB + e], F2t = tangent[S::kTwo * EB + e];
            const Vec<T> plain1 = v1 * F1, plain2 = v2 * F2;
            w1 = t1 * F1 + v1 * F1t, w2 = t2 * F2 + v2 * F2t;
            Vec<T> dot1h{}, dot2h{};
#pragma GCC unroll 3
            for (int c = 0; c < 3; ++c) {
              const Vec<T> vect = load(from_t + (S::kVector + c) * lanes);
              dot1h += vb[c] * vect;
              dot2h += dt[c] * vb[c];
              add(kV + c, vect * plain1 + vec[c] * w1 + dt[c] * plain2 + d[c] * w2);
            }
            gradient[S::kOne] = dot1h * F1 + dot1 * F1t;
            gradient[S::kTwo] = dot2h * F2 + dot2 * F2t;
            row_h[S::kOne * EB + e] = dot1h * v1 + dot1 * t1;
            row_h[S::kTwo * EB + e] = dot2h * v2 + dot2 * t2;
          }
#pragma GCC unroll 3
          for (int c = 0; c < 3; ++c) {
            gradient[S::kVector + c] = vb[c] * w1;
            to_direction[c * EB + e] += vb[c] * w2;
          }
        }
      }
      if (backward && task.source_sums) {
        T* to = to_source[e] + v * SP * lanes;
#pragma GCC unroll 7
        for (int p = 0; p < SP; ++p) store(to + p * lanes, load(to + p * lanes) + gradient[p]);
      }
    }
  }
  if constexpr (backward) {
    if (edges.geometry) {
      if constexpr (Vectors) add_lane_sums<T, 4 * EB>(to_direction, edges.geometry);
      T lane[lanes];
      store(lane, fh);
      for (int e = 0; e < EB; ++e) edges.geometry[3 * EB + e] += lane[e];
    }
    if (task.table_sums || task.bias_sums || task.want_taps)
      to_filters<T, EB, P, Which>(task, taps, f, r, rh);
  }
}

}  // namespace
}  // namespace dpt
