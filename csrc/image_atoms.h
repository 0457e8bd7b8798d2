// The images of one structure's atoms that can lie within the cutoff of any of them, and the search among
// them.
//
// Images are listed in rank order: source slowest, then shift lexicographically, which is the order of the
// edges. A target marks the images within its cutoff in a bitmap over ranks, so rows come out sorted however
// the images were visited: all in turn in a small structure, by spatial bins in a large one. The float32 test
// decides all but the pairs within rounding of a threshold; those are left to the float64 predicate of
// periodic_cell.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "periodic_cell.h"
#include "radius_graph.h"

namespace dpt {
namespace {

// Bits over ranks with a summary (bit w of it: word w is not zero), reused from row to row.
struct RowBits {
  std::vector<uint64_t> words;
  std::vector<uint64_t> summary;
  std::vector<uint32_t> hits;
  RadiusFault fault;

  void fit(size_t num_images) {
    const size_t n = num_images / 64 + 1;
    if (words.size() < n) words.resize(n);
    if (summary.size() < n / 64 + 1) summary.resize(n / 64 + 1);
    if (hits.size() < num_images + kLanes) hits.resize(num_images + kLanes);
  }
  void set(uint32_t rank) {
    words[rank >> 6] |= uint64_t(1) << (rank & 63);
    summary[rank >> 12] |= uint64_t(1) << ((rank >> 6) & 63);
  }
};

class ImageAtoms {
 public:
  // Structures whose images number more than this are searched through bins.
  static constexpr size_t kBinsPay = 2048;
  // The limit on images is this many, and as many again per atom as any sane cell and cutoff need.
  static constexpr double kMostImages = double(1 << 26);

  // positions (n,3) of the structure's atoms, whose first has the index `first` in the batch.
  RadiusFault build(const double* positions, int64_t n, int64_t first, const double* cell, const uint8_t* pbc,
                    double cutoff) {
    positions_ = positions;
    first_ = first;
    cutoff_ = cutoff;
    cell_ = PeriodicCell(cell, pbc);
    RadiusFault fault;
    if (cell_.degenerate) {
      fault.kind = RadiusFault::Cell;
      fault.value = cell_.volume;
      return fault;
    }
    if (!wrap(n, fault)) return fault;
    list_images(n);
    set_thresholds();
    binned_ = size_ > kBinsPay;
    if (binned_) sort_into_bins();
    for (std::vector<float>* v : {&x_, &y_, &z_})
      std::fill(v->begin() + size_, v->begin() + padded(size_), kFar);
    return fault;
  }

  size_t size() const { return size_; }
  size_t room() const { return edges_.size(); }

  // Mark the images within the cutoff of atom i (its index in the structure); their number.
  int64_t find(int64_t i, RowBits& bits) const {
    const double* r = &wrapped_[3 * i];
    Probe probe = probe_;
    probe.x = float(r[0] - origin_[0]);
    probe.y = float(r[1] - origin_[1]);
    probe.z = float(r[2] - origin_[2]);
    return binned_ ? find_in_bins(i, probe, bits) : find_in_all(i, probe, bits);
  }

  // Write the marked edges in order and clear the marks.
  void emit(int64_t i, RowBits& bits, RadiusEdge* out) const {
    const int32_t* wrap = &wraps_[3 * i];
    const size_t num_words = size_ / 64 + 1;
    for (size_t s = 0; 64 * s < num_words; ++s) {
      for (uint64_t summary = bits.summary[s]; summary; summary &= summary - 1) {
        const size_t w = 64 * s + __builtin_ctzll(summary);
        for (uint64_t word = bits.words[w]; word; word &= word - 1) {
          const RadiusEdge& edge = edges_[64 * w + __builtin_ctzll(word)];
          *out++ = {edge.source, {edge.shift[0] - wrap[0], edge.shift[1] - wrap[1], edge.shift[2] - wrap[2]}};
        }
        bits.words[w] = 0;
      }
      bits.summary[s] = 0;
    }
  }

  double squared_distance(int64_t i, const RadiusEdge& edge) const {
    return cell_.squared_distance(positions_ + 3 * i, positions_ + 3 * (edge.source - first_), edge.shift);
  }

 private:
  static constexpr float kFar = 1e18f;         // where padding points stand: outside every cutoff
  static constexpr double kLargest = 1e15;     // Å; beyond it float32 squares overflow
  static constexpr double kLargestWrap = 5e8;  // cells; sums of two fit an int32

  // The tests read whole groups of lanes, from any image on.
  static size_t padded(size_t n) { return (n / 64 + 2) * 64; }

