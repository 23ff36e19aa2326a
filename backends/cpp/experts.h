// The choice of experts, and rows in their order.
#pragma once

#include "rowwise.h"

namespace op {

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
APART void gate(const Step &s, Rows x, Vector<T> bias, Routing how, Rows scratch, Ints index,
                Rows weight) {
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
inline void permute(const Step &s, Ints index, int count, int experts, Ints ends, Ints token,
                    Ints place) {
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

}  // namespace op
