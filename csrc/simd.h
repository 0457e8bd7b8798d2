// Short vectors of the processor level that a file is compiled for, and the activations of the messages on
// them. Included by kernels only, once per level: everything has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace dpt {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// The compiler's own estimate leaves some of these out of line, and then passes vectors through memory.
#define DPT_INLINE inline __attribute__((always_inline))

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int32_t I __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int kLanes = kVectorBytes / 4;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissa = 23;
  static constexpr float kBound = 84.0f;  // 6 exp(kBound) is finite, and 1 over it normal
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
  // exp on [-ln2/2, ln2/2]: largest relative error 1.9e-9; 2 atanh(sqrt y)/sqrt y on [0, 1/9]: 4.0e-9
  // (minimax).
  static constexpr float kExp[] = {1.0f,           1.00000003654f,   0.499999920334f,  0.166664191951f,
                                   0.04166823156f, 0.0083748980886f, 0.00138367552647f};
  static constexpr float kAtanh[] = {2.0f, 0.666663146854f, 0.400249101145f, 0.279606052421f,
                                     0.281783237626f};
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int64_t I __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int kLanes = kVectorBytes / 8;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr double kBound = 704.0;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  // Largest relative errors 4.1e-20 and 9.1e-22 before rounding.
  static constexpr double kExp[] = {1.0,
                                    1.0,
                                    0.5,
                                    0.16666666666666701561,
                                    0.041666666666665927802,
                                    0.0083333333333098999408,
                                    0.0013888888889143683418,
                                    0.00019841269908553060237,
                                    0.000024801586913587687553,
                                    2.7557225473130269392e-6,
                                    2.7557574880196518364e-7,
                                    2.5114725276195475382e-8,
                                    2.0832000269328152484e-9};
  static constexpr double kAtanh[] = {2.0,
                                      0.66666666666666666117,
                                      0.40000000000000275236,
                                      0.28571428571374440011,
                                      0.22222222227747022629,
                                      0.18181817846784150302,
                                      0.15384628396599069717,
                                      0.1333299577146889566,
                                      0.11770672019405702269,
                                      0.10454443969146678434,
                                      0.10101192737770623602,
                                      0.057750925520656844283,
                                      0.16088048608825471797};
};

template <class T>
using Vec = typename Simd<T>::V;

template <class T>
DPT_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}

template <class T>
DPT_INLINE void store(T* p, Vec<T> value) {
  *reinterpret_cast<Vec<T>*>(p) = value;
}

