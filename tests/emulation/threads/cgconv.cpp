// Every kernel of the CGConv message. With an argument, one that has a race.
#include "cgconv.cu"
#include "ring.h"

namespace {

using namespace dpt;

// Of the lengths, the first half lies in one interval, the rest in the next.
template <class T>
void run(bool spline, int64_t channels, int64_t count) {
  const Ring ring;
  std::vector<T> lengths;
  for (int64_t e = 0; e < kEdges; ++e) lengths.push_back(T(e < kEdges / 2 ? 1.5 : 2.5));
  // Intervals begin 3 knots before the first, so these are number 4 and 5.
  std::vector<int64_t> interval_ptr(size_t(count) + 6, kEdges), chunk_ptr = interval_ptr;
  const int64_t chunk = 9, first = kEdges / 2;
  for (size_t k = 0; k < 5; ++k) interval_ptr[k] = chunk_ptr[k] = 0;
  interval_ptr[5] = first;
  chunk_ptr[5] = (first + chunk - 1) / chunk;
  const int64_t chunks = chunk_ptr[5] + (kEdges - first + chunk - 1) / chunk;
  for (size_t k = 6; k < chunk_ptr.size(); ++k) chunk_ptr[k] = chunks;

  const int64_t rows = kAtoms * 2 * channels, table = count * 2 * channels;
  const std::vector<T> a = numbers<T>(rows), b = numbers<T>(rows + 1), weights = numbers<T>(table);
  std::vector<T> sums(size_t(chunks * table)), y(a), to_a(a), to_b(a), to_lengths(lengths), to_table(weights);
  const CgconvGraph graph{kAtoms, ring.ptr.data(), ring.source.data(), true};
  const CgconvOrders<T> orders{kEdges,
                               ring.target.data(),
                               ring.ptr.data(),
                               ring.order.data(),
                               interval_ptr.data(),
                               ring.every.data(),
                               chunk_ptr.data(),
                               chunk,
                               chunks,
                               sums.data()};
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
  if (count > 1) return race();
  run<float>(false, 36, 40);  // loads of 16 bytes; two tiles of Gaussians
  run<double>(true, 33, 40);  // two steps of channels
  return 0;
}
