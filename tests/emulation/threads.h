// The threads of a block as threads of the machine, several blocks at once, for the thread sanitizer.
//
// Memory is ordered by what orders it on a GPU and by nothing else: __syncwarp, __syncthreads and the end of
// a kernel do, votes and shuffles do not, nor do atomics. So the meetings of a warp wait by relaxed atomics
// and bare system calls, which the sanitizer does not take for order. It reports accesses that race; lanes
// that miss a meeting are the business of the fibers, here they wait for ever.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace emulation {

constexpr int kBlocksAtOnce = 3;

// A place that `members` threads leave together, again and again.
class Gate {
 public:
  void pass(uint32_t members, bool orders_memory) {
    const auto in = orders_memory ? std::memory_order_acq_rel : std::memory_order_relaxed;
    const auto out = orders_memory ? std::memory_order_acquire : std::memory_order_relaxed;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, in) + 1 == members) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.fetch_add(1, in);
      syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    } else {
      while (round_.load(out) == round) {
        syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
      }
    }
  }

 private:
  std::atomic<uint32_t> arrived_{0}, round_{0};
};

// What lanes bring has two places in turn: nobody comes to the meeting after the next before all have read.
struct Warp {
  Gate gate;
  std::atomic<uint64_t> given[2][kLanes] = {};
};

struct Block {
  Gate gate;
  Index3 index;
  uint32_t threads;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
};

struct Thread {
  Block* block;
  Index3 index;
  unsigned mask = 0;
  uint64_t everyones[kLanes] = {};
  int64_t calls = 0;
};

[[noreturn]] inline void fail(const char* what, const Thread& thread) {
  std::fprintf(stderr, "emulation: %s (thread %u)\n", what, thread.index.x);
  std::abort();
}

inline Thread& current() {
  static thread_local Thread thread;
  return thread;
}
inline const Index3& thread_index() {
  return current().index;
}
inline const Index3& block_index() {
  return current().block->index;
}
inline Index3 block_size() {
  return {current().block->threads, 1, 1};
}
inline char* block_memory() {
  return current().block->shared.get();
}

template <class T>
Thread& meet(Wait wait, unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread& thread = current();
  Block& block = *thread.block;
  thread.mask = mask;
  if (wait == Wait::BlockBarrier) {
    block.gate.pass(block.threads, true);
    return thread;
  }
  if (mask != 0xffffffffu) fail("whole warps only", thread);
  Warp& warp = block.warps[thread.index.x / kLanes];
  auto& given = warp.given[thread.calls++ % 2];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  given[thread.index.x % kLanes].store(bits, std::memory_order_relaxed);
  warp.gate.pass(kLanes, wait == Wait::WarpBarrier);
  for (int lane = 0; lane < kLanes; ++lane) {
    thread.everyones[lane] = given[lane].load(std::memory_order_relaxed);
  }
  return thread;
}

// body() in every thread of every block.
template <class Body>
void run_grid(int64_t blocks, int threads, int64_t shared_bytes, const Body& body) {
  for (int64_t first = 0; first < blocks; first += kBlocksAtOnce) {
    std::vector<Block> group(size_t(std::min<int64_t>(kBlocksAtOnce, blocks - first)));
    std::vector<std::thread> running;
    for (size_t b = 0; b < group.size(); ++b) {
      group[b].index.x = unsigned(first + int64_t(b));
      group[b].threads = uint32_t(threads);
      group[b].warps = std::vector<Warp>(size_t(threads / kLanes + 1));
      group[b].shared.reset(new char[size_t(shared_bytes)]);
      std::memset(group[b].shared.get(), 0xff, size_t(shared_bytes));
    }
    for (Block& block : group) {
      for (int t = 0; t < threads; ++t) {
        running.emplace_back([&block, &body, t] {
          current().block = &block;
          current().index.x = unsigned(t);
          body();
        });
      }
    }
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace emulation