// The same at any address.
template <class T>
DPT_INLINE Vec<T> load_any(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
DPT_INLINE void store_any(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
DPT_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

template <class T>
DPT_INLINE T sum_lanes(Vec<T> v) {
  constexpr int n = Simd<T>::kLanes;
  T lanes[n];
#pragma GCC unroll 16
  for (int k = 0; k < n; ++k) lanes[k] = v[k];
#pragma GCC unroll 4
  for (int half = n / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

// Every group of `Width` lanes of a, then of b, folded into half as many: lane k of a group plus lane k of
// its other half.
template <class T, int Width, std::size_t... K>
DPT_INLINE Vec<T> fold(Vec<T> a, Vec<T> b, std::index_sequence<K...>) {
  constexpr auto lane = [](std::size_t k) { return k / (Width / 2) * Width + k % (Width / 2); };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane(K)...) + __builtin_shufflevector(a, b, lane(K) + Width / 2 ...);
#else
  using I = typename Simd<T>::I;
  using K0 = decltype(I{}[0] + 0);
  return __builtin_shuffle(a, b, I{K0(lane(K))...}) + __builtin_shuffle(a, b, I{K0(lane(K) + Width / 2)...});
#endif
}

// Lane k: the sum over the lanes of v[k % N]. N and Span are powers of two, N at most kLanes.
template <class T, int N, int Span = Simd<T>::kLanes>
DPT_INLINE Vec<T> lane_sums(const Vec<T>* v) {
  constexpr int lanes = Simd<T>::kLanes;
  if constexpr (Span == 1) {
    return v[0];
  } else {
    constexpr bool repeated = Span > N;
    const Vec<T> a = lane_sums<T, N, Span / 2>(v);
    const Vec<T> b = repeated ? a : lane_sums<T, N, Span / 2>(repeated ? v : v + Span / 2);
    return fold<T, lanes / (Span / 2)>(a, b, std::make_index_sequence<lanes>{});
  }
}

// out[k] += the sum over the lanes of v[k]. N is a power of two.
template <class T, int N>
DPT_INLINE void add_lane_sums(const Vec<T>* v, T* out) {
  constexpr int lanes = Simd<T>::kLanes, at_once = N < lanes ? N : lanes;
#pragma GCC unroll 16
  for (int k = 0; k < N; k += at_once) {
    const Vec<T> sums = lane_sums<T, at_once>(v + k);
    T values[lanes];
    store(values, sums);
    for (int j = 0; j < at_once; ++j) out[k + j] += values[j];
  }
}

template <class T, int N>
DPT_INLINE Vec<T> horner(const T (&coefficients)[N], Vec<T> x) {
  Vec<T> sum = broadcast<T>(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int k = N - 2; k >= 0; --k) sum = sum * x + coefficients[k];
  return sum;
}

// exp for |x| <= kBound. NaN stays NaN.
template <class T>
DPT_INLINE Vec<T> exponential(Vec<T> x) {
  using S = Simd<T>;
  using I = typename S::I;
  const Vec<T> shifted = x * T(1.4426950408889634) + S::kRound;
  const Vec<T> n = shifted - S::kRound;
  const Vec<T> rest = (x - n * S::kLn2High) - n * S::kLn2Low;
  const Vec<T> p = horner<T>(S::kExp, rest);
  return reinterpret_cast<Vec<T>>(reinterpret_cast<I>(p) + (reinterpret_cast<I>(shifted) << S::kMantissa));
}

// max and min that keep NaN.
template <class T>
DPT_INLINE Vec<T> at_least(Vec<T> x, T bound) {
  return x < bound ? broadcast<T>(bound) : x;
}
template <class T>
DPT_INLINE Vec<T> between(Vec<T> x, T low, T high) {
  x = at_least<T>(x, low);
  return x > high ? broadcast<T>(high) : x;
}

template <class T>
DPT_INLINE Vec<T> absolute(Vec<T> x) {
  using I = typename Simd<T>::I;
  constexpr auto sign = decltype(I{}[0] + 0)(1) << (sizeof(T) * 8 - 2);
  return reinterpret_cast<Vec<T>>(reinterpret_cast<I>(x) & (sign | (sign - 1)));
}

// sigmoid(g) and softplus(s), and all that their derivatives need, from two exponentials and one division.
// Every quantity is a product of positive factors, so nothing cancels: sigmoid' = z r^2 keeps its relative
// accuracy where sigmoid (1 - sigmoid) has none, and
// softplus = max(s, 0) + log1p(z) = max(s, 0) + 2 atanh(z / (2 + z)).
template <class T>
struct Gate {
  using V = Vec<T>;
  V e, sigmoid;  // e = exp(-g) within bounds, sigmoid = 1 / (1 + e)
  V s, z, r;     // z = exp(-|s|), r = 1 / (1 + z)
  V softplus;

  DPT_INLINE Gate(V gate, V filter) : s(filter) {
    e = exponential<T>(between<T>(-gate, -Simd<T>::kBound, Simd<T>::kBound));
    z = exponential<T>(at_least<T>(-absolute<T>(s), -Simd<T>::kBound));
    const V oe = e + T(1), oz = z + T(1), tz = z + T(2);
    const V zz = oz * tz;
    const V q = T(1) / (oe * zz);
    sigmoid = q * zz;
    const V qe = q * oe;
    r = qe * tz;
    const V w = z * (qe * oz);
    softplus = at_least<T>(s, T(0)) + w * horner<T>(Simd<T>::kAtanh, w * w);
  }
  DPT_INLINE V d_sigmoid() const { return (e * sigmoid) * sigmoid; }
  DPT_INLINE V sign_term() const { return (e - T(1)) * sigmoid; }    // 1 - 2 sigmoid
  DPT_INLINE V d_softplus() const { return s >= T(0) ? r : z * r; }  // sigmoid(s)
  DPT_INLINE V dd_softplus() const { return (z * r) * r; }
};

// silu(x) = x sigmoid(x) and its derivatives. Far below zero x counts as -kBound, where all are below
// rounding; -inf gives NaN, as inf * 0 does.
template <class T>
struct Silu {
  using V = Vec<T>;
  V x, sigmoid, rest;  // rest = 1 - sigmoid

  explicit DPT_INLINE Silu(V value) {
    constexpr T bound = Simd<T>::kBound;
    x = value < -bound ? value * T(0) - bound : value;
    const V z = exponential<T>(x > bound ? broadcast<T>(-bound) : -x);
    sigmoid = T(1) / (z + T(1));
    rest = x > bound ? V{} : z * sigmoid;
  }
  DPT_INLINE V value() const { return x * sigmoid; }
  DPT_INLINE V slope() const { return sigmoid + (sigmoid * rest) * x; }
  DPT_INLINE V curvature() const { return (sigmoid * rest) * (x * (rest - sigmoid) + T(2)); }
};

}  // namespace
}  // namespace dpt
