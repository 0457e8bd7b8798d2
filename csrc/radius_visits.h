// How a warp of the CUDA radius graph goes over the candidates of its target: all pairs and all images of a
// box around the nearest image, or the bins around it; and, later, over those that were found.
//
// All of them call visit(candidate) by whole warps, 32 candidates at a time; lanes past the end get
// candidates that are not inside. The box and the found ones come in the order of the edges (source slowest,
// then shift).
#pragma once

#include "radius_records.h"

namespace dpt {
namespace {

struct Candidate {
  bool inside;
  int64_t source;
  int32_t shift[3];
  double squared;
};

// An edge found out of order.
struct alignas(16) Hit {
  int32_t source;  // counted from the structure's first atom
  int32_t shift[3];
};

__device__ inline const Record& record_of(const CudaRadiusGraph& graph, int64_t i, bool* fault) {
  const int64_t s = structure_of(graph.atom_ptr, graph.num_structures, i);
  *fault = graph.faults[s] != RadiusFault::None;
  return static_cast<const Record*>(graph.records)[s];
}

// The shift in the cell of a shift in the box.
__device__ inline void to_cell(const Record& record, const int32_t* in_box, int32_t* shift) {
  for (int b = 0; b < 3; ++b) {
    int64_t n = in_box[b];
    if (record.reduced) {
      n = 0;
      for (int a = 0; a < 3; ++a) n += int64_t(in_box[a]) * record.map[a][b];
    }
    shift[b] = int32_t(n);
  }
}

__device__ inline void measure(const CudaRadiusGraph& graph, const Record& record, int64_t i,
                               Candidate& candidate) {
  candidate.squared = record.cell.squared_distance(graph.positions + 3 * i,
                                                   graph.positions + 3 * candidate.source, candidate.shift);
}

// The one test of a candidate whose shift is set: in the graph or not.
__device__ inline void test(const CudaRadiusGraph& graph, const Record& record, int64_t i,
                            Candidate& candidate) {
  bool home = candidate.source == i, near = true;
  for (int a = 0; a < 3; ++a) {
    home = home && candidate.shift[a] == 0;
    near = near && abs(candidate.shift[a]) <= graph.max_images;
  }
  measure(graph, record, i, candidate);
  candidate.inside = near && !home && candidate.squared <= graph.cutoff * graph.cutoff;
}

// The box of images around the nearest image of each source.
struct Box {
  int32_t size[3];
  int64_t images;

