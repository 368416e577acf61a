// The part of ONNX Runtime's C interface that custom operators need, declared by hand: wheels carry no
// headers. OrtApi is a table of functions that only ever grows at its end, so an index means the same
// function in every release since the one that added it (ParallelFor: 1.17, the newest used here).
// Source: include/onnxruntime/core/session/onnxruntime_c_api.h, MIT licence, microsoft/onnxruntime.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum { ORT_ABI_VERSION = 17 };

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;

typedef void (*OrtAnyFunction)(void);
typedef OrtAnyFunction OrtApi;  // const OrtApi *: the table

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { TENSOR_FLOAT = 1, TENSOR_UINT8 = 2, TENSOR_INT64 = 7, TENSOR_FLOAT16 = 10 };
enum { INPUT_REQUIRED = 0, INPUT_OPTIONAL = 1 };

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    int (*GetInputType)(const OrtCustomOp *, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    int (*GetOutputType)(const OrtCustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *, OrtKernelContext *);
    void (*KernelDestroy)(void *);
    int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, OrtShapeInferContext *);
    int (*GetStartVersion)(const OrtCustomOp *);
    int (*GetEndVersion)(const OrtCustomOp *);
    size_t (*GetMayInplace)(int **, int **);
    void (*ReleaseMayInplace)(int *, int *);
    size_t (*GetAliasMap)(int **, int **);
    void (*ReleaseAliasMap)(int *, int *);
};

#define API const OrtApi *api
#define ORT_FUNCTION(index, name, signature, parameters, arguments)                                        \
    static inline OrtStatus *ort_##name parameters {                                                      \
        return ((OrtStatus * (*) signature) api[index]) arguments;                                         \
    }

ORT_FUNCTION(0, CreateStatus, (int, const char *), (API, int code, const char *text), (code, text))
ORT_FUNCTION(26, CreateCustomOpDomain, (const char *, OrtCustomOpDomain **),
             (API, const char *name, OrtCustomOpDomain **out), (name, out))
ORT_FUNCTION(27, CustomOpDomain_Add, (OrtCustomOpDomain *, const OrtCustomOp *),
             (API, OrtCustomOpDomain *domain, const OrtCustomOp *op), (domain, op))
ORT_FUNCTION(28, AddCustomOpDomain, (OrtSessionOptions *, OrtCustomOpDomain *),
             (API, OrtSessionOptions *options, OrtCustomOpDomain *domain), (options, domain))
ORT_FUNCTION(51, GetTensorMutableData, (OrtValue *, void **), (API, OrtValue *value, void **out),
             (value, out))
ORT_FUNCTION(61, GetDimensionsCount, (const OrtTensorTypeAndShapeInfo *, size_t *),
             (API, const OrtTensorTypeAndShapeInfo *info, size_t *out), (info, out))
ORT_FUNCTION(62, GetDimensions, (const OrtTensorTypeAndShapeInfo *, int64_t *, size_t),
             (API, const OrtTensorTypeAndShapeInfo *info, int64_t *out, size_t count), (info, out, count))
ORT_FUNCTION(65, GetTensorTypeAndShape, (const OrtValue *, OrtTensorTypeAndShapeInfo **),
             (API, const OrtValue *value, OrtTensorTypeAndShapeInfo **out), (value, out))
ORT_FUNCTION(85, KernelInfoGetAttribute_float, (const OrtKernelInfo *, const char *, float *),
             (API, const OrtKernelInfo *info, const char *name, float *out), (info, name, out))
ORT_FUNCTION(86, KernelInfoGetAttribute_int64, (const OrtKernelInfo *, const char *, int64_t *),
             (API, const OrtKernelInfo *info, const char *name, int64_t *out), (info, name, out))
ORT_FUNCTION(88, KernelContext_GetInputCount, (const OrtKernelContext *, size_t *),
             (API, const OrtKernelContext *context, size_t *out), (context, out))
ORT_FUNCTION(90, KernelContext_GetInput, (const OrtKernelContext *, size_t, const OrtValue **),
             (API, const OrtKernelContext *context, size_t index, const OrtValue **out),
             (context, index, out))
ORT_FUNCTION(91, KernelContext_GetOutput,
             (OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **),
             (API, OrtKernelContext *context, size_t index, const int64_t *dims, size_t count,
              OrtValue **out),
             (context, index, dims, count, out))
ORT_FUNCTION(274, KernelContext_ParallelFor,
             (const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *),
             (API, const OrtKernelContext *context, void (*function)(void *, size_t), size_t total,
              size_t batches, void *data),
             (context, function, total, batches, data))

static inline void ort_ReleaseTensorTypeAndShapeInfo(API, OrtTensorTypeAndShapeInfo *info) {
    ((void (*)(OrtTensorTypeAndShapeInfo *))api[99])(info);
}
