// Memory kept from call to call. Page faults of fresh memory cost more than the search that fills it.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace dpt {

// Up to `most` objects that were given back, for the next that asks. Thread-safe.
template <class T>
class Kept {
 public:
  explicit Kept(size_t most) : most_(most) {}

  std::unique_ptr<T> take() {
    const std::lock_guard<std::mutex> lock(guard_);
    if (free_.empty()) return nullptr;
    std::unique_ptr<T> object = std::move(free_.back());
    free_.pop_back();
    return object;
  }
  void give_back(std::unique_ptr<T> object) {
    const std::lock_guard<std::mutex> lock(guard_);
    if (free_.size() < most_) free_.push_back(std::move(object));
  }

 private:
  const size_t most_;
  std::mutex guard_;
  std::vector<std::unique_ptr<T>> free_;
};

// Blocks of memory, aligned for vectors. Those that were given back are kept up to a total; the oldest go
// first, and one beyond the total is not kept.
class KeptMemory {
 public:
  static KeptMemory& all() {
    static KeptMemory* memory = new KeptMemory;  // outlives every thread
    return *memory;
  }

  // At least `bytes`; on return `bytes` is what the block holds.
  void* take(size_t& bytes) {
    // Whole units, and more than none: a request for no bytes may give a null pointer, as a failure does.
    bytes = (bytes + kAlignment) / kAlignment * kAlignment;
    {
      const std::lock_guard<std::mutex> lock(guard_);
      for (size_t k = blocks_.size(); k-- > 0;) {
        const Block block = blocks_[k];
        if (block.bytes < bytes || block.bytes / 2 > bytes) continue;
        blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(k));
        total_ -= block.bytes;
        bytes = block.bytes;
        return block.place;
      }
    }
    void* place = std::aligned_alloc(kAlignment, bytes);
    if (!place) throw std::bad_alloc();
    return place;
  }
  void give_back(void* place, size_t bytes) {
    if (bytes > kMost) {
      std::free(place);
      return;
    }
    const std::lock_guard<std::mutex> lock(guard_);
    blocks_.push_back({place, bytes});
    total_ += bytes;
    while (total_ > kMost) {
      total_ -= blocks_.front().bytes;
      std::free(blocks_.front().place);
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  struct Block {
    void* place;
    size_t bytes;
  };
  static constexpr size_t kAlignment = 64, kMost = size_t(64) << 20;
  std::mutex guard_;
  std::vector<Block> blocks_;
  size_t total_ = 0;
};

}  // namespace dpt
