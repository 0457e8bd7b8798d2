// Rows of a graph cut into chunks that threads take one by one, with sums that keep their bits. Included by
// kernels only, once per processor level: everything has internal linkage.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "first_error.h"
#include "kept.h"

namespace dpt {
namespace {

struct Free {
  size_t bytes = 0;
  void operator()(void* p) const { KeptMemory::all().give_back(p, bytes); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Aligned for vectors, zeroed where asked.
template <class T>
Buffer<T> allocate(int64_t count, bool zero = false) {
  const size_t wanted = static_cast<size_t>(count) * sizeof(T);
  size_t bytes = wanted;
  void* p = KeptMemory::all().take(bytes);
  if (zero) __builtin_memset(p, 0, wanted);
  return Buffer<T>(static_cast<T*>(p), Free{bytes});
}

// Sums over chunks are added in the order of the chunks, and the chunks depend on the graph and on sizes
// alone, so that the bits do not depend on the number of threads. A chunk pays one pass over the table.
constexpr int64_t kEdgesPerChunk = 4096;
constexpr int64_t kMostChunks = 256;

// First row of each chunk: chunks of about equal numbers of edges.
inline std::vector<int64_t> cut_rows(const int64_t* target_ptr, int64_t num_atoms, int64_t edges_per_chunk) {
  const int64_t edges = target_ptr[num_atoms];
  int64_t chunks = (edges + edges_per_chunk - 1) / edges_per_chunk;
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

// What a chunk of rows adds to; private to a thread. Null where not wanted.
template <class T>
struct Sums {
  T* by_source;  // (N, row_size)
  T* table;      // (table_size,)
};

// Sums of all chunks.
template <class T>
struct Totals {
  Buffer<T> by_source, table;
};

// What run_chunks sums; a size of 0 is not wanted.
struct ChunkSizes {
  int64_t row, table;
  int64_t edges_per_chunk = kEdgesPerChunk;
  int64_t spare_rows = 0;  // behind those of the atoms, for what is not wanted
};

// Calls run(first row, last row, scratch, sums) for every chunk, scratch = make_scratch() once per thread.
template <class T, class MakeScratch, class Run>
Totals<T> run_chunks(const int64_t* target_ptr, const int64_t* source, int64_t num_atoms,
                     const ChunkSizes& size, int num_threads, const MakeScratch& make_scratch,
                     const Run& run) {
  const std::vector<int64_t> first = cut_rows(target_ptr, num_atoms, size.edges_per_chunk);
  const int64_t chunks = static_cast<int64_t>(first.size()) - 1;
  Totals<T> totals;
  if (size.row) totals.by_source = allocate<T>((num_atoms + size.spare_rows) * size.row, true);
  if (size.table) totals.table = allocate<T>(size.table, true);
  [[maybe_unused]] const int threads = static_cast<int>(num_threads < chunks ? num_threads : chunks);
  FirstError error;
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> my_rows, my_table;
    std::optional<decltype(make_scratch())> scratch;  // empty where this thread got no memory
    error.watch([&] {
      if (size.row && chunks > 1)
        my_rows = allocate<T>((num_atoms + size.spare_rows) * size.row, size.spare_rows > 0);
      if (size.table && chunks > 1) my_table = allocate<T>(size.table);
      scratch.emplace(make_scratch());
    });
    const Sums<T> sums{my_rows ? my_rows.get() : totals.by_source.get(),
                       my_table ? my_table.get() : totals.table.get()};
#pragma omp for ordered schedule(dynamic, 1)
    for (int64_t c = 0; c < chunks; ++c) {
      if (!scratch) continue;
      // Sources that this chunk touches: its own structures, in a batch.
      int64_t low = num_atoms, high = 0;
      if (my_rows) {
        for (int64_t e = target_ptr[first[c]]; e < target_ptr[first[c + 1]]; ++e) {
          low = source[e] < low ? source[e] : low;
          high = source[e] >= high ? source[e] + 1 : high;
        }
        if (high > low)
          __builtin_memset(my_rows.get() + low * size.row, 0,
                           static_cast<size_t>((high - low) * size.row) * sizeof(T));
      }
      if (my_table) __builtin_memset(my_table.get(), 0, static_cast<size_t>(size.table) * sizeof(T));
      error.watch([&] { run(first[c], first[c + 1], *scratch, sums); });
#pragma omp ordered
      {
        if (my_rows)
          for (int64_t k = low * size.row; k < high * size.row; ++k) totals.by_source[k] += my_rows[k];
        if (my_table)
          for (int64_t k = 0; k < size.table; ++k) totals.table[k] += my_table[k];
      }
    }
  }
  error.rethrow();
  return totals;
}

}  // namespace
}  // namespace dpt
