// Sink attention over one element type of the cache. Included with
//   T: that type; LOAD: sixteen of them as floats; LIMIT: its largest value; NAMED(x): x with its suffix.

INLINE T NAMED(narrow)(float value) {
    // NaN is made finite too: a bad value must not outlive its turn in a place that is masked later.
    value = value < (float)LIMIT ? value : (float)LIMIT;
    return (T)(value > -(float)LIMIT ? value : -(float)LIMIT);
}

INLINE T *NAMED(own_keys)(const Job *job, const Row *row, int32_t kv_head) {
    return (T *)(row->own + 2 * (size_t)kv_head * row->own_blocks * block_bytes(job));
}

INLINE T *NAMED(own_values)(const Job *job, const Row *row, int32_t kv_head) {
    return (T *)((char *)NAMED(own_keys)(job, row, kv_head) + row->own_blocks * block_bytes(job));
}

INLINE T *NAMED(slot_keys)(const Job *job, const Row *row, int32_t kv_head) {
    size_t bytes = (size_t)num_blocks_of(job->places) * block_bytes(job);
    return (T *)(row->slot + 2 * (size_t)kv_head * bytes);
}

INLINE T *NAMED(slot_values)(const Job *job, const Row *row, int32_t kv_head) {
    size_t bytes = (size_t)num_blocks_of(job->places) * block_bytes(job);
    return (T *)(row->slot + (2 * (size_t)kv_head + 1) * bytes);
}

// First: the row's own keys, rotated, and values into scratch, in the form of the cache: what a chunk
// attends to is what a later step will read.
void NAMED(prepare)(const Job *job, int32_t row_number, int32_t kv_head) {
    const Row *row = &job->rows[row_number];
    T *keys = NAMED(own_keys)(job, row, kv_head), *values = NAMED(own_values)(job, row, kv_head);
    int32_t dim = job->dim, padded = job->dim_padded;
    float normed[dim], rotated[dim];
    for (int32_t n = 0; n < row->count; n++) {
        size_t token = (size_t)row->first + n;
        const float *from = job->qkv + token * token_stride(job) + (size_t)(job->heads + kv_head) * dim;
        norm_head(job, job->k_norm, from, normed);
        rotate_head(job, job->angles + token * 4 * job->half, normed, rotated);
        T *key = keys + (size_t)(n / LANES) * LANES * padded + n % LANES;
        T *value = values + (size_t)n * padded;
        from += (size_t)job->kv_heads * dim;
        for (int32_t d = 0; d < dim; d++) key[d * LANES] = NAMED(narrow)(rotated[d]);
        for (int32_t d = 0; d < dim; d++) value[d] = NAMED(narrow)(from[d]);
    }
}

// scores[query][block * 16 + lane] = q . k for `nq` queries and `nb` blocks, all in registers.
INLINE void NAMED(score)(const int nq, const int nb, const int ahead, const T *const *keys, int32_t dim,
                         const float *q, int32_t q_stride, float *scores) {
    Floats sum[REGISTER_QUERIES][REGISTER_BLOCKS];
    for (int i = 0; i < nq; i++)
        for (int b = 0; b < nb; b++) sum[i][b] = splat(0.0f);
    for (int32_t d = 0; d < dim; d++) {
        Floats key[REGISTER_BLOCKS];
        for (int b = 0; b < nb; b++) key[b] = LOAD(keys[b] + (size_t)d * LANES);
        if (ahead && d % (CACHE_LINE / (LANES * (int)sizeof(T))) == 0)
            for (int b = 0; b < nb; b++) __builtin_prefetch(keys[nb + b] + (size_t)d * LANES);
        for (int i = 0; i < nq; i++) {
            Floats query = splat(q[i * q_stride + d]);
            for (int b = 0; b < nb; b++) sum[i][b] += query * key[b];
        }
    }
    for (int i = 0; i < nq; i++)
        for (int b = 0; b < nb; b++) store_float(scores + i * SCORE_STRIDE + b * LANES, sum[i][b]);
}

static void NAMED(score_queries)(int nq, int nb, const T *const *keys, int32_t dim, const float *q,
                                 int32_t q_stride, float *scores) {
#define CASE(n)                                                                            \
    case n:                                                                                \
        for (; nb - done >= 2 * REGISTER_BLOCKS; done += REGISTER_BLOCKS)                      \
            NAMED(score)(n, REGISTER_BLOCKS, 1, keys + done, dim, q, q_stride, scores + done * LANES); \
        for (; nb - done >= REGISTER_BLOCKS; done += REGISTER_BLOCKS)                      \
            NAMED(score)(n, REGISTER_BLOCKS, 0, keys + done, dim, q, q_stride, scores + done * LANES); \
        for (; done < nb; done++)                                                          \
            NAMED(score)(n, 1, 0, keys + done, dim, q, q_stride, scores + done * LANES);        \
        break;
    int done = 0;
    switch (nq) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
    }
#undef CASE
}

