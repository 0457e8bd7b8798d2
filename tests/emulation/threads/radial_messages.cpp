// Every kernel of the radial messages. With an argument, one that has a race.
#include "radial_messages.cu"
#include "ring.h"

namespace {

template <class T>
void run(bool attention, bool vectors, int64_t channels) {
  const Ring ring;
  const RadialMessageShape shape{channels, attention ? 2 : 1, 5, 12, attention, vectors, true};
  const int64_t parts = (attention ? 1 : 0) + (vectors ? 3 : 1), C = channels;
  std::vector<int64_t> first_ptr(size_t(shape.count) + 1, kEdges);
  std::vector<int32_t> first;
  for (int64_t e = 0; e < kEdges; ++e) first.push_back(e < kEdges / 2 ? 2 : 3);
  for (size_t k = 0; k < 3; ++k) first_ptr[k] = 0;
  first_ptr[3] = kEdges / 2;

  // One array of numbers serves for every input, one of each size for the results.
  const std::vector<T> in =
      numbers<T>(std::max(kEdges * shape.taps, std::max(kAtoms * 3, shape.count * parts) * C));
  std::vector<std::vector<T>> out(11, in);
  std::vector<double> workspace(
      size_t(CudaRadialMessages::workspace_bytes(shape, kEdges, true, sizeof(T))) / 8 + 1);
  const RadialMessageGraph graph{kAtoms, ring.ptr.data(), ring.source.data(), ring.ptr.data(),
                                 ring.order.data()};
  const RadialMessageOrders orders{kEdges, ring.target.data(), first_ptr.data(), ring.every.data(),
                                   workspace.data()};
  const T *x = in.data(), *qk = attention ? x : nullptr, *vec = vectors ? x : nullptr;
  RadialMessageInputs<T> inputs{qk, qk, x, vec, x, first.data(), x, vec, x, x, nullptr, nullptr};
  RadialMessageOutputs<T> results{};
  results.x = out[0].data();
  results.v = vectors ? out[1].data() : nullptr;
  CudaRadialMessages::forward(graph, orders, shape, inputs, results, nullptr);
  inputs.grad_x = x;
  inputs.grad_v = vec;
  results = {nullptr,
             nullptr,
             attention ? out[2].data() : nullptr,
             attention ? out[3].data() : nullptr,
             out[4].data(),
             vectors ? out[5].data() : nullptr,
             out[6].data(),
             out[7].data(),
             vectors ? out[8].data() : nullptr,
             out[9].data(),
             out[10].data()};
  CudaRadialMessages::backward(graph, orders, shape, inputs, results, nullptr);
  results.x = out[0].data();
  results.v = vectors ? out[1].data() : nullptr;
  const RadialMessageTangents<T> along{qk, qk, x, vec, x, x, vec, x, x};
  CudaRadialMessages::double_backward(graph, orders, shape, inputs, along, results, nullptr);
}

}  // namespace

int main(int count, char**) {
  if (count > 1) return race();
  run<float>(true, true, 40);   // heads of 20 channels
  run<double>(true, true, 70);  // heads of more than a warp
  run<float>(false, false, 33);
  return 0;
}
