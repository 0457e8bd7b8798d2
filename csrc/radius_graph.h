// What a radius search finds before its edges are written to their tensors (CPU).
#pragma once

#include <cstdint>
#include <vector>

#include "kept.h"

namespace dpt {

struct RadiusEdge {
  int32_t source;
  int32_t shift[3];
};

// The first thing that is wrong with the input, by structure. `value` is the volume (Cell), the number of
// images (Images), the distance (Coincident) or the number of edges (Edges).
struct RadiusFault {
  enum Kind { None, Positions, Cell, Images, Coincident, Edges };
  Kind kind = None;
  int64_t structure = -1;
  int64_t target = -1;
  int64_t source = -1;
  double value = 0;
};

// The edges of consecutive targets, in the final order; of at least kBlock edges, and kept for reuse if
// exactly so.
struct RadiusRows {
  static constexpr int64_t kBlock = 1 << 14;

  int64_t first_target;
  int64_t num_targets = 0;
  int64_t capacity;
  std::unique_ptr<RadiusEdge[]> edges;

  RadiusRows(int64_t target, int64_t room)
      : first_target(target), capacity(room > kBlock ? room : kBlock), edges(kept(capacity)) {}
  RadiusRows(RadiusRows&&) = default;
  RadiusRows(const RadiusRows&) = delete;
  ~RadiusRows() {
    if (edges && capacity == kBlock) pool().give_back(std::move(edges));
  }

 private:
  // 256 blocks: 64 MiB.
  static Kept<RadiusEdge[]>& pool() {
    static Kept<RadiusEdge[]> blocks(256);
    return blocks;
  }
  static std::unique_ptr<RadiusEdge[]> kept(int64_t capacity) {
    std::unique_ptr<RadiusEdge[]> block = capacity == kBlock ? pool().take() : nullptr;
    return block ? std::move(block) : std::unique_ptr<RadiusEdge[]>(new RadiusEdge[capacity]);
  }
};

struct RadiusSearch {
  RadiusSearch() = default;
  RadiusSearch(RadiusSearch&&) = default;
  RadiusSearch(const RadiusSearch&) = delete;

  RadiusFault fault;
  int64_t num_edges = 0;
  int64_t num_truncated = 0;
  std::vector<RadiusRows> rows;
};

}  // namespace dpt
