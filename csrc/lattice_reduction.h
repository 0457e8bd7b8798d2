// Shorter vectors of the same lattice, for searches in strongly skewed cells.
#pragma once

#include <cmath>
#include <cstdint>

#include "periodic_cell.h"

namespace dpt {

// vector[a] = sum_b map[a][b] * (the lattice vector b that it was made from); the map is unimodular.
struct ReducedLattice {
  double vector[9];
  int32_t map[3][3];
  bool reduced;  // some vector differs from the given one

  static constexpr int32_t kLargestMap = 1 << 20;  // beyond it the given vectors are kept
  static constexpr int kMostRounds = 200;

  // Takes whole multiples of each periodic vector off the others for as long as that makes them shorter (the
  // three-dimensional form of Gauss's reduction, by pairs). Open axes are left as they are.
  DPT_HOST_DEVICE ReducedLattice(const double* cell, const uint8_t* pbc) {
    start(cell);
    if (!shorten(cell, pbc)) start(cell);
  }

 private:
  DPT_HOST_DEVICE void start(const double* cell) {
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b) {
        vector[3 * a + b] = cell[3 * a + b];
        map[a][b] = a == b;
      }
    }
    reduced = false;
  }

  // False if the map outgrows its bound.
  DPT_HOST_DEVICE bool shorten(const double* cell, const uint8_t* pbc) {
    bool changed = true;
    for (int round = 0; round < kMostRounds && changed; ++round) {
      changed = false;
      for (int a = 0; a < 3; ++a) {
        for (int b = 0; b < 3; ++b) {
          if (a == b || !pbc[a] || !pbc[b]) continue;
          const double* u = vector + 3 * a;
          const double* v = vector + 3 * b;
          const double times = std::rint(PeriodicCell::dot(u, v) / PeriodicCell::dot(v, v));
          if (times == 0) continue;
          if (!(std::fabs(times) <= kLargestMap)) return false;
          int64_t row[3];
          double shorter[3] = {0, 0, 0};
          for (int c = 0; c < 3; ++c) {
            row[c] = map[a][c] - int64_t(times) * map[b][c];
            if (row[c] > kLargestMap || row[c] < -kLargestMap) return false;
            for (int x = 0; x < 3; ++x) shorter[x] = std::fma(double(row[c]), cell[3 * c + x], shorter[x]);
          }
          // Rounding must not let two vectors shorten each other for ever.
          if (!(PeriodicCell::dot(shorter, shorter) < PeriodicCell::dot(u, u) * (1 - 1e-9))) continue;
          for (int c = 0; c < 3; ++c) {
            map[a][c] = int32_t(row[c]);
            vector[3 * a + c] = shorter[c];
          }
          reduced = changed = true;
        }
      }
    }
    return true;
  }
};

}  // namespace dpt
