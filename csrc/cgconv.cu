// The fused CGConv message on a GPU. One block per target, and in a second launch one per source, sums the
// edges of a row; what an edge needs is computed again in each, so that nothing per edge is stored but the
// gradient of the lengths. Every sum is a fixed tree that depends on the length of its row alone: warp w of a
// block takes the edges w, w + 8, ... of the row (or blocks of them), and the warps are added in their order.
#include "cgconv_edges.h"
#include "cgconv_table.h"
#include "ops.h"

namespace dpt {
namespace {

constexpr int kWarps = 8;

template <Pass P, bool BySource>
constexpr int kSums = P == Pass::kForward                       ? 1
                      : P == Pass::kDoubleBackward && !BySource ? 3
                                                                : 2;

template <Pass P, bool BySource, bool Full>
constexpr int kOrders = P == Pass::kForward                      ? 1
                        : P == Pass::kBackward                   ? (Full ? 2 : 1)
                        : P == Pass::kDoubleBackward && BySource ? 2
                                                                 : (Full ? 3 : 2);

// B edges of a row from a place on, those past its end in place of the last: fetched one step ahead, since
// the rows of the other ends wait for them.
template <class T, int B>
struct RowEdges {
  int32_t edge[B], other[B];
  T length[B];
};

template <bool BySource, class T, int B>
__device__ RowEdges<T, B> edges_at(const Task<T>& task, int64_t place, int64_t end) {
  RowEdges<T, B> out{};
  if (place >= end) return out;
#pragma unroll
  for (int k = 0; k < B; ++k) {
    const int64_t at = place + k < end ? place + k : end - 1;
    const int64_t e = BySource ? task.orders.source_order[at] : at;
    out.edge[k] = int32_t(e);
    out.other[k] = int32_t(BySource ? task.orders.target[e] : task.graph.source[e]);
    out.length[k] = task.in.lengths[e];
  }
  return out;
}

// By target: y and a, and the lengths if Full. By source: b. In the second backward, Full also knows tangents
// of the table.
template <class T, int V, class Filter, Pass P, bool BySource, bool Full>
__global__ void __launch_bounds__(kWarps* kWarp) sum_rows(Task<T> task) {
  constexpr int Orders = kOrders<P, BySource, Full>, B = Filter::template kEdges<Orders>;
  constexpr int Sums = kSums<P, BySource>;
  constexpr int ThetaOrders = Full && !BySource ? 2 : 1;
  constexpr bool Lengths = Full && !BySource && P != Pass::kForward;

  const int64_t row = blockIdx.x, channels = task.in.channels;
  const int lane = lane_id(), warp = int(threadIdx.x) / kWarp;
  const int64_t* ptr = BySource ? task.orders.source_ptr : task.graph.target_ptr;
  const int64_t begin = ptr[row], end = ptr[row + 1];
  T* parts = shared_memory<T>();  // (kWarps - 1, Sums, V, 32), then the filters' scratch
  T* scratch = parts + (kWarps - 1) * Sums * V * kWarp + warp * Filter::kScratch * B * Orders;

  for (int64_t first = 0; first < channels; first += kWarp * V) {
    const int64_t column = first + lane * V;
    const bool active = column < channels;
    const T* features = BySource ? task.in.b : task.in.a;
    const T* tangents = BySource ? task.along.b : task.along.a;
    const End<T, V> own = load_end<P, T, V>(features, tangents, row, channels, column, active);
    Pack<T, V> u{};
    if (P != Pass::kForward && !BySource && active) {
      u = load<T, V>(task.in.grad_y + row * channels + column);
      for (int v = 0; v < V; ++v) u.v[v] *= task.weight(row);
    }
    T sums[Sums][V] = {};

    RowEdges<T, B> next = edges_at<BySource, T, B>(task, begin + warp * B, end);
    for (int64_t block = begin + warp * B; block < end; block += kWarps * B) {
      const RowEdges<T, B> edges = next;
      next = edges_at<BySource, T, B>(task, block + kWarps * B, end);
      Filters<T, V, B, Orders> filter;
      Filter::sum(task, task.in.table, edges.length, column, active, scratch, filter);
      Filters<T, V, B, ThetaOrders> theta;
      const bool with_theta = P == Pass::kDoubleBackward && Full && task.along.table;
      if (with_theta) Filter::sum(task, task.along.table, edges.length, column, active, scratch, theta);

#pragma unroll
      for (int k = 0; k < B; ++k) {
        if (block + k >= end) break;
        const int64_t e = edges.edge[k], other_atom = edges.other[k];
        const End<T, V> other =
            load_end<P, T, V>(BySource ? task.in.a : task.in.b, BySource ? task.along.a : task.along.b,
                              other_atom, channels, column, active);
        if (BySource && active) {
          const T weight = task.weight(other_atom);
          u = load<T, V>(task.in.grad_y + other_atom * channels + column);
#pragma unroll
          for (int v = 0; v < V; ++v) u.v[v] *= weight;
        }
        T delta = T(0), along = T(0);
        if constexpr (P == Pass::kDoubleBackward) delta = task.along.lengths ? task.along.lengths[e] : T(0);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          T t_g = T(0), t_s = T(0);
          if constexpr (P == Pass::kDoubleBackward) {
            t_g = own.tangent_g.v[v] + other.tangent_g.v[v] + delta * filter.g[1][k][v];
            t_s = own.tangent_s.v[v] + other.tangent_s.v[v] + delta * filter.s[1][k][v];
            if (with_theta) {
              t_g += theta.g[0][k][v];
              t_s += theta.s[0][k][v];
            }
          }
          const Terms<T> x = terms_of(own.g.v[v] + other.g.v[v] + filter.g[0][k][v],
                                      own.s.v[v] + other.s.v[v] + filter.s[0][k][v], t_g, t_s);
          if constexpr (P == Pass::kForward) sums[0][v] += x.m;
          if constexpr (P == Pass::kBackward) {
            sums[0][v] += BySource ? u.v[v] * x.m_g : x.m_g;
            sums[1][v] += BySource ? u.v[v] * x.m_s : x.m_s;
            if constexpr (Lengths) along += u.v[v] * (x.m_g * filter.g[1][k][v] + x.m_s * filter.s[1][k][v]);
          }
          if constexpr (P == Pass::kDoubleBackward) {
            sums[0][v] += BySource ? u.v[v] * x.h_g : x.h_g;
            sums[1][v] += BySource ? u.v[v] * x.h_s : x.h_s;
            if constexpr (!BySource) sums[2][v] += x.tangent;
            if constexpr (Lengths) {
              T part = x.h_g * filter.g[1][k][v] + x.h_s * filter.s[1][k][v];
              part += delta * (x.m_g * filter.g[2][k][v] + x.m_s * filter.s[2][k][v]);
              if (with_theta) part += x.m_g * theta.g[1][k][v] + x.m_s * theta.s[1][k][v];
              along += u.v[v] * part;
            }
          }
        }
        if constexpr (Lengths) {
          if (task.out.lengths) {
            along = warp_sum(active ? along : T(0));
            if (lane == 0) task.out.lengths[e] = first == 0 ? along : task.out.lengths[e] + along;
          }
        }
      }
    }

    add_warps<kWarps>(parts, sums);
    if (warp != 0 || !active) continue;
    const T weight = task.weight(row);
    Pack<T, V> value[Sums];
#pragma unroll
    for (int q = 0; q < Sums; ++q)
#pragma unroll
      for (int v = 0; v < V; ++v) value[q].v[v] = sums[q][v] * (BySource ? T(1) : u.v[v]);
    if constexpr (P == Pass::kForward) {
#pragma unroll
      for (int v = 0; v < V; ++v) value[0].v[v] = weight * sums[0][v];
      store(task.out.y + row * channels + column, value[0]);
    } else {
      T* to = BySource ? task.out.b : task.out.a;
      if (to) {
        store(to + row * 2 * channels + column, value[0]);
        store(to + row * 2 * channels + channels + column, value[1]);
      }
      if constexpr (P == Pass::kDoubleBackward && !BySource) {
#pragma unroll
        for (int v = 0; v < V; ++v) value[2].v[v] = weight * sums[2][v];
        if (task.out.y) store(task.out.y + row * channels + column, value[2]);
      }
    }
  }
}

template <class T, int V, class Filter, Pass P, bool BySource, bool Full>
void launch_rows(const Task<T>& task, void* stream) {
  constexpr int Orders = kOrders<P, BySource, Full>, B = Filter::template kEdges<Orders>;
  const int64_t numbers =
      (kWarps - 1) * kSums<P, BySource> * V * kWarp + kWarps * Filter::kScratch * B * Orders;
  launch(sum_rows<T, V, Filter, P, BySource, Full>,
         Grid{task.graph.num_atoms, kWarps * kWarp, numbers * int64_t(sizeof(T))}, stream, task);
}

template <class T, int V, class Filter, Pass P>
void run_filter(const Task<T>& task, void* stream) {
  if constexpr (P == Pass::kForward) {
    launch_rows<T, V, Filter, P, false, false>(task, stream);
  } else {
    constexpr bool kSecond = P == Pass::kDoubleBackward;
    const bool theta = kSecond && task.along.table;
    if (task.out.lengths || (theta && (task.out.y || task.out.a))) {
      launch_rows<T, V, Filter, P, false, true>(task, stream);
    } else if (task.out.a || (kSecond && task.out.y)) {
      launch_rows<T, V, Filter, P, false, false>(task, stream);
    }
    if (task.out.b) {
      theta ? launch_rows<T, V, Filter, P, true, kSecond>(task, stream)
            : launch_rows<T, V, Filter, P, true, false>(task, stream);
    }
    if (task.out.table) {
      theta ? sum_table<T, V, Filter, P, kSecond>(task, stream)
            : sum_table<T, V, Filter, P, false>(task, stream);
    }
  }
}

template <class T, Pass P>
void run(const CgconvGraph& graph, const CgconvOrders<T>& orders, const RadialBasis& basis,
         const CgconvInputs<T>& in, const CgconvTangents<T>& along, const CgconvOutputs<T>& out,
         void* stream) {
  Task<T> task{graph,
               orders,
               in,
               along,
               out,
               int(basis.count),
               static_cast<T>(basis.start),
               static_cast<T>(basis.spacing),
               T(1) / static_cast<T>(basis.spacing),
               T(1) / static_cast<T>(basis.width)};
  const auto run_width = [&](auto width) {
    constexpr int V = decltype(width)::value;
    if (basis.spline)
      run_filter<T, V, Splines, P>(task, stream);
    else
      run_filter<T, V, Gaussians, P>(task, stream);
  };
  // Loads of 16 bytes where every row allows them. float64 is for checks, and has no such kernels.
  if constexpr (sizeof(T) == 4) {
    const void* rows[] = {in.a,    in.b,        in.table, in.grad_y, along.a,
                          along.b, along.table, out.y,    out.a,     out.b};
    bool aligned = in.channels % 4 == 0;
    for (const void* p : rows) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    if (aligned) return run_width(Width<4>{});
  }
  run_width(Width<1>{});
}

}  // namespace

