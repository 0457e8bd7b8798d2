// The radial messages on the CPU: packs the arrays by groups of channels, cuts the targets into chunks, runs
// radial_messages_tile.h on them. Per edge only the wanted gradients are stored; everything else is
// recomputed.
#include <atomic>

#include "ops.h"
#include "radial_messages_tile.h"

namespace dpt {
namespace {

// How C channels are cut into groups of whole vectors.
struct Packing {
  int64_t channels, width, groups, vectors;

  // Calls copy(row, channel, place, number of channels left in the group) for what vectors of C channels
  // hold, at places in (rows, groups, v) with the steps given.
  template <class T, class Copy>
  void each(int64_t rows, int64_t row_step, int64_t group_step, int64_t vector_step, const Copy& copy) const {
    constexpr int64_t lanes = Simd<T>::kLanes;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * width, n = channels - first < width ? channels - first : width;
        for (int64_t v = 0; v * lanes < n; ++v)
          copy(row, first + v * lanes, row * row_step + g * group_step + v * vector_step, n - v * lanes);
      }
  }
  // The columns [0, C) of (rows, from_pitch) to those places, and back.
  template <class T>
  void pack(const T* from, int64_t rows, int64_t from_pitch, T* to, int64_t row_step, int64_t group_step,
            int64_t vector_step) const {
    each<T>(rows, row_step, group_step, vector_step,
            [&](int64_t row, int64_t channel, int64_t place, int64_t n) {
              copy_lanes(from + row * from_pitch + channel, to + place, n);
            });
  }
  template <class T>
  void unpack(const T* from, int64_t rows, int64_t to_pitch, T* to, int64_t row_step, int64_t group_step,
              int64_t vector_step) const {
    each<T>(rows, row_step, group_step, vector_step,
            [&](int64_t row, int64_t channel, int64_t place, int64_t n) {
              copy_lanes(from + place, to + row * to_pitch + channel, n);
            });
  }
  template <class T>
  static void copy_lanes(const T* from, T* to, int64_t n) {
    if (n >= Simd<T>::kLanes)
      store_any<T>(to, load_any<T>(from));
    else
      __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  }
};

template <class T>
Packing packing(const RadialMessageShape& shape) {
  constexpr int64_t lanes = Simd<T>::kLanes;
  const int64_t width = shape.attention ? shape.channels / shape.heads : lanes;
  return {shape.channels, width, (shape.channels + width - 1) / width, (width + lanes - 1) / lanes};
}

// One part of a node array: C columns out of rows of `pitch`.
template <class T>
struct Part {
  T* from;  // null is zero, or not wanted
  int64_t pitch;
};

// Node rows of several parts, (atoms + spare, groups, v, part, lane); the spare atoms are zero.
template <class T, class Parts>
Buffer<T> pack_nodes(const Packing& packing, int64_t atoms, int64_t spare, const Parts& parts) {
  constexpr int64_t lanes = Simd<T>::kLanes;
  const int64_t count = static_cast<int64_t>(parts.size()), step = packing.vectors * count * lanes;
  Buffer<T> to = allocate<T>((atoms + spare) * packing.groups * step, true);
  for (int64_t p = 0; p < count; ++p)
    if (parts[p].from)
      packing.pack(parts[p].from, atoms, parts[p].pitch, to.get() + p * lanes, packing.groups * step, step,
                   count * lanes);
  return to;
}
template <class T, class Parts>
void unpack_nodes(const Packing& packing, int64_t atoms, const T* from, const Parts& parts) {
  constexpr int64_t lanes = Simd<T>::kLanes;
  const int64_t count = static_cast<int64_t>(parts.size()), step = packing.vectors * count * lanes;
  for (int64_t p = 0; p < count && from; ++p)
    if (parts[p].from)
      packing.unpack(from + p * lanes, atoms, parts[p].pitch, parts[p].from, packing.groups * step, step,
                     count * lanes);
}

// Parts of the sources: [k, x, 1, 2 | vec (3)], those that are there.
template <class T>
std::vector<Part<T>> source_parts(const RadialMessageShape& shape, T* keys, T* values, T* vectors) {
  const int64_t C = shape.channels, pitch = shape.vectors ? 3 * C : C;
  std::vector<Part<T>> parts;
  if (shape.attention) parts.push_back({keys, C});
  for (int64_t p = 0; p < (shape.vectors ? 3 : 1); ++p)
    parts.push_back({values ? values + p * C : nullptr, pitch});
  for (int64_t c = 0; c < (shape.vectors ? 3 : 0); ++c)
    parts.push_back({vectors ? vectors + c * C : nullptr, pitch});
  return parts;
}

// Filter weights or bias, (groups, v, rows, part, lane).
template <class T>
Buffer<T> pack_filters(const Packing& packing, const T* from, int64_t rows, int64_t parts) {
  if (!from) return nullptr;
  constexpr int64_t lanes = Simd<T>::kLanes;
  const int64_t row = parts * lanes, C = packing.channels, vectors = packing.vectors;
  const bool padded = packing.width % lanes || C % packing.width;
  Buffer<T> to = allocate<T>(packing.groups * vectors * rows * row, padded);
  for (int64_t p = 0; p < parts; ++p)
    packing.pack(from + p * C, rows, parts * C, to.get() + p * lanes, row, vectors * rows * row, rows * row);
  return to;
}
template <class T>
void unpack_filters(const Packing& packing, const T* from, T* to, int64_t rows, int64_t parts) {
  if (!to) return;
  constexpr int64_t lanes = Simd<T>::kLanes;
  const int64_t row = parts * lanes, C = packing.channels, vectors = packing.vectors;
  for (int64_t p = 0; p < parts; ++p)
    packing.unpack(from + p * lanes, rows, parts * C, to + p * C, row, vectors * rows * row, rows * row);
}

// Of whole vectors.
template <class T>
bool all_finite(const T* from, int64_t count) {
  Vec<T> poison{};
  for (int64_t k = 0; k < count; k += Simd<T>::kLanes) poison += load(from + k) * T(0);
  return sum_lanes<T>(poison) == T(0);
}

// (blocks, count, row) -> (blocks, row, pitch)
template <class T>
Buffer<T> transpose(const T* from, int64_t blocks, int64_t count, int64_t row, int64_t pitch) {
  if (!from) return nullptr;
  Buffer<T> to = allocate<T>(blocks * row * pitch, true);
  for (int64_t g = 0; g < blocks; ++g)
    for (int64_t k = 0; k < count; ++k)
      for (int64_t c = 0; c < row; ++c) to[(g * row + c) * pitch + k] = from[(g * count + k) * row + c];
  return to;
}

template <class T>
using RowKernel = void (*)(const MessageTask<T>&, int64_t, int64_t, Tile<T>&, const Sums<T>&);

template <class T, bool Attention, bool Vectors, Pass Which>
RowKernel<T> kernel(bool four) {
  return four ? run_rows<T, Attention, Vectors, true, Which> : run_rows<T, Attention, Vectors, false, Which>;
}
template <class T, Pass Which>
RowKernel<T> kernel(const RadialMessageShape& shape) {
  const bool four = shape.taps == 4;
  if (shape.attention)
    return shape.vectors ? kernel<T, true, true, Which>(four) : kernel<T, true, false, Which>(four);
  return shape.vectors ? kernel<T, false, true, Which>(four) : kernel<T, false, false, Which>(four);
}

template <class T, Pass Which>
void run(const RadialMessageGraph& graph, const RadialMessageShape& shape, const RadialMessageInputs<T>& in,
         const RadialMessageTangents<T>& along, const RadialMessageOutputs<T>& out, int num_threads) {
  constexpr int64_t lanes = Simd<T>::kLanes;
  constexpr bool second = Which == Pass::kDoubleBackward;
  const Packing pack = packing<T>(shape);
  const int64_t n = graph.num_atoms, C = shape.channels, K = shape.count,
                parts = shape.attention + 1 + 2 * shape.vectors;
  const int64_t source_count = parts + 3 * shape.vectors, row = parts * lanes,
                blocks = pack.groups * pack.vectors;

  const auto axis = [&](const T* array, int64_t c) {
    return Part<const T>{array ? array + c * C : nullptr, 3 * C};
  };
  const std::vector<Part<const T>> target_parts{{in.queries, C},    {in.grad_x, C},     axis(in.grad_v, 0),
                                                axis(in.grad_v, 1), axis(in.grad_v, 2), {along.queries, C}};
  const Buffer<T> targets = pack_nodes<T>(pack, n, num_threads, target_parts);
  const Buffer<T> sources = pack_nodes<T>(pack, n, 1, source_parts(shape, in.keys, in.values, in.vectors));
  const Buffer<T> sources_t =
      second ? pack_nodes<T>(pack, n, 1, source_parts(shape, along.keys, along.values, along.vectors))
             : nullptr;
  const Buffer<T> results =
      allocate<T>((n + num_threads) * pack.groups * pack.vectors * kResultParts * lanes, true);
  const Buffer<T> weights = pack_filters(pack, in.weights, K, parts),
                  bias = pack_filters(pack, in.bias, 1, parts);
  const Buffer<T> weights_t = pack_filters(pack, along.weights, K, parts);
  const Buffer<T> bias_t = pack_filters(pack, along.bias, 1, parts);
  const int64_t pitch = (K + 3 * lanes - 1) / lanes * lanes;
  const bool across = out.taps && shape.taps != 4;  // taps in the lanes
  const Buffer<T> transposed = across ? transpose(weights.get(), blocks, K, row, pitch) : nullptr;
  const Buffer<T> transposed_t = across ? transpose(weights_t.get(), blocks, K, row, pitch) : nullptr;

  GroupTask<T> group{};
  group.table = {
      pack.vectors,       K,          pitch,       weights.get(), weights_t.get(), transposed.get(),
      transposed_t.get(), bias.get(), bias_t.get()};
  group.silu = shape.silu;
  group.target = targets.get(), group.source = sources.get(), group.source_t = sources_t.get();
  group.result = results.get();
  group.want_taps = out.taps != nullptr;
  const int64_t target_step = pack.vectors * kTargetParts * lanes,
                result_step = pack.vectors * kResultParts * lanes;
  const int64_t source_step = pack.vectors * source_count * lanes;
  group.target_pitch = pack.groups * target_step, group.source_pitch = pack.groups * source_step;
  group.result_pitch = pack.groups * result_step;
  const int64_t bias_step = pack.vectors * row, table_step = K * bias_step;
  const MessageTask<T> task{graph,       shape,       in,
                            along,       out,         pack.groups,
                            group,       target_step, source_step,
                            result_step, table_step,  bias_step * pitch,
                            bias_step,   row,         all_finite(weights.get(), blocks * K * row)};

  const bool gradient = Which != Pass::kForward;
  const bool want_sources = gradient && (out.keys || out.values || out.vectors);
  const bool want_table = gradient && (out.weights || out.bias);
  ChunkSizes sizes{want_sources ? group.source_pitch : 0, want_table ? blocks * (K + 1) * row : 0};
  sizes.spare_rows = 1;
  if (want_table && 16 * K > sizes.edges_per_chunk) sizes.edges_per_chunk = 16 * K;
  const RowKernel<T> row_kernel = kernel<T, Which>(shape);
  std::atomic<int64_t> next_spare{n};
  const Totals<T> totals = run_chunks<T>(
      graph.target_ptr, graph.source, n, sizes, num_threads,
      [&] { return Tile<T>(4 * kBlock<T> * pack.vectors, next_spare++); },
      [&](int64_t first, int64_t last, Tile<T>& tile, const Sums<T>& sums) {
        row_kernel(task, first, last, tile, sums);
      });

  const auto out_axis = [&](T* array, int64_t c) { return Part<T>{array ? array + c * C : nullptr, 3 * C}; };
  const std::vector<Part<T>> result_parts{
      {out.x, C}, out_axis(out.v, 0), out_axis(out.v, 1), out_axis(out.v, 2), {out.queries, C}};
  unpack_nodes<T>(pack, n, results.get(), result_parts);
  if (!gradient) return;
  unpack_nodes<T>(pack, n, totals.by_source.get(), source_parts(shape, out.keys, out.values, out.vectors));
  unpack_filters(pack, totals.table.get(), out.weights, K, parts);
  if (out.bias) unpack_filters(pack, totals.table.get() + blocks * K * row, out.bias, 1, parts);
}

}  // namespace

