// The fused CGConv message on the CPU: packs the node rows, cuts the targets into chunks, runs cgconv_rows.h
// on them. Nothing per edge is stored but the gradient of the lengths; everything else is recomputed (a row
// at a time).
#include "cgconv_rows.h"

#include "chunks.h"
#include "ops.h"

namespace dpt {
namespace {

// (rows, halves * channels) -> (rows, halves * padded), zeros in the padding.
template <class T>
Buffer<T> pack(const T* from, int64_t rows, int halves, int64_t channels, int64_t padded) {
  Buffer<T> to = allocate<T>(rows * halves * padded);
  for (int64_t r = 0; r < rows * halves; ++r) {
    T* row = to.get() + r * padded;
    if (from) __builtin_memcpy(row, from + r * channels, static_cast<size_t>(channels) * sizeof(T));
    const int64_t filled = from ? channels : 0;
    __builtin_memset(row + filled, 0, static_cast<size_t>(padded - filled) * sizeof(T));
  }
  return to;
}

template <class T>
void unpack(const T* from, T* to, int64_t rows, int halves, int64_t channels, int64_t padded) {
  if (!to) return;
  for (int64_t r = 0; r < rows * halves; ++r)
    __builtin_memcpy(to + r * channels, from + r * padded, static_cast<size_t>(channels) * sizeof(T));
}

template <class T>
using RowKernel = void (*)(const RowTask<T>&, int64_t, int64_t, RowScratch<T>&, const Sums<T>&);

template <class T, bool Spline, Pass P>
RowKernel<T> kernel(bool table, bool length) {
  if constexpr (P == Pass::kForward) return rows<T, Spline, P, false, false>;
  if (table) return length ? rows<T, Spline, P, true, true> : rows<T, Spline, P, true, false>;
  return length ? rows<T, Spline, P, false, true> : rows<T, Spline, P, false, false>;
}

// Buffers for the rows of one thread, and what points to them.
template <class T>
struct RowBuffers {
  Buffer<int64_t> indices;
  Buffer<T> values, taps, sums;
  RowScratch<T> scratch;

