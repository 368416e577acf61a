// Tensors of an operator's inputs and outputs, and what an operator declares of itself.
#pragma once

#include "ort_abi.h"

enum { MAX_DIMENSIONS = 8 };

typedef struct {
    void *data;
    int64_t dims[MAX_DIMENSIONS];
    size_t rank;
} Tensor;

#define TRY(call)                           \
    do {                                    \
        OrtStatus *status_ = (call);        \
        if (status_ != NULL) return status_; \
    } while (0)

static inline OrtStatus *invalid(API, const char *text) {
    return ort_CreateStatus(api, ORT_INVALID_ARGUMENT, text);
}

static inline OrtStatus *input_tensor(API, const OrtKernelContext *context, size_t index, Tensor *out) {
    const OrtValue *value;
    OrtTensorTypeAndShapeInfo *info;
    TRY(ort_KernelContext_GetInput(api, context, index, &value));
    if (value == NULL) return invalid(api, "an input is missing");
    TRY(ort_GetTensorMutableData(api, (OrtValue *)value, &out->data));
    TRY(ort_GetTensorTypeAndShape(api, value, &info));
    OrtStatus *status = ort_GetDimensionsCount(api, info, &out->rank);
    if (status == NULL && out->rank > MAX_DIMENSIONS) status = invalid(api, "an input has too many axes");
    if (status == NULL) status = ort_GetDimensions(api, info, out->dims, out->rank);
    ort_ReleaseTensorTypeAndShapeInfo(api, info);
    return status;
}

static inline OrtStatus *output_tensor(API, OrtKernelContext *context, size_t index,
                                       const int64_t *dims, size_t rank, void **out) {
    OrtValue *value;
    TRY(ort_KernelContext_GetOutput(api, context, index, dims, rank, &value));
    return ort_GetTensorMutableData(api, value, out);
}

// Run function(data, 0) .. function(data, total - 1) on ONNX Runtime's threads, in a few pieces for each, so that
// a thread that is kept waiting does not hold up the others.
static inline OrtStatus *parallel(API, const OrtKernelContext *context, void (*function)(void *, size_t),
                                  size_t total, void *data) {
    const size_t pieces = 16;
    return ort_KernelContext_ParallelFor(api, context, function, total, total < pieces ? total : pieces, data);
}

static inline const char *default_provider(const OrtCustomOp *op) { return (void)op, NULL; }
static inline size_t one_tensor(const OrtCustomOp *op) { return (void)op, 1; }

static inline int float_tensor(const OrtCustomOp *op, size_t index) {
    return (void)op, (void)index, TENSOR_FLOAT;
}

static inline int all_required(const OrtCustomOp *op, size_t index) {
    return (void)op, (void)index, INPUT_REQUIRED;
}

static inline int default_memory(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, 0; }

// What all operators here have in common: the CPU, and float32 results that are always there.
#define COMMON_OP                                                                              \
    .version = ORT_ABI_VERSION, .GetExecutionProviderType = default_provider,                  \
    .GetOutputType = float_tensor, .GetOutputCharacteristic = all_required, .GetInputMemoryType = default_memory

extern const OrtCustomOp sink_attention_op, swiglu_op, block_linear_op, block_embedding_op, add_norm_op,
    all_reduce_op;
