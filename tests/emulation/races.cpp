// Kernels whose threads race on a GPU, and one whose threads do not: the thread sanitizer must tell them
// apart.
#include "device.h"

namespace {

using namespace dpt;

__global__ void a_vote_orders_no_memory(int* out) {
  int* shared = shared_memory<int>();
  shared[lane_id()] = lane_id();
  __ballot_sync(kAllLanes, true);
  out[lane_id()] = shared[kWarp - 1 - lane_id()];
}

__global__ void a_missing_barrier(int* out) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = lane_id();
  __syncwarp(kAllLanes);
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void two_blocks_write_one_number(int* out) {
  if (threadIdx.x == 0) out[0] = int(blockIdx.x);
}

__global__ void right(int* out) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = lane_id();
  __syncthreads();
  const int other = shared[blockDim.x - 1 - threadIdx.x];
  __syncthreads();
  shared[threadIdx.x] = other;
  __syncwarp(kAllLanes);
  out[threadIdx.x] = warp_sum(shared[threadIdx.x ^ 1]);
}

}  // namespace

int main(int, char** arguments) {
  int out[2 * kWarp] = {};
  switch (arguments[1][0]) {
    case '0':
      launch(a_vote_orders_no_memory, Grid{1, kWarp, 1024}, nullptr, out);
      break;
    case '1':
      launch(a_missing_barrier, Grid{1, 2 * kWarp, 1024}, nullptr, out);
      break;
    case '2':
      launch(two_blocks_write_one_number, 2, kWarp, nullptr, out);
      break;
    default:
      launch(right, Grid{1, 2 * kWarp, 1024}, nullptr, out);
      for (int value : out) {
        if (value != 31 * 32 / 2) return 2;
      }
  }
  return 0;
}
