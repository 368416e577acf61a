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

static inline OrtStatus *output_tensor(API, OrtKernelContext *context, const int64_t *dims, size_t rank,
                                       void **out) {
    OrtValue *value;
    TRY(ort_KernelContext_GetOutput(api, context, 0, dims, rank, &value));
    return ort_GetTensorMutableData(api, value, out);
}

extern const OrtCustomOp sink_attention_op;
extern const OrtCustomOp swiglu_op;