  __device__ explicit Box(const Record& record) : images(1) {
    for (int a = 0; a < 3; ++a) images *= size[a] = 2 * record.reach[a] + 1;
  }
  // Place in the box and source, as the digits of a candidate's number.
  __device__ int64_t digits(int64_t number, int32_t* place) const {
    const int64_t line = number / size[2], plane = line / size[1];
    place[2] = int32_t(number - line * size[2]);
    place[1] = int32_t(line - plane * size[1]);
    place[0] = int32_t(plane % size[0]);
    return plane / size[0];
  }
  __device__ static void shift(const CudaRadiusGraph& graph, const Record& record, int64_t i, int64_t source,
                               const int32_t* place, int32_t* shift) {
    int32_t in_box[3];
    for (int a = 0; a < 3; ++a) {
      const double difference = graph.fractions[3 * source + a] - graph.fractions[3 * i + a];
      in_box[a] = place[a] - record.reach[a] - int32_t(std::rint(difference));
    }
    to_cell(record, in_box, shift);
  }
};

template <class Visit>
__device__ void visit_box(const CudaRadiusGraph& graph, const Record& record, int64_t i, const Visit& visit) {
  const Box box(record);
  int32_t place[3], step[3];
  int64_t source = record.first + box.digits(lane_id(), place);
  const int64_t source_step = box.digits(kWarp, step);  // the digits of a number that grows by 32
  for (int64_t left = (record.last - record.first) * box.images; left > 0; left -= kWarp) {
    Candidate candidate{source < record.last, source, {0, 0, 0}, 0};
    if (candidate.inside) {
      Box::shift(graph, record, i, source, place, candidate.shift);
      test(graph, record, i, candidate);
    }
    visit(candidate);
    int32_t carry = 0;
    for (int a = 2; a >= 0; --a) {
      place[a] += step[a] + carry;
      carry = place[a] >= box.size[a];
      place[a] -= carry ? box.size[a] : 0;
    }
    source += source_step + carry;
  }
}

// Bin number c of an unending row of bins is bin `bin` of the image `image` of the cell; false outside of an
// open axis.
__device__ inline bool locate(const Record& record, int a, int32_t c, int32_t* bin, int32_t* image) {
  const int32_t n = record.num_bins[a];
  *image = c >= 0 ? c / n : -((n - 1 - c) / n);
  *bin = c - *image * n;
  return record.box.periodic[a] || *image == 0;
}

template <class Visit>
__device__ void visit_bins(const CudaRadiusGraph& graph, const Record& record, int64_t i,
                           const Visit& visit) {
  const int32_t* size = record.num_bins;
  const int64_t own = graph.bins[i] - record.first, line = own / size[2];
  const int32_t home[3] = {int32_t(line / size[1]), int32_t(line % size[1]), int32_t(own % size[2])};
  int32_t wrap[3];
  for (int a = 0; a < 3; ++a) wrap[a] = int32_t(std::floor(graph.fractions[3 * i + a]));
  int32_t bin[3], image[3];
  for (int32_t a = home[0] - record.stencil[0]; a <= home[0] + record.stencil[0]; ++a) {
    if (!locate(record, 0, a, &bin[0], &image[0])) continue;
    for (int32_t b = home[1] - record.stencil[1]; b <= home[1] + record.stencil[1]; ++b) {
      if (!locate(record, 1, b, &bin[1], &image[1])) continue;
      const int64_t row = record.first + (int64_t(bin[0]) * size[1] + bin[1]) * size[2];
      // Bins of one image stand in one run of atoms.
      const int32_t end = home[2] + record.stencil[2];
      for (int32_t c = home[2] - record.stencil[2], next; c <= end; c = next) {
        const bool there = locate(record, 2, c, &bin[2], &image[2]);
        next = c + size[2] - bin[2];
        if (!there) continue;
        const int64_t to = graph.bin_ptr[row + bin[2] + (next <= end ? next : end + 1) - c];
        for (int64_t k = graph.bin_ptr[row + bin[2]]; k < to; k += kWarp) {
          Candidate candidate{k + lane_id() < to, 0, {0, 0, 0}, 0};
          if (candidate.inside) {
            candidate.source = graph.bin_order[k + lane_id()];
            int32_t in_box[3];
            for (int x = 0; x < 3; ++x) {
              in_box[x] = image[x] + wrap[x] - int32_t(std::floor(graph.fractions[3 * candidate.source + x]));
            }
            to_cell(record, in_box, candidate.shift);
            test(graph, record, i, candidate);
          }
          visit(candidate);
        }
      }
    }
  }
}

template <class Visit>
__device__ void visit_candidates(const CudaRadiusGraph& graph, const Record& record, int64_t i,
                                 const Visit& visit) {
  if (record.binned) {
    visit_bins(graph, record, i, visit);
  } else {
    visit_box(graph, record, i, visit);
  }
}

// The place of the set bit number n (from 0) of a word that has it.
__device__ inline int place_of_bit(uint64_t word, int n) {
  int place = 0;
  for (int width = 32; width > 0; width /= 2) {
    const int below = __popcll(word & ((uint64_t(1) << width) - 1));
    if (n < below) continue;
    n -= below;
    place += width;
    word >>= width;
  }
  return place;
}

// The candidates that are marked in the masks: lane l has the marks of the candidates 64 l .. 64 l + 63. Each
// lane takes one marked candidate, whatever their places, so that it has an edge to write.
template <class Visit>
__device__ void visit_marked(const CudaRadiusGraph& graph, const Record& record, int64_t i, int64_t count,
                             bool measured, const Visit& visit) {
  const Box box(record);
  const uint64_t marks = graph.masks[kWarp * i + lane_id()];
  int until = __popcll(marks);  // marks of this lane and those before it
  for (int step = 1; step < kWarp; step *= 2) {
    const int others = __shfl_sync(kAllLanes, until, (lane_id() - step) & (kWarp - 1));
    if (lane_id() >= step) until += others;
  }
  for (int64_t k = 0; k < count; k += kWarp) {
    const int rank = int(k) + lane_id();
    int holder = 0;  // the first lane with more than `rank` marks up to it
    for (int step = kWarp / 2; step > 0; step /= 2) {
      if (__shfl_sync(kAllLanes, until, holder + step - 1) <= rank) holder += step;
    }
    const uint64_t word = __shfl_sync(kAllLanes, marks, holder);
    const int before = __shfl_sync(kAllLanes, until, holder) - __popcll(word);
    Candidate candidate{rank < count, i, {0, 0, 0}, 0};
    if (candidate.inside) {
      int32_t place[3];
      candidate.source = record.first + box.digits(64 * holder + place_of_bit(word, rank - before), place);
      Box::shift(graph, record, i, candidate.source, place, candidate.shift);
      if (measured) measure(graph, record, i, candidate);
    }
    visit(candidate);
  }
}

template <class Visit>
__device__ void visit_listed(const CudaRadiusGraph& graph, const Record& record, int64_t i, int64_t count,
                             const Hit* hits, bool measured, const Visit& visit) {
  for (int64_t k = lane_id(); k - lane_id() < count; k += kWarp) {
    Candidate candidate{k < count, i, {0, 0, 0}, 0};
    if (candidate.inside) {
      const Hit hit = hits[k];
      candidate.source = record.first + hit.source;
      for (int a = 0; a < 3; ++a) candidate.shift[a] = hit.shift[a];
      if (measured) measure(graph, record, i, candidate);
    }
    visit(candidate);
  }
}

// The edges of target i in their order, with their squared distances if these are wanted. Where the
// candidates are too many to be marked they are tested again, by the same function.
template <class Visit>
__device__ void visit_edges(const CudaRadiusGraph& graph, int64_t i, const int64_t* scan, const Hit* hits,
                            bool measured, const Visit& visit) {
  bool fault;
  const Record& record = record_of(graph, i, &fault);
  const int64_t count = graph.counts[i];
  if (fault || count == 0) return;
  if (record.listed()) {
    const int64_t start = scan[CudaRadiusGraph::Listed * (graph.num_atoms + 1) + i];
    visit_listed(graph, record, i, count, hits + start, measured, visit);
  } else if (record.masked) {
    visit_marked(graph, record, i, count, measured, visit);
  } else {
    visit_box(graph, record, i, visit);
  }
}

}  // namespace
}  // namespace dpt
