// AllReduce: the sum of a float32 tensor over tensor-parallel ranks, by a function of the runtime's.
//
// Inputs float32 [tokens, width] and int64 [2]: the function's address and what to call it with first.
// It adds up the ranks' `count` floats in place and returns 0, or anything else when it could not.
#include <string.h>

#include "tensors.h"

typedef int (*Reduce)(void *context, float *values, int64_t count);

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    API = kernel;
    Tensor in, reducer;
    float *out;
    TRY(input_tensor(api, context, 0, &in));
    TRY(input_tensor(api, context, 1, &reducer));
    if (in.rank != 2) return invalid(api, "AllReduce: not [tokens, width]");
    if (reducer.rank != 1 || reducer.dims[0] != 2) return invalid(api, "AllReduce: no function to call");
    TRY(output_tensor(api, context, 0, in.dims, 2, (void **)&out));
    const int64_t *given = reducer.data, count = in.dims[0] * in.dims[1];
    if (given[0] == 0) return invalid(api, "AllReduce: no function to call");
    memcpy(out, in.data, (size_t)count * sizeof *out);
    Reduce reduce = (Reduce)(intptr_t)given[0];
    if (reduce((void *)(intptr_t)given[1], out, count) != 0)
        return ort_CreateStatus(api, ORT_FAIL, "AllReduce: the ranks did not add up");
    return NULL;
}

static OrtStatus *create(const OrtCustomOp *op, API, const OrtKernelInfo *info, void **kernel) {
    (void)op, (void)info;
    *kernel = (void *)api;
    return NULL;
}

static void destroy(void *kernel) { (void)kernel; }
static const char *name(const OrtCustomOp *op) { return (void)op, "AllReduce"; }
static size_t two_tensors(const OrtCustomOp *op) { return (void)op, 2; }
static int input_type(const OrtCustomOp *op, size_t index) {
    return (void)op, index == 0 ? TENSOR_FLOAT : TENSOR_INT64;
}

const OrtCustomOp all_reduce_op = {
    COMMON_OP,
    .GetName = name,
    .GetInputType = input_type,
    .GetInputTypeCount = two_tensors,
    .GetOutputTypeCount = one_tensor,
    .KernelDestroy = destroy,
    .GetInputCharacteristic = all_required,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
};
