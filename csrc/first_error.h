// Exceptions of the threads of a parallel region, which must not leave it. Included by kernels only, once per
// processor level: everything has internal linkage.
#pragma once

#include <exception>
#include <mutex>

namespace dpt {
namespace {

class FirstError {
 public:
  template <class Body>
  void watch(const Body& body) {
    try {
      body();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard_);
      if (!error_) error_ = std::current_exception();
    }
  }
  // After the region.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::exception_ptr error_;
  std::mutex guard_;
};

}  // namespace
}  // namespace dpt
