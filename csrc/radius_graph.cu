// The radius graph on a GPU: one warp per target over all pairs and all images of a box around the nearest
// image.
//
// Candidates are visited in the order of the edges (source slowest, then shift), 32 at a time, and take their
// places by ballots: rows come out sorted without a sort, an atomic or a guess of their size. The distance is
// the float64 predicate of periodic_cell.h, the CPU's, by the same roundings, so both give the same edges.
#include "device.h"
#include "ops.h"
#include "periodic_cell.h"

namespace dpt {
namespace {

constexpr int kThreads = 128;             // four targets a block
constexpr double kMostImages = 1 << 26;   // of one pair
constexpr double kLargestFraction = 1e8;  // beyond it the fractions lose the digits that kSlack counts on
constexpr double kLargest = 1e15;         // Å, as on the CPU
constexpr double kSlack = 1e-6;           // of a cell; rounding of differences of fractions
constexpr int64_t kNoSource = INT64_MAX;

struct Record {
  PeriodicCell cell;
  int32_t reach[3];  // images within the cutoff are at most this far from the nearest one, on each axis
};

__device__ int64_t structure_of(const int64_t* atom_ptr, int64_t num_structures, int64_t atom) {
  int64_t low = 0, high = num_structures;  // atom_ptr[low] <= atom < atom_ptr[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (atom_ptr[middle] <= atom) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void prepare_cells(const double* cells, const uint8_t* pbc, int64_t num_structures, double cutoff,
                              Record* records, int32_t* faults) {
  const int64_t s = thread_id();
  if (s >= num_structures) return;
  Record record{PeriodicCell(cells + 9 * s, pbc + 3 * s), {0, 0, 0}};
  faults[s] = RadiusFault::None;
  double images = 1;
  for (int a = 0; a < 3 && !record.cell.degenerate; ++a) {
    if (!record.cell.periodic[a]) continue;
    const double reach = cutoff / record.cell.height(a) + 0.5 + kSlack;
    images *= 2 * reach + 1;
    record.reach[a] = images < kMostImages ? int32_t(reach) : 0;
  }
  if (record.cell.degenerate) {
    faults[s] = RadiusFault::Cell;
  } else if (!(images < kMostImages)) {
    faults[s] = RadiusFault::Images;
  }
  records[s] = record;
}

// The largest fault of a structure's atoms wins, in whatever order they write.
__global__ void prepare_atoms(const double* positions, const int64_t* atom_ptr, int64_t num_structures,
                              int64_t num_atoms, const Record* records, double* fractions, int32_t* faults) {
  const int64_t i = thread_id();
  if (i >= num_atoms) return;
  const int64_t s = structure_of(atom_ptr, num_structures, i);
  const double* r = positions + 3 * i;
  const PeriodicCell cell = records[s].cell;
  if (!(fabs(r[0]) <= kLargest && fabs(r[1]) <= kLargest && fabs(r[2]) <= kLargest)) {
    atomicMax(&faults[s], int32_t(RadiusFault::Positions));
    return;
  }
  for (int a = 0; a < 3; ++a) {
    const double f = cell.periodic[a] && !cell.degenerate ? cell.fraction(a, r) : 0;
    if (!(fabs(f) <= kLargestFraction)) atomicMax(&faults[s], int32_t(RadiusFault::Images));
    fractions[3 * i + a] = f;
  }
}

struct Search {
  const double* positions;
  const double* fractions;
  const int64_t* atom_ptr;
  const Record* records;
  const int32_t* faults;
  int64_t num_structures;
  int64_t num_atoms;
  double cutoff;
  int32_t max_images;  // INT32_MAX: all
};

struct Candidate {
  bool inside;
  int64_t source;
  int32_t shift[3];
  double squared;
};

// Calls visit(candidate) for all candidates of target i, by whole warps, in the order of the edges. Lanes
// past the end get candidates that are not inside.
template <class Visit>
__device__ void visit_candidates(const Search& search, int64_t i, const Visit& visit) {
  const int64_t s = structure_of(search.atom_ptr, search.num_structures, i);
  if (search.faults[s] != RadiusFault::None) return;
  const Record record = search.records[s];
  const int64_t last = search.atom_ptr[s + 1];
  const int32_t size[3] = {2 * record.reach[0] + 1, 2 * record.reach[1] + 1, 2 * record.reach[2] + 1};
  const int64_t images = int64_t(size[0]) * size[1] * size[2];
  const double* to = search.positions + 3 * i;
  // Place in the box and source, as the digits of a number that steps by 32.
  const auto digits = [&](int64_t number, int32_t* place) {
    place[2] = int32_t(number % size[2]);
    place[1] = int32_t(number / size[2] % size[1]);
    place[0] = int32_t(number / (int64_t(size[2]) * size[1]) % size[0]);
    return number / images;
  };
  int32_t place[3], step[3];
  int64_t source = search.atom_ptr[s] + digits(lane_id(), place);
  const int64_t source_step = digits(kWarp, step);
  for (int64_t left = (last - search.atom_ptr[s]) * images; left > 0; left -= kWarp) {
    Candidate candidate{source < last, source, {0, 0, 0}, 0};
    if (candidate.inside) {
      bool home = source == i, near = true;
      for (int a = 0; a < 3; ++a) {
        const double difference = search.fractions[3 * source + a] - search.fractions[3 * i + a];
        candidate.shift[a] = place[a] - record.reach[a] - int32_t(rint(difference));
        home = home && candidate.shift[a] == 0;
        near = near && abs(candidate.shift[a]) <= search.max_images;
      }
      candidate.squared = record.cell.squared_distance(to, search.positions + 3 * source, candidate.shift);
      candidate.inside = near && !home && candidate.squared <= search.cutoff * search.cutoff;
    }
    visit(candidate);
    int32_t carry = 0;
    for (int a = 2; a >= 0; --a) {
      place[a] += step[a] + carry;
      carry = place[a] >= size[a];
      place[a] -= carry ? size[a] : 0;
    }
    source += source_step + carry;
  }
}

__global__ void count_edges(Search search, int64_t* counts, int64_t* coincident) {
  const int64_t i = warp_id();
  if (i >= search.num_atoms) return;
  int64_t count = 0, twin = kNoSource;
  visit_candidates(search, i, [&](const Candidate& candidate) {
    count += __popc(__ballot_sync(kAllLanes, candidate.inside));
    if (candidate.inside && candidate.squared <= kCoincident * kCoincident && candidate.source < twin) {
      twin = candidate.source;
    }
  });
  twin = warp_min(twin);
  if (lane_id() == 0) {
    counts[i] = count;
    coincident[i] = twin == kNoSource ? -1 : twin;
  }
}

// The squared distances of the rows that are longer than max_neighbors, row i from distances[offsets[i]] on.
__global__ void write_distances(Search search, const int64_t* counts, int64_t max_neighbors,
                                const int64_t* offsets, double* distances) {
  const int64_t i = warp_id();
  if (i >= search.num_atoms || counts[i] <= max_neighbors) return;
  int64_t place = offsets[i];
  visit_candidates(search, i, [&](const Candidate& candidate) {
    int found;
    const int rank = rank_among(candidate.inside, &found);
    if (candidate.inside) distances[place + rank] = candidate.squared;
    place += found;
  });
}

// The max_neighbors-th smallest of each long row, and how many edges at exactly that distance belong to the
// nearest. The bits of non-negative float64 are in numeric order: the key is found bit by bit from the top,
// moving no data.
__global__ void select_nearest(const int64_t* counts, int64_t num_atoms, int64_t max_neighbors,
                               const int64_t* offsets, const double* distances, int64_t* last_key,
                               int64_t* ties) {
  const int64_t i = warp_id();
  if (i >= num_atoms || counts[i] <= max_neighbors) return;
  const int64_t* keys = reinterpret_cast<const int64_t*>(distances) + offsets[i];
  int64_t prefix = 0, wanted = max_neighbors;
  for (int bit = 62; bit >= 0; --bit) {
    int64_t below = 0;
    for (int64_t k = lane_id(); k < counts[i]; k += kWarp) below += keys[k] >> bit == prefix >> bit;
    below = warp_sum(below);
    if (wanted > below) {
      wanted -= below;
      prefix |= int64_t(1) << bit;
    }
  }
  if (lane_id() == 0) {
    last_key[i] = prefix;
    ties[i] = wanted;
  }
}

// last_key and ties may be null where no row is longer than max_neighbors.
__global__ void write_edges(Search search, const int64_t* counts, int64_t max_neighbors,
                            const int64_t* last_key, const int64_t* ties, const int64_t* target_ptr,
                            int64_t num_edges, int64_t* edge_index, int32_t* cell_shifts) {
  const int64_t i = warp_id();
  if (i >= search.num_atoms || counts[i] == 0) return;
  const bool cut = counts[i] > max_neighbors;
  const double last = cut ? __longlong_as_double(last_key[i]) : 0;
  int64_t ties_left = cut ? ties[i] : 0, place = target_ptr[i];
  visit_candidates(search, i, [&](const Candidate& candidate) {
    bool keep = candidate.inside;
    if (cut) {  // the same for the whole warp
      int tied;
      const int rank = rank_among(keep && candidate.squared == last, &tied);
      keep = keep && (candidate.squared < last || (candidate.squared == last && rank < ties_left));
      ties_left -= tied;
    }
    int found;
    const int64_t e = place + rank_among(keep, &found);
    if (keep) {
      edge_index[e] = candidate.source;
      edge_index[num_edges + e] = i;
      for (int a = 0; a < 3; ++a) cell_shifts[3 * e + a] = candidate.shift[a];
    }
    place += found;
  });
}

int64_t blocks_for(int64_t threads) {
  return (threads + kThreads - 1) / kThreads;
}

Search search_of(const CudaRadiusGraph& graph) {
  return {graph.positions, graph.fractions,      graph.atom_ptr,  static_cast<const Record*>(graph.records),
          graph.faults,    graph.num_structures, graph.num_atoms, graph.cutoff,
          graph.max_images};
}

}  // namespace

int64_t CudaRadiusGraph::record_bytes() {
  return sizeof(Record);
}

void CudaRadiusGraph::count(int64_t* counts, int64_t* coincident, void* stream) const {
  Record* all = static_cast<Record*>(records);
  launch(prepare_cells, blocks_for(num_structures), kThreads, stream, cells, pbc, num_structures, cutoff, all,
         faults);
  launch(prepare_atoms, blocks_for(num_atoms), kThreads, stream, positions, atom_ptr, num_structures,
         num_atoms, all, fractions, faults);
  launch(count_edges, blocks_for(num_atoms * kWarp), kThreads, stream, search_of(*this), counts, coincident);
}

void CudaRadiusGraph::select(const int64_t* counts, int64_t max_neighbors, const int64_t* offsets,
                             double* distances, int64_t* last_key, int64_t* ties, void* stream) const {
  const int64_t blocks = blocks_for(num_atoms * kWarp);
  launch(write_distances, blocks, kThreads, stream, search_of(*this), counts, max_neighbors, offsets,
         distances);
  launch(select_nearest, blocks, kThreads, stream, counts, num_atoms, max_neighbors, offsets, distances,
         last_key, ties);
}

void CudaRadiusGraph::fill(const int64_t* counts, int64_t max_neighbors, const int64_t* last_key,
                           const int64_t* ties, const int64_t* target_ptr, int64_t num_edges,
                           int64_t* edge_index, int32_t* cell_shifts, void* stream) const {
  launch(write_edges, blocks_for(num_atoms * kWarp), kThreads, stream, search_of(*this), counts,
         max_neighbors, last_key, ties, target_ptr, num_edges, edge_index, cell_shifts);
}

}  // namespace dpt
