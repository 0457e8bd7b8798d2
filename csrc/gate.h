// sigmoid(g), softplus(s) and their derivatives, for kernels of the GPU (simd.h has them for the CPU's
// vectors).
#pragma once

namespace dpt {

// From two exponentials of arguments that are not positive, so that nothing overflows, and one division.
// Every quantity is a product of positive factors and keeps its relative accuracy where, say, sigmoid (1 -
// sigmoid) has none; softplus = max(s, 0) + log1p(z), z = exp(-|s|). Largest relative error 1.2e-6 in
// float32.
template <class T>
struct Gate {
  T sigmoid, d_sigmoid, sign_term;  // sign_term = 1 - 2 sigmoid
  T softplus, d_softplus, dd_softplus;

  __host__ __device__ Gate(T g, T s) {
    const T y = exp(-fabs(g)), z = exp(-fabs(s));
    const T oy = T(1) + y, oz = T(1) + z, tz = T(2) + z;
    const T zz = oz * tz, q = T(1) / (oy * zz);
    const T ry = q * zz, qy = q * oy, rz = qy * tz;
    sigmoid = g >= T(0) ? ry : y * ry;
    d_sigmoid = y * ry * ry;
    sign_term = (g >= T(0) ? y - T(1) : T(1) - y) * ry;
    d_softplus = s >= T(0) ? rz : z * rz;
    dd_softplus = z * rz * rz;
    softplus = (s > T(0) ? s : T(0)) + log1p_of(z, z * (qy * oz));
  }

 private:
  // log1p(z) for 0 <= z <= 1, w = z / (2 + z).
  __host__ __device__ static T log1p_of(T z, T w) {
    if constexpr (sizeof(T) == 4) {
      // 2 atanh(w) / w in w^2 on [0, 1/9], minimax: largest relative error 4.0e-9.
      const T x = w * w;
      return w * (T(2) + x * (T(0.666663146854) +
                              x * (T(0.400249101145) + x * (T(0.279606052421) + x * T(0.281783237626)))));
    } else {
      return log1p(z);
    }
  }
};

}  // namespace dpt
