// The radial messages on a GPU. One block per target sums what its edges bring, in a second launch one per
// source; a third writes the rows to the filters of a bounded number of edges, for the sums of
// radial_messages_weights.h. What an edge needs is computed again in each, so that nothing per edge is stored
// but its own gradients. Every sum is a fixed tree that depends on the length of its row alone: warp w of a
// block takes the edges w, w + 4, ... of the row, and the warps are added in their order.
#include "radial_messages_weights.h"

namespace dpt {
namespace {

constexpr int kWarps = 4;

// Blocks of a multiprocessor that leave registers enough: left to itself, the compiler aims for more, and
// spills.
template <class T>
constexpr int kBlocks = sizeof(T) == 4 ? 4 : 2;

// Adds the sums of a block's warps, in their order: those of warp 0 become the total. All threads call it.
//   parts (kWarps - 1, Count, 32) in shared memory
template <class T, int Count>
__device__ void add_warps(T* parts, T (&sums)[Count]) {
  const int lane = lane_id(), warp = int(threadIdx.x) / kWarp;
  for (int n = 0; warp > 0 && n < Count; ++n) parts[((warp - 1) * Count + n) * kWarp + lane] = sums[n];
  __syncthreads();
  if (warp == 0) {
    for (int w = 0; w < kWarps - 1; ++w)
#pragma unroll
      for (int n = 0; n < Count; ++n) sums[n] += parts[(w * Count + n) * kWarp + lane];
  }
  __syncthreads();  // before the next use of `parts`
}

// Four sums over a warp at once: number q is in the lanes 8 q .. 8 q + 7 of the result.
template <class T>
__device__ T warp_sums(const T (&value)[4]) {
  const bool high = lane_id() & 16, odd = lane_id() & 8;
  const T a = (high ? value[2] : value[0]) + __shfl_xor_sync(kAllLanes, high ? value[0] : value[2], 16);
  const T b = (high ? value[3] : value[1]) + __shfl_xor_sync(kAllLanes, high ? value[1] : value[3], 16);
  T sum = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 8);
  for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// The gradients that belong to an edge: of its taps, directions and envelope. Groups of channels are added in
// their order, by the same lane.
template <bool Second, int Count, class T>
__device__ void write_edge(const Task<T>& task, int64_t e, int group, const Place& place,
                           const Contribution<T, Count>& c) {
  const int64_t channels = task.shape.channels, taps = task.shape.taps;
  const int q = lane_id() / 8;
  const auto add = [&](T* to, T value) {
    if (to && lane_id() % 8 == 0) *to = group == 0 ? value : *to + value;
  };
  if (task.out.directions || task.out.envelope) {
    const T geometry[4] = {c.direction[0], c.direction[1], c.direction[2], c.envelope};
    const T sum = warp_sums(geometry);
    if (q < 3) {
      add(task.out.directions ? task.out.directions + 3 * e + q : nullptr, sum);
    } else {
      add(task.out.envelope ? task.out.envelope + e : nullptr, sum);
    }
  }
  if (!task.out.taps) return;
  const int64_t row = int64_t(task.in.first[e]) * Count * channels + place.channel;
  for (int64_t m = 0; m < taps; m += 4) {
    T product[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (m + k >= taps) break;
      int64_t at = row + (m + k) * Count * channels;
#pragma unroll
      for (int p = 0; p < Count; ++p, at += channels) {
        product[k] += c.row[p] * get(task.in.weights, at, place.active);
        if constexpr (Second) product[k] += c.row_first[p] * get(task.along.weights, at, place.active);
      }
    }
    const T sum = warp_sums(product);
    add(m + q < taps ? task.out.taps + e * taps + m + q : nullptr, sum);
  }
}

template <class T>
__device__ void put(T* to, int64_t at, T value) {
  if (to) to[at] = value;
}

template <class T, Pass P, bool Attention, bool Vectors>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<T>) sum_targets(Task<T> task) {
  constexpr bool kSecond = P == Pass::kDoubleBackward, kForward = P == Pass::kForward;
  const int64_t i = blockIdx.x, channels = task.shape.channels;
  const int64_t begin = task.graph.target_ptr[i], end = task.graph.target_ptr[i + 1];
  T* parts = shared_memory<T>();
  for (int group = 0; group < task.lanes.groups; ++group) {
    const Place place(task.lanes, channels, group);
    const TargetEnd<T> target = load_target<P, Attention, Vectors>(task, i, place);
    T sums[5] = {};  // x, v, q
    for (int64_t e = begin + int(threadIdx.x) / kWarp; e < end; e += kWarps) {
      const int64_t j = task.graph.source[e];
      const auto source =
          load_source<Attention, Vectors>(task.in.keys, task.in.values, task.in.vectors, channels, j, place);
      SourceEnd<T> tangent{};
      if constexpr (kSecond)
        tangent = load_source<Attention, Vectors>(task.along.keys, task.along.values, task.along.vectors,
                                                  channels, j, place);
      const auto c =
          contribution<P, Attention, Vectors>(task, e, i, j, group, place, target, source, tangent);
      sums[0] += c.x;
      for (int a = 0; a < 3; ++a) sums[1 + a] += c.v[a];
      sums[4] += c.q;
      if constexpr (!kForward) write_edge<kSecond>(task, e, group, place, c);
    }
    add_warps(parts, sums);
    if (threadIdx.x >= kWarp || !place.active) continue;
    if constexpr (P != Pass::kBackward) {
      put(task.out.x, i * channels + place.channel, sums[0]);
      for (int a = 0; a < 3 && Vectors; ++a)
        put(task.out.v, (3 * i + a) * channels + place.channel, sums[1 + a]);
    }
    if constexpr (Attention && !kForward) put(task.out.queries, i * channels + place.channel, sums[4]);
  }
}

template <class T, Pass P, bool Attention, bool Vectors>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<T>) sum_sources(Task<T> task) {
  constexpr int kValues = Parts<Attention, Vectors>::kValues;
  const int64_t j = blockIdx.x, channels = task.shape.channels;
  const int64_t begin = task.graph.source_ptr[j], end = task.graph.source_ptr[j + 1];
  T* parts = shared_memory<T>();
  for (int group = 0; group < task.lanes.groups; ++group) {
    const Place place(task.lanes, channels, group);
    const auto source =
        load_source<Attention, Vectors>(task.in.keys, task.in.values, task.in.vectors, channels, j, place);
    SourceEnd<T> tangent{};
    if constexpr (P == Pass::kDoubleBackward)
      tangent = load_source<Attention, Vectors>(task.along.keys, task.along.values, task.along.vectors,
                                                channels, j, place);
    T sums[7] = {};  // k, x, one, two, vector
    for (int64_t k = begin + int(threadIdx.x) / kWarp; k < end; k += kWarps) {
      const int64_t e = task.graph.source_order[k], i = task.orders.target[e];
      const auto target = load_target<P, Attention, Vectors>(task, i, place);
      const auto c =
          contribution<P, Attention, Vectors>(task, e, i, j, group, place, target, source, tangent);
      sums[0] += c.source.k;
      sums[1] += c.source.x;
      sums[2] += c.source.one;
      sums[3] += c.source.two;
      for (int a = 0; a < 3; ++a) sums[4 + a] += c.source.vector[a];
    }
    add_warps(parts, sums);
    if (threadIdx.x >= kWarp || !place.active) continue;
    if constexpr (Attention) put(task.out.keys, j * channels + place.channel, sums[0]);
    for (int part = 0; part < kValues; ++part)
      put(task.out.values, (j * kValues + part) * channels + place.channel, sums[1 + part]);
    for (int a = 0; a < 3 && Vectors; ++a)
      put(task.out.vectors, (3 * j + a) * channels + place.channel, sums[4 + a]);
  }
}

