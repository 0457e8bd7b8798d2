// What the .cu files need of CUDA, in one place: launches, shared memory, and warps of 32 lanes. Without nvcc
// the tests put their emulation of the same names in place of it (tests/emulation), so that every kernel also
// runs as host C++.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace dpt {

// The blocks of a launch, and the bytes of shared memory that each of them has.
struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
};

// kernel<<<grid>>>(arguments...) on the stream; an empty grid is no launch.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, void* stream, Arguments... arguments) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (grid.blocks == 0) return;
  if (grid.blocks > 0x7fffffff) throw std::runtime_error("CUDA: more blocks than a grid can have");
  cudaError_t error = cudaSuccess;
  if (grid.shared_bytes > kWithoutAsking)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<dim3(unsigned(grid.blocks)), grid.threads, size_t(grid.shared_bytes),
             static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA launch: ") + cudaGetErrorString(error));
}

// Atomics on integers, whose results do not depend on the order of the threads; the old value.
__device__ inline int64_t atomic_add(int64_t* address, int64_t value) {
  return int64_t(atomicAdd(reinterpret_cast<unsigned long long*>(address), uint64_t(value)));
}
__device__ inline int64_t atomic_min(int64_t* address, int64_t value) {
  return atomicMin(reinterpret_cast<long long*>(address), static_cast<long long>(value));
}
__device__ inline int64_t atomic_max(int64_t* address, int64_t value) {
  return atomicMax(reinterpret_cast<long long*>(address), static_cast<long long>(value));
}
__device__ inline int32_t atomic_max(int32_t* address, int32_t value) {
  return atomicMax(address, value);
}

// The shared memory of this block.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) double shared_bytes_of_the_block[];
  return reinterpret_cast<T*>(shared_bytes_of_the_block);
}

}  // namespace dpt

#else
#include "cuda_emulation.h"
#endif

namespace dpt {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
            Arguments... arguments) {
  launch(kernel, Grid{blocks, threads}, stream, arguments...);
}

__device__ inline int lane_id() {
  return int(threadIdx.x) % kWarp;
}
__device__ inline int64_t warp_id() {
  return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}
__device__ inline int64_t thread_id() {
  return int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
}

// How many lanes before this one have the predicate; `all` receives how many lanes have it.
__device__ inline int rank_among(bool predicate, int* all) {
  const unsigned mask = __ballot_sync(kAllLanes, predicate);
  *all = __popc(mask);
  return __popc(mask & ((1u << lane_id()) - 1));
}

template <class T>
__device__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <class T>
__device__ T warp_min(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, step);
    value = other < value ? other : value;
  }
  return value;
}

}  // namespace dpt
