// Products of rows with weights, in tiles of rows and columns whose sums stay in registers.
#pragma once

#include <type_traits>

#include "registers.h"
#include "step.h"

namespace op {

// Operators are compiled once, not into every block that calls them.
#define APART __attribute__((noinline))

// What takes sums in registers is compiled into its caller, or they would be in memory.
#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

// Loops over what is in registers are written out, or it would be in memory.
#define UNROLL _Pragma("GCC unroll 32")

// Numbers of a row of weights from a column on: those of int8 are yet to be multiplied by `factor`.
template <class T> inline vec numbers(const Matrix<T> &w, int row, int column) {
  return load(w.row(row) + column);
}
inline vec numbers(const Matrix<e4m3> &w, int row, int column) {
  return load(w.row(row) + column) * w.scales(row)[column / RUN];
}
// The first `n` of them, and zeros.
template <class T> inline vec some_numbers(const Matrix<T> &w, int row, int column, int n) {
  return load_some(w.row(row) + column, n);
}
inline vec some_numbers(const Matrix<e4m3> &w, int row, int column, int n) {
  return load_some(w.row(row) + column, n) * w.scales(row)[column / RUN];
}
template <class T> inline float factor(const Matrix<T> &w, int row) {
  return std::is_same_v<T, int8_t> ? *w.scales(row) : 1.0f;
}

// Adds x_r w_c to the sums of R rows x and C rows w, whose numbers `x` and `w` read.
template <int R, int C, class X, class W> INLINE void dots_at(vec (&sums)[R][C], X x, W w) {
  // The fewer are held while the others pass, one at a time.
  if constexpr (R <= C) {
    vec held_x[R];
    UNROLL for (int r = 0; r < R; r++) held_x[r] = held(x(r));
    UNROLL for (int c = 0; c < C; c++) {
      const vec passing = held(w(c));
      UNROLL for (int r = 0; r < R; r++) sums[r][c] = fma(held_x[r], passing, sums[r][c]);
    }
  } else {
    vec held_w[C];
    UNROLL for (int c = 0; c < C; c++) held_w[c] = held(w(c));
    UNROLL for (int r = 0; r < R; r++) {
      const vec passing = held(x(r));
      UNROLL for (int c = 0; c < C; c++) sums[r][c] = fma(passing, held_w[c], sums[r][c]);
    }
  }
}

// The same for all columns. Of weights that come from memory, those `ahead` are asked for, if any:
// rows are too short for the CPU to find out by itself what comes next.
template <int R, int C, class T>
INLINE void dots(vec (&sums)[R][C], const float *const (&x)[R], const Matrix<T> &w,
                 int64_t ahead = 0) {
  constexpr int LINE = 64 / sizeof(T);
  int i = 0;
  for (; i + LANES <= w.in; i += LANES) {
    if (ahead && i % LINE == 0)
      UNROLL for (int c = 0; c < C; c++) __builtin_prefetch(w.row(c) + i + ahead);
    dots_at(sums, [&](int r) { return load(x[r] + i); },
            [&](int c) { return numbers(w, c, i); });
  }
  if (const int left = w.in - i)
    dots_at(sums, [&](int r) { return load_some(x[r] + i, left); },
            [&](int c) { return some_numbers(w, c, i, left); });
}

template <int R, int C> INLINE void clear(vec (&sums)[R][C]) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sums[r][c] = vec{};
}

// The sum of the lanes of each.
template <int R, int C> INLINE void join(const vec (&sums)[R][C], float (&out)[R][C]) {
  UNROLL for (int i = 0; i < R * C; i += 4) {
    const auto at = [&](int j) { return j < R * C ? sums[j / C][j % C] : vec{}; };
    const quad four = sums_of(at(i), at(i + 1), at(i + 2), at(i + 3));
    UNROLL for (int j = 0; j < 4; j++)
      if (i + j < R * C) out[(i + j) / C][(i + j) % C] = four[j];
  }
}

