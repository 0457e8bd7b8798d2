// What the CUDA kernels of the radial messages make of an edge (formulas and notation in radial_messages.h):
// each lane of a warp has one channel, of the edge's filters, of both its ends, and of everything that the
// edge contributes. Included by radial_messages.cu.
#pragma once

#include "device.h"
#include "radial_messages_cuda.h"

namespace dpt {
namespace {

enum class Pass { kForward, kBackward, kDoubleBackward };

// silu(s) = s sigmoid(s) and its derivatives, from an exponential that cannot overflow.
template <class T>
struct Silu {
  T value, slope, curvature;

  __host__ __device__ explicit Silu(T s) {
    const T z = exp(-fabs(s)), r = T(1) / (T(1) + z);
    const T up = s >= T(0) ? r : z * r, down = s >= T(0) ? z * r : r;  // sigmoid(s), sigmoid(-s)
    value = s * up;
    slope = up * (T(1) + s * down);
    curvature = up * down * (T(2) + s * (down - up));
  }
};

// How the channels lie on the lanes of a warp. With attention a head has the next power of two of lanes, as
// many heads as fit stand side by side, and a head of more than 32 channels takes several groups; without, a
// group is 32 channels.
struct Lanes {
  int head_size;  // channels of a head; without attention, all
  int per_head;   // lanes, a power of two
  int chunks;     // groups of a head
  int groups;     // of all channels

  Lanes(const RadialMessageShape& shape)
      : head_size(int(shape.attention ? shape.channels / shape.heads : shape.channels)),
        per_head(1),
        chunks((head_size + kWarp - 1) / kWarp) {
    while (per_head < head_size && per_head < kWarp) per_head *= 2;
    const int side_by_side = kWarp / per_head, heads = shape.attention ? int(shape.heads) : 1;
    groups = (heads + side_by_side - 1) / side_by_side * chunks;
  }
};

// The channel of this lane in a group; of a lane without one, `active` is false.
struct Place {
  int64_t channel;
  int chunk;
  bool active, leads;  // the first lane of a head

