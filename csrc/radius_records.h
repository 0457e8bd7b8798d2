// What the CUDA radius graph knows of each structure, and how that is made: the lattice to search in, the
// images within reach, the bins of a cell list.
#pragma once

#include "device.h"
#include "lattice_reduction.h"
#include "periodic_cell.h"
#include "radius_graph.h"
#include "radius_graph_cuda.h"

namespace dpt {
namespace {

constexpr double kMostImages = 1 << 26;   // of one pair
constexpr double kLargestFraction = 1e8;  // sums of two, and of the images, fit an int32
constexpr double kLargest = 1e15;         // Å, as on the CPU
constexpr double kSlack = 1e-6;           // of a cell: what a difference of two fractions may be wrong by
constexpr double kOpenSlack = 1e-4;       // Å: the same for an open axis
// A set bit for each candidate within the cutoff: two words of 32 candidates for each lane of the target's
// warp.
constexpr int64_t kMaskedCandidates = 64 * kWarp;

struct Record {
  PeriodicCell cell;    // the lattice of the predicate and of the shifts
  PeriodicCell box;     // the same lattice, perhaps by shorter vectors: the search's
  int32_t map[3][3];    // box vector a = sum_b map[a][b] * cell vector b
  double error[3];      // rounding of a fraction in the box, per Å of the atom's distance from the origin
  int64_t first, last;  // its atoms
  int32_t reach[3];     // images within the cutoff are at most this far from the nearest one, on each axis
  bool reduced;         // box and cell differ: candidates are not visited in the order of the edges
  bool binned;          // searched through bins: nor are these
  bool masked;          // candidates within the cutoff are marked when they are counted

  // Bins along each axis: floor((f - low) * scale), of the fraction that is wrapped into [0, 1) if the axis
  // is periodic, and of the coordinate in Å if it is open.
  int64_t extent[3][2];  // lowest and highest coordinate on open axes, as ordered_bits
  int32_t num_bins[3], stencil[3];
  double low[3], scale[3];

