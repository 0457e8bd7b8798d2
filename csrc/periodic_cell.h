// The lattice of one structure and the one distance predicate of all radius-graph kernels, CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DPT_HOST_DEVICE __host__ __device__
#else
#define DPT_HOST_DEVICE
#endif

namespace dpt {

// Two different atoms (or images) closer than this have no direction between them: a broken structure.
constexpr double kCoincident = 1e-2;  // Å

struct PeriodicCell {
  double vector[3][3];  // rows are the lattice vectors
  double dual[3][3];    // dual[a] . r is the fractional coordinate a; 1 / |dual[a]| is the height of the cell
  bool periodic[3];
  bool degenerate;  // the periodic vectors do not span their space
  double volume;    // of the periodic vectors: length, area or volume

  // Open axes are completed by unit vectors at right angles to the periodic ones, so their own vectors (often
  // zero) never matter.
  DPT_HOST_DEVICE PeriodicCell(const double* cell, const uint8_t* pbc) {
    double m[3][3];
    double length = 1;
    int open = 0;
    for (int a = 0; a < 3; ++a) {
      periodic[a] = pbc[a] != 0;
      open += !periodic[a];
      for (int x = 0; x < 3; ++x) {
        vector[a][x] = cell[3 * a + x];
        m[a][x] = periodic[a] ? cell[3 * a + x] : 0;
      }
      if (periodic[a]) length *= std::sqrt(dot(m[a], m[a]));
    }
    for (int a = 0; a < 3; ++a) {
      if (periodic[a]) continue;
      const int b = (a + 1) % 3, c = (a + 2) % 3;
      if (open == 1) {
        cross(m[b], m[c], m[a]);
      } else if (open == 2) {
        // One periodic vector: two unit vectors at right angles to it, the first from the axis it is least
        // along.
        const int p = periodic[b] ? b : c, q = 3 - a - p;
        int least = 0;
        for (int x = 1; x < 3; ++x) {
          if (std::fabs(m[p][x]) < std::fabs(m[p][least])) least = x;
        }
        double axis[3] = {0, 0, 0};
        axis[least] = 1;
        cross(m[p], axis, m[a]);
        normalise(m[a]);
        cross(m[p], m[a], m[q]);
        normalise(m[q]);
        break;
      } else {
        m[a][a] = 1;
      }
      normalise(m[a]);
    }
    double area[3];
    cross(m[1], m[2], area);
    const double determinant = dot(m[0], area);
    volume = std::fabs(determinant);
    degenerate = !(volume > 1e-10 * length);
    for (int a = 0; a < 3; ++a) {
      cross(m[(a + 1) % 3], m[(a + 2) % 3], dual[a]);
      for (int x = 0; x < 3; ++x) dual[a][x] /= determinant;
    }
  }

  // t = n @ cell; a pure function of n, odd in n.
  DPT_HOST_DEVICE void translation(const int32_t* n, double* t) const {
    for (int x = 0; x < 3; ++x) {
      t[x] = std::fma(double(n[2]), vector[2][x], std::fma(double(n[1]), vector[1][x], n[0] * vector[0][x]));
    }
  }

  // |positions[j] + n @ cell - positions[i]|^2 in float64, by the same roundings on every processor. (i, j,
  // n) and (j, i, -n) have the same bits, so that a graph without max_neighbors is symmetric.
  DPT_HOST_DEVICE double squared_distance(const double* from, const double* to, const int32_t* n) const {
    double t[3];
    translation(n, t);
    const double x = (to[0] - from[0]) + t[0], y = (to[1] - from[1]) + t[1], z = (to[2] - from[2]) + t[2];
    return std::fma(z, z, std::fma(y, y, x * x));
  }

  DPT_HOST_DEVICE double fraction(int a, const double* r) const { return dot(dual[a], r); }
  DPT_HOST_DEVICE double height(int a) const { return 1 / std::sqrt(dot(dual[a], dual[a])); }

  DPT_HOST_DEVICE static double dot(const double* u, const double* v) {
    return u[0] * v[0] + u[1] * v[1] + u[2] * v[2];
  }
  DPT_HOST_DEVICE static void cross(const double* u, const double* v, double* w) {
    w[0] = u[1] * v[2] - u[2] * v[1];
    w[1] = u[2] * v[0] - u[0] * v[2];
    w[2] = u[0] * v[1] - u[1] * v[0];
  }
  DPT_HOST_DEVICE static void normalise(double* u) {
    const double length = std::sqrt(dot(u, u));
    for (int x = 0; x < 3; ++x) u[x] = length > 0 ? u[x] / length : 0;
  }
};

}  // namespace dpt
