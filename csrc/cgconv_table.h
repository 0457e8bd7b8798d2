// CUDA kernels of the CGConv message: the gradient of the table of filter weights. A first kernel sums a
// chunk of edges per block, a second one adds the chunks of each row in their order (CgconvOrders).
#pragma once

#include <type_traits>

#include "cgconv_edges.h"

namespace dpt {
namespace {

template <int V>
using Width = std::integral_constant<int, V>;

// Adds the sums of a block's warps, in their order: those of warp 0 become the total. All threads call it.
//   parts (Warps - 1, Sums * V, 32) in shared memory
template <int Warps, class T, int Sums, int V>
__device__ void add_warps(T* parts, T (&sums)[Sums][V]) {
  const int lane = lane_id(), warp = int(threadIdx.x) / kWarp;
  if (warp > 0) {
#pragma unroll
    for (int q = 0; q < Sums; ++q)
#pragma unroll
      for (int v = 0; v < V; ++v) parts[(((warp - 1) * Sums + q) * V + v) * kWarp + lane] = sums[q][v];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int w = 0; w < Warps - 1; ++w)
#pragma unroll
      for (int q = 0; q < Sums; ++q)
#pragma unroll
        for (int v = 0; v < V; ++v) sums[q][v] += parts[((w * Sums + q) * V + v) * kWarp + lane];
  }
  __syncthreads();  // before the next use of `parts`
}

// What an edge adds to the rows of the table: values times phi_k, and in the second backward slopes times
// phi'_k.
template <class T, int V>
struct TableTerms {
  Pack<T, V> value_g, value_s, slope_g, slope_s;
};

// An edge, fetched before it is needed.
template <class T>
struct ChunkEdge {
  int32_t edge, target, source;
  T length;
};

template <class T>
__device__ ChunkEdge<T> edge_at(const Task<T>& task, int64_t e) {
  return {int32_t(e), int32_t(task.orders.target[e]), int32_t(task.graph.source[e]), task.in.lengths[e]};
}

template <class T, int V, class Filter, Pass P, bool Theta>
__device__ TableTerms<T, V> table_terms(const Task<T>& task, const ChunkEdge<T>& edge, int64_t column,
                                        bool active, T* scratch) {
  constexpr int Orders = P == Pass::kDoubleBackward ? 2 : 1;
  const int64_t channels = task.in.channels, i = edge.target, j = edge.source;
  const T length[1] = {edge.length};
  Filters<T, V, 1, Orders> filter;
  Filter::sum(task, task.in.table, length, column, active, scratch, filter);
  Filters<T, V, 1, 1> theta;
  const bool with_theta = Theta && task.along.table;
  if (with_theta) Filter::sum(task, task.along.table, length, column, active, scratch, theta);
  const End<T, V> a = load_end<P, T, V>(task.in.a, task.along.a, i, channels, column, active);
  const End<T, V> b = load_end<P, T, V>(task.in.b, task.along.b, j, channels, column, active);
  Pack<T, V> y{};
  if (active) y = load<T, V>(task.in.grad_y + i * channels + column);
  const T weight = task.weight(i);
  T delta = T(0);
  if constexpr (P == Pass::kDoubleBackward) delta = task.along.lengths ? task.along.lengths[edge.edge] : T(0);
  TableTerms<T, V> out{};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    T t_g = T(0), t_s = T(0);
    if constexpr (P == Pass::kDoubleBackward) {
      t_g = a.tangent_g.v[v] + b.tangent_g.v[v] + delta * filter.g[1][0][v];
      t_s = a.tangent_s.v[v] + b.tangent_s.v[v] + delta * filter.s[1][0][v];
      if (with_theta) {
        t_g += theta.g[0][0][v];
        t_s += theta.s[0][0][v];
      }
    }
    const Terms<T> x =
        terms_of(a.g.v[v] + b.g.v[v] + filter.g[0][0][v], a.s.v[v] + b.s.v[v] + filter.s[0][0][v], t_g, t_s);
    const T u = weight * y.v[v];
    out.value_g.v[v] = u * (P == Pass::kBackward ? x.m_g : x.h_g);
    out.value_s.v[v] = u * (P == Pass::kBackward ? x.m_s : x.h_s);
    if constexpr (P == Pass::kDoubleBackward) {
      out.slope_g.v[v] = u * delta * x.m_g;
      out.slope_s.v[v] = u * delta * x.m_s;
    }
  }
  return out;
}

// Splines: the four rows that the edges of a chunk, all between the same two knots, add to.
constexpr int kSplineWarps = 4;

