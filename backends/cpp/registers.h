// Numbers in registers: widened weights, sums of lanes, exp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace op {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

typedef int8_t bytes __attribute__((vector_size(LANES)));

struct bf16 {
  uint16_t bits;
};

// A sign, four bits of exponent, three of mantissa. No number of a weight is a NaN.
struct e4m3 {
  int8_t bits;
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
// 16 bits in each lane, no sign. GCC 12 widens vectors of AVX-512 by halves, bytes one by one.
inline words widened(const bf16 *x) {
#if defined(__AVX512F__)
  return (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
#elif defined(__AVX2__)
  return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x));
#else
  halves bits;
  std::memcpy(&bits, x, sizeof bits);
  return __builtin_convertvector(bits, words);
#endif
}
inline vec load(const bf16 *x) { return (vec)(widened(x) << 16); }
// A byte in each lane, with its sign.
inline ints widened(const int8_t *x) {
#if defined(__AVX512F__)
  return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x));
#elif defined(__AVX2__)
  return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x));
#else
  bytes bits;
  std::memcpy(&bits, x, sizeof bits);
  return __builtin_convertvector(bits, ints);
#endif
}
inline vec load(const int8_t *x) { return __builtin_convertvector(widened(x), vec); }
// Where a float has its sign, and the last bits of its exponent: 2^120 times too small.
inline vec load(const e4m3 *x) {
  return (vec)((widened(&x->bits) << 20) & int32_t(0x87f00000)) * 0x1p120f;
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

}  // namespace op
