// Kernels that are wrong on a GPU: the emulation must refuse each of them. The argument chooses one.
#include "device.h"

namespace {

using namespace dpt;

__global__ void missing_lane(int* out) {
  if (lane_id() == 7) return;
  out[lane_id()] = __popc(__ballot_sync(kAllLanes, true));
}

__global__ void different_calls(int* out) {
  if (lane_id() < 16) {
    out[lane_id()] = __popc(__ballot_sync(kAllLanes, true));
  } else {
    out[lane_id()] = __shfl_xor_sync(kAllLanes, 1, 1);
  }
}

__global__ void left_before_the_barrier(int* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[lane_id()] = 1;
}

__global__ void right(int* out) {
  out[lane_id()] = warp_sum(lane_id());
}

}  // namespace

int main(int, char** arguments) {
  int out[kWarp] = {};
  switch (arguments[1][0]) {
    case '0':
      launch(missing_lane, 1, kWarp, nullptr, out);
      break;
    case '1':
      launch(different_calls, 1, kWarp, nullptr, out);
      break;
    case '2':
      launch(left_before_the_barrier, 1, 2 * kWarp, nullptr, out);
      break;
    default:
      launch(right, 1, kWarp, nullptr, out);
  }
  for (int value : out) {
    if (value != 31 * 32 / 2) return 2;
  }
  return 0;
}
