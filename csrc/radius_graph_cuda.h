// The radius graph on a GPU: what RadiusGraphOps (ops.h) finds, edge by edge and bit by bit.
#pragma once

#include <cstdint>

namespace dpt {

// Pointers to device memory, all work on one stream, nothing allocated, no result read. The caller runs
//   prepare; sort bins (if any structure may have cell_list_atoms); count; scan = the inclusive sums of the
//   rows of tallies; reads the last column of scan, the one thing that it has to wait for; then
//   list (if Listed > 0), select (if Cut > 0), fill.
struct CudaRadiusGraph {
  const double* positions;  // (N,3)
  const double* cells;      // (B,3,3)
  const uint8_t* pbc;       // (B,3)
  const int64_t* atom_ptr;  // (B+1,); offsets that do not rise from 0 to N are a fault
  int64_t num_structures;   // B; at least 1 if there are atoms
  int64_t num_atoms;        // N
  double cutoff;
  int32_t max_images;       // the largest int32: all
  int64_t max_neighbors;    // the largest int64: all
  int64_t cell_list_atoms;  // structures of so many atoms are searched through bins
  double* fractions;        // (N,3) workspace
  void* records;            // (B, record_bytes()) workspace
  uint64_t* masks;          // (N, 32) workspace
  int64_t* bins;  // (N,) out of prepare: the bin of each atom; those of a structure are in [first, last)
  const int64_t* bin_order;  // (N,) the atoms sorted by bin, stably; null without bins
  // (N+1,) bin b has the atoms bin_order[bin_ptr[b] : bin_ptr[b + 1]]; null without bins
  const int64_t* bin_ptr;
  int32_t* faults;      // (B,) out: RadiusFault::Kind; structures with one have no edges
  int64_t* coincident;  // (N,) out: the lowest coincident source, or -1
  int64_t* counts;      // (N,) out: edges of each target within the cutoff
  int64_t* tallies;     // (5, N+1) zeros; out: column i+1 tells of target i

  // Rows of tallies: edges kept; 1 if the row is cut; edges of cut rows before that; edges of rows that are
  // found out of order; 1 for a fault (in column 0: of any structure).
  enum Tally { Kept, Cut, CutEdges, Listed, Faulty, kTallies };

  static int64_t record_bytes();
  static int64_t mask_words();  // uint64 per target

  void prepare(void* stream) const;
  void count(void* stream) const;
  // hits (Listed, 4) int32 out: the rows found out of order, sorted.
  void list(const int64_t* scan, int32_t* hits, void* stream) const;
  // Of each cut row: the bits of the squared distance of the last edge kept, and how many edges at that
  // distance are. distances (CutEdges,) workspace · last_key, ties (N,) out
  void select(const int64_t* scan, const int32_t* hits, double* distances, int64_t* last_key, int64_t* ties,
              void* stream) const;
  // edge_index (2,E) out · cell_shifts (E,3) out, as RadiusGraphOps::fill; last_key and ties null if nothing
  // is cut
  void fill(const int64_t* scan, const int32_t* hits, const int64_t* last_key, const int64_t* ties,
            int64_t num_edges, int64_t* edge_index, int32_t* cell_shifts, void* stream) const;

  // The edges in the order of their sources, as RadiusGraphOps::by_source, in two steps: counts (N+1,) zeros
  // in, counts[j + 1] = edges with source j out; then, with ptr (N+1,) their inclusive sums and next (N,)
  // zeros: order (E,) out.
  static void count_sources(const int64_t* sources, int64_t num_edges, int64_t* counts, void* stream);
  static void order_by_source(const int64_t* sources, int64_t num_edges, int64_t num_atoms,
                              const int64_t* ptr, int64_t* next, int64_t* order, void* stream);
};

}  // namespace dpt