// sum[query] += weights[query] . values, over `nv` times 16 dimensions.
INLINE void NAMED(weigh)(const int nq, const int nv, const T *const *values, const Block *const *blocks,
                         int num, int32_t padded, const float *weights, float *sums) {
    Floats sum[REGISTER_QUERIES][REGISTER_VECTORS];
    for (int i = 0; i < nq; i++)
        for (int v = 0; v < nv; v++) sum[i][v] = load_float(sums + (size_t)i * padded + v * LANES);
    for (int b = 0; b < num; b++) {
        const T *from = values[b];
        const float *weight = weights + b * LANES;
        for (int lane = 0; lane < blocks[b]->lanes; lane++, from += padded, weight++) {
            Floats value[REGISTER_VECTORS];
            for (int v = 0; v < nv; v++) value[v] = LOAD(from + v * LANES);
            for (int i = 0; i < nq; i++) {
                Floats w = splat(weight[i * SCORE_STRIDE]);
                for (int v = 0; v < nv; v++) sum[i][v] += w * value[v];
            }
        }
    }
    for (int i = 0; i < nq; i++)
        for (int v = 0; v < nv; v++) store_float(sums + (size_t)i * padded + v * LANES, sum[i][v]);
}

static void NAMED(weigh_queries)(int nq, const T *const *values, const Block *const *blocks, int num,
                                 int32_t padded, const float *weights, float *sums) {
#define CASE(n)                                                                                       \
    case n:                                                                                           \
        for (; left >= REGISTER_VECTORS; left -= REGISTER_VECTORS, done += REGISTER_VECTORS * LANES) { \
            for (int b = 0; b < num; b++) from[b] = values[b] + done;                                 \
            NAMED(weigh)(n, REGISTER_VECTORS, from, blocks, num, padded, weights, sums + done);        \
        }                                                                                             \
        for (; left; left--, done += LANES) {                                                         \
            for (int b = 0; b < num; b++) from[b] = values[b] + done;                                 \
            NAMED(weigh)(n, 1, from, blocks, num, padded, weights, sums + done);                       \
        }                                                                                             \
        break;
    const T *from[TILE_BLOCKS];
    int left = padded / LANES, done = 0;
    switch (nq) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
    }
#undef CASE
}

// Then: softmax over a range of a row's blocks for some of its queries, one tile of blocks after another.
void NAMED(attend)(const Job *job, const Task *task) {
    const Row *row = &job->rows[task->row];
    const int32_t dim = job->dim, padded = job->dim_padded, group = job->group;
    const int32_t positions = task->to - task->from, num_queries = positions * group;
    const T *slot_keys = NAMED(slot_keys)(job, row, task->kv_head);
    const T *slot_values = NAMED(slot_values)(job, row, task->kv_head);
    const T *own_keys = NAMED(own_keys)(job, row, task->kv_head);
    const T *own_values = NAMED(own_values)(job, row, task->kv_head);
    const size_t block_size = (size_t)LANES * padded;
    float q[num_queries * dim], sink_q[num_queries * dim], normed[dim];
    float scores[num_queries * SCORE_STRIDE];
    float sums[num_queries * padded], best[num_queries], total[num_queries];
    memset(sums, 0, sizeof sums);
    for (int32_t n = 0; n < num_queries; n++) {
        size_t token = (size_t)row->first + task->from + n / group;
        int32_t head = task->kv_head * group + n % group;
        const float *angles = job->angles + token * 4 * job->half;
        norm_head(job, job->q_norm, job->qkv + token * token_stride(job) + (size_t)head * dim, normed);
        rotate_head(job, angles, normed, q + n * dim);
        rotate_head(job, angles + 2 * job->half, normed, sink_q + n * dim);
        best[n] = -INFINITY;
        total[n] = 0.0f;
    }
    for (int32_t next = task->first_block; next < task->end_block;) {
        const Block *blocks[TILE_BLOCKS];
        const T *keys[TILE_BLOCKS], *values[TILE_BLOCKS];
        int num = 0;
        for (; next < task->end_block && num < TILE_BLOCKS; next++) {
            const Block *block = &row->blocks[next];
            int32_t own = block->index - row->past_blocks;
            if (own * LANES >= task->to) continue;  // after every query of this task
            blocks[num] = block;
            keys[num] = own < 0 ? slot_keys + block->index * block_size : own_keys + own * block_size;
            values[num] = own < 0 ? slot_values + block->index * block_size : own_values + own * block_size;
            num++;
        }
        for (int32_t n = 0; n < num_queries; n += REGISTER_QUERIES) {
            int nq = min_int(REGISTER_QUERIES, num_queries - n);
            NAMED(score_queries)(nq, num, keys, dim, q + n * dim, dim, scores + n * SCORE_STRIDE);
            for (int b = 0; b < num; b++) {
                if (blocks[b]->sinks == 0) continue;
                float moved[REGISTER_QUERIES * SCORE_STRIDE];
                NAMED(score_queries)(nq, 1, keys + b, dim, sink_q + n * dim, dim, moved);
                for (int i = 0; i < nq; i++)
                    memcpy(scores + (n + i) * SCORE_STRIDE + b * LANES, moved + i * SCORE_STRIDE,
                           blocks[b]->sinks * sizeof(float));
            }
        }
        for (int32_t p = 0; p < positions; p++) {
            const int32_t offset = task->from + p;
            const Ints oldest = splat_int(min_int(row->reach, row->window - 1 - offset));
            const Ints newest = splat_int(-offset);
            const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            Ints seen[TILE_BLOCKS];
            for (int b = 0; b < num; b++) {
                Ints distance = load_int(row->distance + blocks[b]->index * LANES);
                Ints sink = lane < splat_int(blocks[b]->sinks);
                seen[b] = (distance >= newest) & (sink | (distance <= oldest));
            }
            for (int32_t n = p * group; n < (p + 1) * group; n++) {
                float *score = scores + n * SCORE_STRIDE;
                Floats most = splat(-INFINITY);
                for (int b = 0; b < num; b++) {
                    Floats s = choose(seen[b], load_float(score + b * LANES), splat(-INFINITY));
                    store_float(score + b * LANES, s);
                    most = larger(s, most);
                }
                float top = largest_of(most);
                if (top > best[n]) {
                    float fade = best[n] == -INFINITY ? 0.0f : expf(best[n] - top);
                    total[n] *= fade;
                    for (int32_t d = 0; d < padded; d++) sums[n * padded + d] *= fade;
                    best[n] = top;
                }
                Floats part = splat(0.0f);
                // Nothing seen so far: any finite reference makes every weight 0.
                Floats reference = splat(best[n] == -INFINITY ? 0.0f : best[n]);
                for (int b = 0; b < num; b++) {
                    Floats weight = exp_of_negative(load_float(score + b * LANES) - reference);
                    store_float(score + b * LANES, weight);
                    part += weight;
                }
                total[n] += sum_of(part);
            }
        }
        for (int32_t n = 0; n < num_queries; n += REGISTER_QUERIES)
            NAMED(weigh_queries)(min_int(REGISTER_QUERIES, num_queries - n), values, blocks, num, padded,
                                 scores + n * SCORE_STRIDE, sums + n * padded);
    }
    for (int32_t n = 0; n < num_queries; n++) {
        if (row->parts > 1) {
            size_t query = (size_t)(task->from + n / group) * job->heads + task->kv_head * group + n % group;
            float *to = row->partial + (query * row->parts + task->part) * partial_stride(job);
            memcpy(to, sums + n * padded, padded * sizeof(float));
            to[padded] = best[n];
            to[padded + 1] = total[n];
        } else {
            size_t token = (size_t)row->first + task->from + n / group;
            float *to = job->out + (token * job->heads + task->kv_head * group + n % group) * dim;
            for (int32_t d = 0; d < dim; d++) to[d] = sums[n * padded + d] / total[n];
        }
    }
}

