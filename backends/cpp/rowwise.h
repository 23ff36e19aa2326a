// What is computed row by row: embedding, norms, rotation, the cache.
#pragma once

#include "products.h"

namespace op {

template <class T> void embedding(const Step &s, Matrix<T> w, Rows y) {
  const auto [first, last] = s.share(y.count);
  for (int r = first; r < last; r++) {
    const T *from = w.data + s.call.tokens[r] * w.in;
    float *out = y.row(r);
    for (int i = 0; i < w.in; i++) out[i] = wide(from[i]);
  }
}

// w x / sqrt(mean(x^2) + eps)
template <class T> inline void norm(const float *x, Vector<T> w, float eps, float *y) {
  vec sums[1][1] = {{vec{}}};
  dots<1, 1>(sums, {x}, Matrix<float>{x, 1, w.n, w.n});
  const float factor = 1.0f / std::sqrt(sum(sums[0][0]) / float(w.n) + eps);
  for (int i = 0; i < w.n; i++) y[i] = x[i] * factor * wide(w.data[i]);
}

template <class T> void rms_norm(const Step &s, Rows x, Vector<T> w, float eps, Rows y) {
  const auto [first, last] = s.share(x.count);
  for (int r = first; r < last; r++) norm(x.row(r), w, eps, y.row(r));
}

// total = x + y, and its norm.
template <class T>
void add_rms_norm(const Step &s, Rows x, Rows y, Vector<T> w, float eps, Rows total, Rows normed) {
  const auto [first, last] = s.share(x.count);
  for (int r = first; r < last; r++) {
    const float *a = x.row(r), *b = y.row(r);
    float *out = total.row(r);
    for (int i = 0; i < x.width; i++) out[i] = a[i] + b[i];
    norm(out, w, eps, normed.row(r));
  }
}

inline void add(const Step &s, Rows x, Rows y, Rows out) {
  const auto [first, last] = s.share(x.count);
  for (int r = first; r < last; r++) {
    const float *a = x.row(r), *b = y.row(r);
    float *to = out.row(r);
    for (int i = 0; i < x.width; i++) to[i] = a[i] + b[i];
  }
}

inline void copy(const Step &s, Rows x, Rows y) {
  const auto [first, last] = s.share(x.count);
  for (int r = first; r < last; r++) std::memcpy(y.row(r), x.row(r), x.width * sizeof(float));
}

// gate / (1 + exp(-gate)) * up
inline void swiglu(const Step &s, Rows gate, Rows up, Rows y) {
  const auto [first, last] = s.share(gate.count);
  for (int r = first; r < last; r++) {
    const float *a = gate.row(r), *b = up.row(r);
    float *out = y.row(r);
    for (int i = 0; i < gate.width; i += LANES) {
      const int n = std::min(gate.width - i, LANES);
      const vec g = load_some(a + i, n), u = load_some(b + i, n);
      store_some(out + i, g / (exp(-g) + 1.0f) * u, n);
    }
  }
}

// Cosines and sines for the position of each row.
inline void rope_table(const Step &s, Table table, Rows cos, Rows sin) {
  const auto [first, last] = s.share(cos.count);
  for (int r = first; r < last; r++) {
    const int64_t at = s.call.position[r] * table.pairs;
    std::memcpy(cos.row(r), table.cos + at, table.pairs * sizeof(float));
    std::memcpy(sin.row(r), table.sin + at, table.pairs * sizeof(float));
  }
}

inline void rotate_pairs(const float *x, const float *cos, const float *sin, int pairs, float *y) {
  for (int i = 0; i < pairs; i++) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    y[2 * i] = even * cos[i] - odd * sin[i];
    y[2 * i + 1] = even * sin[i] + odd * cos[i];
  }
}

// Adjacent numbers are the pairs that turn.
inline void rotate(const Step &s, Rows x, Rows cos, Rows sin, Rows y) {
  const auto [first, last] = s.share(x.count);
  for (int r = first; r < last; r++)
    rotate_pairs(x.row(r), cos.row(r), sin.row(r), cos.width, y.row(r));
}

inline void rotate(const Step &s, Heads x, Rows cos, Rows sin, Heads y) {
  const auto [first, last] = s.share(x.count);
  for (int r = first; r < last; r++)
    for (int h = 0; h < x.heads; h++)
      rotate_pairs(x.at(r, h), cos.row(r), sin.row(r), cos.width, y.at(r, h));
}

// Writes each row to its slot. A cache holds no NaN and no infinity, which would harm other rows:
// the weight of what a row does not see is 0, and 0 times NaN is NaN.
template <class T> inline void append_row(const Step &s, int row, const float *x, int n, T *out) {
  bool broken = false;
  for (int i = 0; i < n; i++) {
    const bool finite = std::isfinite(x[i]);
    narrow(finite ? x[i] : 0.0f, out + i);
    broken |= !finite;
  }
  if (broken) s.call.broken[row] = 1;
}

template <class T> void cache_append(const Step &s, Rows x, Pool<T> pool) {
  const auto [first, last] = s.share(x.count);
  for (int r = first; r < last; r++)
    append_row(s, r, x.row(r), x.width, pool.data + s.call.slots[r] * pool.width);
}

// What the head is given, of all rows: a draft starts from it.
inline void keep_states(const Step &s, Rows x) {
  copy(s, x, {s.call.states, x.width, x.count, x.width});
}

// The rows whose next token is asked for.
inline Rows scored_rows(const Step &s, Rows x) {
  return {x.data, x.stride, s.scored, x.width, s.call.scored_rows};
}

}  // namespace op
