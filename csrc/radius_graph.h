// What a radius search finds before its edges are written to their tensors (CPU).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

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

struct RadiusSearch {
  // The edges of consecutive targets, in the final order.
  struct Rows {
    int64_t first_target;
    int64_t num_targets;
    std::unique_ptr<RadiusEdge[]> edges;
  };

  RadiusSearch() = default;
  RadiusSearch(RadiusSearch&&) = default;
  RadiusSearch(const RadiusSearch&) = delete;

  RadiusFault fault;
  int64_t num_edges = 0;
  int64_t num_truncated = 0;
  std::vector<Rows> rows;
};

}  // namespace dpt
