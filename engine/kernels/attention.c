// The operator SinkAttention: rotation, cache and attention of one layer, for all rows of a step at once.
//
// Inputs:
//   qkv     float32 [tokens, (heads + 2 * kv_heads) * dim], queries already scaled
//   angles  float32 [tokens, 4, rotary_dim / 2]: cosine and sine at token_index, then at cache position
//   rows    int64 [rows, 7]: kv_slot, number of tokens, start, sinks, window, ring, window_start
//   cache   uint8 [layers, slots, 2 * kv_heads, bytes]: keys and values of a head in turn, written in place
//   q_norm, k_norm  float32 [dim], if the model has them
// Output: float32 [tokens, heads * dim].
//
// Rows lie one after another in the flat batch of tokens. For each row and KV head three things happen in
// order, spread over ONNX Runtime's own threads: own keys and values go into scratch; attention, in tasks;
// the last of these to end puts parts together and writes into the ring, as nobody reads it any more. A query at
// token_index i sees key j iff j <= i and (j < sinks or j > i - window), and j >= window_start unless a sink.
// How a row is cut into tasks depends on that row alone, so its result does not depend on its company.
#include "attention.h"

#include <stdlib.h>

#include "tensors.h"

enum { ROW_FIELDS = 7, PART_BLOCKS = 16, ALIGNMENT = 64, MAX_GROUP_FLOATS = 1 << 14 };

typedef struct {
    const OrtApi *api;
    int64_t layer, heads, kv_heads, dim, rotary_dim, kv_bytes, qk_norm;
    float epsilon;
} Kernel;

typedef struct {
    char *next;
} Arena;

static void *take(Arena *arena, size_t bytes) {
    char *taken = arena->next;
    arena->next += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return taken;
}

static OrtStatus *check_row(const Kernel *kernel, const Job *job, const Tensor *cache, const int64_t *row,
                            int64_t tokens_left) {
    API = kernel->api;
    const int64_t slot = row[0], count = row[1], start = row[2], sinks = row[3], window = row[4],
                  ring = row[5];
    if (slot < 0 || slot >= cache->dims[1]) return invalid(api, "SinkAttention: kv_slot out of range");
    if (count < 1 || count > tokens_left) return invalid(api, "SinkAttention: more tokens in rows than in qkv");
    if (start < 0 || sinks < 0 || window < 1) return invalid(api, "SinkAttention: no such window");
    if (ring < 1 || ring < window - 1 || ring > job->places || sinks + ring > job->places)
        return invalid(api, "SinkAttention: the ring does not fit the kv_slot");
    return NULL;
}

static void describe_row(const Job *job, Row *row, const int64_t *fields, Arena *arena) {
    const int64_t first_kept = fields[6] > row->sinks ? fields[6] : row->sinks;
    const int64_t reach = row->start - first_kept;
    row->reach = (int32_t)(reach > row->window ? row->window : reach < -row->count ? -row->count : reach);
    row->past_blocks = num_blocks_of(row->sinks + row->ring);
    row->own_blocks = num_blocks_of(row->count);
    const int32_t all_blocks = row->past_blocks + row->own_blocks;
    row->distance = take(arena, (size_t)all_blocks * LANES * sizeof(int32_t));
    row->blocks = take(arena, (size_t)all_blocks * sizeof(Block));
    row->own = take(arena, 2 * (size_t)job->kv_heads * row->own_blocks * block_bytes(job));
    const int32_t cached_sinks = (int32_t)(row->start < row->sinks ? row->start : row->sinks);
    const int32_t own_sinks = (int32_t)(row->start < row->sinks ? row->sinks - row->start : 0);
    const int32_t newest = row->start > row->sinks ? place_of(row, row->start - 1) : -1;
    const int32_t oldest = min_int(row->reach, row->window - 1);
    row->num_blocks = 0;
    for (int32_t block = 0; block < row->past_blocks; block++) {
        int32_t *distance = row->distance + block * LANES, nearest = INT32_MAX;
        for (int32_t lane = 0; lane < LANES; lane++) {
            const int32_t place = block * LANES + lane;
            int32_t d = newest - place + 1 + (place > newest ? row->ring : 0);
            if (newest < 0 || place < row->sinks || place >= row->sinks + row->ring) d = INT32_MAX;
            if (place < cached_sinks) d = 1;
            distance[lane] = d;
            nearest = min_int(nearest, d);
        }
        const int32_t sinks = max_int(0, min_int(LANES, cached_sinks - block * LANES));
        if (sinks == 0 && nearest > oldest) continue;  // nothing that any query of this row sees
        row->blocks[row->num_blocks++] = (Block){block, sinks, LANES};
    }
    for (int32_t block = 0; block < row->own_blocks; block++) {
        int32_t *distance = row->distance + (row->past_blocks + block) * LANES;
        const int32_t from = block * LANES;
        for (int32_t n = from; n < from + LANES; n++) distance[n - from] = n < row->count ? -n : INT32_MAX;
        const int32_t sinks = max_int(0, min_int(LANES, own_sinks - from));
        const int32_t lanes = min_int(LANES, row->count - from);
        row->blocks[row->num_blocks++] = (Block){row->past_blocks + block, min_int(sinks, lanes), lanes};
    }
    row->left = take(arena, (size_t)job->kv_heads * sizeof *row->left);
    row->tile = max_int(1, QUERIES / job->group);
    row->parts = row->count <= row->tile ? max_int(1, row->num_blocks / PART_BLOCKS) : 1;
    size_t queries = (size_t)row->count * job->heads;
    if (row->parts > 1)
        row->partial = take(arena, queries * row->parts * partial_stride(job) * sizeof(float));
}

