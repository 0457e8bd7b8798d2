#include "radius_graph.h"

#include <algorithm>
#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "first_error.h"
#include "image_atoms.h"
#include "ops.h"

namespace dpt {
namespace {

constexpr int64_t kTaskAtoms = 256;      // targets of one task: enough work to be worth a thread's turn
constexpr int64_t kLargeAtoms = 2048;    // structures from here on are shared between threads
constexpr size_t kKeptImages = 1 << 18;  // a worker that has grown beyond this is not kept between calls

struct Input {
  const double* positions;
  const double* cells;
  const uint8_t* pbc;
  const int64_t* atom_ptr;
  double cutoff;
  int64_t max_neighbors;  // 0: all
  int64_t max_images;     // negative: all
  int64_t most_edges;     // more are a fault
  int64_t most_kept;      // once there are more, the rest is counted and not kept

  int64_t num_atoms(int64_t structure) const { return atom_ptr[structure + 1] - atom_ptr[structure]; }
  RadiusFault list_images(int64_t structure, ImageAtoms& images) const {
    const int64_t first = atom_ptr[structure];
    RadiusFault fault = images.build(positions + 3 * first, num_atoms(structure), first,
                                     cells + 9 * structure, pbc + 3 * structure, cutoff);
    fault.structure = structure;
    return fault;
  }
};

// Growing rows without moving what is there: a row that does not fit opens a new block. `total` counts the
// edges of all writers, block by block, so that a hopeless search ends before it fills the memory.
class RowWriter {
 public:
  RowWriter(std::vector<RadiusRows>& rows, std::atomic<int64_t>& total, const Input& input)
      : rows_(rows), total_(total), most_(input.most_edges), most_kept_(input.most_kept) {}
  ~RowWriter() { total_ += used_; }

  bool overflown() const { return total_.load(std::memory_order_relaxed) > most_; }

  RadiusEdge* room(int64_t target, int64_t count) {
    keeps_ = keeps_ && total_.load(std::memory_order_relaxed) + used_ <= most_kept_;
    if (!keeps_) {
      if (int64_t(counted_.size()) < count) counted_.resize(count);
      return counted_.data();
    }
    if (rows_.empty() || used_ + count > rows_.back().capacity) {
      total_ += used_;
      used_ = 0;
      rows_.emplace_back(target, count);
    }
    return rows_.back().edges.get() + used_;
  }
  void close_row(int64_t count) {
    used_ += count;
    if (keeps_) {
      ++rows_.back().num_targets;
    } else if (used_ >= RadiusRows::kBlock) {
      total_ += used_;
      used_ = 0;
    }
  }