template <class T>
void CudaCgconv::forward(const CgconvGraph& graph, const CgconvOrders<T>& orders, const RadialBasis& basis,
                         const CgconvInputs<T>& in, const CgconvOutputs<T>& out, void* stream) {
  run<T, Pass::kForward>(graph, orders, basis, in, {}, out, stream);
}

template <class T>
void CudaCgconv::backward(const CgconvGraph& graph, const CgconvOrders<T>& orders, const RadialBasis& basis,
                          const CgconvInputs<T>& in, const CgconvOutputs<T>& out, void* stream) {
  run<T, Pass::kBackward>(graph, orders, basis, in, {}, out, stream);
}

template <class T>
void CudaCgconv::double_backward(const CgconvGraph& graph, const CgconvOrders<T>& orders,
                                 const RadialBasis& basis, const CgconvInputs<T>& in,
                                 const CgconvTangents<T>& along, const CgconvOutputs<T>& out, void* stream) {
  run<T, Pass::kDoubleBackward>(graph, orders, basis, in, along, out, stream);
}

#define DPT_INSTANTIATE(T)                                                                                  \
  template void CudaCgconv::forward(const CgconvGraph&, const CgconvOrders<T>&, const RadialBasis&,         \
                                    const CgconvInputs<T>&, const CgconvOutputs<T>&, void*);                \
  template void CudaCgconv::backward(const CgconvGraph&, const CgconvOrders<T>&, const RadialBasis&,        \
                                     const CgconvInputs<T>&, const CgconvOutputs<T>&, void*);               \
  template void CudaCgconv::double_backward(const CgconvGraph&, const CgconvOrders<T>&, const RadialBasis&, \
                                            const CgconvInputs<T>&, const CgconvTangents<T>&,               \
                                            const CgconvOutputs<T>&, void*);
DPT_INSTANTIATE(float)
DPT_INSTANTIATE(double)

}  // namespace dpt
