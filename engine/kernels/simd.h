// Sixteen floats at a time, in the vector types of GCC and Clang: any target, the compiler picks registers.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef _Float16 Halves __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

INLINE Floats load_float(const float *from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store_float(float *to, Floats value) { memcpy(to, &value, sizeof value); }

INLINE Ints load_int(const int32_t *from) {
    Ints value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE Floats load_half(const _Float16 *from) {
    Halves value;
    memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, Floats);
}

INLINE Floats splat(float value) { return (Floats){0} + value; }

INLINE Ints splat_int(int32_t value) { return (Ints){0} + value; }

INLINE Floats choose(Ints mask, Floats yes, Floats no) {
    return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}

INLINE Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }

INLINE float largest_of(Floats v) {
    float lanes[LANES], best = -INFINITY;
    store_float(lanes, v);
    for (int i = 0; i < LANES; i++) best = lanes[i] > best ? lanes[i] : best;
    return best;
}

INLINE float sum_of(Floats v) {
    float lanes[LANES];
    store_float(lanes, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// e to the power x for x <= 0, relative error 2e-7; 0 below -87, NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r by its Taylor polynomial.
INLINE Floats exp_of_negative(Floats x) {
    const Floats lowest = splat(-87.0f), magic = splat(12582912.0f);
    Floats clamped = choose(x < lowest, lowest, x);
    Floats shifted = clamped * 1.44269504f + magic;
    Floats n = shifted - magic;
    Floats r = clamped - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    Floats p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Floats scaled = (Floats)((Ints)p + ((Ints)shifted << 23));
    return choose(x < lowest, splat(0.0f), scaled);
}
