// Linear layers with 8-bit weights in blocks of 64 inputs: BlockLinear, and BlockEmbedding of the same table.
//
//   weights  uint8   [tiles, inputs / 4, 32, 4]   level + 128, 32 outputs side by side
//   scales   float16 [tiles, inputs / 64, 32]
//
// Outputs and inputs are padded to whole tiles and blocks. Activations are rounded to 8 bits too, per half a
// block (scale = largest / 127; they have outliers), so a product is a sum of bytes times bytes.
//
// BlockLinear: x float32 [tokens, inputs], weights, scales, bias float32 [outputs] or absent, result float32
// [tokens, outputs]. BlockEmbedding: token_ids int64 [tokens], weights, scales, result [tokens, inputs].
#include <stdlib.h>

#include "dot.h"
#include "tensors.h"

enum {
    BLOCK = 64,
    HALF = BLOCK / 2,
    TILE = 32,
    TILE_VECTORS = TILE / LANES,
    INLINE_INPUTS = 1 << 13,
    ALIGNMENT = 64,
};

#define SMALLEST 0x1p-120f  // 127 / less than this may overflow

typedef struct {
    const OrtApi *api;
    int64_t inputs, outputs;
} Kernel;

// Activations of a token: `halves` times 32 bytes; of each: its scale and where its sums start.
typedef struct {
    const float *x, *bias;
    const uint8_t *weights;
    const _Float16 *scales;
    float *out;
    int8_t *levels;
    float *level_scales;
    int32_t *starts;
    int64_t tokens, inputs, outputs, blocks, halves;
} Job;

static void round_token(void *data, size_t token) {
    const Job *job = data;
    const float *x = job->x + token * job->inputs;
    for (int64_t half = 0; half < job->halves; half++) {
        float values[HALF] = {0};
        const int64_t left = job->inputs - half * HALF;
        if (left > 0) memcpy(values, x + half * HALF, (left < HALF ? left : HALF) * sizeof(float));
        Floats most = splat(0.0f), zero = splat(0.0f);
        for (int i = 0; i < HALF; i += LANES) {
            Floats value = load_float(values + i);
            most = larger(choose(value > 0.0f, value, -value), most);
            zero += value * 0.0f;  // or NaN, which no rounding may hide
        }
        const float largest = largest_of(most) + sum_of(zero);
        const float inverse = largest > SMALLEST ? 127.0f / largest : 0.0f;
        int8_t *levels = job->levels + (token * job->halves + half) * HALF;
        int32_t sum = 0;
        for (int i = 0; i < HALF; i++) {
            int32_t level = inverse > 0.0f ? (int32_t)__builtin_rintf(values[i] * inverse) : 0;
            levels[i] = (int8_t)level;
            sum += level;
        }
        job->level_scales[token * job->halves + half] = largest / 127.0f;
        job->starts[token * job->halves + half] = DOT_BIAS * sum;
    }
}

// Vectors `first_vector` .. of a tile's outputs, `vectors` of them, for `count` tokens from `first` on.
INLINE void multiply(const Job *job, const int count, const int vectors, int64_t tile, int first_vector,
                     int64_t first) {
    const int64_t halves = job->halves, column = (int64_t)first_vector * LANES;
    const uint8_t *weights = job->weights + tile * halves * HALF * TILE + 4 * column;
    const _Float16 *scales = job->scales + tile * job->blocks * TILE + column;
    const int8_t *levels = job->levels + first * halves * HALF;
    Floats total[DOT_TOKENS][TILE_VECTORS];
    for (int t = 0; t < count; t++)
        for (int v = 0; v < vectors; v++) total[t][v] = splat(0.0f);
    for (int64_t half = 0; half < halves; half++) {
        Ints sum[DOT_TOKENS][TILE_VECTORS];
        for (int t = 0; t < count; t++)
            for (int v = 0; v < vectors; v++)
                sum[t][v] = splat_int(job->starts[(first + t) * halves + half]);
#pragma clang loop unroll(full)
        for (int k = 0; k < HALF; k += 4, weights += 4 * TILE)
            for (int t = 0; t < count; t++)
                for (int v = 0; v < vectors; v++)
                    sum[t][v] = dot4(sum[t][v], weights + 4 * LANES * v, levels + (t * halves + half) * HALF + k);
        for (int v = 0; v < vectors; v++) {
            Floats scale = load_half(scales + half / 2 * TILE + v * LANES);
            for (int t = 0; t < count; t++) {
                Floats product = __builtin_convertvector(sum[t][v], Floats);
                total[t][v] += product * (scale * job->level_scales[(first + t) * halves + half]);
            }
        }
    }
    const int64_t output = tile * TILE + column, width = job->outputs - output;
    for (int t = 0; t < count; t++)
        for (int v = 0; v < vectors; v++) {
            const int64_t left = width - v * LANES;
            float *to = job->out + (first + t) * job->outputs + output + v * LANES;
            if (left <= 0) break;
            float bias[LANES] = {0};
            if (job->bias != NULL)
                memcpy(bias, job->bias + output + v * LANES, (left < LANES ? left : LANES) * sizeof(float));
            Floats result = total[t][v] + load_float(bias);
            if (left >= LANES)
                store_float(to, result);
            else
                memcpy(to, &result, left * sizeof(float));
        }
}

