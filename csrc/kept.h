// Memory kept from call to call. Page faults of fresh memory cost more than the search that fills it.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
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

}  // namespace dpt
