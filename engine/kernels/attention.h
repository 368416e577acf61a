// What the phases of sink attention share. See attention.c for the order of things.
#pragma once

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "simd.h"

enum {
    QUERIES = 24,      // query vectors of a task, at least one position of all heads of a group
    TILE_BLOCKS = 16,  // blocks of keys whose scores are kept at once
    REGISTER_QUERIES = 6,
    REGISTER_BLOCKS = 4,
    REGISTER_VECTORS = 4,
    SCORE_STRIDE = TILE_BLOCKS * LANES,
    CACHE_LINE = 64,
};

// Sixteen neighbouring places of a kv_slot or sixteen tokens of the row itself.
typedef struct {
    int32_t index;  // past blocks first, then the row's own
    int32_t sinks;  // lanes before this one are sinks
    int32_t lanes;  // lanes that hold a key at all
} Block;

// A row of the step: tokens `first` .. `first + count - 1` of the flat batch, at token_index `start`, ...
//
// distance[key] = start - token_index of the key: the query at offset o sees a sink if distance >= -o, and
// a window key if also distance <= min(reach, window - 1 - o).
typedef struct {
    int32_t first, count;
    int32_t sinks, window, ring, reach;
    int64_t start;
    char *slot;  // this layer's part of the kv_slot
    int32_t past_blocks, own_blocks, num_blocks, tile, parts;
    int32_t *distance;
    Block *blocks;
    char *own;
    float *partial;
    atomic_int *left;  // tasks that have not ended, for each KV head
} Row;

typedef struct {
    int32_t row, kv_head, from, to, first_block, end_block, part;
} Task;

// K and V of a (row, kv_head) are [blocks][dim_padded][16] and [16 * blocks][dim_padded], in kv_slots as in
// the rows' own scratch; so that scores need no sums across lanes.
typedef struct {
    int32_t heads, kv_heads, group, dim, dim_padded, half, kv_bytes, places, num_rows, num_tasks;
    float epsilon;
    const float *qkv, *angles, *q_norm, *k_norm;
    float *out;
    Row *rows;
    Task *tasks;
} Job;

INLINE int32_t min_int(int32_t a, int32_t b) { return a < b ? a : b; }
INLINE int32_t max_int(int32_t a, int32_t b) { return a > b ? a : b; }
INLINE int32_t num_blocks_of(int32_t tokens) { return (tokens + LANES - 1) / LANES; }
INLINE int32_t partial_stride(const Job *job) { return job->dim_padded + 2; }

INLINE size_t block_bytes(const Job *job) { return (size_t)LANES * job->dim_padded * job->kv_bytes; }

// q, k and v of one token lie in a row of this many floats.
INLINE size_t token_stride(const Job *job) {
    return (size_t)(job->heads + 2 * job->kv_heads) * job->dim;
}

INLINE int32_t place_of(const Row *row, int64_t token_index) {
    if (token_index < row->sinks) return (int32_t)token_index;
    return row->sinks + (int32_t)((token_index - row->sinks) % row->ring);
}

// RMS norm over a head, if the model has one.
INLINE void norm_head(const Job *job, const float *weight, const float *from, float *to) {
    float scale = 1.0f;
    if (weight != NULL) {
        double sum = 0;
        for (int d = 0; d < job->dim; d++) sum += (double)from[d] * from[d];
        scale = (float)(1.0 / sqrt(sum / job->dim + (double)job->epsilon));
    }
    for (int d = 0; d < job->dim; d++) to[d] = weight == NULL ? from[d] : from[d] * scale * weight[d];
}

// Rotate-half rotary embedding; `angles` = cosines, then sines, [half] each. Dimensions past both stay.
INLINE void rotate_head(const Job *job, const float *angles, const float *from, float *to) {
    int32_t half = job->half;
    const float *cosine = angles, *sine = angles + half;
    for (int i = 0; i < half; i++) {
        to[i] = from[i] * cosine[i] - from[half + i] * sine[i];
        to[half + i] = from[half + i] * cosine[i] + from[i] * sine[i];
    }
    for (int d = 2 * half; d < job->dim; d++) to[d] = from[d];
}

typedef void PhaseFunction(const Job *job, int32_t row, int32_t kv_head);

PhaseFunction prepare_float, prepare_half, finish_float, finish_half;
void attend_float(const Job *job, const Task *task);
void attend_half(const Job *job, const Task *task);
