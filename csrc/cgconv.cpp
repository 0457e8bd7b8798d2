// The fused CGConv message on the CPU: packs the node rows, cuts the targets into chunks, runs cgconv_rows.h
// on them. Nothing per edge is stored but the gradient of the lengths; everything else is recomputed (a row
// at a time).
#include "cgconv_rows.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "ops.h"

namespace dpt {
namespace {

// Sums over chunks are added in the order of the chunks, and the chunks depend on the graph alone, so that
// the bits do not depend on the number of threads. A chunk pays one pass over the table: at this many edges
// that is noise.
constexpr int64_t kEdgesPerChunk = 4096;
constexpr int64_t kMostChunks = 256;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Aligned for vectors, zeroed where asked.
template <class T>
Buffer<T> allocate(int64_t count, bool zero = false) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 64) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (!p) throw std::bad_alloc();
  if (zero) __builtin_memset(p, 0, bytes);
  return Buffer<T>(static_cast<T*>(p));
}

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

// First row of each chunk: chunks of about equal numbers of edges.
std::vector<int64_t> cut_rows(const int64_t* target_ptr, int64_t num_atoms) {
  const int64_t edges = target_ptr[num_atoms];
  int64_t chunks = (edges + kEdgesPerChunk - 1) / kEdgesPerChunk;
  chunks = chunks < 1 ? 1 : chunks > kMostChunks ? kMostChunks : chunks;
  std::vector<int64_t> first(1, 0);
  for (int64_t c = 1; c < chunks; ++c) {
    int64_t low = first.back(), high = num_atoms;
    const int64_t wanted = edges / chunks * c;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (target_ptr[middle] < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    first.push_back(low);
  }
  first.push_back(num_atoms);
  return first;
}

template <class T>
using RowKernel = void (*)(const RowTask<T>&, int64_t, int64_t, RowScratch<T>&, const Sums<T>&);

template <class T, bool Spline, Pass P>
RowKernel<T> kernel(bool table, bool length) {
  if constexpr (P == Pass::kForward) return rows<T, Spline, P, false, false>;
  if (table) return length ? rows<T, Spline, P, true, true> : rows<T, Spline, P, true, false>;
  return length ? rows<T, Spline, P, false, true> : rows<T, Spline, P, false, false>;
}

// Sums of all chunks: rows [0, N) by source and the table, each (rows, 2P).
template <class T>
struct Totals {
  Buffer<T> by_source, table;
};

template <class T>
Totals<T> run_chunks(const RowTask<T>& task, RowKernel<T> run, int64_t num_atoms, bool by_source, bool table,
                     int num_threads) {
  const std::vector<int64_t> first = cut_rows(task.target_ptr, num_atoms);
  const int64_t chunks = static_cast<int64_t>(first.size()) - 1;
  const int64_t stride = 2 * task.padded, table_size = table ? task.count * stride : 0;
  int64_t longest = 0;
  for (int64_t i = 0; i < num_atoms; ++i) {
    const int64_t n = task.target_ptr[i + 1] - task.target_ptr[i];
    longest = n > longest ? n : longest;
  }
  const int64_t weights = 12 * (longest > task.count + 16 ? longest : task.count + 16);

  Totals<T> totals;
  if (by_source) totals.by_source = allocate<T>(num_atoms * stride, true);
  if (table) totals.table = allocate<T>(table_size, true);
  const int threads = static_cast<int>(num_threads < chunks ? num_threads : chunks);
#pragma omp parallel num_threads(threads)
  {
    const Buffer<int64_t> indices = allocate<int64_t>(2 * longest);
    const Buffer<T> values = allocate<T>(2 * longest);
    const Buffer<T> taps = allocate<T>(weights), row_sums = allocate<T>(4 * task.padded);
    RowScratch<T> scratch{indices.get(),           values.get(), values.get() + longest,
                          indices.get() + longest, taps.get(),   row_sums.get()};
    const Buffer<T> my_rows = by_source && chunks > 1 ? allocate<T>(num_atoms * stride) : nullptr;
    const Buffer<T> my_table = table && chunks > 1 ? allocate<T>(table_size) : nullptr;
    Sums<T> sums{my_rows ? my_rows.get() : totals.by_source.get(),
                 my_table ? my_table.get() : totals.table.get()};
#pragma omp for ordered schedule(dynamic, 1)
    for (int64_t c = 0; c < chunks; ++c) {
      // Sources that this chunk touches: its own structures, in a batch.
      int64_t low = num_atoms, high = 0;
      if (my_rows) {
        for (int64_t e = task.target_ptr[first[c]]; e < task.target_ptr[first[c + 1]]; ++e) {
          low = task.source[e] < low ? task.source[e] : low;
          high = task.source[e] >= high ? task.source[e] + 1 : high;
        }
        if (high > low)
          __builtin_memset(my_rows.get() + low * stride, 0,
                           static_cast<size_t>((high - low) * stride) * sizeof(T));
      }
      if (my_table) __builtin_memset(my_table.get(), 0, static_cast<size_t>(table_size) * sizeof(T));
      run(task, first[c], first[c + 1], scratch, sums);
#pragma omp ordered
      {
        if (my_rows)
          for (int64_t k = low * stride; k < high * stride; ++k) totals.by_source[k] += my_rows[k];
        if (my_table)
          for (int64_t k = 0; k < table_size; ++k) totals.table[k] += my_table[k];
      }
    }
  }
  return totals;
}

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
  const Totals<T> totals = run_chunks(task, row_kernel, n, want_b && P != Pass::kForward,
                                      want_table && P != Pass::kForward, num_threads);
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
