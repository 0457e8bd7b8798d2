// A tile of rows of the radial messages: its edges in the order of their windows, with all that the groups of
// channels share, so that a group's part of the filter weights stays in the cache from row to row. Included
// by radial_messages.cpp, once per processor level.
#pragma once

#include <vector>

#include "chunks.h"
#include "radial_messages.h"
#include "radial_messages_rows.h"

namespace dpt {
namespace {

constexpr int64_t kEdgesPerTile = 1024;

// One call with packed arrays.
template <class T>
struct MessageTask {
  const RadialMessageGraph& graph;
  const RadialMessageShape& shape;
  const RadialMessageInputs<T>& in;
  const RadialMessageTangents<T>& along;
  const RadialMessageOutputs<T>& out;  // per edge
  int64_t groups;
  GroupTask<T> group;                             // of the first group; the sums are not set
  int64_t target_step, source_step, result_step;  // from group to group
  int64_t table_step, transposed_step, bias_step;
  int64_t row;  // numbers in a row of the filter weights
  bool trim;    // zeros at the ends of windows are left out

  bool want_geometry() const { return out.envelope || out.directions; }
};

// Columns that the edges of a block share (SharedTaps).
struct SharedWindow {
  int64_t first, count, taps;         // the last: offset in Tile::taps
  int64_t all_first, all, gradients;  // the last: offset in Tile::to_taps
};

template <class T>
struct Tile {
  std::vector<int64_t> edge, source, target, base, bins;
  std::vector<T> envelope, envelope_t, directions, directions_t;
  std::vector<T> taps, taps_t;  // (edges,4), or (columns,EB) block by block
  std::vector<T> geometry, to_taps;
  std::vector<SharedWindow> windows;
  Buffer<T> rows;      // Filters, r and rh: vectors
  int64_t spare_atom;  // whose row takes what the edges that fill up a strip add; no other thread's