static void add_tasks(Job *job, int32_t number) {
    const Row *row = &job->rows[number];
    for (int32_t head = 0; head < job->kv_heads; head++) {
        atomic_init(&row->left[head], row->parts * ((row->count + row->tile - 1) / row->tile));
        for (int32_t from = 0; from < row->count; from += row->tile)
            for (int32_t part = 0; part < row->parts; part++)
                job->tasks[job->num_tasks++] = (Task){
                    .row = number,
                    .kv_head = head,
                    .from = from,
                    .to = min_int(row->count, from + row->tile),
                    .first_block = (int32_t)((int64_t)row->num_blocks * part / row->parts),
                    .end_block = (int32_t)((int64_t)row->num_blocks * (part + 1) / row->parts),
                    .part = part,
                };
    }
}

// Rows of several tiles are prepared before any of them; a row of one tile by the task that needs it.
static int is_one_tile(const Row *row) { return row->count <= row->tile; }

static void run_prepare(void *data, size_t index) {
    const Job *job = data;
    const int32_t row = (int32_t)(index / job->kv_heads), head = (int32_t)(index % job->kv_heads);
    if (is_one_tile(&job->rows[row])) return;
    (job->kv_bytes == 2 ? prepare_half : prepare_float)(job, row, head);
}

static void run_task(void *data, size_t index) {
    const Job *job = data;
    const Task *task = &job->tasks[index];
    const Row *row = &job->rows[task->row];
    const int half = job->kv_bytes == 2;
    // A row's own keys come last, so only its last part reads them.
    if (is_one_tile(row) && task->part == row->parts - 1)
        (half ? prepare_half : prepare_float)(job, task->row, task->kv_head);
    (half ? attend_half : attend_float)(job, task);
    if (atomic_fetch_sub(&row->left[task->kv_head], 1) == 1)
        (half ? finish_half : finish_float)(job, task->row, task->kv_head);
}

static size_t scratch_bytes(const Job *job, const int64_t *rows, size_t *num_tasks) {
    size_t bytes = (size_t)job->num_rows * sizeof(Row) + ALIGNMENT;
    const int64_t tile = max_int(1, QUERIES / job->group);
    *num_tasks = 0;
    for (int32_t n = 0; n < job->num_rows; n++, rows += ROW_FIELDS) {
        const int64_t past = num_blocks_of((int32_t)(rows[3] + rows[5]));
        const int64_t own = num_blocks_of((int32_t)rows[1]);
        const int64_t parts = rows[1] <= tile ? max_int(1, (int32_t)(past + own) / PART_BLOCKS) : 1;
        bytes += (past + own) * (LANES * sizeof(int32_t) + sizeof(Block));
        bytes += 2 * job->kv_heads * own * block_bytes(job);
        bytes += rows[1] * job->heads * parts * partial_stride(job) * sizeof(float);
        bytes += job->kv_heads * sizeof(atomic_int) + 5 * ALIGNMENT;
        *num_tasks += (size_t)(job->kv_heads * ((rows[1] + tile - 1) / tile) * parts);
    }
    return bytes + *num_tasks * sizeof(Task) + ALIGNMENT;
}

