// SwiGLU: gate * sigmoid(gate) * up over [tokens, 2 * inner] = [gate | up], result [tokens, inner].
#include <stdlib.h>

#include "simd.h"
#include "tensors.h"

enum { PIECE = 512 };

typedef struct {
    const float *in;
    float *out;
    size_t inner, pieces;
} Job;

INLINE Floats gated(Floats gate, Floats up) {
    Floats e = exp_of_negative(choose(gate > 0.0f, -gate, gate));
    Floats sigmoid = choose(gate > 0.0f, splat(1.0f), e) / (e + 1.0f);
    return gate * sigmoid * up;
}

static void run_piece(void *data, size_t index) {
    const Job *job = data;
    size_t token = index / job->pieces, from = index % job->pieces * PIECE;
    size_t count = job->inner - from < PIECE ? job->inner - from : PIECE;
    const float *gate = job->in + token * 2 * job->inner + from, *up = gate + job->inner;
    float *out = job->out + token * job->inner + from;
    size_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store_float(out + i, gated(load_float(gate + i), load_float(up + i)));
    if (i < count) {
        float rest[3][LANES] = {0};
        memcpy(rest[0], gate + i, (count - i) * sizeof(float));
        memcpy(rest[1], up + i, (count - i) * sizeof(float));
        store_float(rest[2], gated(load_float(rest[0]), load_float(rest[1])));
        memcpy(out + i, rest[2], (count - i) * sizeof(float));
    }
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    API = kernel;
    Tensor in;
    Job job;
    TRY(input_tensor(api, context, 0, &in));
    if (in.rank != 2 || in.dims[1] % 2) return invalid(api, "SwiGLU: not [tokens, 2 * inner]");
    int64_t dims[2] = {in.dims[0], in.dims[1] / 2};
    TRY(output_tensor(api, context, 0, dims, 2, (void **)&job.out));
    job.in = in.data;
    job.inner = (size_t)dims[1];
    job.pieces = (job.inner + PIECE - 1) / PIECE;
    size_t total = (size_t)dims[0] * job.pieces;
    // Waking another thread costs more than a few thousand exponentials.
    if (total >= 16) return parallel(api, context, run_piece, total, &job);
    for (size_t i = 0; i < total; i++) run_piece(&job, i);
    return NULL;
}

static OrtStatus *create(const OrtCustomOp *op, API, const OrtKernelInfo *info, void **kernel) {
    (void)op, (void)info;
    *kernel = (void *)api;
    return NULL;
}

static void destroy(void *kernel) { (void)kernel; }
static const char *name(const OrtCustomOp *op) { return (void)op, "SwiGLU"; }

const OrtCustomOp swiglu_op = {
    COMMON_OP,
    .GetName = name,
    .GetInputType = float_tensor,
    .GetInputTypeCount = one_tensor,
    .GetOutputTypeCount = one_tensor,
    .KernelDestroy = destroy,
    .GetInputCharacteristic = all_required,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
};