  Tile(int64_t block_vectors, int64_t spare)
      : rows(allocate<T>((4 * kStrip + 2) * block_vectors * Simd<T>::kLanes)), spare_atom(spare) {}
};

// Puts the edges [begin, end) in the order of their windows (stable).
template <class T>
void sort_edges(const MessageTask<T>& task, int64_t begin, int64_t end, Tile<T>& tile) {
  const int64_t count = task.shape.count, bins = count < 1024 ? count : 1024;
  tile.bins.assign(static_cast<size_t>(bins + 1), 0);
  const auto bin = [&](int64_t e) { return task.in.first[e] * bins / count; };
  for (int64_t e = begin; e < end; ++e) ++tile.bins[bin(e) + 1];
  for (int64_t k = 1; k <= bins; ++k) tile.bins[k] += tile.bins[k - 1];
  for (int64_t e = begin; e < end; ++e) tile.edge[tile.bins[bin(e)]++] = e;
}

// What the edges of a block share: columns and their taps.
template <class T>
void share_window(const MessageTask<T>& task, Tile<T>& tile, int64_t slot) {
  constexpr int64_t lanes = Simd<T>::kLanes, EB = kBlock<T>;
  const int64_t M = task.shape.taps;
  const T *taps = task.in.taps, *taps_t = task.along.taps;
  SharedWindow w{task.shape.count, 0, static_cast<int64_t>(tile.taps.size()),
                 task.shape.count, 0, static_cast<int64_t>(tile.to_taps.size())};
  int64_t last = 0, all_last = 0;
  for (int e = 0; e < EB; ++e) {
    const int64_t edge = tile.edge[slot + e], first = task.in.first[edge];
    w.all_first = first < w.all_first ? first : w.all_first;
    all_last = first + M > all_last ? first + M : all_last;
    int64_t low = 0, high = M;
    const auto empty = [&](int64_t m) {
      return taps[edge * M + m] == T(0) && !(taps_t && taps_t[edge * M + m] != T(0));
    };
    while (task.trim && low < high && empty(low)) ++low;
    while (task.trim && high > low && empty(high - 1)) --high;
    if (low == high) continue;
    w.first = first + low < w.first ? first + low : w.first;
    last = first + high > last ? first + high : last;
  }
  w.count = last > w.first ? last - w.first : 0;
  w.all = (all_last - w.all_first + lanes - 1) / lanes * lanes;
  tile.taps.resize(tile.taps.size() + static_cast<size_t>(w.count * EB));
  if (taps_t) tile.taps_t.resize(tile.taps.size());
  if (task.out.taps) tile.to_taps.resize(tile.to_taps.size() + static_cast<size_t>(w.all * EB));
  for (int e = 0; e < EB; ++e) {
    const int64_t edge = tile.edge[slot + e], first = task.in.first[edge] - w.first;
    for (int64_t m = first < 0 ? -first : 0; m < M && first + m < w.count; ++m) {
      const int64_t to = w.taps + (first + m) * EB + e;
      tile.taps[to] = taps[edge * M + m];
      if (taps_t) tile.taps_t[to] = taps_t[edge * M + m];
    }
  }
  tile.windows.push_back(w);
}

// Everything that the groups share. The last strip is filled up with edges between spare atoms, whose rows
// are zero.
template <class T, bool Four, Pass Which>
void fill_tile(const MessageTask<T>& task, int64_t first, int64_t last, Tile<T>& tile) {
  constexpr int64_t EB = kBlock<T>, strip = kStrip * EB;
  const RadialMessageGraph& graph = task.graph;
  const int64_t begin = graph.target_ptr[first], n = graph.target_ptr[last] - begin;
  const size_t size = static_cast<size_t>((n + strip - 1) / strip * strip);
  tile.edge.resize(size);
  sort_edges(task, begin, begin + n, tile);
  for (size_t k = n; k < size; ++k) tile.edge[k] = tile.edge[n - 1];
  tile.source.assign(size, graph.num_atoms * task.group.source_pitch);
  tile.target.assign(size, tile.spare_atom);
  tile.base.resize(size);
  tile.envelope.assign(size, T(0)), tile.envelope_t.assign(size, T(0));
  tile.directions.assign(3 * size, T(0)), tile.directions_t.assign(3 * size, T(0));
  tile.geometry.assign(task.want_geometry() && Which != Pass::kForward ? 4 * size : 0, T(0));
  std::vector<int64_t>& target = tile.bins;  // by edge
  target.resize(size);
  for (int64_t i = first; i < last; ++i)
    for (int64_t e = graph.target_ptr[i]; e < graph.target_ptr[i + 1]; ++e) target[e - begin] = i;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t e = tile.edge[k];
    tile.source[k] = graph.source[e] * task.group.source_pitch;
    tile.target[k] = target[e - begin];
    tile.envelope[k] = task.in.envelope ? task.in.envelope[e] : T(1);
    if (task.along.envelope) tile.envelope_t[k] = task.along.envelope[e];
    for (int c = 0; c < 3; ++c) {
      if (task.in.directions) tile.directions[3 * k + c] = task.in.directions[3 * e + c];
      if (task.along.directions) tile.directions_t[3 * k + c] = task.along.directions[3 * e + c];
    }
  }
  for (size_t k = 0; k < size; ++k) tile.base[k] = task.in.first[tile.edge[k]] * task.row;
  tile.windows.clear(), tile.taps.clear(), tile.taps_t.clear(), tile.to_taps.clear();
  if constexpr (Four) {
    tile.taps.resize(4 * size), tile.taps_t.resize(4 * size);
    if (task.out.taps) tile.to_taps.resize(4 * size);
    for (size_t k = 0; k < size; ++k)
      for (int m = 0; m < 4; ++m) {
        tile.taps[4 * k + m] = task.in.taps[4 * tile.edge[k] + m];
        if (task.along.taps) tile.taps_t[4 * k + m] = task.along.taps[4 * tile.edge[k] + m];
      }
  } else {
    for (size_t k = 0; k < size; k += EB) share_window(task, tile, k);
  }
}

// What the groups have summed per edge.
template <class T, bool Four>
void write_edges(const MessageTask<T>& task, int64_t count, const Tile<T>& tile) {
  constexpr int64_t EB = kBlock<T>;
  const int64_t M = task.shape.taps;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t edge = tile.edge[k], e = k % EB;
    const T* sums = tile.geometry.data() + 4 * (k - e) + e;
    if (task.out.envelope) task.out.envelope[edge] = sums[3 * EB];
    if (task.out.directions)
      for (int c = 0; c < 3; ++c) task.out.directions[3 * edge + c] = sums[c * EB];
    if (!task.out.taps) continue;
    const T* from = tile.to_taps.data() + 4 * k;
    if constexpr (!Four) {
      const SharedWindow& w = tile.windows[k / EB];
      from = tile.to_taps.data() + w.gradients + e * w.all + (task.in.first[edge] - w.all_first);
    }
    for (int64_t m = 0; m < M; ++m) task.out.taps[edge * M + m] = from[m];
  }
}

