// The radial messages (formulas and notation in radial_messages.h) of a block of edges in one group of
// channels: forward, first and second backward. Included by radial_messages_tile.h.
//
// A group is a head, or, without attention, as many channels as a vector has lanes; its channels are padded
// to whole vectors with zeros. Node arrays are packed as (atom, group, v, part, lane).
#pragma once

#include "radial_messages_filters.h"

namespace dpt {
namespace {

// Parts of the packed rows of targets (in and out); sources have [k, x, 1, 2 | vec (3)], those that are
// there.
constexpr int kTargetParts = 6, kResultParts = 5;
enum TargetPart { kQuery, kGradX, kGradV, kQueryTangent = 5 };
enum ResultPart { kX, kV, kQueryGradient = 4 };

// The edges of a block.
template <class T, int EB>
struct BlockEdges {
  const int64_t *source, *target;      // (EB,), the former times source_pitch
  const T *directions, *directions_t;  // (EB,3)
  // (4,EB), added to: to directions, to envelope; null where not wanted
  T* geometry;
};

template <class T, bool Attention, bool Vectors>
struct Parts {
  // Of filters and sources; the key is 0.
  static constexpr int kX = Attention, kOne = kX + 1, kTwo = kX + 2;
  static constexpr int kFilters = Attention + 1 + 2 * Vectors;
  static constexpr int kVector = kFilters, kSource = kFilters + 3 * Vectors;
};

// Per edge of a strip, in one group: sums over the channels of a head, and the weights that follow from them.
template <class T>
struct Strip {
  static constexpr int kEdges = kStrip * kBlock<T>;
  // st: tangent of s; ab: cotangent of a
  alignas(64) T s[kEdges], st[kEdges], ab[kEdges], ah[kEdges];
  alignas(64) T a[kEdges], at[kEdges], sb[kEdges], sh[kEdges];
  alignas(64) T fh[kEdges];  // to envelope
};

// Where the rows of a block's edges are.
template <class T, int EB>
struct BlockRows {
  const T *target[EB], *source[EB], *source_t[EB];

  DPT_INLINE BlockRows(const GroupTask<T>& task, const BlockEdges<T, EB>& edges) {
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) {
      const int64_t offset = edges.source[e];
      target[e] = task.target + edges.target[e] * task.target_pitch;
      source[e] = task.source + offset;
      source_t[e] = task.source_t ? task.source_t + offset : nullptr;
    }
  }
};

// The filters of a block and its sums over channels, the latter to `strip` from `first` on.
template <class T, int EB, bool Attention, bool Vectors, Pass Which, class Taps>
DPT_INLINE void sum_block(const GroupTask<T>& task, const BlockEdges<T, EB>& edges, const Taps& taps,
                          const Filters<T>& f, Strip<T>& strip, int first) {
  using S = Parts<T, Attention, Vectors>;
  constexpr int lanes = Simd<T>::kLanes, P = S::kFilters, SP = S::kSource;
  constexpr bool backward = Which != Pass::kForward, second = Which == Pass::kDoubleBackward;
  const BlockRows<T, EB> at_edges(task, edges);
  Vec<T> s[EB] = {}, st[EB] = {}, ab[EB] = {}, ah[EB] = {};
  for (int64_t v = 0; v < task.table.vectors; ++v) {
    make_filters<T, EB, P, Which>(task, taps, v, f);
    const Vec<T>* value = f.value + v * P * EB;
    const Vec<T>* tangent = f.tangent + v * P * EB;
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) {
      const T *at = at_edges.target[e] + v * kTargetParts * lanes,
              *from = at_edges.source[e] + v * SP * lanes;
      const T* from_t = second ? at_edges.source_t[e] + v * SP * lanes : nullptr;
      if constexpr (Attention) {
        const Vec<T> q = load(at + kQuery * lanes), k = load(from), kF = k * value[e];
        s[e] += q * kF;
        if constexpr (second)
          st[e] += load(at + kQueryTangent * lanes) * kF + q * (load(from_t) * value[e] + k * tangent[e]);
      }
      if constexpr (backward) {
        const Vec<T> x = load(at + kGradX * lanes), vx = load(from + S::kX * lanes);
        const Vec<T> F = value[S::kX * EB + e];
        ab[e] += x * (vx * F);
        if constexpr (second) ah[e] += x * (load(from_t + S::kX * lanes) * F + vx * tangent[S::kX * EB + e]);
      }
    }
  }
  const auto keep = [&](const Vec<T>* sums, T* to) __attribute__((always_inline)) {
    const Vec<T> totals = lane_sums<T, EB>(sums);
    __builtin_memcpy(to + first, &totals, EB * sizeof(T));
  };
  if constexpr (Attention) keep(s, strip.s);
  if constexpr (Attention && second) keep(st, strip.st);
  if constexpr (backward) keep(ab, strip.ab);
  if constexpr (second) keep(ah, strip.ah);
}