  void make_room(size_t n) {
    if (edges_.size() >= n && x_.size() >= padded(n)) return;
    n = std::max(n, 2 * edges_.size());
    edges_.resize(n);
    for (std::vector<float>* v : {&x_, &y_, &z_, &scratch_}) v->resize(padded(n));
  }

  bool wrap(int64_t n, RadiusFault& fault) {
    wrapped_.resize(3 * n);
    wraps_.assign(3 * n, 0);
    fractions_.resize(3 * n);
    for (int a = 0; a < 3; ++a) {
      low_[a] = box_low_[a] = INFINITY;
      high_[a] = box_high_[a] = -INFINITY;
    }
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double* r = positions_ + 3 * i;
      for (int x = 0; x < 3; ++x) {
        if (!(std::fabs(r[x]) <= kLargest)) {
          fault.kind = RadiusFault::Positions;
          fault.target = first_ + i;
          fault.value = r[x];
          return false;
        }
        largest = std::max(largest, std::fabs(r[x]));
      }
      for (int a = 0; a < 3; ++a) {
        if (!cell_.periodic[a]) continue;
        const double f = cell_.fraction(a, r), w = -std::floor(f);
        if (std::fabs(w) > kLargestWrap) {
          fault.kind = RadiusFault::Images;
          fault.value = std::fabs(w);
          return false;
        }
        wraps_[3 * i + a] = int32_t(w);
        fractions_[3 * i + a] = f + w;
        low_[a] = std::min(low_[a], f + w);
        high_[a] = std::max(high_[a], f + w);
      }
      double t[3];
      cell_.translation(&wraps_[3 * i], t);
      for (int x = 0; x < 3; ++x) {
        wrapped_[3 * i + x] = r[x] + t[x];
        box_low_[x] = std::min(box_low_[x], r[x] + t[x]);
        box_high_[x] = std::max(box_high_[x], r[x] + t[x]);
      }
    }
    double images = double(n);
    for (int a = 0; a < 3; ++a) {
      origin_[a] = n ? 0.5 * (box_low_[a] + box_high_[a]) : 0;
      if (!n || !cell_.periodic[a]) continue;
      // Rounding of a fraction grows with the coordinate; images that are listed needlessly cost little.
      const double slack = 1e-9 + 1e-14 * largest / cell_.height(a);
      const double reach = cutoff_ / cell_.height(a) * (1 + 1e-9) + slack;
      low_[a] -= reach;
      high_[a] += reach;
      images *= high_[a] - low_[a] + 1;
    }
    if (!(images <= kMostImages + 8.0 * double(n))) {
      fault.kind = RadiusFault::Images;
      fault.value = images;
      return false;
    }
    return true;
  }

  void list_images(int64_t n) {
    double reach = cutoff_;
    for (int a = 0; a < 3 && n; ++a) reach += 1e-9 * (cutoff_ + box_high_[a] - box_low_[a]);
    const double reach2 = reach * reach;
    make_room(0);
    size_t count = 0;
    for (int64_t j = 0; j < n; ++j) {
      int32_t from[3] = {0, 0, 0}, to[3] = {0, 0, 0};
      for (int a = 0; a < 3; ++a) {
        if (!cell_.periodic[a]) continue;
        from[a] = int32_t(std::ceil(low_[a] - fractions_[3 * j + a]));
        to[a] = int32_t(std::floor(high_[a] - fractions_[3 * j + a]));
      }
      const size_t most = size_t(to[0] - from[0] + 1) * (to[1] - from[1] + 1) * (to[2] - from[2] + 1);
      make_room(count + most + 1);
      const int32_t* w = &wraps_[3 * j];
      for (int32_t a = from[0]; a <= to[0]; ++a) {
        for (int32_t b = from[1]; b <= to[1]; ++b) {
          double line[3];
          for (int x = 0; x < 3; ++x) {
            line[x] = wrapped_[3 * j + x] + a * cell_.vector[0][x] + b * cell_.vector[1][x];
          }
          for (int32_t c = from[2]; c <= to[2]; ++c) {
            double outside2 = 0;  // squared distance to the box of all targets
            double r[3];
            for (int x = 0; x < 3; ++x) {
              r[x] = line[x] + c * cell_.vector[2][x];
              const double outside = std::max(0.0, std::max(box_low_[x] - r[x], r[x] - box_high_[x]));
              outside2 += outside * outside;
            }
            edges_[count] = {int32_t(first_ + j), {a + w[0], b + w[1], c + w[2]}};
            x_[count] = float(r[0] - origin_[0]);
            y_[count] = float(r[1] - origin_[1]);
            z_[count] = float(r[2] - origin_[2]);
            count += outside2 <= reach2;
          }
        }
      }
    }
    size_ = count;
    largest_ = 0;
    for (int x = 0; x < 3 && n; ++x) {
      largest_ = std::max(largest_, cutoff_ + 0.5 * (box_high_[x] - box_low_[x]));
    }
  }

