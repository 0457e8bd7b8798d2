#include "ops.h"

#include <vector>

namespace dpt {

template <>
void RadiusGraphOps<DPT_LEVEL>::by_source(const int64_t* sources, int64_t num_edges, int64_t num_atoms,
                                          int64_t* ptr, int64_t* order) {
  for (int64_t j = 0; j <= num_atoms; ++j) ptr[j] = 0;
  for (int64_t e = 0; e < num_edges; ++e) ++ptr[sources[e] + 1];
  for (int64_t j = 0; j < num_atoms; ++j) ptr[j + 1] += ptr[j];
  std::vector<int64_t> next(ptr, ptr + num_atoms);
  for (int64_t e = 0; e < num_edges; ++e) order[next[sources[e]]++] = e;
}

}  // namespace dpt
