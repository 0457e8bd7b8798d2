#include "radius_graph.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <mutex>

#include "image_atoms.h"
#include "ops.h"

namespace dpt {
namespace {

constexpr int64_t kMostEdges = std::numeric_limits<int32_t>::max();
constexpr int64_t kTaskAtoms = 256;    // targets of one task: enough work to be worth a thread's turn
constexpr int64_t kLargeAtoms = 2048;  // structures from here on are shared between threads
constexpr int64_t kBlockEdges = 1 << 15;

struct Limits {
  int64_t max_neighbors;  // 0: all
  int64_t max_images;     // negative: all
};

// Growing rows without moving what is there: a row that does not fit opens a new block. `total` counts the
// edges of all writers, block by block, so that a hopeless search ends before it fills the memory.
class RowWriter {
 public:
  RowWriter(std::vector<RadiusSearch::Rows>& rows, std::atomic<int64_t>& total)
      : rows_(rows), total_(total) {}
  ~RowWriter() { total_ += used_; }

  bool overflown() const { return total_.load(std::memory_order_relaxed) > kMostEdges; }

  RadiusEdge* room(int64_t target, int64_t count) {
    if (used_ + count > capacity_ || rows_.empty()) {
      total_ += used_;
      capacity_ = std::max(count, kBlockEdges);
      used_ = 0;
      rows_.push_back({target, 0, std::unique_ptr<RadiusEdge[]>(new RadiusEdge[capacity_])});
    }
    return rows_.back().edges.get() + used_;
  }
  void close_row(int64_t count) {
    used_ += count;
    ++rows_.back().num_targets;
  }