// Rows to the filters of the edges first_order[begin ..], into the workspace: (edges, nC) of gz, or of gz2
// and, held_edges(num_edges) rows farther on, gz.
template <class T, Pass P, bool Attention, bool Vectors>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<T>)
    write_rows(Task<T> task, int64_t begin, int64_t edges) {
  constexpr int kFilters = Parts<Attention, Vectors>::kFilters;
  const int64_t place_of_edge = warp_id(), channels = task.shape.channels, columns = kFilters * channels;
  if (place_of_edge >= edges) return;
  const int64_t e = task.orders.first_order[begin + place_of_edge];
  const int64_t i = task.orders.target[e], j = task.graph.source[e];
  T* to = static_cast<T*>(task.orders.workspace) + place_of_edge * columns;
  T* to_first = to + held_edges(task.orders.num_edges) * columns;
  for (int group = 0; group < task.lanes.groups; ++group) {
    const Place place(task.lanes, channels, group);
    const auto target = load_target<P, Attention, Vectors>(task, i, place);
    const auto source =
        load_source<Attention, Vectors>(task.in.keys, task.in.values, task.in.vectors, channels, j, place);
    SourceEnd<T> tangent{};
    if constexpr (P == Pass::kDoubleBackward)
      tangent = load_source<Attention, Vectors>(task.along.keys, task.along.values, task.along.vectors,
                                                channels, j, place);
    const auto c = contribution<P, Attention, Vectors>(task, e, i, j, group, place, target, source, tangent);
    for (int p = 0; p < kFilters && place.active; ++p) {
      to[p * channels + place.channel] = c.row[p];
      if constexpr (P == Pass::kDoubleBackward) to_first[p * channels + place.channel] = c.row_first[p];
    }
  }
}