// Weights of the edges of a strip from its sums.
template <class T, bool Attention, Pass Which>
DPT_INLINE void weigh_strip(const T* envelopes, const T* envelopes_t, Strip<T>& strip) {
  constexpr bool backward = Which != Pass::kForward, second = Which == Pass::kDoubleBackward;
#pragma GCC unroll 4
  for (int k = 0; k < Strip<T>::kEdges; k += Simd<T>::kLanes) {
    const Vec<T> envelope = load_any<T>(envelopes + k);
    if constexpr (!Attention) {
      store(strip.a + k, envelope);
      if constexpr (second) store(strip.at + k, load_any<T>(envelopes_t + k));
      if constexpr (backward) store(strip.fh + k, load((second ? strip.ah : strip.ab) + k));
    } else {
      const Silu<T> act(load(strip.s + k));
      const Vec<T> value = act.value();
      store(strip.a + k, value * envelope);
      if constexpr (backward) {
        const Vec<T> slope = act.slope(), ab = load(strip.ab + k), to_silu = ab * envelope;
        store(strip.sb + k, to_silu * slope);
        if constexpr (!second) {
          store(strip.fh + k, ab * value);
        } else {
          const Vec<T> st = load(strip.st + k), ah = load(strip.ah + k), slope_t = slope * st;
          const Vec<T> envelope_t = load_any<T>(envelopes_t + k);
          store(strip.at + k, slope_t * envelope + value * envelope_t);
          store(strip.sh + k, to_silu * (act.curvature() * st) + slope * (ab * envelope_t + ah * envelope));
          store(strip.fh + k, ab * slope_t + ah * value);
        }
      }
    }
  }
}

