// AddNorm: x + delta, and the RMS norm of that over the last axis times a weight.
//
// Inputs float32 [tokens, width], [tokens, width], [width]; outputs the norm, then the sum.
#include <stdlib.h>

#include "simd.h"
#include "tensors.h"

enum { INLINE_FLOATS = 1 << 14 };

typedef struct {
    const OrtApi *api;
    float epsilon;
} Kernel;

typedef struct {
    const float *x, *delta, *weight;
    float *normed, *sum;
    int64_t width;
    float epsilon;
} Job;

static void run_token(void *data, size_t token) {
    const Job *job = data;
    const int64_t width = job->width, whole = width / LANES * LANES;
    const float *x = job->x + token * width, *delta = job->delta + token * width;
    float *sum = job->sum + token * width, *normed = job->normed + token * width;
    Floats squares = splat(0.0f);
    float rest = 0.0f;
    for (int64_t i = 0; i < whole; i += LANES) {
        Floats both = load_float(x + i) + load_float(delta + i);
        store_float(sum + i, both);
        squares += both * both;
    }
    for (int64_t i = whole; i < width; i++) {
        sum[i] = x[i] + delta[i];
        rest += sum[i] * sum[i];
    }
    const float scale = 1.0f / sqrtf((sum_of(squares) + rest) / (float)width + job->epsilon);
    for (int64_t i = 0; i < whole; i += LANES)
        store_float(normed + i, load_float(sum + i) * scale * load_float(job->weight + i));
    for (int64_t i = whole; i < width; i++) normed[i] = sum[i] * scale * job->weight[i];
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
    const Kernel *kernel = data;
    API = kernel->api;
    Tensor x, delta, weight;
    TRY(input_tensor(api, context, 0, &x));
    TRY(input_tensor(api, context, 1, &delta));
    TRY(input_tensor(api, context, 2, &weight));
    if (x.rank != 2 || delta.rank != 2 || weight.rank != 1 || delta.dims[0] != x.dims[0] ||
        delta.dims[1] != x.dims[1] || weight.dims[0] != x.dims[1])
        return invalid(api, "AddNorm: not [tokens, width] twice and [width]");
    Job job = {
        .x = x.data,
        .delta = delta.data,
        .weight = weight.data,
        .width = x.dims[1],
        .epsilon = kernel->epsilon,
    };
    TRY(output_tensor(api, context, 0, x.dims, 2, (void **)&job.normed));
    TRY(output_tensor(api, context, 1, x.dims, 2, (void **)&job.sum));
    const size_t tokens = (size_t)x.dims[0];
    if (x.dims[0] * x.dims[1] >= INLINE_FLOATS)
        return parallel(api, context, run_token, tokens, &job);
    for (size_t token = 0; token < tokens; token++) run_token(&job, token);
    return NULL;
}

static OrtStatus *create(const OrtCustomOp *op, API, const OrtKernelInfo *info, void **out) {
    (void)op;
    float epsilon;
    TRY(ort_KernelInfoGetAttribute_float(api, info, "epsilon", &epsilon));
    Kernel *kernel = malloc(sizeof *kernel);
    if (kernel == NULL) return ort_CreateStatus(api, ORT_FAIL, "AddNorm: out of memory");
    *kernel = (Kernel){api, epsilon};
    *out = kernel;
    return NULL;
}

static const char *name(const OrtCustomOp *op) { return (void)op, "AddNorm"; }
static size_t three(const OrtCustomOp *op) { return (void)op, 3; }
static size_t two(const OrtCustomOp *op) { return (void)op, 2; }

const OrtCustomOp add_norm_op = {
    COMMON_OP,
    .GetName = name,
    .GetInputType = float_tensor,
    .GetInputTypeCount = three,
    .GetOutputTypeCount = two,
    .KernelDestroy = free,
    .GetInputCharacteristic = all_required,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
};
