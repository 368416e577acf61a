// Four bytes times four bytes, summed into each of sixteen int32 lanes.
#pragma once

#include "simd.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

// What a sum of products starts with so that it ends as that of (weight - 128): weights are stored with 128
// added, as VNNI multiplies unsigned by signed bytes.
#if defined(__ARM_FEATURE_DOTPROD) || (defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__))
enum { DOT_BIAS = 0 };
#else
enum { DOT_BIAS = -128 };
#endif

// Sums that registers hold: of so many tokens, each with so many vectors of outputs.
#if defined(__AVX512VNNI__)
enum { DOT_TOKENS = 8, DOT_VECTORS = 2 };
#else
enum { DOT_TOKENS = 4, DOT_VECTORS = 1 };
#endif

INLINE Ints dot4(Ints sum, const uint8_t *weights, const int8_t *activations) {
    int32_t four;
    memcpy(&four, activations, sizeof four);
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(weights), _mm512_set1_epi32(four));
#elif defined(__AVXVNNI__)
    __m256i halves[2], all = _mm256_set1_epi32(four);
    memcpy(halves, &sum, sizeof sum);
    for (int i = 0; i < 2; i++)
        halves[i] = _mm256_dpbusd_avx_epi32(halves[i], _mm256_loadu_si256((const __m256i *)weights + i), all);
    memcpy(&sum, halves, sizeof sum);
    return sum;
#elif defined(__AVX2__)
    // |weight| <= 128 and |activation| <= 127, so the sum of two products fits 16 bits: 32512 at most.
    __m256i halves[2], all = _mm256_set1_epi32(four);
    memcpy(halves, &sum, sizeof sum);
    for (int i = 0; i < 2; i++) {
        __m256i stored = _mm256_loadu_si256((const __m256i *)weights + i);
        __m256i weight = _mm256_xor_si256(stored, _mm256_set1_epi8(-128));
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(all, weight));
        halves[i] = _mm256_add_epi32(halves[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    memcpy(&sum, halves, sizeof sum);
    return sum;
#elif defined(__ARM_FEATURE_DOTPROD)
    int32x4_t quarters[4];
    int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
    memcpy(quarters, &sum, sizeof sum);
    for (int i = 0; i < 4; i++) {
        int8x16_t signs = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weights + 16 * i), vdupq_n_u8(128)));
        quarters[i] = vdotq_s32(quarters[i], signs, all);
    }
    memcpy(&sum, quarters, sizeof sum);
    return sum;
#else
    int32_t lanes[LANES];
    memcpy(lanes, &sum, sizeof sum);
    for (int lane = 0; lane < LANES; lane++)
        for (int j = 0; j < 4; j++) lanes[lane] += (int32_t)weights[4 * lane + j] * activations[j];
    memcpy(&sum, lanes, sizeof sum);
    return sum;
#endif
}
