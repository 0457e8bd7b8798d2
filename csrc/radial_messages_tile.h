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
  int64_t table_step, transposed_step;

  bool want_geometry() const { return out.envelope || out.directions; }
};

// Columns that the edges of a block share (SharedTaps).
struct SharedWindow {
  int64_t first, count, taps;         // the last: offset in Tile::shared
  int64_t all_first, all, gradients;  // the last: offset in Tile::to_taps
};

template <class T>
struct Tile {
  std::vector<int64_t> edge, source, base;
  std::vector<T> envelope, envelope_t, directions, directions_t;
  std::vector<T> taps, taps_t;  // (edges,4), or (columns,EB) block by block
  std::vector<T> geometry, to_taps;
  std::vector<SharedWindow> windows;
  Buffer<T> rows;  // Filters, r and rh: vectors

  explicit Tile(int64_t block_vectors) : rows(allocate<T>(6 * block_vectors * Simd<T>::kLanes)) {}
};

// Puts the edges of a row in the order of a coarse bin of their windows (stable).
template <class T>
void sort_row(const MessageTask<T>& task, int64_t begin, int64_t end, int64_t* edge) {
  constexpr int kBins = 64;
  int64_t offset[kBins + 1] = {};
  const int64_t most = task.shape.count;
  const auto bin = [&](int64_t e) {
    return most <= kBins ? int64_t(task.in.first[e]) : int64_t(task.in.first[e]) * kBins / most;
  };
  for (int64_t e = begin; e < end; ++e) ++offset[bin(e) + 1];
  for (int k = 1; k <= kBins; ++k) offset[k] += offset[k - 1];
  for (int64_t e = begin; e < end; ++e) edge[offset[bin(e)]++] = e;
}

// Calls act(first edge, constant number of edges) for the blocks of a row.
template <class T, class Act>
DPT_INLINE void for_blocks(int64_t begin, int64_t end, const Act& act) {
  constexpr int EB = kBlock<T>;
  for (; begin + EB <= end; begin += EB) act(begin, std::integral_constant<int, EB>{});
  for (; begin < end; ++begin) act(begin, std::integral_constant<int, 1>{});
}

