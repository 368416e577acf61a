// The entry point that ONNX Runtime calls when the library is registered with a session.
#include "tensors.h"

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base);

static const OrtCustomOp *const all_ops[] = {
    &sink_attention_op, &swiglu_op, &add_norm_op, &block_linear_op, &block_embedding_op,
    &all_reduce_op,
};

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static OrtCustomOpDomain *domain;  // sessions refer to it for as long as they live
    const OrtApi *api = base->GetApi(ORT_ABI_VERSION);
    if (domain == NULL) {
        OrtCustomOpDomain *fresh;
        TRY(ort_CreateCustomOpDomain(api, "sinkserve", &fresh));
        for (size_t i = 0; i < sizeof all_ops / sizeof *all_ops; i++)
            TRY(ort_CustomOpDomain_Add(api, fresh, all_ops[i]));
        domain = fresh;
    }
    return ort_AddCustomOpDomain(api, options, domain);
}