 private:
  std::vector<RadiusSearch::Rows>& rows_;
  std::atomic<int64_t>& total_;
  int64_t used_ = 0, capacity_ = 0;
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
int64_t keep_nearest(const ImageAtoms& images, int64_t i, RadiusEdge* row, int64_t count, int64_t most,
                     std::vector<double>& distances, std::vector<double>& sorted) {
  if (count <= most) return count;
  distances.resize(count);
  for (int64_t k = 0; k < count; ++k) distances[k] = images.squared_distance(i, row[k]);
  sorted = distances;
  std::nth_element(sorted.begin(), sorted.begin() + (most - 1), sorted.end());
  const double last = sorted[most - 1];
  int64_t ties = most;
  for (int64_t k = 0; k < most; ++k) ties -= sorted[k] < last;
  int64_t kept = 0;
  for (int64_t k = 0; k < count; ++k) {
    const bool keep = distances[k] < last || (distances[k] == last && ties-- > 0);
    row[kept] = row[k];
    kept += keep;
  }
  return kept;
}

struct Worker {
  ImageAtoms images;  // of the worker's own small structures
  RowBits bits;
  std::vector<double> distances, sorted;
};

// Targets [begin, end) of one large structure, or of a run of whole small ones.
struct Task {
  int64_t first_structure, last_structure;
  int64_t begin, end;
  std::vector<RadiusSearch::Rows> rows;
  RadiusFault fault;
  int64_t num_truncated = 0;
};

void search_targets(const ImageAtoms& images, int64_t structure, int64_t first, int64_t begin, int64_t end,
                    const Limits& limits, Worker& worker, RowWriter& writer, Task& task,
                    int64_t* target_ptr) {
  worker.bits.fit(images.size());
  for (int64_t target = begin; target < end && !writer.overflown(); ++target) {
    int64_t count = images.find(target - first, worker.bits);
    RadiusEdge* row = writer.room(target, count);
    images.emit(target - first, worker.bits, row);
    if (worker.bits.fault.kind != RadiusFault::None) {
      task.fault = worker.bits.fault;
      task.fault.structure = structure;
      worker.bits.fault = RadiusFault();
      return;
    }
    if (limits.max_images >= 0) count = keep_near_cells(row, count, limits.max_images);
    if (limits.max_neighbors > 0) {
      task.num_truncated += count > limits.max_neighbors;
      count = keep_nearest(images, target - first, row, count, limits.max_neighbors, worker.distances,
                           worker.sorted);
    }
    writer.close_row(count);
    target_ptr[target + 1] = count;
  }
}

// Runs body(k) for k in [0, n) on so many threads, in no fixed order, and hands on the first exception.
template <class Body>
void parallel_for(int64_t n, int threads, const Body& body) {
  std::exception_ptr error;
  std::mutex guard;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && n > 1)
  for (int64_t k = 0; k < n; ++k) {
    try {
      body(k);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace

template <>
RadiusSearch RadiusGraphOps<DPT_LEVEL>::search(const double* positions, const double* cells,
                                               const uint8_t* pbc, const int64_t* atom_ptr,
                                               int64_t num_structures, double cutoff, int64_t max_neighbors,
                                               int64_t max_images, int threads, int64_t* target_ptr) {
  const Limits limits{max_neighbors, max_images};
  RadiusSearch search;
  std::atomic<int64_t> num_edges{0};
  // Workers outlive their tasks, so that their buffers are allocated once.
  std::vector<std::unique_ptr<Worker>> idle;
  std::mutex guard;
  const auto with_worker = [&](const auto& body) {
    std::unique_ptr<Worker> worker;
    {
      const std::lock_guard<std::mutex> lock(guard);
      if (!idle.empty()) {
        worker = std::move(idle.back());
        idle.pop_back();
      }
    }
    if (!worker) worker = std::make_unique<Worker>();
    body(*worker);
    const std::lock_guard<std::mutex> lock(guard);
    idle.push_back(std::move(worker));
  };
  const auto run = [&](std::vector<Task>& tasks, const ImageAtoms* shared) {
    parallel_for(int64_t(tasks.size()), threads, [&](int64_t k) {
      Task& task = tasks[k];
      with_worker([&](Worker& worker) {
        RowWriter writer(task.rows, num_edges);
        for (int64_t s = task.first_structure; s < task.last_structure; ++s) {
          const int64_t first = atom_ptr[s];
          if (!shared) {
            task.fault = worker.images.build(positions + 3 * first, atom_ptr[s + 1] - first, first,
                                             cells + 9 * s, pbc + 3 * s, cutoff);
            task.fault.structure = s;
            if (task.fault.kind != RadiusFault::None) return;
          }
          search_targets(shared ? *shared : worker.images, s, first, std::max(task.begin, first),
                         std::min(task.end, atom_ptr[s + 1]), limits, worker, writer, task, target_ptr);
          if (task.fault.kind != RadiusFault::None) return;
        }
      });
    });
    for (Task& task : tasks) {
      if (task.fault.kind != RadiusFault::None && search.fault.kind == RadiusFault::None) {
        search.fault = task.fault;
      }
      search.num_truncated += task.num_truncated;
      for (RadiusSearch::Rows& rows : task.rows) search.rows.push_back(std::move(rows));
    }
    tasks.clear();
  };

  std::vector<Task> tasks;
  int64_t s = 0;
  while (s < num_structures && search.fault.kind == RadiusFault::None) {
    if (atom_ptr[s + 1] - atom_ptr[s] >= kLargeAtoms) {
      ImageAtoms images;
      search.fault = images.build(positions + 3 * atom_ptr[s], atom_ptr[s + 1] - atom_ptr[s], atom_ptr[s],
                                  cells + 9 * s, pbc + 3 * s, cutoff);
      search.fault.structure = s;
      if (search.fault.kind != RadiusFault::None) break;
      for (int64_t i = atom_ptr[s]; i < atom_ptr[s + 1]; i += kTaskAtoms) {
        tasks.push_back({s, s + 1, i, std::min(i + kTaskAtoms, atom_ptr[s + 1]), {}, {}});
      }
      run(tasks, &images);
      ++s;
      continue;
    }
    // A run of small structures: every task takes whole ones.
    for (; s < num_structures && atom_ptr[s + 1] - atom_ptr[s] < kLargeAtoms;) {
      const int64_t start = s;
      while (s < num_structures && atom_ptr[s + 1] - atom_ptr[s] < kLargeAtoms &&
             atom_ptr[s] - atom_ptr[start] < kTaskAtoms) {
        ++s;
      }
      tasks.push_back({start, s, atom_ptr[start], atom_ptr[s], {}, {}});
    }
    run(tasks, nullptr);
  }
  if (search.fault.kind != RadiusFault::None) return search;
  if (num_edges.load() > kMostEdges) {
    search.fault.kind = RadiusFault::Edges;
    search.fault.value = double(num_edges.load());
    return search;
  }
  target_ptr[0] = 0;
  for (int64_t i = 0; i < (num_structures ? atom_ptr[num_structures] : 0); ++i) {
    target_ptr[i + 1] += target_ptr[i];
  }
  search.num_edges = num_edges.load();
  return search;
}

template <>
void RadiusGraphOps<DPT_LEVEL>::fill(const RadiusSearch& search, const int64_t* target_ptr, int threads,
                                     int64_t* edge_index, int32_t* cell_shifts) {
  parallel_for(int64_t(search.rows.size()), threads, [&](int64_t k) {
    const RadiusSearch::Rows& rows = search.rows[k];
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