// A whole tile for `count` tokens. Two tokens or fewer leave registers for all its outputs at once.
INLINE void multiply_all(const Job *job, const int count, int64_t tile, int64_t first) {
    const int vectors = count <= 2 ? TILE_VECTORS : DOT_VECTORS;
    for (int v = 0; v < TILE_VECTORS; v += vectors) multiply(job, count, vectors, tile, v, first);
}

static void multiply_tile(void *data, size_t tile) {
    const Job *job = data;
    int64_t first = 0;
    for (; job->tokens - first >= DOT_TOKENS; first += DOT_TOKENS)
        multiply_all(job, DOT_TOKENS, (int64_t)tile, first);
    switch (job->tokens - first) {  // less than DOT_TOKENS; no code is made for more
#define CASE(n) \
    case n: multiply_all(job, n < DOT_TOKENS ? n : 1, (int64_t)tile, first); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#undef CASE
    }
}

static OrtStatus *check_weights(const Kernel *kernel, const Tensor *weights, const Tensor *scales) {
    const int64_t tiles = (kernel->outputs + TILE - 1) / TILE, blocks = (kernel->inputs + BLOCK - 1) / BLOCK;
    if (weights->rank != 4 || weights->dims[0] != tiles || weights->dims[1] != blocks * BLOCK / 4 ||
        weights->dims[2] != TILE || weights->dims[3] != 4)
        return invalid(kernel->api, "BlockLinear: weights are not [tiles, inputs / 4, 32, 4]");
    if (scales->rank != 3 || scales->dims[0] != tiles || scales->dims[1] != blocks || scales->dims[2] != TILE)
        return invalid(kernel->api, "BlockLinear: scales are not [tiles, inputs / 64, 32]");
    return NULL;
}

static OrtStatus *compute_linear(void *data, OrtKernelContext *context) {
    const Kernel *kernel = data;
    API = kernel->api;
    Tensor x, weights, scales, bias = {0};
    const OrtValue *given;
    TRY(input_tensor(api, context, 0, &x));
    TRY(input_tensor(api, context, 1, &weights));
    TRY(input_tensor(api, context, 2, &scales));
    size_t num_inputs;
    TRY(ort_KernelContext_GetInputCount(api, context, &num_inputs));
    if (num_inputs > 3) {
        TRY(ort_KernelContext_GetInput(api, context, 3, &given));
        if (given != NULL) TRY(input_tensor(api, context, 3, &bias));
        if (given != NULL && (bias.rank != 1 || bias.dims[0] != kernel->outputs))
            return invalid(api, "BlockLinear: bias is not [outputs]");
    }
    TRY(check_weights(kernel, &weights, &scales));
    if (x.rank != 2 || x.dims[1] != kernel->inputs)
        return invalid(api, "BlockLinear: x is not [tokens, inputs]");
    const int64_t tokens = x.dims[0], dims[2] = {tokens, kernel->outputs};
    Job job = {
        .x = x.data,
        .bias = bias.data,
        .weights = weights.data,
        .scales = scales.data,
        .tokens = tokens,
        .inputs = kernel->inputs,
        .outputs = kernel->outputs,
        .blocks = (kernel->inputs + BLOCK - 1) / BLOCK,
        .halves = 2 * ((kernel->inputs + BLOCK - 1) / BLOCK),
    };
    TRY(output_tensor(api, context, 0, dims, 2, (void **)&job.out));
    if (tokens == 0) return NULL;
    const size_t halves = (size_t)(tokens * job.halves);
    char *memory = malloc(halves * (HALF + sizeof(float) + sizeof(int32_t)) + ALIGNMENT);
    if (memory == NULL) return ort_CreateStatus(api, ORT_FAIL, "BlockLinear: out of memory");
    job.levels = (int8_t *)(memory + (ALIGNMENT - (uintptr_t)memory % ALIGNMENT) % ALIGNMENT);
    job.level_scales = (float *)(job.levels + halves * HALF);
    job.starts = (int32_t *)(job.level_scales + halves);
    OrtStatus *status = NULL;
    // Waking threads costs microseconds: what is quicker than that is done here.
    if (tokens > 1 && tokens * kernel->inputs >= INLINE_INPUTS)
        status = parallel(api, context, round_token, (size_t)tokens, &job);
    else
        for (int64_t token = 0; token < tokens; token++) round_token(&job, (size_t)token);
    const size_t tiles = (size_t)((job.outputs + TILE - 1) / TILE);
    if (status == NULL) status = parallel(api, context, multiply_tile, tiles, &job);
    free(memory);
    return status;
}

