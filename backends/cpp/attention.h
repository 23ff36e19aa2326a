// Attention of rows to the pages of their sequences.
#pragma once

#include "products.h"

namespace op {

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

// Which keys a row sees, and what becomes of products of queries and keys.
struct Scores {
  float scale;
  int window = 0;     // a row sees so many keys, itself included; 0: all
  float softcap = 0;  // c: scores s become c tanh(s / c); 0: they stay
};

// The keys that a row sees, from the first to the last, by the pages where they lie:
// `each(first, n, slot)` is called for n keys, whose numbers begin with `first` and slots with
// `slot`. Gives how many they are.
template <class Each> inline int seen(const Step &s, int row, const Scores &how, Each each) {
  const int keys = int(s.call.lengths[row]), page = int(s.call.page);
  const int begin = how.window && how.window < keys ? keys - how.window : 0;
  const int64_t *blocks = s.call.blocks + s.call.table[row];
  for (int at = begin, n; at < keys; at += n) {
    n = std::min(page - at % page, keys - at);
    each(at - begin, n, blocks[at / page] * page + at % page);
  }
  return keys - begin;
}

// Softmax attention of H heads of a row, which read the same keys and values. `add(sums, slot)`
// adds the products of their queries with the keys from a slot on; `values` are those of all slots.
template <int H, class T, class Add, class Y>
inline void attend(const Step &s, int row, const Scores &how, Add add, const Matrix<T> &values,
                   Y y) {
  float *score[H];
  const int apart = (int(s.call.lengths[row]) + LANES - 1) / LANES * LANES;
  for (int h = 0; h < H; h++) score[h] = s.scratch() + int64_t(h) * apart;
  constexpr int C = H == 1 ? 8 : REGISTERS == 32 ? 4 : 3;  // a page has 16 keys
  const int keys = seen(s, row, how, [&](int first, int n, int64_t slot) {
    int key = 0;
    const auto scores = [&](auto some) {
      constexpr int N = decltype(some)::value;
      vec sums[H][N];
      float joined[H][N];
      clear(sums);
      add(sums, slot + key);
      join(sums, joined);
      UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int i = 0; i < N; i++) score[h][first + key + i] = joined[h][i] * how.scale;
    };
    for (; key + C <= n; key += C) scores(std::integral_constant<int, C>());
    for (; key < n; key++) scores(std::integral_constant<int, 1>());
  });
  float inverse[H];
  const float *weight[H];
  for (int h = 0; h < H; h++) {
    for (int i = 0; how.softcap > 0 && i < keys; i++)
      score[h][i] = how.softcap * std::tanh(score[h][i] / how.softcap);
    inverse[h] = 1.0f / softmax_sum(score[h], keys);
    weight[h] = score[h];
  }
  const auto parts = [&](auto sum) {
    seen(s, row, how, [&](int first, int n, int64_t slot) { sum(values.from(slot), first, n); });
  };
  weighted_sum<H>(weight, parts, values.in, y);
  for (int h = 0; h < H; h++) {
    float *out = y(h);
    for (int i = 0; i < values.in; i++) out[i] *= inverse[h];
  }
}

// The part of each token's entry that begins with number `first`.
template <class T> inline Matrix<T> slots(const Pool<T> &pool, int first, int width) {
  return {pool.data + first, 0, width, pool.width};
}

// To the latents of a sequence, keys and values at once.
template <int H, class T>
APART void attend_latent(const Step &s, int row, int head, Heads q, Heads q_rope, Pool<T> c_kv,
                         Pool<T> k_rope, Scores how, Heads y) {
  const float *latent[H], *turned[H];
  for (int h = 0; h < H; h++)
    latent[h] = q.at(row, head + h), turned[h] = q_rope.at(row, head + h);
  const Matrix<T> latents = slots(c_kv, 0, c_kv.width), ropes = slots(k_rope, 0, k_rope.width);
  const auto add = [&](auto &sums, int64_t slot) INLINED {
    dots(sums, latent, latents.from(slot));
    dots(sums, turned, ropes.from(slot));
  };
  attend<H>(s, row, how, add, latents, [&](int h) { return y.at(row, head + h); });
}

// To the keys and values of head `group`.
template <int H, class T>
APART void attend_keys(const Step &s, int row, int head, int group, Heads q, Pool<T> k, Pool<T> v,
                       Scores how, Heads y) {
  const float *query[H];
  for (int h = 0; h < H; h++) query[h] = q.at(row, head + h);
  const Matrix<T> keys = slots(k, group * q.width, q.width);
  const auto add = [&](auto &sums, int64_t slot) INLINED { dots(sums, query, keys.from(slot)); };
  attend<H>(s, row, how, add, slots(v, group * y.width, y.width),
            [&](int h) { return y.at(row, head + h); });
}

// The heads of all rows in tiles, of which threads take some: `each` of them share keys.
template <class Tile> inline void tiles_of_heads(const Step &s, Heads q, int each, Tile tile) {
  const int tiles = (each + ROWS - 1) / ROWS, groups = q.heads / each;
  const auto [first, last] = s.share_keys(q.count, groups * tiles);
  for (int item = first; item < last; item++) {
    const int row = item / tiles / groups, group = item / tiles % groups;
    const int begin = group * each, head = begin + item % tiles * ROWS;
    if (head + ROWS <= begin + each) tile(std::integral_constant<int, ROWS>(), row, head, group);
    else
      for (int h = head; h < begin + each; h++)
        tile(std::integral_constant<int, 1>(), row, h, group);
  }
}

template <class T>
void latent_attention(const Step &s, Heads q, Heads q_rope, Pool<T> c_kv, Pool<T> k_rope,
                      Scores how, Heads y) {
  tiles_of_heads(s, q, q.heads, [&](auto heads, int row, int head, int) {
    attend_latent<decltype(heads)::value>(s, row, head, q, q_rope, c_kv, k_rope, how, y);
  });
}

template <class T>
void attention(const Step &s, Heads q, Pool<T> k, Pool<T> v, Scores how, Heads y) {
  const int groups = k.width / q.width;
  tiles_of_heads(s, q, q.heads / groups, [&](auto heads, int row, int head, int group) {
    attend_keys<decltype(heads)::value>(s, row, head, group, q, k, v, how, y);
  });
}

}  // namespace op