// One group of channels of a tile.
template <class T, bool Attention, bool Vectors, bool Four, Pass Which>
void run_group(const MessageTask<T>& task, const GroupTask<T>& given, Tile<T>& tile) {
  const GroupTask<T> group = given;  // a copy that no store can change, so that its fields stay in registers
  constexpr int EB = kBlock<T>;
  const int64_t size = EB * 4 * group.table.vectors, count = static_cast<int64_t>(tile.edge.size());
  Vec<T>* buffer = reinterpret_cast<Vec<T>*>(tile.rows.get());
  const bool tangents = task.along.taps != nullptr;
  const auto each_block = [&](int64_t first, const auto& act) __attribute__((always_inline)) {
    for (int b = 0; b < kStrip; ++b) {
      const int64_t k = first + b * EB;
      const BlockEdges<T, EB> edges{tile.source.data() + k, tile.target.data() + k,
                                    tile.directions.data() + 3 * k, tile.directions_t.data() + 3 * k,
                                    tile.geometry.empty() ? nullptr : tile.geometry.data() + 4 * k};
      Vec<T>* place = buffer + (2 + 4 * b) * size;
      const Filters<T> f{place, place + size, place + 2 * size, place + 3 * size};
      if constexpr (Four) {
        act(b * EB, edges, f,
            FourTaps<T, EB>{tile.taps.data() + 4 * k, tangents ? tile.taps_t.data() + 4 * k : nullptr,
                            tile.base.data() + k, tile.to_taps.data() + 4 * k});
      } else {
        const SharedWindow& w = tile.windows[k / EB];
        act(b * EB, edges, f,
            SharedTaps<T, EB>{w.first, w.count, tile.taps.data() + w.taps,
                              tangents ? tile.taps_t.data() + w.taps : nullptr, w.all_first, w.all,
                              tile.to_taps.data() + w.gradients});
      }
    }
  };
  Strip<T> strip;
  for (int64_t k = 0; k < count; k += Strip<T>::kEdges) {
    each_block(
        k, [&](int first, const auto& edges, const auto& f, const auto& taps) __attribute__((always_inline)) {
          sum_block<T, EB, Attention, Vectors, Which>(group, edges, taps, f, strip, first);
        });
    weigh_strip<T, Attention, Which>(tile.envelope.data() + k, tile.envelope_t.data() + k, strip);
    each_block(
        k, [&](int first, const auto& edges, const auto& f, const auto& taps) __attribute__((always_inline)) {
          message_block<T, EB, Attention, Vectors, Which>(group, edges, taps, f, buffer, buffer + size, strip,
                                                          first);
        });
  }
}

// Rows [first, last), tile by tile.
template <class T, bool Attention, bool Vectors, bool Four, Pass Which>
void run_rows(const MessageTask<T>& task, int64_t first, int64_t last, Tile<T>& tile, const Sums<T>& sums) {
  const int64_t* ptr = task.graph.target_ptr;
  for (int64_t end; first < last; first = end) {
    for (end = first + 1; end < last && ptr[end + 1] - ptr[first] <= kEdgesPerTile;) ++end;
    if (ptr[end] == ptr[first]) continue;
    fill_tile<T, Four, Which>(task, first, end, tile);
    for (int64_t g = 0; g < task.groups; ++g) {
      GroupTask<T> group = task.group;
      FilterTable<T>& table = group.table;
      group.target += g * task.target_step;
      group.source += g * task.source_step;
      if (group.source_t) group.source_t += g * task.source_step;
      group.result += g * task.result_step;
      table.weights += g * task.table_step;
      if (table.weights_t) table.weights_t += g * task.table_step;
      if (table.transposed) table.transposed += g * task.transposed_step;
      if (table.transposed_t) table.transposed_t += g * task.transposed_step;
      if (table.bias) table.bias += g * task.bias_step;
      if (table.bias_t) table.bias_t += g * task.bias_step;
      if (sums.by_source) group.source_sums = sums.by_source + g * task.source_step;
      if (sums.table && task.out.weights) group.table_sums = sums.table + g * task.table_step;
      if (sums.table && task.out.bias)
        group.bias_sums = sums.table + task.groups * task.table_step + g * task.bias_step;
      run_group<T, Attention, Vectors, Four, Which>(task, group, tile);
    }
    if (Which != Pass::kForward && (task.want_geometry() || task.out.taps))
      write_edges<T, Four>(task, ptr[end] - ptr[first], tile);
  }
}

}  // namespace
}  // namespace dpt