template <class T, int V, Pass P, bool Theta>
__global__ void __launch_bounds__(kSplineWarps* kWarp) sum_spline_chunks(Task<T> task) {
  constexpr int Orders = P == Pass::kDoubleBackward ? 2 : 1;
  const int64_t chunk = blockIdx.x, channels = task.in.channels, intervals = task.count + 5;
  const int64_t* chunk_ptr = task.orders.chunk_ptr;
  if (chunk >= chunk_ptr[intervals]) return;
  int64_t low = 0, high = intervals;  // chunk_ptr[low] <= chunk < chunk_ptr[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (chunk_ptr[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  const int64_t begin = task.orders.interval_ptr[low] + (chunk - chunk_ptr[low]) * task.orders.chunk_edges;
  const int64_t whole = begin + task.orders.chunk_edges, most = task.orders.interval_ptr[low + 1];
  const int64_t end = whole < most ? whole : most;
  const T knot = T(low - 3);
  const int lane = lane_id(), warp = int(threadIdx.x) / kWarp;

  for (int64_t first = 0; first < channels; first += kWarp * V) {
    const int64_t column = first + lane * V;
    const bool active = column < channels;
    T sums[8][V] = {};  // 4 rows of gates, 4 of filters
    const int64_t* order = task.orders.interval_order;
    ChunkEdge<T> next{};
    if (begin + warp < end) next = edge_at(task, order[begin + warp]);
    for (int64_t place = begin + warp; place < end; place += kSplineWarps) {
      const ChunkEdge<T> edge = next;
      if (place + kSplineWarps < end) next = edge_at(task, order[place + kSplineWarps]);
      const TableTerms<T, V> x =
          table_terms<T, V, Splines, P, Theta>(task, edge, column, active, static_cast<T*>(nullptr));
      const SplinePlace<T> at(edge.length, task.start, task.inverse_spacing, task.count);
      const SplineTaps<T, Orders> taps(at.x - knot, task.inverse_spacing);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sums[m][v] += taps.weight[0][m] * x.value_g.v[v];
          sums[4 + m][v] += taps.weight[0][m] * x.value_s.v[v];
          if constexpr (P == Pass::kDoubleBackward) {
            sums[m][v] += taps.weight[1][m] * x.slope_g.v[v];
            sums[4 + m][v] += taps.weight[1][m] * x.slope_s.v[v];
          }
        }
    }
    add_warps<kSplineWarps>(shared_memory<T>(), sums);
    if (warp != 0 || !active) continue;
    T* to = task.orders.chunk_sums + chunk * 4 * 2 * channels + column;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        to[m * 2 * channels + v] = sums[m][v];
        to[m * 2 * channels + channels + v] = sums[4 + m][v];
      }
  }
}

// A thread per number of the table.
template <class T>
__global__ void add_spline_chunks(Task<T> task) {
  const int64_t width = 2 * task.in.channels, number = thread_id(), row = number / width;
  if (row >= task.count) return;
  T sum = T(0);
  for (int m = 3; m >= 0; --m) {  // the row is tap m of the interval from knot row + 1 - m on
    const int64_t interval = row + 4 - m;
    const T* from = task.orders.chunk_sums + m * width + number % width;
    for (int64_t c = task.orders.chunk_ptr[interval]; c < task.orders.chunk_ptr[interval + 1]; ++c)
      sum += from[c * 4 * width];
  }
  task.out.table[number] = sum;
}

// Gaussians: 64 rows of the table, 8 per warp, which the block's edges add to 16 at a time.
constexpr int kGaussianWarps = 8;
constexpr int kTile = 16;
constexpr int kRowsPerWarp = 8;
constexpr int kRows = kGaussianWarps * kRowsPerWarp;