INLINE void NAMED(merge)(const Job *job, const Row *row, int32_t position, int32_t head) {
    const int32_t stride = partial_stride(job), padded = job->dim_padded;
    const float *parts = row->partial + ((size_t)position * job->heads + head) * row->parts * stride;
    float *out = job->out + (((size_t)row->first + position) * job->heads + head) * job->dim;
    float best = -INFINITY, total = 0.0f;
    for (int32_t p = 0; p < row->parts; p++)
        best = parts[p * stride + padded] > best ? parts[p * stride + padded] : best;
    for (int32_t d = 0; d < job->dim; d++) out[d] = 0.0f;
    for (int32_t p = 0; p < row->parts; p++) {
        const float *part = parts + p * stride;
        float weight = expf(part[padded] - best);
        total += weight * part[padded + 1];
        for (int32_t d = 0; d < job->dim; d++) out[d] += weight * part[d];
    }
    for (int32_t d = 0; d < job->dim; d++) out[d] /= total;
}

// Last: put the parts of split rows together; then, as nobody reads the ring any more, write into it.
void NAMED(finish)(const Job *job, int32_t row_number, int32_t kv_head) {
    const Row *row = &job->rows[row_number];
    const int32_t padded = job->dim_padded;
    if (row->parts > 1)
        for (int32_t position = 0; position < row->count; position++)
            for (int32_t g = 0; g < job->group; g++)
                NAMED(merge)(job, row, position, kv_head * job->group + g);
    const T *keys = NAMED(own_keys)(job, row, kv_head), *values = NAMED(own_values)(job, row, kv_head);
    T *slot_keys = NAMED(slot_keys)(job, row, kv_head), *slot_values = NAMED(slot_values)(job, row, kv_head);
    for (int32_t n = 0; n < row->count; n++) {
        int32_t place = place_of(row, row->start + n);
        const T *key = keys + (size_t)(n / LANES) * LANES * padded + n % LANES;
        T *to = slot_keys + (size_t)(place / LANES) * LANES * padded + place % LANES;
        for (int32_t d = 0; d < job->dim; d++) to[d * LANES] = key[d * LANES];
        memcpy(slot_values + (size_t)place * padded, values + (size_t)n * padded, job->dim * sizeof(T));
    }
}