// The messages of a block, whose weights stand in `strip` from `first` on, and their gradients.
template <class T, int EB, bool Attention, bool Vectors, Pass Which, class Taps>
DPT_INLINE void message_block(const GroupTask<T>& task, const BlockEdges<T, EB>& edges, const Taps& taps,
                              const Filters<T>& f, Vec<T>* r, Vec<T>* rh, const Strip<T>& strip, int first) {
  using S = Parts<T, Attention, Vectors>;
  constexpr int lanes = Simd<T>::kLanes, P = S::kFilters, SP = S::kSource;
  constexpr bool backward = Which != Pass::kForward, second = Which == Pass::kDoubleBackward;
  const T *a = strip.a + first, *a_t = strip.at + first, *sb = strip.sb + first, *sh = strip.sh + first;
  const bool wants_filters = task.table_sums || task.bias_sums || task.want_taps;
  Vec<T> to_direction[4 * EB];
  if (edges.geometry)
    for (int k = 0; k < 4 * EB; ++k) to_direction[k] = Vec<T>{};
  for (int64_t v = 0; v < task.table.vectors; ++v) {
    const Vec<T>* value = f.value + v * P * EB;
    const Vec<T>* tangent = f.tangent + v * P * EB;
    // Not unrolled: the body is long, and its addresses would not fit the registers.
#pragma GCC unroll 1
    for (int e = 0; e < EB; ++e) {
      const T* at = task.target + edges.target[e] * task.target_pitch + v * kTargetParts * lanes;
      const T* from = task.source + edges.source[e] + v * SP * lanes;
      const T* from_t = second ? task.source_t + edges.source[e] + v * SP * lanes : nullptr;
      T* out = task.result + edges.target[e] * task.result_pitch + v * kResultParts * lanes;
      const auto add = [&](int part, Vec<T> value) __attribute__((always_inline)) {
        store(out + part * lanes, load(out + part * lanes) + value);
      };
      Vec<T> gradient[SP], row[P], row_h[P];
      if constexpr (Attention && backward) {
        const Vec<T> q = load(at + kQuery * lanes), k = load(from), F = value[e];
        const Vec<T> sbq = sb[e] * q, sbk = sb[e] * k;
        row[0] = sbq * k;
        if constexpr (!second) {
          add(kQueryGradient, sbk * F);
          gradient[0] = sbq * F;
        } else {
          const Vec<T> qt = load(at + kQueryTangent * lanes), kt = load(from_t), Ft = tangent[e];
          const Vec<T> to_k = sh[e] * q + sb[e] * qt, to_q = sh[e] * k + sb[e] * kt;
          add(kQueryGradient, to_q * F + sbk * Ft);
          gradient[0] = to_k * F + sbq * Ft;
          row_h[0] = to_k * k + sbq * kt;
        }
      }
      {
        const Vec<T> vx = load(from + S::kX * lanes), F = value[S::kX * EB + e];
        if constexpr (!backward) {
          add(kX, a[e] * (vx * F));
        } else {
          const Vec<T> x = load(at + kGradX * lanes), wb = a[e] * x;
          row[S::kX] = wb * vx;
          if constexpr (!second) {
            gradient[S::kX] = wb * F;
          } else {
            const Vec<T> vt = load(from_t + S::kX * lanes), Ft = tangent[S::kX * EB + e], wh = a_t[e] * x;
            add(kX, a_t[e] * (vx * F) + a[e] * (vt * F + vx * Ft));
            gradient[S::kX] = wh * F + wb * Ft;
            row_h[S::kX] = wh * vx + wb * vt;
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
          row[S::kOne] = dot1 * v1;
          row[S::kTwo] = dot2 * v2;
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
            row_h[S::kOne] = dot1h * v1 + dot1 * t1;
            row_h[S::kTwo] = dot2h * v2 + dot2 * t2;
          }
#pragma GCC unroll 3
          for (int c = 0; c < 3; ++c) gradient[S::kVector + c] = vb[c] * w1;
          if (edges.geometry) {
#pragma GCC unroll 3
            for (int c = 0; c < 3; ++c) to_direction[c * EB + e] += vb[c] * w2;
          }
        }
      }
      if (backward && task.source_sums) {
        T* to = task.source_sums + edges.source[e] + v * SP * lanes;
#pragma GCC unroll 7
        for (int p = 0; p < SP; ++p) store(to + p * lanes, load(to + p * lanes) + gradient[p]);
      }
      if constexpr (backward) {
        if (wants_filters) edge_to_filters<T, EB, P, Which>(task, taps, f, v, e, row, row_h, r, rh);
      }
    }
  }
  if constexpr (backward) {
    if (edges.geometry) {
      if constexpr (Vectors) add_lane_sums<T, 4 * EB>(to_direction, edges.geometry);
      for (int e = 0; e < EB; ++e) edges.geometry[3 * EB + e] += strip.fh[first + e];
    }
    if (wants_filters) to_filters<T, EB, P, Which>(task, taps, r, rh);
  }
}

}  // namespace
}  // namespace dpt
