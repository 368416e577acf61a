// The entry point that ONNX Runtime calls when the library is registered with a session.
#include "tensors.h"

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base);

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static OrtCustomOpDomain *domain;  // sessions refer to it for as long as they live
    const OrtApi *api = base->GetApi(ORT_ABI_VERSION);
    if (domain == NULL) {
        OrtCustomOpDomain *fresh;
        TRY(ort_CreateCustomOpDomain(api, "sinkserve", &fresh));
        TRY(ort_CustomOpDomain_Add(api, fresh, &sink_attention_op));
        TRY(ort_CustomOpDomain_Add(api, fresh, &swiglu_op));
        domain = fresh;
    }
    return ort_AddCustomOpDomain(api, options, domain);
}