  __device__ Place(const Lanes& lanes, int64_t channels, int group) : chunk(group % lanes.chunks) {
    const int64_t head =
        int64_t(group / lanes.chunks) * (kWarp / lanes.per_head) + lane_id() / lanes.per_head;
    const int within = chunk * kWarp + lane_id() % lanes.per_head;
    channel = head * lanes.head_size + within;
    active = within < lanes.head_size && channel < channels;
    leads = active && within == 0;
  }
};

// One call. Null outputs are not wanted; null tangents are zero.
template <class T>
struct Task {
  RadialMessageGraph graph;
  RadialMessageOrders orders;
  RadialMessageShape shape;
  Lanes lanes;
  RadialMessageInputs<T> in;
  RadialMessageTangents<T> along;
  RadialMessageOutputs<T> out;
};

// Zero where the array is null or the lane has no channel.
template <class T>
__device__ T get(const T* from, int64_t at, bool active) {
  return from && active ? from[at] : T(0);
}

template <bool Attention, bool Vectors>
struct Parts {
  static constexpr int kX = Attention ? 1 : 0, kOne = kX + 1, kTwo = kX + 2;  // the key's is 0
  static constexpr int kFilters = (Attention ? 1 : 0) + (Vectors ? 3 : 1);
  static constexpr int kValues = Vectors ? 3 : 1;
};

// One channel of a target: query, and the cotangents of X and V.
template <class T>
struct TargetEnd {
  T q, x, v[3], qt;
};

template <Pass P, bool Attention, bool Vectors, class T>
__device__ TargetEnd<T> load_target(const Task<T>& task, int64_t i, const Place& place) {
  const int64_t channels = task.shape.channels, at = i * channels + place.channel;
  TargetEnd<T> end{};
  if constexpr (Attention) {
    end.q = get(task.in.queries, at, place.active);
    if constexpr (P == Pass::kDoubleBackward) end.qt = get(task.along.queries, at, place.active);
  }
  if constexpr (P != Pass::kForward) {
    end.x = get(task.in.grad_x, at, place.active);
    if constexpr (Vectors) {
      for (int a = 0; a < 3; ++a)
        end.v[a] = get(task.in.grad_v, (3 * i + a) * channels + place.channel, place.active);
    }
  }
  return end;
}

// One channel of a source, and its tangent.
template <class T>
struct SourceEnd {
  T k, x, one, two, vector[3];
};

template <bool Attention, bool Vectors, class T>
__device__ SourceEnd<T> load_source(const T* keys, const T* values, const T* vectors, int64_t channels,
                                    int64_t j, const Place& place) {
  constexpr int kValues = Parts<Attention, Vectors>::kValues;
  SourceEnd<T> end{};
  if constexpr (Attention) end.k = get(keys, j * channels + place.channel, place.active);
  const int64_t at = kValues * j * channels + place.channel;
  end.x = get(values, at, place.active);
  if constexpr (Vectors) {
    end.one = get(values, at + channels, place.active);
    end.two = get(values, at + 2 * channels, place.active);
    for (int a = 0; a < 3; ++a)
      end.vector[a] = get(vectors, (3 * j + a) * channels + place.channel, place.active);
  }
  return end;
}

// One channel of an edge's filters: F, act'(z), Ft, act''(z) zt.
template <class T, int Count>
struct Filters {
  T value[Count], slope[Count], tangent[Count], bend[Count];
};

template <Pass P, int Count, class T>
__device__ Filters<T, Count> load_filters(const Task<T>& task, int64_t e, const Place& place) {
  constexpr bool kSecond = P == Pass::kDoubleBackward;
  const int64_t channels = task.shape.channels, taps = task.shape.taps;
  T z[Count], zt[Count];
#pragma unroll
  for (int p = 0; p < Count; ++p) {
    z[p] = get(task.in.bias, p * channels + place.channel, place.active);
    zt[p] = kSecond ? get(task.along.bias, p * channels + place.channel, place.active) : T(0);
  }
  int64_t row = int64_t(task.in.first[e]) * Count * channels + place.channel;
#pragma unroll 2
  for (int64_t m = 0; m < taps; ++m) {
    const T tap = task.in.taps[e * taps + m];
    T tap_t = T(0);
    if constexpr (kSecond) tap_t = task.along.taps ? task.along.taps[e * taps + m] : T(0);
#pragma unroll
    for (int p = 0; p < Count; ++p, row += channels) {
      const T w = get(task.in.weights, row, place.active);
      z[p] += tap * w;
      if constexpr (kSecond) zt[p] += tap_t * w + tap * get(task.along.weights, row, place.active);
    }
  }
  Filters<T, Count> out;
#pragma unroll
  for (int p = 0; p < Count; ++p) {
    out.value[p] = z[p];
    out.slope[p] = T(1);
    out.bend[p] = T(0);
    if (task.shape.silu) {
      const Silu<T> act(z[p]);
      out.value[p] = act.value;
      out.slope[p] = act.slope;
      out.bend[p] = act.curvature * zt[p];
    }
    out.tangent[p] = out.slope[p] * zt[p];
  }
  return out;
}

// Sums over the channels of a head: s, its tangent, and the cotangents of a and of at.
template <class T>
struct HeadSums {
  T s, st, ab, ah;
};

template <Pass P, bool Attention, int Count, class T>
__device__ HeadSums<T> head_terms(const Filters<T, Count>& f, const TargetEnd<T>& i, const SourceEnd<T>& j,
                                  const SourceEnd<T>& jt) {
  constexpr bool kSecond = P == Pass::kDoubleBackward;
  HeadSums<T> out{};
  if constexpr (Attention) {
    out.s = i.q * j.k * f.value[0];
    if constexpr (kSecond) out.st = (i.qt * j.k + i.q * jt.k) * f.value[0] + i.q * j.k * f.tangent[0];
  }
  constexpr int kX = Attention ? 1 : 0;
  if constexpr (P != Pass::kForward) out.ab = i.x * j.x * f.value[kX];
  if constexpr (kSecond) out.ah = i.x * (jt.x * f.value[kX] + j.x * f.tangent[kX]);
  return out;
}

// The same for all lanes of a head.
template <Pass P, class T>
__device__ void add_lanes(const Lanes& lanes, HeadSums<T>& sums) {
  for (int step = lanes.per_head / 2; step > 0; step /= 2) {
    sums.s += __shfl_xor_sync(kAllLanes, sums.s, step);
    if constexpr (P != Pass::kForward) sums.ab += __shfl_xor_sync(kAllLanes, sums.ab, step);
    if constexpr (P == Pass::kDoubleBackward) {
      sums.st += __shfl_xor_sync(kAllLanes, sums.st, step);
      sums.ah += __shfl_xor_sync(kAllLanes, sums.ah, step);
    }
  }
}

// What an edge contributes in one channel. Not all of it is wanted: what a kernel does not use, the compiler
// leaves out.
template <class T, int Count>
struct Contribution {
  T x, v[3], q;                    // to its target
  SourceEnd<T> source;             // to its source
  T envelope, direction[3];        // to be added over the channels
  T row[Count], row_first[Count];  // to z: gz, or in the second backward gz2 and gz
};

template <Pass P, bool Attention, bool Vectors, class T>
__device__ Contribution<T, Parts<Attention, Vectors>::kFilters> contribution(
    const Task<T>& task, int64_t e, int64_t i_atom, int64_t j_atom, int group, const Place& place,
    const TargetEnd<T>& i, const SourceEnd<T>& j, const SourceEnd<T>& jt) {
  using S = Parts<Attention, Vectors>;
  constexpr bool kSecond = P == Pass::kDoubleBackward, kForward = P == Pass::kForward;
  constexpr int Count = S::kFilters;
  const Filters<T, Count> f = load_filters<P, Count>(task, e, place);
  const T envelope = task.in.envelope ? task.in.envelope[e] : T(1);
  T envelope_t = T(0);
  if constexpr (kSecond) envelope_t = task.along.envelope ? task.along.envelope[e] : T(0);

  Contribution<T, Count> out{};
  HeadSums<T> sums = head_terms<P, Attention>(f, i, j, jt);
  T a = envelope, at = envelope_t, sb = T(0), sh = T(0);
  if constexpr (Attention) {
    if (task.lanes.chunks > 1) {
      // The other channels of the head, each chunk of them added as they are here.
      const HeadSums<T> mine = sums;
      sums = HeadSums<T>{};
      for (int chunk = 0; chunk < task.lanes.chunks; ++chunk) {
        HeadSums<T> part = mine;
        if (chunk != place.chunk) {
          const Place other(task.lanes, task.shape.channels, group - place.chunk + chunk);
          const int64_t channels = task.shape.channels;
          part = head_terms<P, Attention>(
              load_filters<P, Count>(task, e, other), load_target<P, Attention, Vectors>(task, i_atom, other),
              load_source<Attention, Vectors>(task.in.keys, task.in.values, task.in.vectors, channels, j_atom,
                                              other),
              kSecond ? load_source<Attention, Vectors>(task.along.keys, task.along.values,
                                                        task.along.vectors, channels, j_atom, other)
                      : SourceEnd<T>{});
        }
        add_lanes<P>(task.lanes, part);
        sums.s += part.s, sums.st += part.st, sums.ab += part.ab, sums.ah += part.ah;
      }
    } else {
      add_lanes<P>(task.lanes, sums);
    }
    const Silu<T> act(sums.s);
    a = act.value * envelope;
    sb = sums.ab * envelope * act.slope;
    at = act.slope * sums.st * envelope + act.value * envelope_t;
    sh = sums.ab * (act.curvature * sums.st * envelope + act.slope * envelope_t) +
         sums.ah * envelope * act.slope;
    // A number of the head, counted once.
    if (place.leads)
      out.envelope = kSecond ? sums.ab * act.slope * sums.st + sums.ah * act.value : sums.ab * act.value;
  } else {
    out.envelope = kSecond ? sums.ah : sums.ab;
  }

  T r[Count], rh[Count];  // to F
  if constexpr (Attention && !kForward) {
    r[0] = sb * i.q * j.k;
    rh[0] = sh * i.q * j.k + sb * (i.qt * j.k + i.q * jt.k);
    const T F = f.value[0], Ft = f.tangent[0];
    out.q = kSecond ? sh * j.k * F + sb * (jt.k * F + j.k * Ft) : sb * j.k * F;
    out.source.k = kSecond ? sh * i.q * F + sb * (i.qt * F + i.q * Ft) : sb * i.q * F;
  }
  {
    const T F = f.value[S::kX], Ft = f.tangent[S::kX], W = j.x * F;
    if constexpr (kForward) out.x = a * W;
    if constexpr (kSecond) out.x = at * W + a * (jt.x * F + j.x * Ft);
    if constexpr (!kForward) {
      r[S::kX] = a * i.x * j.x;
      rh[S::kX] = at * i.x * j.x + a * i.x * jt.x;
      out.source.x = kSecond ? at * i.x * F + a * i.x * Ft : a * i.x * F;
    }
  }
  if constexpr (Vectors) {
    T d[3], dt[3] = {};
    for (int c = 0; c < 3; ++c) {
      d[c] = task.in.directions[3 * e + c];
      if constexpr (kSecond) dt[c] = task.along.directions ? task.along.directions[3 * e + c] : T(0);
    }
    const T F1 = f.value[S::kOne], F2 = f.value[S::kTwo], F1t = f.tangent[S::kOne], F2t = f.tangent[S::kTwo];
    const T W1 = j.one * F1, W2 = j.two * F2;
    const T W1t = jt.one * F1 + j.one * F1t, W2t = jt.two * F2 + j.two * F2t;
    T w1 = T(0), w2 = T(0), w1h = T(0), w2h = T(0);
    for (int c = 0; c < 3; ++c) {
      if constexpr (kForward) out.v[c] = j.vector[c] * W1 + d[c] * W2;
      if constexpr (kSecond) out.v[c] = jt.vector[c] * W1 + j.vector[c] * W1t + dt[c] * W2 + d[c] * W2t;
      w1 += i.v[c] * j.vector[c];
      w2 += i.v[c] * d[c];
      w1h += i.v[c] * jt.vector[c];
      w2h += i.v[c] * dt[c];
      out.source.vector[c] = i.v[c] * (kSecond ? W1t : W1);
      out.direction[c] = i.v[c] * (kSecond ? W2t : W2);
    }
    if constexpr (!kForward) {
      r[S::kOne] = w1 * j.one;
      r[S::kTwo] = w2 * j.two;
      rh[S::kOne] = w1h * j.one + w1 * jt.one;
      rh[S::kTwo] = w2h * j.two + w2 * jt.two;
      out.source.one = kSecond ? w1h * F1 + w1 * F1t : w1 * F1;
      out.source.two = kSecond ? w2h * F2 + w2 * F2t : w2 * F2;
    }
  }
  if constexpr (!kForward) {
#pragma unroll
    for (int p = 0; p < Count; ++p) {
      out.row_first[p] = r[p] * f.slope[p];
      out.row[p] = kSecond ? rh[p] * f.slope[p] + r[p] * f.bend[p] : out.row_first[p];
    }
  }
  return out;
}

}  // namespace
}  // namespace dpt