static OrtStatus *run_job(const Kernel *kernel, const OrtKernelContext *context, Job *job,
                          const Tensor *cache, const int64_t *rows, int64_t tokens) {
    API = kernel->api;
    int64_t first = 0;
    for (int32_t n = 0; n < job->num_rows; n++) {
        TRY(check_row(kernel, job, cache, rows + n * ROW_FIELDS, tokens - first));
        first += rows[n * ROW_FIELDS + 1];
    }
    if (first != tokens) return invalid(api, "SinkAttention: tokens that belong to no row");
    size_t num_tasks;
    const size_t bytes = scratch_bytes(job, rows, &num_tasks);
    char *memory = malloc(bytes);
    if (memory == NULL) return ort_CreateStatus(api, ORT_FAIL, "SinkAttention: out of memory");
    Arena arena = {memory + (ALIGNMENT - (uintptr_t)memory % ALIGNMENT) % ALIGNMENT};
    const size_t slot_bytes = (size_t)(cache->dims[2] * cache->dims[3]);
    char *layer = (char *)cache->data + (size_t)(kernel->layer * cache->dims[1]) * slot_bytes;
    job->rows = take(&arena, job->num_rows * sizeof(Row));
    job->tasks = take(&arena, num_tasks * sizeof(Task));
    int several_tiles = 0;
    first = 0;
    for (int32_t n = 0; n < job->num_rows; n++) {
        const int64_t *fields = rows + n * ROW_FIELDS;
        job->rows[n] = (Row){
            .first = (int32_t)first,
            .count = (int32_t)fields[1],
            .start = fields[2],
            .sinks = (int32_t)fields[3],
            .window = (int32_t)fields[4],
            .ring = (int32_t)fields[5],
            .slot = layer + (size_t)fields[0] * slot_bytes,
        };
        describe_row(job, &job->rows[n], fields, &arena);
        add_tasks(job, n);
        several_tiles |= !is_one_tile(&job->rows[n]);
        first += fields[1];
    }
    OrtStatus *status = NULL;
    if (several_tiles)
        status = parallel(api, context, run_prepare, (size_t)job->num_rows * job->kv_heads, job);
    if (status == NULL) status = parallel(api, context, run_task, job->num_tasks, job);
    free(memory);
    return status;
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
    const Kernel *kernel = data;
    API = kernel->api;
    Tensor qkv, angles, rows, cache, q_norm = {0}, k_norm = {0};
    TRY(input_tensor(api, context, 0, &qkv));
    TRY(input_tensor(api, context, 1, &angles));
    TRY(input_tensor(api, context, 2, &rows));
    TRY(input_tensor(api, context, 3, &cache));
    if (kernel->qk_norm) {
        TRY(input_tensor(api, context, 4, &q_norm));
        TRY(input_tensor(api, context, 5, &k_norm));
        if (q_norm.rank != 1 || q_norm.dims[0] != kernel->dim || k_norm.rank != 1 ||
            k_norm.dims[0] != kernel->dim)
            return invalid(api, "SinkAttention: a norm is not [dim]");
    }
    const int64_t width = (kernel->heads + 2 * kernel->kv_heads) * kernel->dim;
    const int64_t padded = num_blocks_of((int32_t)kernel->dim) * LANES;
    const int64_t tokens = qkv.dims[0];
    if (qkv.rank != 2 || qkv.dims[1] != width || tokens > INT32_MAX / width)
        return invalid(api, "SinkAttention: qkv is not [tokens, heads * dim]");
    if (angles.rank != 3 || angles.dims[0] != tokens || angles.dims[1] != 4 ||
        angles.dims[2] != kernel->rotary_dim / 2)
        return invalid(api, "SinkAttention: angles are not [tokens, 4, rotary_dim / 2]");
    if (rows.rank != 2 || rows.dims[1] != ROW_FIELDS) return invalid(api, "SinkAttention: rows are not [rows, 7]");
    const int64_t places = cache.rank == 4 ? cache.dims[3] / (padded * kernel->kv_bytes) : 0;
    if (cache.rank != 4 || cache.dims[0] <= kernel->layer || cache.dims[2] != 2 * kernel->kv_heads ||
        places % LANES || places > INT32_MAX || places * padded * kernel->kv_bytes != cache.dims[3])
        return invalid(api, "SinkAttention: cache is not [layers, slots, 2 * kv_heads, bytes]");
    Job job = {
        .heads = (int32_t)kernel->heads,
        .kv_heads = (int32_t)kernel->kv_heads,
        .group = (int32_t)(kernel->heads / kernel->kv_heads),
        .dim = (int32_t)kernel->dim,
        .dim_padded = (int32_t)padded,
        .half = (int32_t)(kernel->rotary_dim / 2),
        .kv_bytes = (int32_t)kernel->kv_bytes,
        .places = (int32_t)places,
        .num_rows = (int32_t)rows.dims[0],
        .epsilon = kernel->epsilon,
        .qkv = qkv.data,
        .angles = angles.data,
        .q_norm = q_norm.data,
        .k_norm = k_norm.data,
    };
    const int64_t dims[2] = {tokens, kernel->heads * kernel->dim};
    TRY(output_tensor(api, context, 0, dims, 2, (void **)&job.out));
    return run_job(kernel, context, &job, &cache, rows.data, tokens);
}