// What a block of EB edges shares: columns and their taps.
template <class T, int EB>
void share_window(const MessageTask<T>& task, Tile<T>& tile, int64_t slot) {
  constexpr int64_t lanes = Simd<T>::kLanes;
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
    while (low < high && empty(low)) ++low;
    while (high > low && empty(high - 1)) --high;
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

// Everything that the groups share.
template <class T, bool Four, Pass Which>
void fill_tile(const MessageTask<T>& task, int64_t first, int64_t last, Tile<T>& tile) {
  const int64_t begin = task.graph.target_ptr[first], n = task.graph.target_ptr[last] - begin;
  const size_t size = static_cast<size_t>(n), padded = size + Simd<T>::kLanes;  // load_repeated reads beyond
  tile.edge.resize(size), tile.source.resize(size), tile.base.resize(size);
  tile.envelope.resize(padded), tile.envelope_t.resize(padded);
  tile.directions.resize(3 * size), tile.directions_t.resize(3 * size);
  tile.geometry.assign(task.want_geometry() && Which != Pass::kForward ? 4 * size : 0, T(0));
  for (int64_t i = first; i < last; ++i)
    sort_row(task, task.graph.target_ptr[i], task.graph.target_ptr[i + 1],
             tile.edge.data() + (task.graph.target_ptr[i] - begin));
  for (int64_t k = 0; k < n; ++k) {
    const int64_t e = tile.edge[k];
    tile.source[k] = task.graph.source[e];
    tile.base[k] = task.in.first[e] * task.group.table.row;
    tile.envelope[k] = task.in.envelope ? task.in.envelope[e] : T(1);
    tile.envelope_t[k] = task.along.envelope ? task.along.envelope[e] : T(0);
    for (int c = 0; c < 3; ++c) {
      tile.directions[3 * k + c] = task.in.directions ? task.in.directions[3 * e + c] : T(0);
      tile.directions_t[3 * k + c] = task.along.directions ? task.along.directions[3 * e + c] : T(0);
    }
  }
  if constexpr (Four) {
    tile.taps.resize(4 * size), tile.taps_t.resize(4 * size);
    tile.to_taps.assign(task.out.taps ? 4 * size : 0, T(0));
    for (int64_t k = 0; k < n; ++k)
      for (int m = 0; m < 4; ++m) {
        tile.taps[4 * k + m] = task.in.taps[4 * tile.edge[k] + m];
        if (task.along.taps) tile.taps_t[4 * k + m] = task.along.taps[4 * tile.edge[k] + m];
      }
  } else {
    tile.windows.clear(), tile.taps.clear(), tile.taps_t.clear(), tile.to_taps.clear();
    for (int64_t i = first; i < last; ++i)
      for_blocks<T>(task.graph.target_ptr[i], task.graph.target_ptr[i + 1], [&](int64_t e, auto block) {
        share_window<T, decltype(block)::value>(task, tile, e - begin);
      });
  }
}

// What the groups have summed per edge.
template <class T, bool Four>
void write_edges(const MessageTask<T>& task, int64_t first, int64_t last, const Tile<T>& tile) {
  const int64_t begin = task.graph.target_ptr[first], M = task.shape.taps;
  int64_t window = 0;
  for (int64_t i = first; i < last; ++i)
    for_blocks<T>(task.graph.target_ptr[i], task.graph.target_ptr[i + 1], [&](int64_t start, auto block) {
      constexpr int EB = decltype(block)::value;
      const int64_t slot = start - begin;
      for (int e = 0; e < EB; ++e) {
        const int64_t edge = tile.edge[slot + e];
        const T* sums = tile.geometry.data() + 4 * slot + e;
        if (task.out.envelope) task.out.envelope[edge] = sums[3 * EB];
        if (task.out.directions)
          for (int c = 0; c < 3; ++c) task.out.directions[3 * edge + c] = sums[c * EB];
        if (!task.out.taps) continue;
        const T* from = tile.to_taps.data() + 4 * (slot + e);
        if constexpr (!Four) {
          const SharedWindow& w = tile.windows[window];
          from = tile.to_taps.data() + w.gradients + e * w.all + (task.in.first[edge] - w.all_first);
        }
        for (int64_t m = 0; m < M; ++m) task.out.taps[edge * M + m] = from[m];
      }
      ++window;
    });
}

// One group of channels of the rows [first, last).
template <class T, bool Attention, bool Vectors, bool Four, Pass Which>
void run_group(const MessageTask<T>& task, const GroupTask<T>& group, int64_t first, int64_t last,
               Tile<T>& tile) {
  const int64_t begin = task.graph.target_ptr[first];
  const int64_t size = kBlock<T> * 4 * group.table.vectors;
  Vec<T>* buffer = reinterpret_cast<Vec<T>*>(tile.rows.get());
  const Filters<T> f{buffer, buffer + size, buffer + 2 * size, buffer + 3 * size};
  int64_t window = 0;
  for (int64_t i = first; i < last; ++i)
    for_blocks<T>(task.graph.target_ptr[i], task.graph.target_ptr[i + 1],
                  [&](int64_t start, auto block) __attribute__((always_inline)) {
                    constexpr int EB = decltype(block)::value;
                    const int64_t slot = start - begin;
                    const BlockEdges<T, EB> edges{
                        tile.source.data() + slot,
                        tile.envelope.data() + slot,
                        tile.envelope_t.data() + slot,
                        tile.directions.data() + 3 * slot,
                        tile.directions_t.data() + 3 * slot,
                        tile.geometry.empty() ? nullptr : tile.geometry.data() + 4 * slot};
                    Vec<T>*r = buffer + 4 * size, *rh = buffer + 5 * size;
                    if constexpr (Four) {
                      const FourTaps<T, EB> taps{tile.taps.data() + 4 * slot,
                                                 task.along.taps ? tile.taps_t.data() + 4 * slot : nullptr,
                                                 tile.base.data() + slot, tile.to_taps.data() + 4 * slot};
                      message_block<T, EB, Attention, Vectors, Which>(group, edges, taps, i, f, r, rh);
                    } else {
                      const SharedWindow& w = tile.windows[window++];
                      const SharedTaps<T, EB> taps{w.first,
                                                   w.count,
                                                   tile.taps.data() + w.taps,
                                                   task.along.taps ? tile.taps_t.data() + w.taps : nullptr,
                                                   w.all_first,
                                                   w.all,
                                                   tile.to_taps.data() + w.gradients};
                      message_block<T, EB, Attention, Vectors, Which>(group, edges, taps, i, f, r, rh);
                    }
                  });
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
      if (table.bias) table.bias += g * table.row;
      if (table.bias_t) table.bias_t += g * table.row;
      if (sums.by_source) group.source_sums = sums.by_source + g * task.source_step;
      if (sums.table && task.out.weights) group.table_sums = sums.table + g * task.table_step;
      if (sums.table && task.out.bias)
        group.bias_sums = sums.table + task.groups * task.table_step + g * table.row;
      run_group<T, Attention, Vectors, Four, Which>(task, group, first, end, tile);
    }
    if (Which != Pass::kForward && (task.want_geometry() || task.out.taps))
      write_edges<T, Four>(task, first, end, tile);
  }
}

}  // namespace
}  // namespace dpt