template <class T, Pass P, bool Attention, bool Vectors>
void run_shape(const Task<T>& task, void* stream) {
  const auto& out = task.out;
  const int64_t atoms = task.graph.num_atoms, shared = (kWarps - 1) * kWarp * int64_t(sizeof(T));
  const bool edges = out.taps || out.envelope || out.directions;
  if (out.x || out.v || out.queries || edges)
    launch(sum_targets<T, P, Attention, Vectors>, Grid{atoms, kWarps * kWarp, 5 * shared}, stream, task);
  if constexpr (P != Pass::kForward) {
    if (out.keys || out.values || out.vectors)
      launch(sum_sources<T, P, Attention, Vectors>, Grid{atoms, kWarps * kWarp, 7 * shared}, stream, task);
    if (out.weights || out.bias) {
      const int64_t most = held_edges(task.orders.num_edges);
      for (int64_t begin = 0; begin == 0 || begin < task.orders.num_edges; begin += most) {
        const int64_t left = task.orders.num_edges - begin, count = left < most ? left : most;
        launch(write_rows<T, P, Attention, Vectors>, (count + kWarps - 1) / kWarps, kWarps * kWarp, stream,
               task, begin, count);
        sum_weights<T, P == Pass::kDoubleBackward>(task, begin, count, stream);
        if (most == 0) break;
      }
    }
  }
}

template <class T, Pass P>
void run(const RadialMessageGraph& graph, const RadialMessageOrders& orders, const RadialMessageShape& shape,
         const RadialMessageInputs<T>& in, const RadialMessageTangents<T>& along,
         const RadialMessageOutputs<T>& out, void* stream) {
  const Task<T> task{graph, orders, shape, Lanes(shape), in, along, out};
  if (shape.attention) {
    shape.vectors ? run_shape<T, P, true, true>(task, stream) : run_shape<T, P, true, false>(task, stream);
  } else {
    shape.vectors ? run_shape<T, P, false, true>(task, stream) : run_shape<T, P, false, false>(task, stream);
  }
}

}  // namespace

int64_t CudaRadialMessages::workspace_bytes(const RadialMessageShape& shape, int64_t num_edges, bool second,
                                            int64_t element) {
  const int64_t parts = (shape.attention ? 1 : 0) + (shape.vectors ? 3 : 1);
  return held_edges(num_edges) * parts * shape.channels * (second ? 2 : 1) * element;
}

template <class T>
void CudaRadialMessages::forward(const RadialMessageGraph& graph, const RadialMessageOrders& orders,
                                 const RadialMessageShape& shape, const RadialMessageInputs<T>& in,
                                 const RadialMessageOutputs<T>& out, void* stream) {
  run<T, Pass::kForward>(graph, orders, shape, in, {}, out, stream);
}

template <class T>
void CudaRadialMessages::backward(const RadialMessageGraph& graph, const RadialMessageOrders& orders,
                                  const RadialMessageShape& shape, const RadialMessageInputs<T>& in,
                                  const RadialMessageOutputs<T>& out, void* stream) {
  run<T, Pass::kBackward>(graph, orders, shape, in, {}, out, stream);
}

template <class T>
void CudaRadialMessages::double_backward(const RadialMessageGraph& graph, const RadialMessageOrders& orders,
                                         const RadialMessageShape& shape, const RadialMessageInputs<T>& in,
                                         const RadialMessageTangents<T>& along,
                                         const RadialMessageOutputs<T>& out, void* stream) {
  run<T, Pass::kDoubleBackward>(graph, orders, shape, in, along, out, stream);
}

#define DPT_INSTANTIATE(T)                                                                             \
  template void CudaRadialMessages::forward(const RadialMessageGraph&, const RadialMessageOrders&,     \
                                            const RadialMessageShape&, const RadialMessageInputs<T>&,  \
                                            const RadialMessageOutputs<T>&, void*);                    \
  template void CudaRadialMessages::backward(const RadialMessageGraph&, const RadialMessageOrders&,    \
                                             const RadialMessageShape&, const RadialMessageInputs<T>&, \
                                             const RadialMessageOutputs<T>&, void*);                   \
  template void CudaRadialMessages::double_backward(                                                   \
      const RadialMessageGraph&, const RadialMessageOrders&, const RadialMessageShape&,                \
      const RadialMessageInputs<T>&, const RadialMessageTangents<T>&, const RadialMessageOutputs<T>&,  \
      void*);
DPT_INSTANTIATE(float)
DPT_INSTANTIATE(double)

}  // namespace dpt
