// The radius graph on a GPU: one warp per target. Candidates are visited 32 at a time and take their places
// by ballots, so rows come out without an atomic or a guess of their size; rows are sorted only where
// candidates come out of order. The distance is the float64 predicate of periodic_cell.h, the CPU's, by the
// same roundings, so both give the same edges.
#include "radius_visits.h"
#include "warp_sort.h"

namespace dpt {
namespace {

constexpr int kThreads = 128;  // four targets a block
constexpr int64_t kNoSource = INT64_MAX;

__device__ void tally(const CudaRadiusGraph& graph, CudaRadiusGraph::Tally row, int64_t i, int64_t value) {
  graph.tallies[row * (graph.num_atoms + 1) + i + 1] = value;
}

__global__ void count_edges(const CudaRadiusGraph graph) {
  const int64_t i = warp_id();
  if (i >= graph.num_atoms) return;
  bool fault;
  const Record& record = record_of(graph, i, &fault);
  int64_t count = 0, twin = kNoSource, group = 0;
  uint64_t marks = 0;
  if (!fault) {
    visit_candidates(graph, record, i, [&](const Candidate& candidate) {
      const unsigned inside = __ballot_sync(kAllLanes, candidate.inside);
      count += __popc(inside);
      if (group / 2 == lane_id()) marks |= uint64_t(inside) << (group % 2 * kWarp);
      ++group;
      if (candidate.inside && candidate.squared <= kCoincident * kCoincident && candidate.source < twin) {
        twin = candidate.source;
      }
    });
    if (record.masked) graph.masks[kWarp * i + lane_id()] = marks;
  }
  twin = warp_min(twin);
  if (lane_id() != 0) return;
  const bool cut = count > graph.max_neighbors;
  graph.counts[i] = count;
  graph.coincident[i] = twin == kNoSource ? -1 : twin;
  tally(graph, CudaRadiusGraph::Kept, i, cut ? graph.max_neighbors : count);
  tally(graph, CudaRadiusGraph::Cut, i, cut);
  tally(graph, CudaRadiusGraph::CutEdges, i, cut ? count : 0);
  tally(graph, CudaRadiusGraph::Listed, i, record.listed() ? count : 0);
  tally(graph, CudaRadiusGraph::Faulty, i, twin != kNoSource);
}

// The rows found out of order: found again, by the same function, and sorted.
__global__ void list_hits(const CudaRadiusGraph graph, const int64_t* scan, Hit* hits) {
  const int64_t i = warp_id();
  if (i >= graph.num_atoms || graph.counts[i] == 0) return;
  bool fault;
  const Record& record = record_of(graph, i, &fault);
  if (!record.listed()) return;
  Hit* row = hits + scan[CudaRadiusGraph::Listed * (graph.num_atoms + 1) + i];
  int64_t place = 0;
  visit_candidates(graph, record, i, [&](const Candidate& candidate) {
    int found;
    const int rank = rank_among(candidate.inside, &found);
    if (candidate.inside) {
      row[place + rank] = {int32_t(candidate.source - record.first),
                           {candidate.shift[0], candidate.shift[1], candidate.shift[2]}};
    }
    place += found;
  });
  __syncwarp(kAllLanes);
  warp_sort(row, place, [](const Hit& a, const Hit& b) {
    if (a.source != b.source) return a.source < b.source;
    if (a.shift[0] != b.shift[0]) return a.shift[0] < b.shift[0];
    if (a.shift[1] != b.shift[1]) return a.shift[1] < b.shift[1];
    return a.shift[2] < b.shift[2];
  });
}

// The squared distances of the rows that are longer than max_neighbors, row i from
// distances[scan[CutEdges][i]] on.
__global__ void write_distances(const CudaRadiusGraph graph, const int64_t* scan, const Hit* hits,
                                double* distances) {
  const int64_t i = warp_id();
  if (i >= graph.num_atoms || graph.counts[i] <= graph.max_neighbors) return;
  int64_t place = scan[CudaRadiusGraph::CutEdges * (graph.num_atoms + 1) + i];
  visit_edges(graph, i, scan, hits, true, [&](const Candidate& candidate) {
    int found;
    const int rank = rank_among(candidate.inside, &found);
    if (candidate.inside) distances[place + rank] = candidate.squared;
    place += found;
  });
}

// The max_neighbors-th smallest of each long row, and how many edges at exactly that distance belong to the
// nearest. The bits of non-negative float64 are in numeric order: the key is found bit by bit from the top,
// moving no data.
__global__ void select_nearest(const CudaRadiusGraph graph, const int64_t* scan, const double* distances,
                               int64_t* last_key, int64_t* ties) {
  const int64_t i = warp_id();
  if (i >= graph.num_atoms || graph.counts[i] <= graph.max_neighbors) return;
  const int64_t count = graph.counts[i];
  const double* row = distances + scan[CudaRadiusGraph::CutEdges * (graph.num_atoms + 1) + i];
  int64_t prefix = 0, wanted = graph.max_neighbors;
  for (int bit = 62; bit >= 0; --bit) {
    int64_t below = 0;
    for (int64_t k = lane_id(); k < count; k += kWarp) {
      below += __double_as_longlong(row[k]) >> bit == prefix >> bit;
    }
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
__global__ void write_edges(const CudaRadiusGraph graph, const int64_t* scan, const Hit* hits,
                            const int64_t* last_key, const int64_t* ties, int64_t num_edges,
                            int64_t* edge_index, int32_t* cell_shifts) {
  const int64_t i = warp_id();
  if (i >= graph.num_atoms) return;
  const bool cut = graph.counts[i] > graph.max_neighbors;
  const double last = cut ? __longlong_as_double(last_key[i]) : 0;
  int64_t ties_left = cut ? ties[i] : 0, place = scan[i];
  visit_edges(graph, i, scan, hits, cut, [&](const Candidate& candidate) {
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

__global__ void count_edges_out(const int64_t* sources, int64_t num_edges, int64_t* counts) {
  const int64_t e = thread_id();
  if (e < num_edges) atomic_add(counts + sources[e] + 1, int64_t(1));
}

// Edges take their places in order of arrival, which differs from run to run ...
__global__ void place_edges_out(const int64_t* sources, int64_t num_edges, const int64_t* ptr, int64_t* next,
                                int64_t* order) {
  const int64_t e = thread_id();
  if (e >= num_edges) return;
  order[ptr[sources[e]] + atomic_add(next + sources[e], int64_t(1))] = e;
}

// ... and are sorted, so that the result does not.
__global__ void sort_edges_out(int64_t num_atoms, const int64_t* ptr, int64_t* order) {
  const int64_t j = warp_id();
  if (j >= num_atoms) return;
  warp_sort(order + ptr[j], ptr[j + 1] - ptr[j], [](int64_t a, int64_t b) { return a < b; });
}

int64_t blocks_for(int64_t threads) {
  return (threads + kThreads - 1) / kThreads;
}

}  // namespace

int64_t CudaRadiusGraph::record_bytes() {
  return sizeof(Record);
}

int64_t CudaRadiusGraph::mask_words() {
  return kMaskedCandidates / 64;
}

void CudaRadiusGraph::prepare(void* stream) const {
  Record* all = static_cast<Record*>(records);
  launch(prepare_cells, blocks_for(num_structures), kThreads, stream, *this, all);
  launch(prepare_atoms, blocks_for(num_atoms), kThreads, stream, *this, all);
  if (!bin_order) return;
  launch(prepare_bins, blocks_for(num_structures), kThreads, stream, *this, all);
  launch(assign_bins, blocks_for(num_atoms), kThreads, stream, *this, all);
}

void CudaRadiusGraph::count(void* stream) const {
  launch(count_edges, blocks_for(num_atoms * kWarp), kThreads, stream, *this);
}

void CudaRadiusGraph::list(const int64_t* scan, int32_t* hits, void* stream) const {
  launch(list_hits, blocks_for(num_atoms * kWarp), kThreads, stream, *this, scan,
         reinterpret_cast<Hit*>(hits));
}

void CudaRadiusGraph::select(const int64_t* scan, const int32_t* hits, double* distances, int64_t* last_key,
                             int64_t* ties, void* stream) const {
  const int64_t blocks = blocks_for(num_atoms * kWarp);
  launch(write_distances, blocks, kThreads, stream, *this, scan, reinterpret_cast<const Hit*>(hits),
         distances);
  launch(select_nearest, blocks, kThreads, stream, *this, scan, distances, last_key, ties);
}

void CudaRadiusGraph::fill(const int64_t* scan, const int32_t* hits, const int64_t* last_key,
                           const int64_t* ties, int64_t num_edges, int64_t* edge_index, int32_t* cell_shifts,
                           void* stream) const {
  launch(write_edges, blocks_for(num_atoms * kWarp), kThreads, stream, *this, scan,
         reinterpret_cast<const Hit*>(hits), last_key, ties, num_edges, edge_index, cell_shifts);
}

void CudaRadiusGraph::count_sources(const int64_t* sources, int64_t num_edges, int64_t* counts,
                                    void* stream) {
  launch(count_edges_out, blocks_for(num_edges), kThreads, stream, sources, num_edges, counts);
}

void CudaRadiusGraph::order_by_source(const int64_t* sources, int64_t num_edges, int64_t num_atoms,
                                      const int64_t* ptr, int64_t* next, int64_t* order, void* stream) {
  launch(place_edges_out, blocks_for(num_edges), kThreads, stream, sources, num_edges, ptr, next, order);
  launch(sort_edges_out, blocks_for(num_atoms * kWarp), kThreads, stream, num_atoms, ptr, order);
}

}  // namespace dpt