static OrtStatus *compute_embedding(void *data, OrtKernelContext *context) {
    const Kernel *kernel = data;
    API = kernel->api;
    Tensor ids, weights, scales;
    TRY(input_tensor(api, context, 0, &ids));
    TRY(input_tensor(api, context, 1, &weights));
    TRY(input_tensor(api, context, 2, &scales));
    TRY(check_weights(kernel, &weights, &scales));
    if (ids.rank != 1) return invalid(api, "BlockEmbedding: token_ids are not [tokens]");
    const int64_t dims[2] = {ids.dims[0], kernel->inputs};
    const int64_t blocks = (kernel->inputs + BLOCK - 1) / BLOCK;
    float *out;
    TRY(output_tensor(api, context, 0, dims, 2, (void **)&out));
    for (int64_t n = 0; n < dims[0]; n++) {
        const int64_t id = ((const int64_t *)ids.data)[n], tile = id / TILE, lane = id % TILE;
        if (id < 0 || id >= kernel->outputs) return invalid(api, "BlockEmbedding: no such token id");
        const uint8_t *levels = (const uint8_t *)weights.data + tile * blocks * BLOCK * TILE + lane * 4;
        const _Float16 *scale = (const _Float16 *)scales.data + tile * blocks * TILE + lane;
        for (int64_t i = 0; i < kernel->inputs; i++) {
            const int level = (int)levels[i / 4 * 4 * TILE + i % 4] - 128;
            out[n * kernel->inputs + i] = (float)level * (float)scale[i / BLOCK * TILE];
        }
    }
    return NULL;
}

static OrtStatus *create(const OrtCustomOp *op, API, const OrtKernelInfo *info, void **out) {
    (void)op;
    Kernel *kernel = malloc(sizeof *kernel);
    if (kernel == NULL) return ort_CreateStatus(api, ORT_FAIL, "BlockLinear: out of memory");
    *kernel = (Kernel){.api = api};
    OrtStatus *status = ort_KernelInfoGetAttribute_int64(api, info, "width_in", &kernel->inputs);
    if (status == NULL) status = ort_KernelInfoGetAttribute_int64(api, info, "width_out", &kernel->outputs);
    if (status == NULL && (kernel->inputs < 1 || kernel->outputs < 1))
        status = invalid(api, "BlockLinear: inputs and outputs must be positive");
    if (status != NULL) free(kernel);
    else *out = kernel;
    return status;
}

static const char *linear_name(const OrtCustomOp *op) { return (void)op, "BlockLinear"; }
static const char *embedding_name(const OrtCustomOp *op) { return (void)op, "BlockEmbedding"; }
static size_t four(const OrtCustomOp *op) { return (void)op, 4; }
static size_t three(const OrtCustomOp *op) { return (void)op, 3; }

static int linear_input(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index == 1 ? TENSOR_UINT8 : index == 2 ? TENSOR_FLOAT16 : TENSOR_FLOAT;
}

static int embedding_input(const OrtCustomOp *op, size_t index) {
    return index == 0 ? TENSOR_INT64 : linear_input(op, index);
}

static int linear_characteristic(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index < 3 ? INPUT_REQUIRED : INPUT_OPTIONAL;
}

const OrtCustomOp block_linear_op = {
    COMMON_OP,
    .GetName = linear_name,
    .GetInputType = linear_input,
    .GetInputTypeCount = four,
    .GetOutputTypeCount = one_tensor,
    .KernelDestroy = free,
    .GetInputCharacteristic = linear_characteristic,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute_linear,
};

const OrtCustomOp block_embedding_op = {
    COMMON_OP,
    .GetName = embedding_name,
    .GetInputType = embedding_input,
    .GetInputTypeCount = three,
    .GetOutputTypeCount = one_tensor,
    .KernelDestroy = free,
    .GetInputCharacteristic = all_required,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute_embedding,
};