// So many rows of weights are multiplied with each so many rows at once that all sums stay in
// registers.
template <int R>
constexpr int TILE = R == 1 ? 8 : R == 8 ? 3 : REGISTERS / 16 * (R == 2 ? 6 : 3);
constexpr int ROWS = 4;
constexpr int MANY = 32;   // rows of a head that one thread takes at once
constexpr int BLOCK = 48;  // rows of weights that stay in the cache while all rows pass

// y_r[c] = x_r w_c for columns `first` to `last`, R rows. `x` and `y` give the rows; `fresh` says
// that the weights come from memory.
template <int R, class T, class X, class Y>
inline void product_tile(int row, const Matrix<T> &w, int first, int last, bool fresh, X x, Y y) {
  const float *in[R];
  float *out[R];
  UNROLL for (int r = 0; r < R; r++) in[r] = x(row + r), out[r] = y(row + r);
  constexpr int C = TILE<R>;
  int c = first;
  const auto columns = [&](auto n) {
    constexpr int N = decltype(n)::value;
    vec sums[R][N];
    float joined[R][N];
    clear(sums);
    const Matrix<T> part = w.from(c);
    dots<R, N>(sums, in, part, fresh ? int64_t(C) * w.in : 0);
    join(sums, joined);
    UNROLL for (int i = 0; i < N; i++)
      UNROLL for (int r = 0; r < R; r++) out[r][c + i] = joined[r][i] * factor(part, i);
  };
  for (; c + C <= last; c += C) columns(std::integral_constant<int, C>());
  for (; c + 2 <= last; c += 2) columns(std::integral_constant<int, 2>());
  if (c < last) columns(std::integral_constant<int, 1>());
}

// The same of rows `begin` to `end`.
template <class T, class X, class Y>
inline void product(int begin, int end, const Matrix<T> &w, int first, int last, X x, Y y) {
  for (int block = first; block < last; block += BLOCK) {
    const int stop = std::min(block + BLOCK, last);
    int row = begin;
    if constexpr (REGISTERS == 32)
      for (; row + 8 <= end; row += 8) product_tile<8>(row, w, block, stop, row == begin, x, y);
    for (; row + ROWS <= end; row += ROWS)
      product_tile<ROWS>(row, w, block, stop, row == begin, x, y);
    if (end - row == 3) product_tile<3>(row, w, block, stop, row == begin, x, y);
    if (end - row == 2) product_tile<2>(row, w, block, stop, row == begin, x, y);
    if (end - row == 1) product_tile<1>(row, w, block, stop, row == begin, x, y);
  }
}

// y = x W^T. Each thread computes some columns.
template <class T> APART void linear(const Step &s, Rows x, Matrix<T> w, Rows y) {
  const auto [first, last] = s.share(w.out, 8);
  product(0, x.count, w, first, last, [&](int r) { return x.row(r); },
          [&](int r) { return y.row(r); });
}

// y = x W_e^T for the rows of each expert e, which end at `ends`; each thread some columns of all.
template <class T>
APART void grouped_linear(const Step &s, Rows x, Ints ends, Matrices<T> w, Rows y) {
  const auto [first, last] = s.share(w.out, 8);
  for (int e = 0, begin = 0; e < w.experts; begin = ends.data[e++])
    if (begin < ends.data[e])
      product(begin, ends.data[e], w.of(e), first, last, [&](int r) { return x.row(r); },
              [&](int r) { return y.row(r); });
}

// Each head's rows of the weight times x: y[r, h, c] = x[r, h] w[h, start + c].
template <class T> APART void head_linear(const Step &s, Heads x, Matrix<T> w, int start, Heads y) {
  const int each = w.out / x.heads, tiles = (x.count + MANY - 1) / MANY;
  const auto [first, last] = s.share(x.heads * tiles);
  for (int item = first; item < last; item++) {
    const int head = item / tiles, begin = item % tiles * MANY;
    product(begin, std::min(begin + MANY, x.count), w.from(head * each + start), 0, y.width,
            [&](int r) { return x.at(r, head); }, [&](int r) { return y.at(r, head); });
  }
}

