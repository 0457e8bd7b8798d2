// The rows of the CGConv message: all edges of one target, forward, first and second backward.
// Included by cgconv.cpp, once per processor level. Arrays are padded: a node row holds the gate in [0, P)
// and the filter in [P, 2P), P the channels rounded up to whole vectors; padding is zero.
//
// With m = sigmoid(g) softplus(s), (g|s) = A_i + B_j + C(d), C(d) = sum_k phi_k(d) T_k and u_i = w_i Y_i
// (w_i = 1/n_i for the mean, 1 for the sum):
//   forward          y_i = w_i sum m
//   first backward   a = u (m_g, m_s): sums of a by target and by source, <a, C'>, sum phi_k a
//   second backward  along t = alpha_i + beta_j + delta C' + sum_k phi_k Theta_k:
//                    to Y_i: w_i sum (m_g t_g + m_s t_s); b = u (Hessian of m) t: sums of b by target and
//                    source; to T_k: phi_k b + delta phi'_k a; to d: <b, C'> + delta <a, C''> + <a, sum_k
//                    phi'_k Theta_k>
#pragma once

#include "cgconv_taps.h"
#include "chunks.h"

namespace dpt {
namespace {

enum class Pass { kForward, kBackward, kDoubleBackward };

// EB edges of target i, forward. sums (P): of m.
template <class T, int EB, class Taps>
DPT_INLINE void forward_block(const RowTask<T>& task, const Taps& taps, const int64_t* edge, int64_t i,
                              T* sums) {
  const int64_t P = task.padded;
  const T* a = task.a + i * 2 * P;
  const T* b[EB];
  for (int e = 0; e < EB; ++e) b[e] = task.b + task.source[edge[e]] * 2 * P;
  for (int64_t v = 0; v < P; v += Simd<T>::kLanes) {
    Vec<T> cg[EB], cs[EB];
    taps.template sum<0>(task.table, v, cg, cs);
    const Vec<T> ag = load(a + v), as = load(a + P + v);
    Vec<T> total = load(sums + v);
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) {
      const Gate<T> m(ag + load(b[e] + v) + cg[e], as + load(b[e] + P + v) + cs[e]);
      total += m.sigmoid * m.softplus;
    }
    store(sums + v, total);
  }
}

// First backward. u (P): the weighted Y of the row · sums (2P): of m_g and m_s.
template <class T, int EB, bool WantTable, bool WantLength, class Taps>
DPT_INLINE void backward_block(const RowTask<T>& task, const Taps& taps, const int64_t* edge, int64_t i,
                               const T* u, T* sums, const Sums<T>& out) {
  const int64_t P = task.padded;
  const T* a = task.a + i * 2 * P;
  const T* b[EB];
  T* to_b[EB];
  for (int e = 0; e < EB; ++e) {
    b[e] = task.b + task.source[edge[e]] * 2 * P;
    to_b[e] = out.by_source ? out.by_source + task.source[edge[e]] * 2 * P : nullptr;
  }
  Vec<T> along[EB] = {};
  for (int64_t v = 0; v < P; v += Simd<T>::kLanes) {
    Vec<T> cg[EB], cs[EB], xg[EB], xs[EB];
    taps.template sum<0>(task.table, v, cg, cs);
    const Vec<T> ag = load(a + v), as = load(a + P + v), uv = load(u + v);
    Vec<T> total_g = load(sums + v), total_s = load(sums + P + v);
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) {
      const Gate<T> m(ag + load(b[e] + v) + cg[e], as + load(b[e] + P + v) + cs[e]);
      xg[e] = m.d_sigmoid() * m.softplus;
      xs[e] = m.sigmoid * m.d_softplus();
      total_g += xg[e];
      total_s += xs[e];
      xg[e] *= uv;
      xs[e] *= uv;
    }
    store(sums + v, total_g);
    store(sums + P + v, total_s);
    if (out.by_source) {
      for (int e = 0; e < EB; ++e) {
        store(to_b[e] + v, load(to_b[e] + v) + xg[e]);
        store(to_b[e] + P + v, load(to_b[e] + P + v) + xs[e]);
      }
    }
    if constexpr (WantLength) {
      taps.template sum<1>(task.table, v, cg, cs);
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e) along[e] += xg[e] * cg[e] + xs[e] * cs[e];
    }
    if constexpr (WantTable) taps.template add<false>(out.table, v, xg, xs, xg, xs);
  }
  if constexpr (WantLength)
    for (int e = 0; e < EB; ++e) task.out_length[edge[e]] = sum_lanes<T>(along[e]);
}