  RowBuffers(int64_t longest, int64_t count, int64_t padded)
      : indices(allocate<int64_t>(2 * longest)),
        values(allocate<T>(2 * longest)),
        taps(allocate<T>(12 * (longest > count + 16 ? longest : count + 16))),
        sums(allocate<T>(4 * padded)),
        scratch{indices.get(),           values.get(), values.get() + longest,
                indices.get() + longest, taps.get(),   sums.get()} {}
};

template <class T, Pass P>
void run(const CgconvGraph& graph, const RadialBasis& basis, const CgconvInputs<T>& in,
         const CgconvTangents<T>& along, const CgconvOutputs<T>& out, int num_threads) {
  constexpr int64_t lanes = Simd<T>::kLanes;
  const int64_t n = graph.num_atoms, F = in.channels, padded = (F + lanes - 1) / lanes * lanes,
                K = basis.count;
  const auto rows_of = [&](const T* from) { return pack(from, n, 2, F, padded); };
  const Buffer<T> a = rows_of(in.a), b = rows_of(in.b), table = pack(in.table, K, 2, F, padded);
  const Buffer<T> y = P == Pass::kForward ? nullptr : pack(in.grad_y, n, 1, F, padded);
  Buffer<T> alpha, beta, theta;
  if constexpr (P == Pass::kDoubleBackward) {
    alpha = rows_of(along.a);
    beta = rows_of(along.b);
    if (along.table) theta = pack(along.table, K, 2, F, padded);
  }
  const bool want_y = P != Pass::kBackward, want_a = out.a != nullptr || P == Pass::kDoubleBackward;
  const bool want_b = out.b != nullptr || P == Pass::kDoubleBackward;
  const Buffer<T> out_y = want_y ? allocate<T>(n * padded, true) : nullptr;
  const Buffer<T> out_a = want_a ? allocate<T>(n * 2 * padded, true) : nullptr;

  // Beyond `reach` widths a Gaussian is below 1e-9 (1e-17) of its peak. A table that is not finite is read
  // whole, so that an infinity is never hidden.
  const bool single = sizeof(T) == 4;
  T poison = T(0);
  for (int64_t k = 0; k < K * 2 * padded; ++k) poison += table[k] * T(0);
  const double reach = poison == T(0) ? (single ? 6.5 : 9.0) * basis.width : 1e30;

  RowTask<T> task{};
  task.padded = padded;
  task.mean = graph.mean;
  task.target_ptr = graph.target_ptr;
  task.source = graph.source;
  task.length = in.lengths;
  task.count = K;
  task.start = static_cast<T>(basis.start);
  task.spacing = static_cast<T>(basis.spacing);
  task.width = static_cast<T>(basis.width);
  task.window = static_cast<T>(reach);
  task.a = a.get(), task.b = b.get(), task.table = table.get(), task.y = y.get();
  task.alpha = alpha.get(), task.beta = beta.get(), task.theta = theta.get(), task.delta = along.lengths;
  task.out_y = out_y.get(), task.out_a = out_a.get(), task.out_length = out.lengths;

  const bool want_table = out.table != nullptr, want_length = out.lengths != nullptr;
  const auto row_kernel = basis.spline ? kernel<T, true, P>(want_table, want_length)
                                       : kernel<T, false, P>(want_table, want_length);
  int64_t longest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t length = graph.target_ptr[i + 1] - graph.target_ptr[i];
    longest = length > longest ? length : longest;
  }
  const bool gradient = P != Pass::kForward;
  const Totals<T> totals = run_chunks<T>(
      graph.target_ptr, graph.source, n,
      {gradient && want_b ? 2 * padded : 0, gradient && want_table ? K * 2 * padded : 0}, num_threads,
      [&] { return RowBuffers<T>(longest, K, padded); },
      [&](int64_t first, int64_t last, RowBuffers<T>& buffers, const Sums<T>& sums) {
        row_kernel(task, first, last, buffers.scratch, sums);
      });
  unpack(out_y.get(), out.y, n, 1, F, padded);
  unpack(out_a.get(), out.a, n, 2, F, padded);
  unpack(totals.by_source.get(), out.b, n, 2, F, padded);
  unpack(totals.table.get(), out.table, K, 2, F, padded);
}

}  // namespace

template <class Level>
template <class T>
void CgconvOps<Level>::forward(const CgconvGraph& graph, const RadialBasis& basis, const CgconvInputs<T>& in,
                               const CgconvOutputs<T>& out, int num_threads) {
  run<T, Pass::kForward>(graph, basis, in, {}, out, num_threads);
}

template <class Level>
template <class T>
void CgconvOps<Level>::backward(const CgconvGraph& graph, const RadialBasis& basis, const CgconvInputs<T>& in,
                                const CgconvOutputs<T>& out, int num_threads) {
  run<T, Pass::kBackward>(graph, basis, in, {}, out, num_threads);
}

template <class Level>
template <class T>
void CgconvOps<Level>::double_backward(const CgconvGraph& graph, const RadialBasis& basis,
                                       const CgconvInputs<T>& in, const CgconvTangents<T>& along,
                                       const CgconvOutputs<T>& out, int num_threads) {
  run<T, Pass::kDoubleBackward>(graph, basis, in, along, out, num_threads);
}

#define DPT_INSTANTIATE(T)                                                                              \
  template void CgconvOps<DPT_LEVEL>::forward(const CgconvGraph&, const RadialBasis&,                   \
                                              const CgconvInputs<T>&, const CgconvOutputs<T>&, int);    \
  template void CgconvOps<DPT_LEVEL>::backward(const CgconvGraph&, const RadialBasis&,                  \
                                               const CgconvInputs<T>&, const CgconvOutputs<T>&, int);   \
  template void CgconvOps<DPT_LEVEL>::double_backward(const CgconvGraph&, const RadialBasis&,           \
                                                      const CgconvInputs<T>&, const CgconvTangents<T>&, \
                                                      const CgconvOutputs<T>&, int);
DPT_INSTANTIATE(float)
DPT_INSTANTIATE(double)

}  // namespace dpt