static OrtStatus *create(const OrtCustomOp *op, API, const OrtKernelInfo *info, void **out) {
    (void)op;
    Kernel kernel = {.api = api};
    TRY(ort_KernelInfoGetAttribute_int64(api, info, "layer", &kernel.layer));
    TRY(ort_KernelInfoGetAttribute_int64(api, info, "heads", &kernel.heads));
    TRY(ort_KernelInfoGetAttribute_int64(api, info, "kv_heads", &kernel.kv_heads));
    TRY(ort_KernelInfoGetAttribute_int64(api, info, "dim", &kernel.dim));
    TRY(ort_KernelInfoGetAttribute_int64(api, info, "rotary_dim", &kernel.rotary_dim));
    TRY(ort_KernelInfoGetAttribute_int64(api, info, "kv_bytes", &kernel.kv_bytes));
    TRY(ort_KernelInfoGetAttribute_int64(api, info, "qk_norm", &kernel.qk_norm));
    TRY(ort_KernelInfoGetAttribute_float(api, info, "epsilon", &kernel.epsilon));
    if (kernel.layer < 0 || kernel.kv_heads < 1 || kernel.dim < 1 || kernel.heads < kernel.kv_heads ||
        kernel.heads % kernel.kv_heads || kernel.rotary_dim < 0 || kernel.rotary_dim % 2 ||
        kernel.rotary_dim > kernel.dim || (kernel.kv_bytes != 2 && kernel.kv_bytes != 4) ||
        // Queries of a group are kept on the stack.
        kernel.heads / kernel.kv_heads * kernel.dim > MAX_GROUP_FLOATS)
        return invalid(api, "SinkAttention: attributes of no such attention");
    Kernel *kept = malloc(sizeof *kept);
    if (kept == NULL) return ort_CreateStatus(api, ORT_FAIL, "SinkAttention: out of memory");
    *kept = kernel;
    *out = kept;
    return NULL;
}

static const char *name(const OrtCustomOp *op) { return (void)op, "SinkAttention"; }
static size_t num_inputs(const OrtCustomOp *op) { return (void)op, 6; }

static int input_type(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index == 2 ? TENSOR_INT64 : index == 3 ? TENSOR_UINT8 : TENSOR_FLOAT;
}

static int characteristic(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index < 4 ? INPUT_REQUIRED : INPUT_OPTIONAL;
}

const OrtCustomOp sink_attention_op = {
    COMMON_OP,
    .GetName = name,
    .GetInputType = input_type,
    .GetInputTypeCount = num_inputs,
    .GetOutputTypeCount = one_tensor,
    .KernelDestroy = free,
    .GetInputCharacteristic = characteristic,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
};
