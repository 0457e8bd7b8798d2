// Sums by one thread per row and pack of channels (16 bytes where rows allow it), over the edges in their
// order; scalar products by one warp per edge.
#include "gather_aggregate.h"

#include "device.h"

namespace dpt {
namespace {

constexpr int kThreads = 128;

template <class T, int Width>
struct alignas(Width * sizeof(T)) Pack {
  T value[Width];
};

template <class T, int Width>
__global__ void sum_rows(GatherRows rows, int64_t packs, bool shared, const T* weights, const T* features,
                         T* out) {
  const int64_t id = thread_id();
  if (id >= rows.num_rows * packs) return;
  const int64_t r = id / packs, p = id % packs;
  const auto* w = reinterpret_cast<const Pack<T, Width>*>(weights);
  const auto* x = reinterpret_cast<const Pack<T, Width>*>(features);
  Pack<T, Width> sum{};
  for (int64_t k = rows.ptr[r]; k < rows.ptr[r + 1]; ++k) {
    const int64_t e = rows.edge ? rows.edge[k] : k;
    const Pack<T, Width> feature = x[rows.other[e] * packs + p];
    Pack<T, Width> weight;
    if (shared) {
      for (int c = 0; c < Width; ++c) weight.value[c] = weights[e];
    } else {
      weight = w[e * packs + p];
    }
    for (int c = 0; c < Width; ++c) sum.value[c] += weight.value[c] * feature.value[c];
  }
  reinterpret_cast<Pack<T, Width>*>(out)[id] = sum;
}

template <class T, int Width>
__global__ void products(EdgeEnds ends, int64_t packs, const T* targets, const T* sources, T* out) {
  const int64_t id = thread_id();
  if (id >= ends.num_edges * packs) return;
  const int64_t e = id / packs, p = id % packs;
  const auto a = reinterpret_cast<const Pack<T, Width>*>(targets)[ends.target[e] * packs + p];
  const auto b = reinterpret_cast<const Pack<T, Width>*>(sources)[ends.source[e] * packs + p];
  Pack<T, Width> product;
  for (int c = 0; c < Width; ++c) product.value[c] = a.value[c] * b.value[c];
  reinterpret_cast<Pack<T, Width>*>(out)[id] = product;
}

template <class T>
__global__ void scalar_products(EdgeEnds ends, int64_t channels, const T* targets, const T* sources, T* out) {
  static_assert(kPartialSums == kWarp);
  const int64_t e = warp_id();
  if (e >= ends.num_edges) return;
  const T* a = targets + ends.target[e] * channels;
  const T* b = sources + ends.source[e] * channels;
  T sum = 0;
  for (int64_t c = lane_id(); c < channels; c += kWarp) sum += a[c] * b[c];
  sum = warp_sum(sum);
  if (lane_id() == 0) out[e] = sum;
}

template <class T>
constexpr int kWide = int(16 / sizeof(T));

// Whether rows can be read and written 16 bytes at a time.
template <class T>
bool wide(int64_t channels, const T* a, const T* b, const T* c) {
  const auto bits =
      reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c);
  return channels % kWide<T> == 0 && bits % 16 == 0;
}

int64_t blocks_for(int64_t threads) {
  return (threads + kThreads - 1) / kThreads;
}

}  // namespace

template <class T>
void cuda_gather_aggregate(const GatherRows& rows, int64_t channels, bool shared, const T* weights,
                           const T* features, T* out, void* stream) {
  // One weight for all channels is read as a scalar.
  const bool packs = wide(channels, shared ? features : weights, features, static_cast<const T*>(out));
  const int64_t count = packs ? channels / kWide<T> : channels;
  launch(packs ? sum_rows<T, kWide<T>> : sum_rows<T, 1>, blocks_for(rows.num_rows * count), kThreads, stream,
         rows, count, shared, weights, features, out);
}

template <class T>
void cuda_edge_product(const EdgeEnds& ends, int64_t channels, bool shared, const T* targets,
                       const T* sources, T* out, void* stream) {
  if (shared) {
    launch(scalar_products<T>, blocks_for(ends.num_edges * kWarp), kThreads, stream, ends, channels, targets,
           sources, out);
    return;
  }
  const bool packs = wide(channels, targets, sources, static_cast<const T*>(out));
  const int64_t count = packs ? channels / kWide<T> : channels;
  launch(packs ? products<T, kWide<T>> : products<T, 1>, blocks_for(ends.num_edges * count), kThreads, stream,
         ends, count, targets, sources, out);
}

#define DPT_INSTANTIATE(T)                                                                              \
  template void cuda_gather_aggregate(const GatherRows&, int64_t, bool, const T*, const T*, T*, void*); \
  template void cuda_edge_product(const EdgeEnds&, int64_t, bool, const T*, const T*, T*, void*);
DPT_INSTANTIATE(float)
DPT_INSTANTIATE(double)
#undef DPT_INSTANTIATE

}  // namespace dpt
