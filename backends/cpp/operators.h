// The operators of a decoding step, for one CPU: what the generated step.cpp calls.
//
// Weights keep the element type in which they are stored and are widened to float32 in registers;
// everything else is float32. Every number of a row is computed by the same operations in the same
// order, whatever other rows there are and whichever thread computes it: products sum over their
// inner dimension in LANES partial sums, from the first number to the last, and join those in one
// order; sums over keys run from the first key to the last.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>
#include <type_traits>
#include <unistd.h>
#include <vector>
#if defined(__AVX__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace op {

// ---- numbers in registers ------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

struct bf16 {
  uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void narrow(float x, float *out) { *out = x; }
// To nearest, ties to even. `x` is finite.
inline void narrow(float x, bf16 *out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline vec load(const float *x) {
  vec out;
  std::memcpy(&out, x, sizeof out);
  return out;
}
inline vec load(const bf16 *x) {
  halves bits;
  std::memcpy(&bits, x, sizeof bits);
  return (vec)(__builtin_convertvector(bits, words) << 16);
}
inline void store(float *out, vec x) { std::memcpy(out, &x, sizeof x); }

// The first `n` numbers, and zeros.
template <class T> inline vec load_some(const T *x, int n) {
  if (n >= LANES) return load(x);
  T some[LANES] = {};
  for (int i = 0; i < n; i++) some[i] = x[i];
  return load(some);
}
inline void store_some(float *out, vec x, int n) {
  if (n >= LANES) return store(out, x);
  for (int i = 0; i < n; i++) out[i] = x[i];
}

// Keeps a number in a register that the compiler would read from memory at each use.
inline vec held(vec x) {
#if defined(__AVX__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

inline vec all(float x) { return x - vec{}; }

// a * b + c, rounded once where the CPU can: said here, for the compiler must not choose.
inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

typedef float quad __attribute__((vector_size(16)));

// Lanes of a register as four sums: lane i, i + 4, ..
inline quad folded(vec x) {
  quad parts[LANES / 4];
  std::memcpy(parts, &x, sizeof x);
#if defined(__AVX512F__)
  return (parts[0] + parts[2]) + (parts[1] + parts[3]);
#elif defined(__AVX__)
  return parts[0] + parts[1];
#else
  return parts[0];
#endif
}

inline quad pairs(quad a, quad b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
}

// The sums of the lanes of four registers; each has the order that it has in any place.
inline quad sums_of(vec a, vec b, vec c, vec d) {
  return pairs(pairs(folded(a), folded(b)), pairs(folded(c), folded(d)));
}
inline float sum(vec x) { return sums_of(x, x, x, x)[0]; }

// exp to about 1 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; 0 below the smallest normal
// number, NaN of NaN.
inline vec exp(vec x) {
  const vec low = all(-87.33654f), high = all(88.72283f);
  const vec bounded = x < low ? low : (x > high ? high : x);
  const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const vec n = fma(bounded, all(1.44269504f), magic) - magic;
  vec r = fma(n, all(-0.693359375f), bounded);
  r = fma(n, all(2.12194440e-4f), r);
  vec y = all(1.9875691500e-4f);
  y = fma(y, r, all(1.3981999507e-3f));
  y = fma(y, r, all(8.3334519073e-3f));
  y = fma(y, r, all(4.1665795894e-2f));
  y = fma(y, r, all(1.6666665459e-1f));
  y = fma(y, r, all(5.0000001201e-1f));
  y = fma(y, r * r, r) + 1.0f;
  // In two steps: 2^128 is no float, half of it is.
  const ints whole = __builtin_convertvector(x == x ? n : vec{}, ints), half = whole >> 1;
  y = y * (vec)((half + 127) << 23) * (vec)((whole - half + 127) << 23);
  return x < low ? vec{} : y;
}

// ---- rows ----------------------------------------------------------------------------------------

// `count` rows of `width` numbers, `stride` apart; with `index`, those that it lists: slots of
// experts are rows of their tokens.
struct Rows {
  float *data;
  int64_t stride;
  int count, width;
  const int32_t *index = nullptr;

  float *row(int i) const { return data + (index ? index[i] : i) * stride; }
  Rows columns(int first, int n) const { return {data + first, stride, count, n, index}; }
};

// Rows of `heads` parts of `width` numbers.
struct Heads {
  float *data;
  int64_t stride;
  int count, heads, apart, width;

  float *at(int row, int head) const { return data + row * stride + int64_t(head) * apart; }
  Heads columns(int first, int n) const { return {data + first, stride, count, heads, apart, n}; }
};

inline Heads unflatten(Rows x, int heads) {
  return {x.data, x.stride, x.count, heads, x.width / heads, x.width / heads};
}
inline Rows flatten(Heads x) { return {x.data, x.stride, x.count, x.heads * x.width}; }

// `n` numbers for each row.
struct Ints {
  int32_t *data;
  int n;
  int32_t *row(int i) const { return data + int64_t(i) * n; }
};

template <class T> struct Matrix {
  const T *data;
  int out, in;
};

// One matrix for each expert, one behind the other.
template <class T> struct Matrices {
  const T *data;
  int experts, out, in;
};

template <class T> struct Vector {
  const T *data;
  int n;
};

// What a cache holds of one entry, [blocks, page, width].
template <class T> struct Pool {
  T *data;
  int width;
};

// Cosines [positions, pairs], then sines.
struct Table {
  const float *cos, *sin;
  int pairs;
};

// ---- a step --------------------------------------------------------------------------------------

// What a caller hands over; `runtime/compiled.py` has the same fields in the same order.
struct Call {
  int64_t rows, scored, threads, page;
  int64_t vocab, positions;  // above all tokens and positions
  const int64_t *tokens, *position, *slots, *lengths;  // of each row
  const int32_t *scored_rows;
  const int64_t *blocks;   // tables of blocks, one behind the other
  const int64_t *table;    // where in `blocks` that of each row begins
  void *const *weights;    // in the order of the package's list
  void *const *pools;      // likewise
  const float *const *angles;  // cosines of each rope table, then its sines, for all positions
  const float *state;      // [rows, hidden] that a draft starts from
  float *logits;           // [scored, vocab]
  float *states;           // [rows, hidden] that went to the head
  uint8_t *broken;         // of each row: whether it had a NaN or an infinity to remember
  float *workspace;        // for values
  int64_t workspace_size;
  float *scratch;          // scores of attention, `scratch_size` for each thread
  int64_t scratch_size;
};

constexpr int SPINS = 2000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `word` is no longer `old`: a little while awake, then asleep, for other processes
// may need the core.
inline void wait_while(std::atomic<uint32_t> &word, uint32_t old) {
  for (int i = 0; i < SPINS; i++) {
    if (word.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

class Barrier {
 public:
  void wait(uint32_t threads) {
    const uint32_t now = turn.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      turn.store(now + 1, std::memory_order_release);
      turn.notify_all();
    } else {
      wait_while(turn, now);
    }
  }

 private:
  alignas(64) std::atomic<uint32_t> arrived{0};
  alignas(64) std::atomic<uint32_t> turn{0};
};

// What one thread knows of a step.
class Step {
 public:
  Step(const Call &call, Barrier &barrier, int thread)
      : call(call), n(int(call.rows)), scored(int(call.scored)), thread(thread),
        threads(int(call.threads)), barrier(barrier) {}

  const Call &call;
  const int n, scored, thread, threads;

  // Until all threads are here, so that each may read what others wrote.
  void wait() const {
    if (threads > 1) barrier.wait(threads);
  }

  // Which of `count` items this thread computes, in multiples of `tile`.
  struct Share {
    int first, last;
  };
  Share share(int count, int tile = 1) const {
    const int64_t tiles = (count + tile - 1) / tile;
    const int first = int(tiles * thread / threads) * tile;
    const int last = int(tiles * (thread + 1) / threads) * tile;
    return {std::min(first, count), std::min(last, count)};
  }

  float *scratch() const { return call.scratch + thread * call.scratch_size; }

 private:
  Barrier &barrier;
};

// Threads that run steps with the caller. They live as long as the process does; a process that was
// forked from this one makes its own.
class Team {
 public:
  typedef void (*Work)(const Step &, const void *model);

  static void run(const Call &call, Work work, const void *model) {
    static std::mutex mutex;
    static Team *team = nullptr;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!team || team->process != getpid() || team->size != call.threads) {
      if (team && team->process == getpid()) team->end();
      team = new Team(int(call.threads));
    }
    team->call = &call;
    team->work = work;
    team->model = model;
    team->job.fetch_add(1, std::memory_order_release);
    team->job.notify_all();
    work(Step(call, team->barrier, 0), model);
    if (team->size > 1) team->barrier.wait(team->size);
  }

 private:
  explicit Team(int size) : process(getpid()), size(size) {
    for (int i = 1; i < size; i++) std::thread(&Team::serve, this, i).detach();
  }

  void serve(int thread) {
    for (uint32_t seen = 0;;) {
      wait_while(job, seen);
      seen++;
      if (!work) break;
      work(Step(*call, barrier, thread), model);
      barrier.wait(size);
    }
    leave();
  }

  // Whoever leaves last removes the team.
  void leave() {
    if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  void end() {
    work = nullptr;
    job.fetch_add(1, std::memory_order_release);
    job.notify_all();
    leave();
  }

  const pid_t process;
  const int size;
  const Call *call = nullptr;
  Work work = nullptr;
  const void *model = nullptr;
  Barrier barrier;
  std::atomic<int> left{size};
  alignas(64) std::atomic<uint32_t> job{0};
};

// Memory for the values of a block, given back when the block ends. All threads take the same.
class Arena {
 public:
  explicit Arena(const Call &call) : next(call.workspace), end(call.workspace + call.workspace_size) {}

  Rows rows(int count, int width) { return {take(int64_t(count) * width), width, count, width}; }
  Heads heads(int count, int heads, int width) {
    const int64_t stride = int64_t(heads) * width;
    return {take(count * stride), stride, count, heads, width, width};
  }
  Ints ints(int count, int n) { return {(int32_t *)take(int64_t(count) * n), n}; }

 private:
  float *take(int64_t floats) {
    float *const taken = next;
    next += (floats + 15) / 16 * 16;
    if (next > end) __builtin_trap();  // the caller was told how much it is
    return taken;
  }
  float *next, *end;
};

// Pointers of a call, in the order in which the package lists them.
class Bound {
 public:
  explicit Bound(const Call &call) : weights(call.weights), pools(call.pools), angles(call.angles) {}

  template <class T> Matrix<T> matrix(int out, int in) { return {(const T *)*weights++, out, in}; }
  template <class T> Matrices<T> matrices(int experts, int out, int in) {
    return {(const T *)*weights++, experts, out, in};
  }
  template <class T> Vector<T> vector(int n) { return {(const T *)*weights++, n}; }
  template <class T> Pool<T> pool(int width) { return {(T *)*pools++, width}; }
  Table table(int pairs) {
    const float *cos = *angles++;
    return {cos, *angles++, pairs};
  }
  // So many equal modules.
  template <class Module> std::vector<Module> layers(int n) {
    std::vector<Module> made;
    made.reserve(n);
    while (n--) made.emplace_back(*this);
    return made;
  }

 private:
  void *const *weights;
  void *const *pools;
  const float *const *angles;
};

// Runs a step of a model, `model.run(step, arena)`, in all threads. Not 0 for a token or position
// that there is none of.
template <class Model> int run(const Call &call, const Model &model) {
  for (int r = 0; r < call.rows; r++) {
    const bool known = call.tokens[r] >= 0 && call.tokens[r] < call.vocab;
    if (!known || call.position[r] < 0 || call.position[r] >= call.positions) return 1;
  }
  Team::run(call, [](const Step &s, const void *m) {
    static_cast<const Model *>(m)->run(s, Arena(s.call));
  }, &model);
  return 0;
}

// ---- products ------------------------------------------------------------------------------------

// Operators are compiled once, not into every block that calls them.
#define APART __attribute__((noinline))

// Loops over what is in registers are written out, or it would be in memory.
#define UNROLL _Pragma("GCC unroll 32")

// Adds x_r w_c to the sums of R rows x and C rows w, of `n` numbers each that `get` reads.
template <int R, int C, class T, class Get>
inline void dots_at(vec (&sums)[R][C], const float *const (&x)[R], const T *w, int64_t apart, Get get) {
  // The fewer are held while the others pass, one at a time.
  if constexpr (R <= C) {
    vec held_x[R];
    UNROLL for (int r = 0; r < R; r++) held_x[r] = held(get(x[r]));
    UNROLL for (int c = 0; c < C; c++) {
      const vec passing = held(get(w + c * apart));
      UNROLL for (int r = 0; r < R; r++) sums[r][c] = fma(held_x[r], passing, sums[r][c]);
    }
  } else {
    vec held_w[C];
    UNROLL for (int c = 0; c < C; c++) held_w[c] = held(get(w + c * apart));
    UNROLL for (int r = 0; r < R; r++) {
      const vec passing = held(get(x[r]));
      UNROLL for (int c = 0; c < C; c++) sums[r][c] = fma(passing, held_w[c], sums[r][c]);
    }
  }
}

// The same for k numbers. Of weights that come from memory, those `ahead` are asked for, if any:
// rows are too short for the CPU to find out by itself what comes next.
template <int R, int C, class T>
inline void dots(vec (&sums)[R][C], const float *const (&x)[R], const T *w, int64_t apart, int k,
                 int64_t ahead = 0) {
  constexpr int LINE = 64 / sizeof(T);
  int i = 0;
  for (; i + LANES <= k; i += LANES) {
    if (ahead && i % LINE == 0)
      UNROLL for (int c = 0; c < C; c++) __builtin_prefetch(w + c * apart + i + ahead);
    dots_at(sums, x, w, apart, [&](auto *row) { return load(row + i); });
  }
  if (i < k) dots_at(sums, x, w, apart, [&](auto *row) { return load_some(row + i, k - i); });
}

template <int R, int C> inline void clear(vec (&sums)[R][C]) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sums[r][c] = vec{};
}

// The sum of the lanes of each.
template <int R, int C> inline void join(const vec (&sums)[R][C], float (&out)[R][C]) {
  UNROLL for (int i = 0; i < R * C; i += 4) {
    const auto at = [&](int j) { return j < R * C ? sums[j / C][j % C] : vec{}; };
    const quad four = sums_of(at(i), at(i + 1), at(i + 2), at(i + 3));
    UNROLL for (int j = 0; j < 4; j++)
      if (i + j < R * C) out[(i + j) / C][(i + j) % C] = four[j];
  }
}

// So many rows of weights are multiplied with each so many rows at once that all sums stay in
// registers.
template <int R> constexpr int TILE = R == 1 ? 8 : R == 2 ? 6 : 3;
constexpr int ROWS = 4;
constexpr int BLOCK = 24;  // rows of weights that stay in the cache while all rows pass: of all tiles

// y_r[c] = x_r w_c for columns `first` to `last`, R rows. `x` and `y` give the rows; `fresh` says that
// the weights come from memory.
template <int R, class T, class X, class Y>
inline void product_tile(int row, int k, const T *w, int first, int last, bool fresh, X x, Y y) {
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
    dots<R, N>(sums, in, w + int64_t(c) * k, k, k, fresh ? int64_t(C) * k : 0);
    join(sums, joined);
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < N; i++) out[r][c + i] = joined[r][i];
  };
  for (; c + C <= last; c += C) columns(std::integral_constant<int, C>());
  for (; c < last; c++) columns(std::integral_constant<int, 1>());
}

// The same of rows `begin` to `end`.
template <class T, class X, class Y>
inline void product(int begin, int end, int k, const T *w, int first, int last, X x, Y y) {
  for (int block = first; block < last; block += BLOCK) {
    const int stop = std::min(block + BLOCK, last);
    int row = begin;
    for (; row + ROWS <= end; row += ROWS)
      product_tile<ROWS>(row, k, w, block, stop, row == begin, x, y);
    if (end - row == 3) product_tile<3>(row, k, w, block, stop, row == begin, x, y);
    if (end - row == 2) product_tile<2>(row, k, w, block, stop, row == begin, x, y);
    if (end - row == 1) product_tile<1>(row, k, w, block, stop, row == begin, x, y);
  }
}

// y = x W^T. Each thread computes some columns.
template <class T> APART void linear(const Step &s, Rows x, Matrix<T> w, Rows y) {
  const auto [first, last] = s.share(w.out, 8);
  product(0, x.count, w.in, w.data, first, last, [&](int r) { return x.row(r); },
          [&](int r) { return y.row(r); });
}

// y = x W_e^T for the rows of each expert e, which end at `ends`; each thread some columns of all.
template <class T> APART void grouped_linear(const Step &s, Rows x, Ints ends, Matrices<T> w, Rows y) {
  const auto [first, last] = s.share(w.out, 8);
  for (int e = 0, begin = 0; e < w.experts; begin = ends.data[e++])
    if (begin < ends.data[e])
      product(begin, ends.data[e], w.in, w.data + int64_t(e) * w.out * w.in, first, last,
              [&](int r) { return x.row(r); }, [&](int r) { return y.row(r); });
}

// Each head's rows of the weight times x: y[r, h, c] = x[r, h] w[h, start + c].
template <class T> APART void head_linear(const Step &s, Heads x, Matrix<T> w, int start, Heads y) {
  const int each = w.out / x.heads, tiles = (x.count + ROWS - 1) / ROWS;
  const auto [first, last] = s.share(x.heads * tiles);
  for (int item = first; item < last; item++) {
    const int head = item / tiles, begin = item % tiles * ROWS;
    product(begin, std::min(begin + ROWS, x.count), w.in,
            w.data + (int64_t(head) * each + start) * w.in, 0, y.width,
            [&](int r) { return x.at(r, head); }, [&](int r) { return y.at(r, head); });
  }
}

// Adds f_r[j] w_j[c] over j to the sums of R rows and V vectors of columns.
template <int R, int V, class T>
inline void weighted(vec (&sums)[R][V], const float *const (&f)[R], const T *w, int64_t apart, int n) {
  for (int j = 0; j < n; j++) {
    vec wide_w[V];
    UNROLL for (int v = 0; v < V; v++) wide_w[v] = held(load(w + j * apart + v * LANES));
    UNROLL for (int r = 0; r < R; r++) {
      const vec factor = held(all(f[r][j]));
      UNROLL for (int v = 0; v < V; v++) sums[r][v] = fma(factor, wide_w[v], sums[r][v]);
    }
  }
}

template <int R, class T>
inline void weighted_some(vec (&sums)[R][1], const float *const (&f)[R], const T *w, int64_t apart,
                          int n, int width) {
  for (int j = 0; j < n; j++) {
    const vec wide_w = load_some(w + j * apart, width);
    UNROLL for (int r = 0; r < R; r++) sums[r][0] = fma(all(f[r][j]), wide_w, sums[r][0]);
  }
}

// Runs of rows: `each(run, first, n)` is called for parts of a list of rows that lie together.
// y_r = sum_j f_r[j] w_j over the rows of all runs, from the first to the last.
template <int R, class Runs, class Y>
inline void weighted_sum(const float *const (&f)[R], const Runs &runs, int width, Y y) {
  constexpr int V = 12 / R;
  int c = 0;
  const auto columns = [&](auto vectors, int left) {
    constexpr int N = decltype(vectors)::value;
    vec sums[R][N];
    clear(sums);
    runs([&](auto *w, int64_t apart, int first, int n) {
      const float *part[R];
      UNROLL for (int r = 0; r < R; r++) part[r] = f[r] + first;
      if constexpr (N == 1)
        if (left < LANES) return weighted_some<R>(sums, part, w + c, apart, n, left);
      weighted<R, N>(sums, part, w + c, apart, n);
    });
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int v = 0; v < N; v++) store_some(y(r) + c + v * LANES, sums[r][v], left - v * LANES);
  };
  for (; c + V * LANES <= width; c += V * LANES) columns(std::integral_constant<int, V>(), V * LANES);
  for (; c < width; c += LANES)
    columns(std::integral_constant<int, 1>(), std::min(width - c, LANES));
}

// Each head's rows of the weight, transposed: y[r, h] = sum_j x[r, h, j] w[h, start + j].
template <class T> APART void head_linear_t(const Step &s, Heads x, Matrix<T> w, int start, Heads y) {
  const int each = w.out / x.heads, tiles = (x.count + ROWS - 1) / ROWS;
  const auto [first, last] = s.share(x.heads * tiles);
  for (int item = first; item < last; item++) {
    const int head = item / tiles, begin = item % tiles * ROWS;
    const T *part = w.data + (int64_t(head) * each + start) * w.in;
    const auto runs = [&](auto add) { add(part, w.in, 0, x.width); };
    const auto tile = [&](auto rows, int row) {
      constexpr int R = decltype(rows)::value;
      const float *f[R];
      for (int r = 0; r < R; r++) f[r] = x.at(row + r, head);
      weighted_sum<R>(f, runs, y.width, [&](int r) { return y.at(row + r, head); });
    };
    if (begin + ROWS <= x.count) tile(std::integral_constant<int, ROWS>(), begin);
    else
      for (int row = begin; row < x.count; row++) tile(std::integral_constant<int, 1>(), row);
  }
}

// ---- row by row ----------------------------------------------------------------------------------

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
  dots<1, 1>(sums, {x}, x, 0, w.n);
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

// ---- experts -------------------------------------------------------------------------------------

struct Routing {
  bool softmax;          // else sigmoid
  int groups, used;      // groups of neighbouring experts, and how many of them a row may use
  bool two_best;         // a group counts as much as its two best, else as its best
  bool normalize;
  double scale;
};

// Of `n` numbers that are not `taken` the first of the largest; NaN counts as the smallest.
template <class Taken> inline int best(const float *x, int n, Taken taken) {
  int found = -1;
  for (int i = 0; i < n; i++)
    if (!taken(i) && (found < 0 || x[i] > x[found])) found = i;
  return found;
}

// The k experts of each row and their weights, eq. 12 to 16. Affinities are float64, then rounded.
// `scratch` has three numbers for each expert.
template <class T>
APART void gate(const Step &s, Rows x, Vector<T> bias, Routing how, Rows scratch, Ints index, Rows weight) {
  const int experts = x.width, each = experts / how.groups;
  const auto [first, last] = s.share(x.count);
  for (int r = first; r < last; r++) {
    const float *logit = x.row(r);
    float *affinity = scratch.row(r), *choice = affinity + experts, *group = choice + experts;
    double total = 0, most = logit[0];
    if (how.softmax) {
      for (int e = 0; e < experts; e++) most = std::max(most, double(logit[e]));
      for (int e = 0; e < experts; e++) total += std::exp(logit[e] - most);
    }
    for (int e = 0; e < experts; e++) {
      affinity[e] = float(how.softmax ? std::exp(logit[e] - most) / total
                                      : 1.0 / (1.0 + std::exp(-double(logit[e]))));
      choice[e] = bias.data ? affinity[e] + wide(bias.data[e]) : affinity[e];
    }
    // Of a group: its score; then whether its experts may be chosen.
    for (int g = 0; g < how.groups; g++) {
      const float *part = choice + g * each;
      const int one = best(part, each, [](int) { return false; });
      const int two = best(part, each, [&](int i) { return i == one; });
      group[g] = how.two_best && two >= 0 ? part[one] + part[two] : part[one];
    }
    bool open[1024] = {};
    for (int i = 0; i < how.used; i++)
      open[best(group, how.groups, [&](int g) { return open[g]; })] = true;
    int32_t *chosen = index.row(r);
    float *share = weight.row(r);
    double sum = 0;
    for (int i = 0; i < index.n; i++) {
      chosen[i] = best(choice, experts, [&](int e) {
        return !open[e / each] || std::find(chosen, chosen + i, e) != chosen + i;
      });
      sum += affinity[chosen[i]];
    }
    for (int i = 0; i < index.n; i++) {
      const double part = affinity[chosen[i]];
      share[i] = float((how.normalize ? part / (sum + 1e-20) : part) * how.scale);
    }
  }
}

// Sorts the choices of all rows by expert. `ends` says where each expert's slots end, `token` has
// the row of each slot, `place` the slot of each choice.
inline void permute(const Step &s, Ints index, int count, int experts, Ints ends, Ints token, Ints place) {
  if (s.thread) return;
  const int choices = count * index.n;
  std::memset(ends.data, 0, experts * sizeof(int32_t));
  for (int i = 0; i < choices; i++) ends.data[index.data[i]]++;
  for (int e = 0, begin = 0; e < experts; e++) {  // where each begins, for now
    const int n = ends.data[e];
    ends.data[e] = begin;
    begin += n;
  }
  for (int i = 0; i < choices; i++) {
    const int slot = ends.data[index.data[i]]++;
    token.data[slot] = i / index.n;
    place.data[i] = slot;
  }
}

// Each slot's row, where it lies.
inline Rows permuted(Rows x, Ints token, int slots) {
  return {x.data, x.stride, slots, x.width, token.data};
}

// The rows of each token's choices times their weights, summed in the order of the choices, eq. 12.
inline void unpermute(const Step &s, Rows y, Ints place, Rows weight, Rows out) {
  const auto [first, last] = s.share(out.count);
  for (int r = first; r < last; r++) {
    float *to = out.row(r);
    for (int j = 0; j < weight.width; j++) {
      const float *from = y.row(place.data[r * weight.width + j]), share = weight.row(r)[j];
      for (int i = 0; i < out.width; i++) to[i] = j ? to[i] + from[i] * share : from[i] * share;
    }
  }
}

// ---- attention -----------------------------------------------------------------------------------

// Numbers to exp(number - largest), and their sum.
inline float softmax_sum(float *x, int n) {
  float most = x[0];
  for (int i = 1; i < n; i++) most = std::max(most, x[i]);
  vec total = {};
  for (int i = 0; i < n; i += LANES) {
    const int left = std::min(n - i, LANES);
    store_some(x + i, exp(load_some(x + i, left) - most), left);
    total += load_some(x + i, left);
  }
  return sum(total);
}

// Softmax attention of H heads of a row to the latents of its sequence, keys and values at once.
template <int H, class T>
APART void attend_latent(const Step &s, int row, int head, Heads q, Heads q_rope, Pool<T> c_kv,
                   Pool<T> k_rope, float scale, Heads y) {
  const Call &call = s.call;
  const int keys = int(call.lengths[row]), page = int(call.page), c = c_kv.width, d = k_rope.width;
  const int64_t *blocks = call.blocks + call.table[row];
  const int apart = (keys + LANES - 1) / LANES * LANES;
  const float *latent[H], *turned[H];
  float *score[H];
  for (int h = 0; h < H; h++) {
    latent[h] = q.at(row, head + h), turned[h] = q_rope.at(row, head + h);
    score[h] = s.scratch() + int64_t(h) * apart;
  }
  constexpr int C = TILE<H>;
  for (int first = 0, block = 0; first < keys; first += page, block++) {
    const T *latents = c_kv.data + blocks[block] * page * c;
    const T *ropes = k_rope.data + blocks[block] * page * d;
    const int n = std::min(page, keys - first);
    int key = 0;
    const auto scores = [&](auto some) {
      constexpr int N = decltype(some)::value;
      vec sums[H][N];
      float joined[H][N];
      clear(sums);
      dots<H, N>(sums, latent, latents + key * c, c, c);
      dots<H, N>(sums, turned, ropes + key * d, d, d);
      join(sums, joined);
      UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int i = 0; i < N; i++) score[h][first + key + i] = joined[h][i] * scale;
    };
    for (; key + C <= n; key += C) scores(std::integral_constant<int, C>());
    for (; key < n; key++) scores(std::integral_constant<int, 1>());
  }
  float inverse[H];
  for (int h = 0; h < H; h++) inverse[h] = 1.0f / softmax_sum(score[h], keys);
  const auto runs = [&](auto add) {
    for (int first = 0, block = 0; first < keys; first += page, block++)
      add(c_kv.data + blocks[block] * page * c, int64_t(c), first, std::min(page, keys - first));
  };
  const float *factor[H];
  for (int h = 0; h < H; h++) factor[h] = score[h];
  weighted_sum<H>(factor, runs, c, [&](int h) { return y.at(row, head + h); });
  for (int h = 0; h < H; h++) {
    float *out = y.at(row, head + h);
    for (int i = 0; i < c; i++) out[i] *= inverse[h];
  }
}

// The heads of all rows, each tile of them by one thread.
template <class T>
void latent_attention(const Step &s, Heads q, Heads q_rope, Pool<T> c_kv, Pool<T> k_rope, float scale,
                      Heads y) {
  const int tiles = (q.heads + ROWS - 1) / ROWS;
  const auto [first, last] = s.share(q.count * tiles);
  for (int item = first; item < last; item++) {
    const int row = item / tiles, head = item % tiles * ROWS;
    if (head + ROWS <= q.heads) attend_latent<ROWS>(s, row, head, q, q_rope, c_kv, k_rope, scale, y);
    else
      for (int h = head; h < q.heads; h++)
        attend_latent<1>(s, row, h, q, q_rope, c_kv, k_rope, scale, y);
  }
}

}  // namespace op
