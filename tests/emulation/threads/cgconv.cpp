// Every kernel of the CGConv message on a ring of atoms, under the thread sanitizer. With an argument, a
// kernel that misses a barrier: the sanitizer must report it.
#include "cgconv.cu"

#include <numeric>

namespace {

using namespace dpt;

__global__ void without_a_barrier(int* out) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = shared[threadIdx.x ^ kWarp];
}

constexpr int64_t kAtoms = 3, kNeighbors = 37, kEdges = kAtoms * kNeighbors;

template <class T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> out(static_cast<size_t>(count));
  for (size_t k = 0; k < out.size(); ++k) out[k] = std::cos(T(k));
  return out;
}

// One atom after the other is the source of all edges; of the lengths, the first half lies in one interval.
template <class T>
void run(bool spline, int64_t channels, int64_t count) {
  std::vector<int64_t> ptr, source, target, order(kEdges);
  std::vector<T> lengths;
  for (int64_t i = 0; i <= kAtoms; ++i) ptr.push_back(i * kNeighbors);
  for (int64_t e = 0; e < kEdges; ++e) {
    target.push_back(e / kNeighbors);
    source.push_back((e / kNeighbors + 1) % kAtoms);
    order[size_t(e)] = (e + kEdges - kNeighbors) % kEdges;
    lengths.push_back(T(e < kEdges / 2 ? 1.5 : 2.5));
  }
  // Intervals begin 3 knots before the first, so these are number 4 and 5.
  std::vector<int64_t> by_interval(kEdges), interval_ptr(size_t(count) + 6, kEdges), chunk_ptr = interval_ptr;
  std::iota(by_interval.begin(), by_interval.end(), 0);
  const int64_t chunk = 9, first = kEdges / 2;
  for (size_t k = 0; k < 5; ++k) interval_ptr[k] = chunk_ptr[k] = 0;
  interval_ptr[5] = first;
  chunk_ptr[5] = (first + chunk - 1) / chunk;
  const int64_t chunks = chunk_ptr[5] + (kEdges - first + chunk - 1) / chunk;
  for (size_t k = 6; k < chunk_ptr.size(); ++k) chunk_ptr[k] = chunks;

  const int64_t rows = kAtoms * 2 * channels, table = count * 2 * channels;
  const std::vector<T> a = numbers<T>(rows), b = numbers<T>(rows + 1), weights = numbers<T>(table);
  std::vector<T> sums(size_t(chunks * table)), y(a), to_a(a), to_b(a), to_lengths(lengths), to_table(weights);
  const CgconvGraph graph{kAtoms, ptr.data(), source.data(), true};
  const CgconvOrders<T> orders{
      kEdges,           target.data(), ptr.data(), order.data(), interval_ptr.data(), by_interval.data(),
      chunk_ptr.data(), chunk,         chunks,     sums.data()};
  const RadialBasis basis{spline, count, 0, 1, 1};
  CgconvInputs<T> in{channels, a.data(), b.data(), lengths.data(), weights.data(), nullptr};
  CudaCgconv::forward(graph, orders, basis, in, {y.data(), nullptr, nullptr, nullptr, nullptr}, nullptr);
  in.grad_y = a.data();
  CgconvOutputs<T> out{nullptr, to_a.data(), to_b.data(), to_lengths.data(), to_table.data()};
  CudaCgconv::backward(graph, orders, basis, in, out, nullptr);
  out.y = y.data();
  const CgconvTangents<T> along{b.data(), a.data(), lengths.data(), weights.data()};
  CudaCgconv::double_backward(graph, orders, basis, in, along, out, nullptr);
}

}  // namespace

int main(int count, char**) {
  if (count > 1) {
    std::vector<int> out(2 * kWarp);
    launch(without_a_barrier, Grid{1, 2 * kWarp, int64_t(out.size() * sizeof(int))}, nullptr, out.data());
    return 0;
  }
  for (const bool spline : {false, true}) {
    run<float>(spline, 36, 40);   // loads of 16 bytes; two tiles of Gaussians
    run<double>(spline, 33, 40);  // two steps of channels
  }
  return 0;
}
