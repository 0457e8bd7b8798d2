// CUDA's threads as threads of the operating system, for the thread sanitizer: it reports two lanes that
// touch one address, one of them writing, without a barrier between them. Blocks run one after the other;
// warp calls need all 32 lanes. (../cuda_emulation.h is the emulation that the other tests use.)
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

using std::abs;
using std::exp;
using std::fabs;
using std::floor;
using std::log1p;
using std::rint;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index3 threadIdx, blockIdx, blockDim;

namespace emulation {

constexpr unsigned kLanes = 32;

struct Barrier {
  pthread_barrier_t barrier;
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }
};

struct Warp {
  Barrier barrier{kLanes};
  uint64_t given[kLanes] = {};
};

struct Launch {
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<double[]> shared;
  Launch(unsigned threads, size_t shared_bytes)
      : barrier(threads), warps(threads / kLanes), shared(new double[shared_bytes / 8 + 1]) {}
};

inline Launch*& current() {
  static Launch* launch = nullptr;
  return launch;
}
inline Warp& warp() {
  return current()->warps[threadIdx.x / kLanes];
}

// What all lanes bring, for f(their values).
template <class T, class F>
auto meet(unsigned mask, T value, const F& f) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) std::abort();
  Warp& w = warp();
  std::memcpy(&w.given[threadIdx.x % kLanes], &value, sizeof(T));
  w.barrier.wait();
  const auto result = f(w.given);
  w.barrier.wait();
  return result;
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::meet(mask, value, [&](const uint64_t* given) {
    T result;
    std::memcpy(&result, &given[lane], sizeof(T));
    return result;
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  return __shfl_sync(mask, value, int(threadIdx.x % emulation::kLanes) ^ step);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return emulation::meet(mask, uint64_t(predicate), [](const uint64_t* given) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < emulation::kLanes; ++lane) votes |= unsigned(given[lane]) << lane;
    return votes;
  });
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline void __syncwarp() {
  emulation::warp().barrier.wait();
}
inline void __syncthreads() {
  emulation::current()->barrier.wait();
}

namespace dpt {

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, void*, Arguments... arguments) {
  emulation::Launch launch(unsigned(grid.threads), size_t(grid.shared_bytes));
  emulation::current() = &launch;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < unsigned(grid.threads); ++t) {
    threads.emplace_back([&, t] {
      threadIdx.x = t;
      blockDim.x = unsigned(grid.threads);
      for (int64_t b = 0; b < grid.blocks; ++b) {
        blockIdx.x = unsigned(b);
        kernel(arguments...);
        launch.barrier.wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::current()->shared.get());
}

}  // namespace dpt