  // What float32 coordinates of size X can be wrong by in a squared distance near d^2, twice over: the
  // first-order terms 7 u d (X + d) and the second-order term 12 (u X)^2, with u = 2^-24.
  static double rounding(double d, double largest) {
    const double u = 6e-8;
    return 16 * u * d * (largest + d) + 32 * u * u * largest * largest;
  }

  void set_thresholds() {
    const double cutoff2 = cutoff_ * cutoff_, margin = rounding(cutoff_, largest_);
    probe_.possible = float((cutoff2 + margin) * (1 + 1e-6));
    probe_.sure = float((cutoff2 - margin) * (1 - 1e-6));
    probe_.near = float(4 * kCoincident * kCoincident + 4 * rounding(kCoincident, largest_));
    slack_ = float(16 * 6e-8 * (largest_ + cutoff_));
  }

  // Counting sort of the images into columns of bins along z. `bin` is monotone in the coordinate, roundings
  // included, so that an interval of coordinates lies in the interval of its bins.
  int bin(int x, float r) const {
    const float b = (r - bin_low_[x]) * bin_scale_[x];
    return b > 0 ? int(std::min(b, bin_last_[x])) : 0;
  }

  void sort_into_bins() {
    const size_t n = size_;
    double extent[3], edge = std::max(cutoff_ * kBinEdge, 1e-3);
    const std::vector<float>* coordinates[3] = {&x_, &y_, &z_};
    for (int x = 0; x < 3; ++x) {
      const auto [low, high] = std::minmax_element(coordinates[x]->begin(), coordinates[x]->begin() + n);
      bin_low_[x] = *low;
      extent[x] = double(*high) - double(*low);
    }
    // At most a few bins per image, however empty the space between them.
    double size[3];
    for (;; edge *= 1.25) {
      double bins = 1;
      for (int x = 0; x < 3; ++x) {
        size[x] = x < 2 ? edge : edge * kBinFlatness;
        bins *= std::floor(extent[x] / size[x]) + 1;
      }
      if (bins <= 4.0 * double(n) + 64) break;
    }
    for (int x = 0; x < 3; ++x) {
      bin_size_[x] = float(size[x]);
      bin_scale_[x] = float(1 / size[x]);
      num_bins_[x] = int(extent[x] / size[x]) + 1;
      bin_last_[x] = float(num_bins_[x] - 1);
    }
    starts_.assign(size_t(num_bins_[0]) * num_bins_[1] * num_bins_[2] + 1, 0);
    bin_of_.resize(n);
    for (size_t k = 0; k < n; ++k) {
      const size_t column = size_t(bin(0, x_[k])) * num_bins_[1] + bin(1, y_[k]);
      bin_of_[k] = uint32_t(column * num_bins_[2] + bin(2, z_[k]));
      ++starts_[bin_of_[k] + 1];
    }
    for (size_t b = 1; b < starts_.size(); ++b) starts_[b] += starts_[b - 1];
    next_.assign(starts_.begin(), starts_.end() - 1);
    ranks_.resize(padded(n));
    for (size_t k = 0; k < n; ++k) {
      bin_of_[k] = next_[bin_of_[k]]++;  // from here on: the place of image k
      ranks_[bin_of_[k]] = uint32_t(k);
    }
    for (std::vector<float>* v : {&x_, &y_, &z_}) {
      for (size_t k = 0; k < n; ++k) scratch_[bin_of_[k]] = (*v)[k];
      v->swap(scratch_);
    }
  }

  int64_t find_in_all(int64_t i, const Probe& probe, RowBits& bits) const {
    int64_t count = 0;
    for (size_t start = 0; start < size_; start += 64) {
      uint64_t inside = 0, decided = 0;
      for (size_t k = 0; k < 64; k += kLanes) {
        const Hits hits = test_lanes(probe, &x_[start + k], &y_[start + k], &z_[start + k]);
        inside |= hits.inside << k;
        decided |= hits.decided << k;
      }
      for (uint64_t open = inside & ~decided; open; open &= open - 1) {
        const int k = __builtin_ctzll(open);
        if (!is_edge(i, uint32_t(start + k), bits)) inside &= ~(uint64_t(1) << k);
      }
      bits.words[start / 64] = inside;
      bits.summary[start / 4096] |= uint64_t(inside != 0) << (start / 64 % 64);
      count += __builtin_popcountll(inside);
    }
    return count;
  }

