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
void latent_attention(const Step &s, Heads q, Heads q_rope, Pool<T> c_kv, Pool<T> k_rope,
                      float scale, Heads y) {
  const int tiles = (q.heads + ROWS - 1) / ROWS;
  const auto [first, last] = s.share(q.count * tiles);
  for (int item = first; item < last; item++) {
    const int row = item / tiles, head = item % tiles * ROWS;
    if (head + ROWS <= q.heads)
      attend_latent<ROWS>(s, row, head, q, q_rope, c_kv, k_rope, scale, y);
    else
      for (int h = head; h < q.heads; h++)
        attend_latent<1>(s, row, h, q, q_rope, c_kv, k_rope, scale, y);
  }
}

}  // namespace op
