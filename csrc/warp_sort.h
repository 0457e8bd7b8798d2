// Sorting a few hundred values by one warp, in place.
#pragma once

#include "device.h"

namespace dpt {

// Bitonic sort of data[0 .. n) by less(a, b), for any n: all exchanges put the smaller value first, so that
// the missing values past the end are the largest ones and never move. Called by whole warps.
template <class T, class Less>
__device__ void warp_sort(T* data, int64_t n, const Less& less) {
  const auto order = [&](int64_t a, int64_t b) {
    if (b >= n) return;
    const T first = data[a], second = data[b];
    if (!less(second, first)) return;
    data[a] = second;
    data[b] = first;
  };
  // Sorted runs of 2^(block-1) become 2^block.
  for (int block = 1; (int64_t(1) << (block - 1)) < n; ++block) {
    const int64_t half = int64_t(1) << (block - 1);
    const int64_t pairs = (n + 2 * half - 1) / (2 * half) * half;
    for (int64_t t = lane_id(); t < pairs; t += kWarp) {
      const int64_t start = t >> (block - 1) << block, offset = t & (half - 1);
      order(start + offset, start + 2 * half - 1 - offset);
    }
    __syncwarp(kAllLanes);
    for (int bit = block - 2; bit >= 0; --bit) {
      const int64_t step = int64_t(1) << bit;
      for (int64_t t = lane_id(); t < pairs; t += kWarp) {
        const int64_t a = (t >> bit << (bit + 1)) | (t & (step - 1));
        order(a, a + step);
      }
      __syncwarp(kAllLanes);
    }
  }
}

}  // namespace dpt