// Second backward. sums (3P): the tangent of m, and the Hessian of m along t (gate, filter), all without u.
template <class T, int EB, bool WantTable, bool WantLength, class Taps>
DPT_INLINE void double_backward_block(const RowTask<T>& task, const Taps& taps, const int64_t* edge,
                                      const T* delta, int64_t i, const T* u, T* sums, const Sums<T>& out) {
  const int64_t P = task.padded;
  const T *a = task.a + i * 2 * P, *alpha = task.alpha + i * 2 * P;
  const T *b[EB], *beta[EB];
  T* to_b[EB];
  for (int e = 0; e < EB; ++e) {
    const int64_t offset = task.source[edge[e]] * 2 * P;
    b[e] = task.b + offset;
    beta[e] = task.beta + offset;
    to_b[e] = out.by_source + offset;
  }
  Vec<T> along[EB] = {};
  for (int64_t v = 0; v < P; v += Simd<T>::kLanes) {
    Vec<T> cg[EB], cs[EB], slope_g[EB], slope_s[EB];
    taps.template sum<0>(task.table, v, cg, cs);
    taps.template sum<1>(task.table, v, slope_g, slope_s);
    Vec<T> tg[EB], ts[EB];
    if (task.theta) {
      taps.template sum<0>(task.theta, v, tg, ts);
    } else {
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e) tg[e] = ts[e] = Vec<T>{};
    }
    const Vec<T> ag = load(a + v), as = load(a + P + v), uv = load(u + v);
    const Vec<T> alpha_g = load(alpha + v), alpha_s = load(alpha + P + v);
    Vec<T> tangent = load(sums + v), total_g = load(sums + P + v), total_s = load(sums + 2 * P + v);
    Vec<T> xg[EB], xs[EB];  // a, then a times delta
#pragma GCC unroll 4
    for (int e = 0; e < EB; ++e) {
      const Gate<T> m(ag + load(b[e] + v) + cg[e], as + load(b[e] + P + v) + cs[e]);
      const Vec<T> d_sigmoid = m.d_sigmoid(), d_softplus = m.d_softplus();
      const Vec<T> m_g = d_sigmoid * m.softplus, m_s = m.sigmoid * d_softplus;
      tg[e] += alpha_g + load(beta[e] + v) + delta[e] * slope_g[e];
      ts[e] += alpha_s + load(beta[e] + P + v) + delta[e] * slope_s[e];
      tangent += m_g * tg[e] + m_s * ts[e];
      xg[e] = uv * m_g;
      xs[e] = uv * m_s;
      const Vec<T> m_gs = d_sigmoid * d_softplus;
      const Vec<T> hg = m_g * m.sign_term() * tg[e] + m_gs * ts[e];
      const Vec<T> hs = m_gs * tg[e] + m.sigmoid * m.dd_softplus() * ts[e];
      total_g += hg;
      total_s += hs;
      tg[e] = uv * hg;  // from here on b
      ts[e] = uv * hs;
      store(to_b[e] + v, load(to_b[e] + v) + tg[e]);
      store(to_b[e] + P + v, load(to_b[e] + P + v) + ts[e]);
    }
    store(sums + v, tangent);
    store(sums + P + v, total_g);
    store(sums + 2 * P + v, total_s);
    if constexpr (WantLength) {
      taps.template sum<2>(task.table, v, cg, cs);
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e)
        along[e] += tg[e] * slope_g[e] + ts[e] * slope_s[e] + delta[e] * (xg[e] * cg[e] + xs[e] * cs[e]);
      if (task.theta) {
        taps.template sum<1>(task.theta, v, cg, cs);
#pragma GCC unroll 4
        for (int e = 0; e < EB; ++e) along[e] += xg[e] * cg[e] + xs[e] * cs[e];
      }
    }
    if constexpr (WantTable) {
#pragma GCC unroll 4
      for (int e = 0; e < EB; ++e) {
        xg[e] *= delta[e];
        xs[e] *= delta[e];
      }
      taps.template add<true>(out.table, v, tg, ts, xg, xs);
    }
  }
  if constexpr (WantLength)
    for (int e = 0; e < EB; ++e) task.out_length[edge[e]] = sum_lanes<T>(along[e]);
}