template <class T, int V, Pass P, bool Theta>
__global__ void __launch_bounds__(kGaussianWarps* kWarp, 2) sum_gaussian_chunks(Task<T> task) {
  constexpr int Orders = P == Pass::kDoubleBackward ? 2 : 1;
  using Columns = Pack<T, V>[2][kWarp];  // of an edge: gates, filters
  const int64_t channels = task.in.channels, blocks = (task.count + kRows - 1) / kRows;
  const int64_t chunk = blockIdx.x / blocks, first_row = blockIdx.x % blocks * kRows;
  const int64_t begin = chunk * task.orders.chunk_edges, whole = begin + task.orders.chunk_edges;
  const int64_t end = whole < task.orders.num_edges ? whole : task.orders.num_edges;
  const int lane = lane_id(), warp = int(threadIdx.x) / kWarp;
  Columns* terms = shared_memory<Columns>();                  // (Orders, kTile)
  T* weights = reinterpret_cast<T*>(terms + Orders * kTile);  // (Orders, kTile, kRows)
  T* scratch = weights + Orders * kTile * kRows + warp * Gaussians::kScratch * Orders;

  for (int64_t first = 0; first < channels; first += kWarp * V) {
    const int64_t column = first + lane * V;
    const bool active = column < channels;
    T sums[2][kRowsPerWarp][V] = {};
    for (int64_t tile = begin; tile < end; tile += kTile) {
      const int edges = int(end - tile < kTile ? end - tile : kTile);
      for (int n = warp; n < edges; n += kGaussianWarps) {
        const TableTerms<T, V> x =
            table_terms<T, V, Gaussians, P, Theta>(task, edge_at(task, tile + n), column, active, scratch);
        terms[n][0][lane] = x.value_g;
        terms[n][1][lane] = x.value_s;
        if constexpr (P == Pass::kDoubleBackward) {
          terms[kTile + n][0][lane] = x.slope_g;
          terms[kTile + n][1][lane] = x.slope_s;
        }
      }
      for (int k = int(threadIdx.x); k < edges * kRows; k += kGaussianWarps * kWarp) {
        T value[Orders];
        gaussian(task, task.in.lengths[tile + k / kRows], int(first_row) + k % kRows, value);
#pragma unroll
        for (int o = 0; o < Orders; ++o) weights[o * kTile * kRows + k] = value[o];
      }
      __syncthreads();
      for (int n = 0; n < edges; ++n) {
#pragma unroll
        for (int o = 0; o < Orders; ++o) {
          const Pack<T, V> g = terms[o * kTile + n][0][lane], s = terms[o * kTile + n][1][lane];
          const T* own = weights + (o * kTile + n) * kRows + warp * kRowsPerWarp;
#pragma unroll
          for (int r = 0; r < kRowsPerWarp; ++r)
#pragma unroll
            for (int v = 0; v < V; ++v) {
              sums[0][r][v] += own[r] * g.v[v];
              sums[1][r][v] += own[r] * s.v[v];
            }
        }
      }
      __syncthreads();
    }
    T* to = task.orders.chunk_sums + chunk * task.count * 2 * channels + column;
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const int64_t row = first_row + warp * kRowsPerWarp + r;
      if (row >= task.count || !active) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        to[row * 2 * channels + v] = sums[0][r][v];
        to[row * 2 * channels + channels + v] = sums[1][r][v];
      }
    }
  }
}

template <class T>
__global__ void add_gaussian_chunks(Task<T> task) {
  const int64_t size = task.count * 2 * task.in.channels, number = thread_id();
  if (number >= size) return;
  T sum = T(0);
  for (int64_t c = 0; c < task.orders.num_chunks; ++c) sum += task.orders.chunk_sums[c * size + number];
  task.out.table[number] = sum;
}

// Both kernels.
template <class T, int V, class Filter, Pass P, bool Theta>
void sum_table(const Task<T>& task, void* stream) {
  constexpr int Orders = P == Pass::kDoubleBackward ? 2 : 1, kThreads = 128;
  const int64_t threads = int64_t(task.count) * 2 * task.in.channels;
  const Grid second{(threads + kThreads - 1) / kThreads, kThreads};
  if constexpr (std::is_same<Filter, Splines>::value) {
    const int64_t numbers = (kSplineWarps - 1) * 8 * V * kWarp;
    launch(sum_spline_chunks<T, V, P, Theta>,
           Grid{task.orders.num_chunks, kSplineWarps * kWarp, numbers * int64_t(sizeof(T))}, stream, task);
    launch(add_spline_chunks<T>, second, stream, task);
  } else {
    constexpr int kWidth = V == 4 ? 2 : V;  // with 4, the sums alone are 64 registers
    const int64_t numbers =
        Orders * kTile * (2 * kWidth * kWarp + kRows) + kGaussianWarps * Filter::kScratch * Orders;
    launch(sum_gaussian_chunks<T, kWidth, P, Theta>,
           Grid{task.orders.num_chunks * ((task.count + kRows - 1) / kRows), kGaussianWarps * kWarp,
                numbers * int64_t(sizeof(T))},
           stream, task);
    launch(add_gaussian_chunks<T>, second, stream, task);
  }
}

}  // namespace
}  // namespace dpt
