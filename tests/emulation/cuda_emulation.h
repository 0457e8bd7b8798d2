// CUDA's names on a CPU, for tests. The threads of a block are fibers (fibers.h: strict, and in any order),
// or, under the thread sanitizer, threads (threads.h: finds races).
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

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

namespace emulation {

constexpr int kLanes = 32;
constexpr int64_t kMostShared = 160 * 1024;  // of an A100's block

enum class Wait { None, Ballot, Shuffle, WarpBarrier, BlockBarrier, Done };

// Changes the order in which the threads run: no result may depend on it.
inline unsigned& seed() {
  static unsigned value = 0;
  return value;
}

}  // namespace emulation

#if defined(__SANITIZE_THREAD__)
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace emulation {

// What a lane brought to the meeting that the caller comes from.
template <class T, class Caller>
T brought(const Caller& caller, int lane) {
  if (!(caller.mask >> lane & 1)) fail("a shuffle reads a lane outside its mask", caller);
  T value;
  std::memcpy(&value, &caller.everyones[lane], sizeof(T));
  return value;
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const auto& caller = emulation::meet(emulation::Wait::Ballot, mask, predicate);
  unsigned votes = 0;
  for (int lane = 0; lane < emulation::kLanes; ++lane) votes |= unsigned(caller.everyones[lane] != 0) << lane;
  return votes;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  const auto& caller = emulation::meet(emulation::Wait::Shuffle, mask, value);
  return emulation::brought<T>(caller, int(threadIdx.x % emulation::kLanes) ^ step);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::brought<T>(emulation::meet(emulation::Wait::Shuffle, mask, value), lane);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::meet(emulation::Wait::WarpBarrier, mask, 0);
}
inline void __syncthreads() {
  emulation::meet(emulation::Wait::BlockBarrier, 0xffffffffu, 0);
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

inline int __popcll(unsigned long long bits) {
  return __builtin_popcountll(bits);
}

inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

namespace dpt {

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, void*, Arguments... arguments) {
  if (grid.threads < 1 || grid.threads > 1024 || grid.shared_bytes > emulation::kMostShared) {
    std::fprintf(stderr, "emulation: %d threads and %lld bytes of shared memory in a block\n", grid.threads,
                 static_cast<long long>(grid.shared_bytes));
    std::abort();
  }
  emulation::run_grid(grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(arguments...); });
}

inline int64_t atomic_add(int64_t* address, int64_t value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomic_min(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < old &&
         !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
T atomic_max(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value &&
         !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::block_memory());
}

}  // namespace dpt
