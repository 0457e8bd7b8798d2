#include "gather_aggregate.h"

#include "ops.h"

namespace dpt {
namespace {

constexpr int64_t kBlock = 128;  // channels whose sums stay in registers

// One row, channels [0, width) of rows that are `channels` apart. The full block has a constant width, so
// that the compiler keeps its sums in vectors.
template <class T, bool Shared, int64_t Width>
void sum_row(const GatherRows& rows, int64_t r, int64_t channels, int64_t width, const T* weights,
             const T* features, T* out) {
  T sum[kBlock] = {};
  const int64_t size = Width ? Width : width;
  for (int64_t k = rows.ptr[r]; k < rows.ptr[r + 1]; ++k) {
    const int64_t e = rows.edge ? rows.edge[k] : k;
    const T* x = features + rows.other[e] * channels;
    const T* w = weights + (Shared ? e : e * channels);
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) sum[c] += w[Shared ? 0 : c] * x[c];
  }
  for (int64_t c = 0; c < size; ++c) out[c] = sum[c];
}

template <class T, bool Shared>
void sum_rows(const GatherRows& rows, int64_t channels, const T* weights, const T* features, T* out,
              int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    T* to = out + r * channels;
    for (int64_t c = 0; c < channels; c += kBlock) {
      const T* w = Shared ? weights : weights + c;
      if (c + kBlock <= channels) {
        sum_row<T, Shared, kBlock>(rows, r, channels, kBlock, w, features + c, to + c);
      } else {
        sum_row<T, Shared, 0>(rows, r, channels, channels - c, w, features + c, to + c);
      }
    }
  }
}

template <class T>
T scalar_product(const T* a, const T* b, int64_t channels) {
  T sum[kPartialSums] = {};
  const int64_t whole = channels / kPartialSums * kPartialSums;
  for (int64_t c = 0; c < whole; c += kPartialSums) {
#pragma omp simd
    for (int l = 0; l < kPartialSums; ++l) sum[l] += a[c + l] * b[c + l];
  }
  for (int64_t c = whole; c < channels; ++c) sum[c - whole] += a[c] * b[c];
  for (int step = kPartialSums / 2; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) sum[l] += sum[l + step];
  }
  return sum[0];
}

}  // namespace

template <class Level>
template <class T>
void GatherAggregateOps<Level>::gather_aggregate(const GatherRows& rows, int64_t channels, bool shared,
                                                 const T* weights, const T* features, T* out, int threads) {
  (shared ? sum_rows<T, true> : sum_rows<T, false>)(rows, channels, weights, features, out, threads);
}

template <class Level>
template <class T>
void GatherAggregateOps<Level>::edge_product(const EdgeEnds& ends, int64_t channels, bool shared,
                                             const T* targets, const T* sources, T* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t e = 0; e < ends.num_edges; ++e) {
    const T* a = targets + ends.target[e] * channels;
    const T* b = sources + ends.source[e] * channels;
    if (shared) {
      out[e] = scalar_product(a, b, channels);
    } else {
      T* to = out + e * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) to[c] = a[c] * b[c];
    }
  }
}

#define DPT_INSTANTIATE(T)                                                                                  \
  template void GatherAggregateOps<DPT_LEVEL>::gather_aggregate(const GatherRows&, int64_t, bool, const T*, \
                                                                const T*, T*, int);                         \
  template void GatherAggregateOps<DPT_LEVEL>::edge_product(const EdgeEnds&, int64_t, bool, const T*,       \
                                                            const T*, T*, int);
DPT_INSTANTIATE(float)
DPT_INSTANTIATE(double)

}  // namespace dpt