template <class T, bool Spline, Pass P, bool WantTable, bool WantLength, int EB>
DPT_INLINE void block(const RowTask<T>& task, int64_t e, int64_t n, int64_t i, RowScratch<T>& scratch,
                      const Sums<T>& out) {
  const T* u = scratch.rows;
  T* sums = scratch.rows + task.padded;
  const int64_t* edge = scratch.edge + e;
  const auto run = [&](const auto& taps) __attribute__((always_inline)) {
    if constexpr (P == Pass::kForward) forward_block<T, EB>(task, taps, edge, i, sums);
    if constexpr (P == Pass::kBackward)
      backward_block<T, EB, WantTable, WantLength>(task, taps, edge, i, u, sums, out);
    if constexpr (P == Pass::kDoubleBackward)
      double_backward_block<T, EB, WantTable, WantLength>(task, taps, edge, scratch.delta + e, i, u, sums,
                                                          out);
  };
  if constexpr (Spline) {
    const T* w = scratch.weights + 4 * e;
    run(SplineTaps<T, EB>{{w, w + 4 * n, w + 8 * n}, scratch.base + e, 2 * task.padded});
  } else {
    run(gaussian_taps<T, EB>(task, scratch.length + e, scratch.weights, P == Pass::kForward ? 1 : 3));
  }
}

// Rows [first, last): every target's edges, and what they add to the sums by source and of the table.
template <class T, bool Spline, Pass P, bool WantTable, bool WantLength>
void rows(const RowTask<T>& task, int64_t first, int64_t last, RowScratch<T>& scratch, const Sums<T>& out) {
  const int64_t padded = task.padded;
  T *u = scratch.rows, *sums = scratch.rows + padded;
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = task.target_ptr[i], n = task.target_ptr[i + 1] - begin;
    if (n == 0) continue;
    const T weight = task.mean ? T(1) / T(n) : T(1);
    for (int64_t v = 0; v < 3 * padded; ++v) sums[v] = T(0);
    if constexpr (P != Pass::kForward)
      for (int64_t v = 0; v < padded; ++v) u[v] = weight * task.y[i * padded + v];
    sort_row(task, begin, begin + n, scratch);
    if constexpr (Spline) spline_weights(task, n, scratch);
    int64_t e = 0;
    for (; e + 4 <= n; e += 4) block<T, Spline, P, WantTable, WantLength, 4>(task, e, n, i, scratch, out);
    for (; e < n; ++e) block<T, Spline, P, WantTable, WantLength, 1>(task, e, n, i, scratch, out);

    if constexpr (P == Pass::kForward)
      for (int64_t v = 0; v < padded; ++v) task.out_y[i * padded + v] = weight * sums[v];
    if constexpr (P == Pass::kBackward) {
      if (task.out_a) {
        for (int64_t v = 0; v < padded; ++v) {
          task.out_a[i * 2 * padded + v] = u[v] * sums[v];
          task.out_a[(i * 2 + 1) * padded + v] = u[v] * sums[padded + v];
        }
      }
    }
    if constexpr (P == Pass::kDoubleBackward) {
      for (int64_t v = 0; v < padded; ++v) {
        task.out_y[i * padded + v] = weight * sums[v];
        task.out_a[i * 2 * padded + v] = u[v] * sums[padded + v];
        task.out_a[(i * 2 + 1) * padded + v] = u[v] * sums[2 * padded + v];
      }
    }
  }
}

}  // namespace
}  // namespace dpt