 private:
  std::vector<RadiusRows>& rows_;
  std::atomic<int64_t>& total_;
  int64_t most_, most_kept_;
  bool keeps_ = true;
  int64_t used_ = 0;                 // edges in the last block
  std::vector<RadiusEdge> counted_;  // a row that is not kept
};

int64_t keep_near_cells(RadiusEdge* row, int64_t count, int64_t max_images) {
  int64_t kept = 0;
  for (int64_t k = 0; k < count; ++k) {
    bool near = true;
    for (int32_t n : row[k].shift) near = near && std::abs(int64_t(n)) <= max_images;
    row[kept] = row[k];
    kept += near;
  }
  return kept;
}

// The nearest `most` edges of a row, in their old order; at the last distance the first ones in that order.
int64_t keep_nearest(const Input& input, const ImageAtoms& images, int64_t i, RadiusEdge* row, int64_t count,
                     std::vector<double>& distances, std::vector<double>& sorted) {
  const int64_t most = input.max_neighbors;
  if (count <= most) return count;
  distances.resize(count);
  for (int64_t k = 0; k < count; ++k) distances[k] = images.squared_distance(i, row[k]);
  // Only the bin of the last one needs its order.
  constexpr int kBins = 128;
  const double cutoff2 = input.cutoff * input.cutoff, scale = cutoff2 > 0 ? (kBins - 1) / cutoff2 : 0;
  uint32_t sizes[kBins] = {};
  for (double d2 : distances) ++sizes[int(d2 * scale)];
  int last_bin = 0;
  int64_t before = 0;  // edges in the bins before the last one's
  while (before + sizes[last_bin] < most) before += sizes[last_bin++];
  sorted.clear();
  for (double d2 : distances) {
    if (int(d2 * scale) == last_bin) sorted.push_back(d2);
  }
  std::nth_element(sorted.begin(), sorted.begin() + (most - before - 1), sorted.end());
  const double last = sorted[most - before - 1];
  int64_t ties = most - before;
  for (int64_t k = 0; k < most - before; ++k) ties -= sorted[k] < last;
  int64_t kept = 0;
  for (int64_t k = 0; k < count; ++k) {
    const bool keep = distances[k] < last || (distances[k] == last && ties-- > 0);
    row[kept] = row[k];
    kept += keep;
  }
  return kept;
}

// Buffers of one thread.
struct Worker {
  ImageAtoms images;  // of the small structures it searches whole
  RowBits bits;
  std::vector<double> distances, sorted;
};

// Targets [begin, end): a part of one large structure, or a run of whole small ones.
struct Task {
  int64_t first_structure, last_structure;
  int64_t begin, end;
  std::vector<RadiusRows> rows;
  RadiusFault fault;
  int64_t num_truncated = 0;
};

// The targets of the task that belong to one structure. target_ptr[i + 1] receives the length of row i.
void search_structure(const Input& input, int64_t structure, const ImageAtoms& images, Worker& worker,
                      RowWriter& writer, Task& task, int64_t* target_ptr) {
  worker.bits.fit(images.size());
  const int64_t first = input.atom_ptr[structure];
  const int64_t end = std::min(task.end, input.atom_ptr[structure + 1]);
  for (int64_t target = std::max(task.begin, first); target < end && !writer.overflown(); ++target) {
    int64_t count = images.find(target - first, worker.bits);
    RadiusEdge* row = writer.room(target, count);
    images.emit(target - first, worker.bits, row);
    if (worker.bits.fault.kind != RadiusFault::None) {
      task.fault = worker.bits.fault;
      task.fault.structure = structure;
      worker.bits.fault = RadiusFault();
      return;
    }
    if (input.max_images >= 0) count = keep_near_cells(row, count, input.max_images);
    if (input.max_neighbors > 0) {
      task.num_truncated += count > input.max_neighbors;
      count = keep_nearest(input, images, target - first, row, count, worker.distances, worker.sorted);
    }
    writer.close_row(count);
    target_ptr[target + 1] = count;
  }
}

// `shared`: the images of the one structure that the task is a part of, or null.
void search_task(const Input& input, const ImageAtoms* shared, Worker& worker,
                 std::atomic<int64_t>& num_edges, Task& task, int64_t* target_ptr) {
  RowWriter writer(task.rows, num_edges, input);
  for (int64_t s = task.first_structure; s < task.last_structure; ++s) {
    if (!shared) task.fault = input.list_images(s, worker.images);
    if (task.fault.kind == RadiusFault::None) {
      search_structure(input, s, shared ? *shared : worker.images, worker, writer, task, target_ptr);
    }
    if (task.fault.kind != RadiusFault::None) return;
  }
}

// Runs body(k) for k in [0, n) on so many threads, in no fixed order, and hands on the first exception.
template <class Body>
void parallel_for(int64_t n, int threads, const Body& body) {
  FirstError error;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && n > 1)
  for (int64_t k = 0; k < n; ++k) {
    error.watch([&] { body(k); });
  }
  error.rethrow();
}

// Ask for huge pages for fresh memory about to be written: its page faults would take longer than the search.
void expect_writes(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kPage = 4096, kWorthwhile = size_t(4) << 20;
  if (bytes < kWorthwhile) return;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(start), (bytes - kPage) / kPage * kPage,
          MADV_HUGEPAGE);  // a hint: may fail
#else
  (void)data, (void)bytes;
#endif
}

