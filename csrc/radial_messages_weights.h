// CUDA kernels of the radial messages: the gradient of the filter weights and of the bias, from rows to the
// filters of some edges that lie in the workspace in the order of `first`. The edges whose windows reach
// eight neighbouring rows of the weights are neighbours there: one block per eight rows and 32 columns adds
// them, its warps taking every sixteenth, and the warps in their order. The workspace is filled several
// times; what it gives is added in that order.
#pragma once

#include "radial_messages_edge.h"

namespace dpt {
namespace {

constexpr int kWeightWarps = 16, kWeightRows = 8;

__host__ __device__ inline int64_t held_edges(int64_t num_edges) {
  return num_edges < CudaRadialMessages::kMostEdges ? num_edges : CudaRadialMessages::kMostEdges;
}

// Rows 8 blockIdx / tiles .. of the weights, or the bias; columns 32 (blockIdx % tiles) .. Edges
// first_order[begin .. begin + edges] are in the workspace.
template <class T, bool Second, bool Bias>
__global__ void __launch_bounds__(kWeightWarps* kWarp)
    add_rows(Task<T> task, int64_t columns, int64_t tiles, int64_t begin, int64_t edges) {
  constexpr int kRows = Bias ? 1 : kWeightRows;
  const RadialMessageOrders& orders = task.orders;
  const int64_t count = task.shape.count, taps = task.shape.taps;
  const int64_t row = blockIdx.x / tiles * kRows, column = blockIdx.x % tiles * kWarp + lane_id();
  const bool active = column < columns;
  const int warp = int(threadIdx.x) / kWarp;
  int64_t from = begin, to = begin + edges;
  if constexpr (!Bias) {
    const int64_t lowest = row < taps ? 0 : row - taps + 1, end = row + kRows;
    const int64_t low = orders.first_ptr[lowest], high = orders.first_ptr[end < count ? end : count];
    from = low > from ? low : from;
    to = high < to ? high : to;
  }
  const T* rows = static_cast<const T*>(orders.workspace);
  const T* rows_first = rows + held_edges(orders.num_edges) * columns;
  T sums[kRows] = {};
#pragma unroll 2
  for (int64_t k = from + warp; k < to; k += kWeightWarps) {
    const T value = get(rows, (k - begin) * columns + column, active);
    if constexpr (Bias) {
      sums[0] += value;
      continue;
    }
    T value_first = T(0);
    if constexpr (Second) value_first = get(rows_first, (k - begin) * columns + column, active);
    const int64_t e = orders.first_order[k], m = row - task.in.first[e];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (m + r < 0 || m + r >= taps) continue;
      sums[r] += task.in.taps[e * taps + m + r] * value;
      if constexpr (Second) sums[r] += get(task.along.taps, e * taps + m + r, true) * value_first;
    }
  }
  T* parts = shared_memory<T>();  // (kRows, kWeightWarps, 32)
#pragma unroll
  for (int r = 0; r < kRows; ++r) parts[(r * kWeightWarps + warp) * kWarp + lane_id()] = sums[r];
  __syncthreads();
  if (warp >= kRows || !active || (!Bias && row + warp >= count)) return;
  T* out = Bias ? task.out.bias + column : task.out.weights + (row + warp) * columns + column;
  T sum = begin == 0 ? T(0) : *out;
  for (int w = 0; w < kWeightWarps; ++w) sum += parts[(warp * kWeightWarps + w) * kWarp + lane_id()];
  *out = sum;
}

template <class T, bool Second>
void sum_weights(const Task<T>& task, int64_t begin, int64_t edges, void* stream) {
  const int64_t parts = (task.shape.attention ? 1 : 0) + (task.shape.vectors ? 3 : 1);
  const int64_t columns = parts * task.shape.channels, tiles = (columns + kWarp - 1) / kWarp;
  const int64_t rows = (task.shape.count + kWeightRows - 1) / kWeightRows;
  const int64_t shared = kWeightWarps * kWarp * int64_t(sizeof(T));
  if (task.out.weights)
    launch(add_rows<T, Second, false>, Grid{rows * tiles, kWeightWarps * kWarp, kWeightRows * shared}, stream,
           task, columns, tiles, begin, edges);
  if (task.out.bias)
    launch(add_rows<T, Second, true>, Grid{tiles, kWeightWarps * kWarp, shared}, stream, task, columns, tiles,
           begin, edges);
}

}  // namespace
}  // namespace dpt
