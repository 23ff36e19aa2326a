// Rows of numbers, what a caller hands over, and the threads that run a step together.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

namespace op {

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

constexpr int RUN = 128;  // numbers of a row of FP8 weights that share a scale

// `out` rows of `in` numbers, `apart` from one another. Quantized numbers are multiplied by scales:
// those of int8 by one for each row; those of FP8 by one for each run of a block of rows, and
// `block` says to which block a row belongs.
template <class T> struct Matrix {
  const T *data;
  int out, in;
  int64_t apart;
  const float *scale = nullptr;
  const int32_t *block = nullptr;

  const T *row(int r) const { return data + r * apart; }
  // The scales of a row.
  const float *scales(int r) const {
    return block ? scale + int64_t(block[r]) * ((in + RUN - 1) / RUN) : scale + r;
  }
  // What begins with a row.
  Matrix from(int64_t r) const {
    return {data + r * apart, int(out - r), in, apart, scale && !block ? scale + r : scale,
            block ? block + r : nullptr};
  }
};

// One matrix for each expert, contiguous in order of the experts, and so are their scales.
template <class T> struct Matrices {
  const T *data;
  int experts, out, in;
  const float *scale = nullptr;
  const int32_t *block = nullptr;

  Matrix<T> of(int expert) const {
    const int64_t blocks = block ? int64_t(block[out - 1] + 1) * ((in + RUN - 1) / RUN) : out;
    return {data + int64_t(expert) * out * in, out, in, in,
            scale ? scale + expert * blocks : nullptr, block};
  }
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

// What a caller hands over; `runtime/compiled.py` has the same fields in the same order.
struct Call {
  int64_t rows, scored, threads, page;
  int64_t vocab, positions;  // above all tokens and positions
  const int64_t *tokens, *position, *slots, *lengths;  // of each row
  const int32_t *scored_rows;
  const int64_t *blocks;   // block tables, concatenated
  const int64_t *table;    // where in `blocks` that of each row begins
  void *const *weights;    // in the order of the package's list
  void *const *products;   // likewise: numbers, their scales, the block of each row
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

  // The same of `each` items of every row, where threads have equally many keys of the rows.
  Share share_keys(int count, int each) const {
    int64_t total = 0;
    for (int row = 0; row < count; row++) total += call.lengths[row] * each;
    const auto item = [&](int part) {
      int64_t before = total * part / threads;
      int row = 0;
      for (; row < count && before >= call.lengths[row] * each; row++)
        before -= call.lengths[row] * each;
      return row < count ? row * each + int(before / call.lengths[row]) : count * each;
    };
    return {item(thread), item(thread + 1)};
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
  explicit Arena(const Call &call)
      : next(call.workspace), end(call.workspace + call.workspace_size) {}

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
    if (next > end) __builtin_trap();  // the caller knows the size
    return taken;
  }
  float *next, *end;
};

// Pointers of a call, in the order in which the package lists them.
class Bound {
 public:
  explicit Bound(const Call &call)
      : weights(call.weights), products(call.products), pools(call.pools), angles(call.angles) {}

  template <class T> Matrix<T> matrix(int out, int in) {
    return {(const T *)*weights++, out, in, in};
  }
  // Of products, whose weights may be quantized.
  template <class T> Matrix<T> product(int out, int in) {
    void *const *const given = std::exchange(products, products + 3);
    return {(const T *)given[0], out, in, in, (const float *)given[1], (const int32_t *)given[2]};
  }
  template <class T> Matrices<T> products_of(int experts, int out, int in) {
    void *const *const given = std::exchange(products, products + 3);
    return {(const T *)given[0], experts, out, in, (const float *)given[1],
            (const int32_t *)given[2]};
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
  void *const *products;
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

}  // namespace op