// All structures, once.
RadiusSearch search_all(const Input& input, int64_t num_structures, int threads, int64_t* target_ptr) {
  static Kept<Worker> workers(64);
  RadiusSearch search;
  std::atomic<int64_t> num_edges{0};
  std::vector<Task> tasks;
  const auto with_worker = [](const auto& body) {
    std::unique_ptr<Worker> worker = workers.take();
    if (!worker) worker = std::make_unique<Worker>();
    body(*worker);
    if (worker->images.room() < kKeptImages) workers.give_back(std::move(worker));
  };
  const auto run = [&](const ImageAtoms* shared) {
    parallel_for(int64_t(tasks.size()), threads, [&](int64_t k) {
      with_worker(
          [&](Worker& worker) { search_task(input, shared, worker, num_edges, tasks[k], target_ptr); });
    });
    for (Task& task : tasks) {
      if (search.fault.kind == RadiusFault::None) search.fault = task.fault;
      search.num_truncated += task.num_truncated;
      for (RadiusRows& rows : task.rows) search.rows.push_back(std::move(rows));
    }
    tasks.clear();
  };

  int64_t s = 0;
  while (s < num_structures && search.fault.kind == RadiusFault::None) {
    if (input.num_atoms(s) >= kLargeAtoms) {
      with_worker([&](Worker& worker) {
        search.fault = input.list_images(s, worker.images);
        if (search.fault.kind != RadiusFault::None) return;
        for (int64_t i = input.atom_ptr[s]; i < input.atom_ptr[s + 1]; i += kTaskAtoms) {
          tasks.push_back({s, s + 1, i, std::min(i + kTaskAtoms, input.atom_ptr[s + 1]), {}, {}});
        }
        run(&worker.images);
      });
      ++s;
      continue;
    }
    while (s < num_structures && input.num_atoms(s) < kLargeAtoms) {
      const int64_t start = s;
      while (s < num_structures && input.num_atoms(s) < kLargeAtoms &&
             input.atom_ptr[s] - input.atom_ptr[start] < kTaskAtoms) {
        ++s;
      }
      tasks.push_back({start, s, input.atom_ptr[start], input.atom_ptr[s], {}, {}});
    }
    run(nullptr);
  }
  search.num_edges = num_edges.load();
  if (search.fault.kind == RadiusFault::None && search.num_edges > input.most_edges) {
    search.fault.kind = RadiusFault::Edges;
    search.fault.value = double(search.num_edges);
  }
  return search;
}

}  // namespace

template <>
RadiusSearch RadiusGraphOps<DPT_LEVEL>::search(const double* positions, const double* cells,
                                               const uint8_t* pbc, const int64_t* atom_ptr,
                                               int64_t num_structures, double cutoff, int64_t max_neighbors,
                                               int64_t max_images, int64_t most_edges, int threads,
                                               int64_t* target_ptr) {
  Input input{positions, cells, pbc, atom_ptr, cutoff, max_neighbors, max_images, most_edges, most_edges / 8};
  const auto with_offsets = [&](RadiusSearch search) {
    if (search.fault.kind != RadiusFault::None) return search;
    target_ptr[0] = 0;
    const int64_t num_atoms = num_structures ? atom_ptr[num_structures] : 0;
    for (int64_t i = 0; i < num_atoms; ++i) target_ptr[i + 1] += target_ptr[i];
    return search;
  };
  {
    RadiusSearch search = search_all(input, num_structures, threads, target_ptr);
    const bool all_kept = search.num_edges <= input.most_kept;
    if (all_kept || search.fault.kind != RadiusFault::None) return with_offsets(std::move(search));
  }
  input.most_kept = most_edges;  // they are few enough, so there must be room for them
  return with_offsets(search_all(input, num_structures, threads, target_ptr));
}

template <>
void RadiusGraphOps<DPT_LEVEL>::fill(const RadiusSearch& search, const int64_t* target_ptr, int threads,
                                     int64_t* edge_index, int32_t* cell_shifts) {
  expect_writes(edge_index, 2 * search.num_edges * sizeof(int64_t));
  expect_writes(cell_shifts, 3 * search.num_edges * sizeof(int32_t));
  parallel_for(int64_t(search.rows.size()), threads, [&](int64_t k) {
    const RadiusRows& rows = search.rows[k];
    const RadiusEdge* edge = rows.edges.get();
    int64_t e = target_ptr[rows.first_target];
    for (int64_t i = rows.first_target; i < rows.first_target + rows.num_targets; ++i) {
      for (; e < target_ptr[i + 1]; ++e, ++edge) {
        edge_index[e] = edge->source;
        edge_index[search.num_edges + e] = i;
        for (int a = 0; a < 3; ++a) cell_shifts[3 * e + a] = edge->shift[a];
      }
    }
  });
}

template <>
void RadiusGraphOps<DPT_LEVEL>::by_source(const int64_t* sources, int64_t num_edges, int64_t num_atoms,
                                          int64_t* ptr, int64_t* order) {
  for (int64_t j = 0; j <= num_atoms; ++j) ptr[j] = 0;
  for (int64_t e = 0; e < num_edges; ++e) ++ptr[sources[e] + 1];
  for (int64_t j = 0; j < num_atoms; ++j) ptr[j + 1] += ptr[j];
  std::vector<int64_t> next(ptr, ptr + num_atoms);
  for (int64_t e = 0; e < num_edges; ++e) order[next[sources[e]]++] = e;
}

}  // namespace dpt