  __device__ bool listed() const { return reduced || binned; }
};

// The order of float64 as an order of integers.
__device__ inline int64_t ordered_bits(double value) {
  const int64_t bits = __double_as_longlong(value);
  return bits < 0 ? bits ^ INT64_MAX : bits;
}
__device__ inline double from_ordered_bits(int64_t bits) {
  return __longlong_as_double(bits < 0 ? bits ^ INT64_MAX : bits);
}

__device__ inline int64_t structure_of(const int64_t* atom_ptr, int64_t num_structures, int64_t atom) {
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

// The images of one pair in a box around the nearest one; at least kMostImages if they are too many.
__device__ inline double images_in_reach(const PeriodicCell& cell, double cutoff, int32_t* reach) {
  double images = 1;
  for (int a = 0; a < 3; ++a) {
    reach[a] = 0;
    if (!cell.periodic[a]) continue;
    const double most = cutoff / cell.height(a) + 0.5 + kSlack;
    images *= most < kMostImages ? 2 * std::floor(most) + 1 : kMostImages;
    if (images < kMostImages) reach[a] = int32_t(most);
  }
  return images;
}

// A box of at most half as many images is worth the sorting of the rows.
__device__ inline void choose_box(Record& record, const double* cell, const uint8_t* pbc, double cutoff) {
  const double images = images_in_reach(record.cell, cutoff, record.reach);
  const ReducedLattice lattice(cell, pbc);
  if (lattice.reduced) {
    const PeriodicCell box(lattice.vector, pbc);
    int32_t reach[3];
    record.reduced = !box.degenerate && 2 * images_in_reach(box, cutoff, reach) <= images;
    if (record.reduced) {
      record.box = box;
      for (int a = 0; a < 3; ++a) record.reach[a] = reach[a];
    }
  }
  // A vector of the box is wrong by the rounding of its terms, as often as an atom is away from the origin.
  double turns = 1;
  for (int a = 0; a < 3; ++a) {
    double terms = 0;
    for (int b = 0; b < 3; ++b) {
      record.map[a][b] = record.reduced ? lattice.map[a][b] : a == b;
      terms += std::fabs(double(record.map[a][b])) *
               std::sqrt(PeriodicCell::dot(record.cell.vector[b], record.cell.vector[b]));
    }
    if (record.reduced && record.box.periodic[a]) turns += terms / record.box.height(a);
  }
  for (int a = 0; a < 3; ++a) record.error[a] = 1e-15 * turns / record.box.height(a);
}

__global__ void prepare_cells(const CudaRadiusGraph graph, Record* records) {
  const int64_t s = thread_id();
  if (s >= graph.num_structures) return;
  const double* cell = graph.cells + 9 * s;
  const uint8_t* pbc = graph.pbc + 3 * s;
  Record record{PeriodicCell(cell, pbc),
                PeriodicCell(cell, pbc),
                {},
                {},
                0,
                0,
                {},
                false,
                false,
                false,
                {},
                {},
                {},
                {},
                {}};
  const int64_t n = graph.num_atoms, first = graph.atom_ptr[s], last = graph.atom_ptr[s + 1];
  bool wrong_offsets = (s == 0 && first != 0) || (s + 1 == graph.num_structures && last != n);
  wrong_offsets = wrong_offsets || first < 0 || first > last || last > n;
  record.first = wrong_offsets ? 0 : first;
  record.last = wrong_offsets ? 0 : last;

  bool finite = true;
  for (int k = 0; k < 9; ++k) finite = finite && std::fabs(cell[k]) <= 1e300;
  int32_t fault = RadiusFault::None;
  if (record.cell.degenerate || !finite) {
    fault = RadiusFault::Cell;
  } else if (!(images_in_reach(record.cell, graph.cutoff, record.reach) < kMostImages)) {
    fault = RadiusFault::Images;
  } else {
    choose_box(record, cell, pbc, graph.cutoff);
  }
  double candidates = double(record.last - record.first);
  for (int a = 0; a < 3; ++a) {
    candidates *= 2 * record.reach[a] + 1;
    record.extent[a][0] = INT64_MAX;
    record.extent[a][1] = INT64_MIN;
  }
  record.binned =
      graph.bin_order && record.last > record.first && record.last - record.first >= graph.cell_list_atoms;
  record.masked = !record.listed() && candidates <= kMaskedCandidates;
  records[s] = record;
  graph.faults[s] = fault;
  if (fault != RadiusFault::None || wrong_offsets) {
    atomic_max(graph.tallies + CudaRadiusGraph::Faulty * (n + 1), int64_t(1));
  }
}

// The largest fault of a structure's atoms wins, in whatever order they write.
__global__ void prepare_atoms(const CudaRadiusGraph graph, Record* records) {
  const int64_t i = thread_id();
  if (i >= graph.num_atoms) return;
  const int64_t s = structure_of(graph.atom_ptr, graph.num_structures, i);
  const double* r = graph.positions + 3 * i;
  Record& record = records[s];
  const double distance = std::fabs(r[0]) + std::fabs(r[1]) + std::fabs(r[2]);
  int32_t fault = RadiusFault::None;
  if (!(std::fabs(r[0]) <= kLargest && std::fabs(r[1]) <= kLargest && std::fabs(r[2]) <= kLargest)) {
    fault = RadiusFault::Positions;
  } else if (!record.cell.degenerate) {
    for (int a = 0; a < 3; ++a) {
      const double f = record.box.fraction(a, r);
      graph.fractions[3 * i + a] = record.box.periodic[a] ? f : 0;
      if (record.box.periodic[a]) {
        const bool sure = std::fabs(f) <= kLargestFraction && record.error[a] * distance <= kSlack / 4 &&
                          std::fabs(record.cell.fraction(a, r)) <= kLargestFraction;
        if (!sure) fault = RadiusFault::Images;
      } else if (record.binned) {
        atomic_min(&record.extent[a][0], ordered_bits(f));
        atomic_max(&record.extent[a][1], ordered_bits(f));
      }
    }
  }
  if (fault == RadiusFault::None) return;
  atomic_max(graph.faults + s, fault);
  atomic_max(graph.tallies + CudaRadiusGraph::Faulty * (graph.num_atoms + 1), int64_t(1));
}

// Bins of half a cutoff, in a stencil of 5 x 5 x 5, or larger ones where the structure is mostly empty: no
// more bins than atoms.
__global__ void prepare_bins(const CudaRadiusGraph graph, Record* records) {
  const int64_t s = thread_id();
  if (s >= graph.num_structures || !records[s].binned || graph.faults[s] != RadiusFault::None) return;
  Record& record = records[s];
  double length[3];
  for (int a = 0; a < 3; ++a) {
    const bool periodic = record.box.periodic[a];
    record.low[a] = periodic ? 0 : from_ordered_bits(record.extent[a][0]);
    length[a] = periodic ? record.box.height(a) : from_ordered_bits(record.extent[a][1]) - record.low[a];
  }
  // A hair over half the cutoff, so that rounding does not make the stencil one bin wider.
  const double most = double(record.last - record.first);
  double size = std::fmax(0.5 * graph.cutoff * (1 + 1e-4), 1e-3), bins[3];
  for (;; size *= 1.1) {
    for (int a = 0; a < 3; ++a)
      bins[a] = std::fmax(std::floor(length[a] / size) + (record.box.periodic[a] ? 0.0 : 1.0), 1.0);
    if (bins[0] * bins[1] * bins[2] <= most) break;
  }
  for (int a = 0; a < 3; ++a) {
    const bool periodic = record.box.periodic[a];
    record.num_bins[a] = int32_t(bins[a]);
    record.scale[a] = periodic ? bins[a] : 1 / size;
    const double cutoff = periodic ? graph.cutoff / length[a] + kSlack : graph.cutoff + kOpenSlack;
    record.stencil[a] = int32_t(std::ceil(cutoff * record.scale[a]));
  }
}

__device__ inline int64_t bin_of(const Record& record, const double* fractions, const double* position) {
  int64_t bin = 0;
  for (int a = 0; a < 3; ++a) {
    const double f = record.box.periodic[a] ? fractions[a] - std::floor(fractions[a])
                                            : record.box.fraction(a, position) - record.low[a];
    const int32_t place =
        int32_t(std::fmin(std::fmax(f * record.scale[a], 0.0), double(record.num_bins[a] - 1)));
    bin = bin * record.num_bins[a] + place;
  }
  return record.first + bin;
}

// Atoms of structures without bins are each a bin of their own.
__global__ void assign_bins(const CudaRadiusGraph graph, const Record* records) {
  const int64_t i = thread_id();
  if (i >= graph.num_atoms) return;
  const int64_t s = structure_of(graph.atom_ptr, graph.num_structures, i);
  const bool binned = records[s].binned && graph.faults[s] == RadiusFault::None;
  graph.bins[i] = binned ? bin_of(records[s], graph.fractions + 3 * i, graph.positions + 3 * i) : i;
}

}  // namespace
}  // namespace dpt
