// YoloLayer: the raw heads of all levels become dense rows, one an anchor and cell.
//
// A block makes ROWS consecutive rows of one picture; a warp reads one slice of the channels for them, so that
// consecutive threads read consecutive columns. The finished rows go through shared memory and leave in one piece.
// Every row is written; no atomics, no workspace: the kernel can be an ahead-of-time TensorRT plugin, whose arguments
// are the inputs, 32-bit integers, then the outputs.
// A row whose raw objectness is below the float with the bits `least_objectness` becomes zeros (FULL_ROWS 0 only): a
// caller that will drop it anyway, since its score cannot exceed its objectness, saves the reading of its classes. Minus
// infinity keeps all rows.
// Grid:    x = rows of a picture / 32, y = pictures; block 256.
// Heads:   a level [pictures, ANCHORS * (5 + NC), height, width], float32 or half, before the sigmoid.
// Output:  float32 [pictures, rows, 6]: left, top, right, bottom, objectness x best class probability, class index
//          (FULL_ROWS 0), or [pictures, rows, 5 + NC]: centre x, centre y, width, height, objectness, class
//          probabilities (FULL_ROWS 1). Row order: level, anchor, row, column.
// Cost:    reads the heads and writes the rows once: yolov5n 640, best: 8.6 MB (fp16 heads 4.3) + 0.6 MB a picture;
//          with a least objectness that few rows reach, 0.1 MB of the heads.
//
// The formulas are YOLOv5's (models/yolo.py, Detect.forward), in float32, in the order of yolotrt/postprocess.py.
//
// Segmentation models have MASKS coefficients after the classes: FULL_ROWS 1 copies them, FULL_ROWS 0 leaves them to
// masks.cu, which takes those of the detections only.
//
// Macros: LEVELS 1..4, ANCHORS a level, ANCHOR_SIZES and STRIDES (comma-separated floats), NC, MASKS (optional), HALF_HEADS,
// FULL_ROWS.

#ifndef MASKS
#define MASKS 0
#endif

#define ROWS 32
#define SLICES 8
#define BLOCK (ROWS * SLICES)
#define BOX_VALUES 5
#define VALUES (BOX_VALUES + NC + MASKS)
#define BEST_VALUES 6

#if HALF_HEADS
typedef unsigned short Head;  // the bits of an IEEE half
#else
typedef float Head;
#endif

#ifdef __CUDACC__  // host builds bring their own conversion; cuda_fp16.h would need an installed toolkit
__device__ __forceinline__ float half_to_float(unsigned short bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

__constant__ float anchor_sizes[LEVELS * ANCHORS * 2] = {ANCHOR_SIZES};
__constant__ float strides[LEVELS] = {STRIDES};

__device__ __forceinline__ float load(const Head* value)
{
#if HALF_HEADS
    return half_to_float(*value);
#else
    return *value;
#endif
}

__device__ __forceinline__ float sigmoid(float raw)
{
    return 1.0f / (1.0f + expf(-raw));
}

// Whether sigmoid(raw) > sigmoid(best) in float32. Different raw values may share a sigmoid, and then the first class
// wins, so raw values decide only where their sigmoids are known to differ: two sigmoids within 2^-20 of each other
// (8 roundings of the float32 computation) have raw values within 2^-20 (1 + exp(larger)), which is below 0.003 while
// the larger is below 8; and above -80 no sigmoid of the larger underflows.
__device__ __forceinline__ bool is_better(float raw, float best)
{
    const float larger = fmaxf(raw, best);
    if (fabsf(raw - best) > 0.003f && larger < 8.0f && larger > -80.0f) return raw > best;
    return sigmoid(raw) > sigmoid(best);
}

// Where a row of the output lies in the heads.
struct Cell {
    const Head* head;  // its first channel
    int plane;         // values from one channel to the next
    int level, anchor, row, column;
};

__device__ __forceinline__ Cell locate(int row, int picture, const Head* const* heads, const int* heights,
                                       const int* widths)
{
    Cell cell = {};
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
        const int plane = heights[level] * widths[level];
        if (row >= 0 && row < ANCHORS * plane) {
            const int anchor = row / plane, position = row % plane;
            cell.head = heads[level] + ((long long)picture * ANCHORS + anchor) * VALUES * plane + position;
            cell.plane = plane;
            cell.level = level;
            cell.anchor = anchor;
            cell.row = position / widths[level];
            cell.column = position % widths[level];
        }
        row -= ANCHORS * plane;
    }
    return cell;
}

__device__ __forceinline__ float raw_value(const Cell& cell, int channel)
{
    return load(cell.head + (long long)channel * cell.plane);
}

// Channel 0..4 or a class's channel, decoded.
__device__ __forceinline__ float decode(const Cell& cell, int channel, float raw)
{
    if (channel >= BOX_VALUES + NC) return raw;
    const float value = sigmoid(raw);
    if (channel == 0) return (value * 2.0f - 0.5f + (float)cell.column) * strides[cell.level];
    if (channel == 1) return (value * 2.0f - 0.5f + (float)cell.row) * strides[cell.level];
    if (channel > 3) return value;
    const float twice = value * 2.0f;
    return twice * twice * anchor_sizes[(cell.level * ANCHORS + cell.anchor) * 2 + channel - 2];
}

#if !FULL_ROWS

#define SLICE_CLASSES ((NC + SLICES - 1) / SLICES)
#define IN_FLIGHT (SLICE_CLASSES < 16 ? SLICE_CLASSES : 16)  // loads issued before the first is needed

struct Best {
    float raw;
    int class_id;  // -1: no class
};