// Adds f_r[j] w_j[c] over the first `n` rows to the sums of R rows and V vectors of columns.
template <int R, int V, class T>
INLINE void weighted(vec (&sums)[R][V], const float *const (&f)[R], const Matrix<T> &w, int c,
                     int n) {
  for (int j = 0; j < n; j++) {
    vec wide_w[V];
    UNROLL for (int v = 0; v < V; v++) wide_w[v] = held(numbers(w, j, c + v * LANES));
    UNROLL for (int r = 0; r < R; r++) {
      const vec by = held(all(f[r][j] * factor(w, j)));
      UNROLL for (int v = 0; v < V; v++) sums[r][v] = fma(by, wide_w[v], sums[r][v]);
    }
  }
}

template <int R, class T>
INLINE void weighted_some(vec (&sums)[R][1], const float *const (&f)[R], const Matrix<T> &w, int c,
                          int n, int width) {
  for (int j = 0; j < n; j++) {
    const vec wide_w = some_numbers(w, j, c, width);
    UNROLL for (int r = 0; r < R; r++)
      sums[r][0] = fma(all(f[r][j] * factor(w, j)), wide_w, sums[r][0]);
  }
}

// y_r = sum_j f_r[j] w_j over the rows of all parts, from the first to the last: `parts` calls its
// argument with a matrix, the number of its first row among all, and how many rows there are.
template <int R, class Parts, class Y>
inline void weighted_sum(const float *const (&f)[R], const Parts &parts, int width, Y y) {
  constexpr int V = (REGISTERS == 32 ? 16 : 12) / R;
  int c = 0;
  const auto columns = [&](auto vectors, int left) {
    constexpr int N = decltype(vectors)::value;
    vec sums[R][N];
    clear(sums);
    parts([&](const auto &w, int first, int n) {
      const float *part[R];
      UNROLL for (int r = 0; r < R; r++) part[r] = f[r] + first;
      if constexpr (N == 1)
        if (left < LANES) return weighted_some<R>(sums, part, w, c, n, left);
      weighted<R, N>(sums, part, w, c, n);
    });
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int v = 0; v < N; v++)
        store_some(y(r) + c + v * LANES, sums[r][v], left - v * LANES);
  };
  for (; c + V * LANES <= width; c += V * LANES)
    columns(std::integral_constant<int, V>(), V * LANES);
  for (; c < width; c += LANES)
    columns(std::integral_constant<int, 1>(), std::min(width - c, LANES));
}

// Each head's rows of the weight, transposed: y[r, h] = sum_j x[r, h, j] w[h, start + j].
template <class T>
APART void head_linear_t(const Step &s, Heads x, Matrix<T> w, int start, Heads y) {
  const int each = w.out / x.heads, tiles = (x.count + ROWS - 1) / ROWS;
  const auto [first, last] = s.share(x.heads * tiles);
  for (int item = first; item < last; item++) {
    const int head = item / tiles, begin = item % tiles * ROWS;
    const Matrix<T> part = w.from(head * each + start);
    const auto parts = [&](auto add) { add(part, 0, x.width); };
    const auto tile = [&](auto rows, int row) {
      constexpr int R = decltype(rows)::value;
      const float *f[R];
      for (int r = 0; r < R; r++) f[r] = x.at(row + r, head);
      weighted_sum<R>(f, parts, y.width, [&](int r) { return y.at(row + r, head); });
    };
    if (begin + ROWS <= x.count) tile(std::integral_constant<int, ROWS>(), begin);
    else
      for (int row = begin; row < x.count; row++) tile(std::integral_constant<int, 1>(), row);
  }
}

}  // namespace op
