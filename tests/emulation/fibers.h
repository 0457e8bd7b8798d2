// The threads of a block as fibers, and blocks one after the other.
//
// Stricter than a GPU. The fibers run in a seeded random order, changed at every meeting; lanes named in a
// mask must meet at the same warp call (same kind, same number of calls so far); a lane that leaves while
// others wait for it, or lanes that wait for different calls, abort with a message. So a missing or divergent
// warp call shows in every run.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 128 * 1024;
#else
constexpr size_t kStack = 32 * 1024;
#endif

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  jmp_buf jump;
  bool started = false;
  Index3 index;
  Wait wait = Wait::None;
  unsigned mask = 0;
  uint64_t given = 0;               // the value this lane brings to the meeting
  uint64_t everyones[kLanes] = {};  // what all lanes of the warp brought, once it was held
  int64_t calls = 0;                // warp calls so far: lanes that meet must have made as many
  void* sanitizer_stack = nullptr;
};

[[noreturn]] inline void fail(const char* what, const Fiber& fiber) {
  std::fprintf(stderr, "emulation: %s (thread %u)\n", what, fiber.index.x);
  std::abort();
}

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::function<void()> body;
  ucontext_t scheduler;
  jmp_buf scheduler_jump;
  void* scheduler_sanitizer_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  Fiber* current = nullptr;
  std::unique_ptr<char[]> shared;
  std::mt19937 random{12345};

#if defined(__SANITIZE_ADDRESS__)
  void enter(Fiber& fiber) {
    current = &fiber;
    __sanitizer_start_switch_fiber(&scheduler_sanitizer_stack, fiber.stack, kStack);
    swapcontext(&scheduler, &fiber.context);
    __sanitizer_finish_switch_fiber(scheduler_sanitizer_stack, nullptr, nullptr);
  }
  void leave(Fiber& fiber) {
    const bool gone = fiber.wait == Wait::Done;
    __sanitizer_start_switch_fiber(gone ? nullptr : &fiber.sanitizer_stack, scheduler_bottom, scheduler_size);
    swapcontext(&fiber.context, &scheduler);
    __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler_bottom, &scheduler_size);
  }
#else
  // Jumps once a fiber has started: swapcontext asks the kernel for the signal mask at every switch.
  void enter(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler_jump) != 0) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  void leave(Fiber& fiber) {
    if (_setjmp(fiber.jump) == 0) _longjmp(scheduler_jump, 1);
  }
#endif

  // All fibers run until they wait; then every meeting whose members are all there is held.
  void run(unsigned threads);
  bool hold_warp_meetings();
  bool hold_block_barrier();
};

inline Block*& block() {
  static Block* current = nullptr;
  return current;
}
inline const Index3& thread_index() {
  return block()->current->index;
}
inline char* block_memory() {
  return block()->shared.get();
}
inline Index3& block_index() {
  static Index3 index;
  return index;
}
inline Index3& block_size() {
  static Index3 size;
  return size;
}

// Stacks are used again by the next block.
inline char* stack(unsigned thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStack]);
  return stacks[thread].get();
}

inline void start() {
  Block& b = *block();
  Fiber& fiber = *b.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_bottom, &b.scheduler_size);
#endif
  b.body();
  fiber.wait = Wait::Done;
  b.leave(fiber);
}

inline void Block::run(unsigned threads) {
  fibers.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t] = std::make_unique<Fiber>();
    Fiber& fiber = *fibers[t];
    fiber.stack = stack(t);
    std::memset(fiber.stack, 0xff, kStack);  // a local that is read before it is written is a NaN
    fiber.index.x = t;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  std::vector<Fiber*> order;
  for (;;) {
    order.clear();
    for (auto& fiber : fibers) {
      if (fiber->wait == Wait::None) order.push_back(fiber.get());
    }
    if (order.empty()) {
      const auto done = [](const auto& fiber) { return fiber->wait == Wait::Done; };
      if (std::all_of(fibers.begin(), fibers.end(), done)) return;
      if (!hold_warp_meetings() && !hold_block_barrier()) {
        fail("deadlock: threads wait for others that have left or wait elsewhere",
             **std::find_if_not(fibers.begin(), fibers.end(), done));
      }
      continue;
    }
    std::shuffle(order.begin(), order.end(), random);
    for (Fiber* fiber : order) enter(*fiber);
  }
}

inline bool Block::hold_warp_meetings() {
  bool held = false;
  for (size_t first = 0; first < fibers.size(); first += kLanes) {
    Fiber* caller = nullptr;
    for (size_t t = first; t < first + kLanes && t < fibers.size(); ++t) {
      const Wait wait = fibers[t]->wait;
      if (wait != Wait::Done && wait != Wait::BlockBarrier) caller = fibers[t].get();
    }
    if (!caller) continue;
    uint64_t everyones[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(caller->mask >> lane & 1)) continue;
      if (first + lane >= fibers.size()) fail("a mask names a lane that the block does not have", *caller);
      const Fiber& other = *fibers[first + lane];
      if (other.wait != caller->wait || other.mask != caller->mask || other.calls != caller->calls) {
        fail("lanes of one mask are at different warp calls, or have left", other);
      }
      everyones[lane] = other.given;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(caller->mask >> lane & 1)) continue;
      std::copy(everyones, everyones + kLanes, fibers[first + lane]->everyones);
      fibers[first + lane]->wait = Wait::None;
    }
    held = true;
  }
  return held;
}

inline bool Block::hold_block_barrier() {
  for (auto& fiber : fibers) {
    if (fiber->wait != Wait::BlockBarrier) return false;
  }
  for (auto& fiber : fibers) fiber->wait = Wait::None;
  return true;
}

// Waits for the lanes of the mask; afterwards `everyones` of this lane holds what they brought.
template <class T>
Fiber& meet(Wait wait, unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fiber& fiber = *block()->current;
  if (!(mask >> (fiber.index.x % kLanes) & 1)) fail("a lane calls with a mask that leaves it out", fiber);
  fiber.wait = wait;
  fiber.mask = mask;
  fiber.given = 0;
  std::memcpy(&fiber.given, &value, sizeof(T));
  ++fiber.calls;
  block()->leave(fiber);
  return fiber;
}

// body() in every thread of every block.
template <class Body>
void run_grid(int64_t blocks, int threads, int64_t shared_bytes, const Body& body) {
  block_size().x = unsigned(threads);
  for (int64_t b = 0; b < blocks; ++b) {
    Block next;
    next.random.seed(unsigned(b) + seed());
    next.shared.reset(new char[size_t(shared_bytes)]);
    std::memset(next.shared.get(), 0xff, size_t(shared_bytes));
    next.body = body;
    block() = &next;
    block_index().x = unsigned(b);
    next.run(unsigned(threads));
  }
}

}  // namespace emulation