  int64_t find_in_bins(int64_t i, const Probe& probe, RowBits& bits) const {
    const float reach = float(cutoff_) * (1 + 1e-6f) + slack_, reach2 = reach * reach;
    const int x_to = bin(0, probe.x + reach), y_from = bin(1, probe.y - reach),
              y_to = bin(1, probe.y + reach);
    uint32_t* hits = bits.hits.data();
    int64_t count = 0;
    for (int bx = bin(0, probe.x - reach); bx <= x_to; ++bx) {
      const float x2 = squared_gap(0, bx, probe.x);
      for (int by = y_from; by <= y_to; ++by) {
        const float left2 = reach2 - x2 - squared_gap(1, by, probe.y);
        if (left2 < 0) continue;
        const float half = std::sqrt(left2) + slack_;
        const size_t column = (size_t(bx) * num_bins_[1] + by) * num_bins_[2];
        const uint32_t end = starts_[column + bin(2, probe.z + half) + 1];
        for (uint32_t k = starts_[column + bin(2, probe.z - half)]; k < end; k += kLanes) {
          const uint64_t valid = end - k >= kLanes ? ~uint64_t(0) : (uint64_t(1) << (end - k)) - 1;
          const Hits test = test_lanes(probe, &x_[k], &y_[k], &z_[k]);
          uint64_t inside = test.inside & valid;
          for (uint64_t open = inside & ~test.decided; open; open &= open - 1) {
            const int lane = __builtin_ctzll(open);
            if (!is_edge(i, ranks_[k + lane], bits)) inside &= ~(uint64_t(1) << lane);
          }
          count += compress(inside, &ranks_[k], hits + count);
        }
      }
    }
    for (int64_t k = 0; k < count; ++k) bits.set(hits[k]);
    return count;
  }

  // Squared distance from r to bin b along axis x, never too large.
  float squared_gap(int x, int b, float r) const {
    const float low = bin_low_[x] + float(b) * bin_size_[x];
    const float gap = std::max(low - r, r - (low + bin_size_[x])) - slack_;
    return gap > 0 ? gap * gap : 0;
  }

  // The float64 predicate. Notes the coincident pair of the lowest source.
  bool is_edge(int64_t i, uint32_t rank, RowBits& bits) const {
    RadiusEdge edge = edges_[rank];
    bool same = edge.source == first_ + i;
    for (int a = 0; a < 3; ++a) {
      edge.shift[a] -= wraps_[3 * i + a];
      same = same && edge.shift[a] == 0;
    }
    const double d2 = squared_distance(i, edge);
    if (same || d2 > cutoff_ * cutoff_) return false;
    if (d2 <= kCoincident * kCoincident &&
        (bits.fault.kind == RadiusFault::None || edge.source < bits.fault.source)) {
      bits.fault.kind = RadiusFault::Coincident;
      bits.fault.target = first_ + i;
      bits.fault.source = edge.source;
      bits.fault.value = std::sqrt(d2);
    }
    return true;
  }

  // Measured: few wide columns, finely divided, feed the lanes best.
  static constexpr double kBinEdge = 1.0;      // of the cutoff, across the columns
  static constexpr double kBinFlatness = 0.2;  // of that, along them

  static constexpr double kNoCell[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
  static constexpr uint8_t kOpen[3] = {0, 0, 0};

  const double* positions_ = nullptr;
  int64_t first_ = 0;
  double cutoff_ = 0;
  PeriodicCell cell_{kNoCell, kOpen};
  Probe probe_{};
  float slack_ = 0;  // rounding of a float32 coordinate, several times over
  double largest_ = 0;
  double origin_[3], box_low_[3], box_high_[3], low_[3], high_[3];
  std::vector<double> wrapped_, fractions_;  // (n,3)
  std::vector<int32_t> wraps_;               // (n,3): wrapped = position + wrap @ cell
  std::vector<RadiusEdge> edges_;            // images in rank order: source, shift of the wrapped image
  std::vector<float> x_, y_, z_, scratch_;   // in rank order, or by bins

  size_t size_ = 0;  // images listed; the arrays keep the room of the largest structure so far
  bool binned_ = false;
  int num_bins_[3];
  float bin_low_[3], bin_size_[3], bin_scale_[3], bin_last_[3];
  std::vector<uint32_t> starts_, next_, bin_of_, ranks_;
};

}  // namespace
}  // namespace dpt