template <class Level>
template <class T>
void RadialMessageOps<Level>::forward(const RadialMessageGraph& graph, const RadialMessageShape& shape,
                                      const RadialMessageInputs<T>& in, const RadialMessageOutputs<T>& out,
                                      int num_threads) {
  run<T, Pass::kForward>(graph, shape, in, {}, out, num_threads);
}

template <class Level>
template <class T>
void RadialMessageOps<Level>::backward(const RadialMessageGraph& graph, const RadialMessageShape& shape,
                                       const RadialMessageInputs<T>& in, const RadialMessageOutputs<T>& out,
                                       int num_threads) {
  run<T, Pass::kBackward>(graph, shape, in, {}, out, num_threads);
}

template <class Level>
template <class T>
void RadialMessageOps<Level>::double_backward(const RadialMessageGraph& graph,
                                              const RadialMessageShape& shape,
                                              const RadialMessageInputs<T>& in,
                                              const RadialMessageTangents<T>& along,
                                              const RadialMessageOutputs<T>& out, int num_threads) {
  run<T, Pass::kDoubleBackward>(graph, shape, in, along, out, num_threads);
}

#define DPT_INSTANTIATE(T)                                                                                  \
  template void RadialMessageOps<DPT_LEVEL>::forward(const RadialMessageGraph&, const RadialMessageShape&,  \
                                                     const RadialMessageInputs<T>&,                         \
                                                     const RadialMessageOutputs<T>&, int);                  \
  template void RadialMessageOps<DPT_LEVEL>::backward(const RadialMessageGraph&, const RadialMessageShape&, \
                                                      const RadialMessageInputs<T>&,                        \
                                                      const RadialMessageOutputs<T>&, int);                 \
  template void RadialMessageOps<DPT_LEVEL>::double_backward(                                               \
      const RadialMessageGraph&, const RadialMessageShape&, const RadialMessageInputs<T>&,                  \
      const RadialMessageTangents<T>&, const RadialMessageOutputs<T>&, int);
DPT_INSTANTIATE(float)
DPT_INSTANTIATE(double)

}  // namespace dpt