__device__ __forceinline__ Best best_class(const Cell& cell, int first, int end)
{
    Best best = {0.0f, -1};
    for (int start = first; start < end; start += IN_FLIGHT) {
        float raw[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) raw[i] = start + i < end ? raw_value(cell, BOX_VALUES + start + i) : 0.0f;
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i)
            if (start + i < end && (best.class_id < 0 || is_better(raw[i], best.raw))) best = {raw[i], start + i};
    }
    return best;
}

__device__ __forceinline__ void write_rows(const Cell& cell, bool inside, int row_count, float least_objectness,
                                           float* output)
{
    __shared__ float best_raws[SLICES][ROWS];
    __shared__ int best_classes[SLICES][ROWS];
    __shared__ float finished[ROWS * BEST_VALUES];
    const int lane = threadIdx.x % ROWS, slice = threadIdx.x / ROWS;

    Best best = {0.0f, -1};
    float box[BOX_VALUES] = {};
    const bool wanted = inside && !(raw_value(cell, BOX_VALUES - 1) < least_objectness);
    if (wanted) {
        if (slice == 0) {
#pragma unroll
            for (int channel = 0; channel < BOX_VALUES; ++channel) box[channel] = raw_value(cell, channel);
        }
        best = best_class(cell, slice * SLICE_CLASSES, min((slice + 1) * SLICE_CLASSES, NC));
    }
    best_raws[slice][lane] = best.raw;
    best_classes[slice][lane] = best.class_id;
    __syncthreads();

    if (slice == 0 && inside && !wanted)
        for (int i = 0; i < BEST_VALUES; ++i) finished[lane * BEST_VALUES + i] = 0.0f;
    if (slice == 0 && wanted) {
        for (int other = 1; other < SLICES; ++other) {
            const Best rival = {best_raws[other][lane], best_classes[other][lane]};
            if (rival.class_id >= 0 && is_better(rival.raw, best.raw)) best = rival;
        }
        const float x = decode(cell, 0, box[0]), y = decode(cell, 1, box[1]);
        const float half_width = decode(cell, 2, box[2]) / 2.0f, half_height = decode(cell, 3, box[3]) / 2.0f;
        float* row = finished + lane * BEST_VALUES;
        row[0] = x - half_width;
        row[1] = y - half_height;
        row[2] = x + half_width;
        row[3] = y + half_height;
        row[4] = sigmoid(box[4]) * sigmoid(best.raw);
        row[5] = (float)best.class_id;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < row_count * BEST_VALUES; i += BLOCK) output[i] = finished[i];
}

#define ROW_VALUES BEST_VALUES

#else

#define TILE 32  // channels that go through shared memory at once

__device__ __forceinline__ void write_rows(const Cell& cell, bool inside, int row_count, float, float* output)
{
    __shared__ float tile[ROWS][TILE + 1];  // one more against bank conflicts
    const int lane = threadIdx.x % ROWS, slice = threadIdx.x / ROWS;
    for (int first = 0; first < VALUES; first += TILE) {
        const int channels = min(TILE, VALUES - first);
        if (inside)
            for (int i = slice; i < channels; i += SLICES)
                tile[lane][i] = decode(cell, first + i, raw_value(cell, first + i));
        __syncthreads();
        for (int i = threadIdx.x; i < row_count * TILE; i += BLOCK)
            if (i % TILE < channels) output[(long long)(i / TILE) * VALUES + first + i % TILE] = tile[i / TILE][i % TILE];
        __syncthreads();
    }
}

#define ROW_VALUES VALUES

#endif

#if LEVELS == 1
#define HEADS const Head* __restrict__ head0
#define SIZES int height0, int width0
#define EACH_HEAD head0
#define EACH_HEIGHT height0
#define EACH_WIDTH width0
#elif LEVELS == 2
#define HEADS const Head* __restrict__ head0, const Head* __restrict__ head1
#define SIZES int height0, int width0, int height1, int width1
#define EACH_HEAD head0, head1
#define EACH_HEIGHT height0, height1
#define EACH_WIDTH width0, width1
#elif LEVELS == 3
#define HEADS const Head* __restrict__ head0, const Head* __restrict__ head1, const Head* __restrict__ head2
#define SIZES int height0, int width0, int height1, int width1, int height2, int width2
#define EACH_HEAD head0, head1, head2
#define EACH_HEIGHT height0, height1, height2
#define EACH_WIDTH width0, width1, width2
#elif LEVELS == 4
#define HEADS                                                                                                   \
    const Head *__restrict__ head0, const Head *__restrict__ head1, const Head *__restrict__ head2,             \
        const Head *__restrict__ head3
#define SIZES int height0, int width0, int height1, int width1, int height2, int width2, int height3, int width3
#define EACH_HEAD head0, head1, head2, head3
#define EACH_HEIGHT height0, height1, height2, height3
#define EACH_WIDTH width0, width1, width2, width3
#else
#error "LEVELS must be 1, 2, 3 or 4"
#endif

__device__ __forceinline__ float float_of(int bits)
{
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

extern "C" __global__ void yololayer(HEADS, int pictures, SIZES, int least_objectness, float* __restrict__ output)
{
    const Head* const heads[LEVELS] = {EACH_HEAD};
    const int heights[LEVELS] = {EACH_HEIGHT}, widths[LEVELS] = {EACH_WIDTH};
    int rows = 0;
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) rows += ANCHORS * heights[level] * widths[level];

    const int picture = blockIdx.y, first = blockIdx.x * ROWS, row = first + threadIdx.x % ROWS;
    if (picture >= pictures || first >= rows) return;  // the whole block
    const Cell cell = locate(row, picture, heads, heights, widths);
    write_rows(cell, row < rows, min(ROWS, rows - first), float_of(least_objectness),
               output + ((long long)picture * rows + first) * ROW_VALUES);
}
