// Distance tests on many points at once: the only place of the radius graph that is written per instruction
// set.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dpt {

// One target in float32 with its thresholds on the squared distance. A point with d2 > possible is surely
// outside the cutoff, one with near < d2 <= sure is surely inside; the others need the float64 predicate.
struct Probe {
  float x, y, z;
  float near, sure, possible;
};

struct Hits {
  uint64_t inside;   // bit k: point k is possibly within the cutoff
  uint64_t decided;  // bit k: and surely so
};

// The first `count` <= kLanes points at x, y, z. Reads kLanes points.
#if defined(__AVX512F__)

constexpr int kLanes = 16;

inline Hits test_lanes(const Probe& p, const float* x, const float* y, const float* z) {
  const __m512 dx = _mm512_sub_ps(_mm512_loadu_ps(x), _mm512_set1_ps(p.x));
  const __m512 dy = _mm512_sub_ps(_mm512_loadu_ps(y), _mm512_set1_ps(p.y));
  const __m512 dz = _mm512_sub_ps(_mm512_loadu_ps(z), _mm512_set1_ps(p.z));
  const __m512 d2 = _mm512_fmadd_ps(dz, dz, _mm512_fmadd_ps(dy, dy, _mm512_mul_ps(dx, dx)));
  const __mmask16 inside = _mm512_cmp_ps_mask(d2, _mm512_set1_ps(p.possible), _CMP_LE_OQ);
  const __mmask16 sure = _mm512_cmp_ps_mask(d2, _mm512_set1_ps(p.sure), _CMP_LE_OQ);
  const __mmask16 near = _mm512_cmp_ps_mask(d2, _mm512_set1_ps(p.near), _CMP_LE_OQ);
  return {inside, uint64_t(sure & ~near & 0xffff)};
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;

inline Hits test_lanes(const Probe& p, const float* x, const float* y, const float* z) {
  const __m256 dx = _mm256_sub_ps(_mm256_loadu_ps(x), _mm256_set1_ps(p.x));
  const __m256 dy = _mm256_sub_ps(_mm256_loadu_ps(y), _mm256_set1_ps(p.y));
  const __m256 dz = _mm256_sub_ps(_mm256_loadu_ps(z), _mm256_set1_ps(p.z));
  const __m256 d2 = _mm256_fmadd_ps(dz, dz, _mm256_fmadd_ps(dy, dy, _mm256_mul_ps(dx, dx)));
  const int inside = _mm256_movemask_ps(_mm256_cmp_ps(d2, _mm256_set1_ps(p.possible), _CMP_LE_OQ));
  const int sure = _mm256_movemask_ps(_mm256_cmp_ps(d2, _mm256_set1_ps(p.sure), _CMP_LE_OQ));
  const int near = _mm256_movemask_ps(_mm256_cmp_ps(d2, _mm256_set1_ps(p.near), _CMP_LE_OQ));
  return {uint64_t(inside), uint64_t(sure & ~near)};
}

#else

constexpr int kLanes = 16;

inline Hits test_lanes(const Probe& p, const float* x, const float* y, const float* z) {
  float d2[kLanes];
  for (int k = 0; k < kLanes; ++k) {
    const float dx = x[k] - p.x, dy = y[k] - p.y, dz = z[k] - p.z;
    d2[k] = dx * dx + dy * dy + dz * dz;
  }
  uint64_t inside = 0, decided = 0;
  for (int k = 0; k < kLanes; ++k) {
    inside |= uint64_t(d2[k] <= p.possible) << k;
    decided |= uint64_t(d2[k] <= p.sure && d2[k] > p.near) << k;
  }
  return {inside, decided};
}

#endif

// Write the ranks whose bit is set in `mask` to `out`, ascending in k; up to kLanes entries of `out` are
// overwritten.
inline int compress(uint64_t mask, const uint32_t* ranks, uint32_t* out) {
#if defined(__AVX512F__)
  const __m512i packed = _mm512_maskz_compress_epi32(__mmask16(mask), _mm512_loadu_si512(ranks));
  _mm512_storeu_si512(out, packed);
  return __builtin_popcountll(mask);
#else
  int count = 0;
  for (; mask; mask &= mask - 1) out[count++] = ranks[__builtin_ctzll(mask)];
  return count;
#endif
}

}  // namespace dpt
