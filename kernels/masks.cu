// Masks of segmentation models: from the detections that NMS kept to the cells of the prototypes' grid that each covers.
//
// No host synchronisation, no atomics, no dependence on the order of blocks: legal in a CUDA graph.
//
//   mask_crops   one block a picture: the part of the prototypes' grid that each detection's box covers, with a row or
//                column of zeros around it where the grid goes on, and where its values lie: one detection's behind the
//                other's, so that a few megabytes hold the masks of hundreds of detections.
//                Grid: x = pictures; block 256.
//   mask_cells   one thread a cell of a crop: the sigmoid of the prototypes weighed by the detection's coefficients
//                times its objectness, where the cell's left upper corner is in the box, else 0
//                (YOLOv5 utils/general.py, non_max_suppression; utils/segment/general.py, process_mask, crop_mask).
//                Grid: x = cells of the whole grid / 256, y = detections, z = pictures; block 256.
//
// Levels:  a table of {head's address, height, width}, finest first as in yololayer.cu.
// Heads:   [pictures, ANCHORS * (5 + NC + MASKS), height, width], prototypes [pictures, MASKS, grid height, grid width];
//          float32 or half.
// Rows:    what yololayer.cu gives with FULL_ROWS 0, and kept_rows what nms.cu makes of it with KEPT_ROWS.
// Crops:   [pictures, max_detections] of {offset, top, left, height, width}, an offset of -1 where there is no detection
//          or no room. Those of detections are written a second time for the host, which may have page-locked memory.
// Cells:   float32 [pictures, capacity], only written, each once: page-locked memory of the host serves as well.
// Cost:    640 x 640, 32 prototypes: a detection reads at most 3.3 MB from the L2 cache and writes 0.1 MB, both in
//          proportion to its box.
//
// Macros: ANCHORS a level, NC, MASKS, HALF_HEADS.

#define BOX_VALUES 5
#define VALUES (BOX_VALUES + NC + MASKS)
#define ROW_VALUES 6
#define CELLS 256
#define CROPS 256

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

struct Level {
    const Head* head;
    int height, width;
};

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

// A channel of a row, before any sigmoid; rows are ordered by level, anchor, row, column.
__device__ __forceinline__ float raw_value(const Level* levels, int picture, int row, int channel)
{
    int level = 0;
    while (row >= ANCHORS * levels[level].height * levels[level].width) {
        row -= ANCHORS * levels[level].height * levels[level].width;
        ++level;
    }
    const int plane = levels[level].height * levels[level].width;
    const long long anchor = (long long)picture * ANCHORS + row / plane;
    return load(levels[level].head + (anchor * VALUES + channel) * plane + row % plane);
}

struct Crop {
    int offset, top, left, height, width;
};

// The first cell at or after a place, as a cell or as the end of some.
__device__ __forceinline__ int first_cell(float place, int cell_count)
{
    return (int)fminf(fmaxf(ceilf(place), 0.0f), (float)cell_count);
}

__device__ __forceinline__ Crop crop_of(const float* box, int grid_height, int grid_width, float scale_x, float scale_y)
{
    const int left = first_cell(box[0] * scale_x, grid_width), right = first_cell(box[2] * scale_x, grid_width);
    const int top = first_cell(box[1] * scale_y, grid_height), bottom = first_cell(box[3] * scale_y, grid_height);
    if (left >= right || top >= bottom) return Crop{-1, 0, 0, 0, 0};
    const int first_row = max(top - 1, 0), first_column = max(left - 1, 0);
    return Crop{-1, first_row, first_column, min(bottom + 1, grid_height) - first_row,
                min(right + 1, grid_width) - first_column};
}

extern "C" __global__ void __launch_bounds__(CROPS)
mask_crops(const float* __restrict__ rows, int row_count, const int* __restrict__ kept_rows, int max_detections,
           int grid_height, int grid_width, float scale_x, float scale_y, int capacity, Crop* __restrict__ crops,
           Crop* __restrict__ host_crops)
{
    __shared__ long long sums[CROPS];
    const int thread = threadIdx.x;
    const long long first_slot = (long long)blockIdx.x * max_detections;
    const float* picture = rows + (long long)blockIdx.x * row_count * ROW_VALUES;
    long long before = 0;  // cells of all detections of earlier rounds, whether there is room for them or not
    for (int first = 0; first < max_detections; first += CROPS) {
        const int detection = first + thread;
        const int row = detection < max_detections ? kept_rows[first_slot + detection] : -1;
        Crop crop = {-1, 0, 0, 0, 0};
        if (row >= 0) crop = crop_of(picture + (long long)row * ROW_VALUES, grid_height, grid_width, scale_x, scale_y);
        const long long size = (long long)crop.height * crop.width;
        sums[thread] = size;
        __syncthreads();
        for (int distance = 1; distance < CROPS; distance *= 2) {
            const long long other = thread >= distance ? sums[thread - distance] : 0;
            __syncthreads();
            sums[thread] += other;
            __syncthreads();
        }
        const long long end = before + sums[thread];
        if (row >= 0 && end <= capacity) crop.offset = (int)(end - size);
        if (detection < max_detections) crops[first_slot + detection] = crop;
        if (row >= 0) host_crops[first_slot + detection] = crop;
        before += sums[CROPS - 1];
        __syncthreads();  // before the next round overwrites the sums
    }
}

extern "C" __global__ void __launch_bounds__(CELLS)
mask_cells(const Level* __restrict__ levels, const Head* __restrict__ prototypes, int grid_height, int grid_width,
           float scale_x, float scale_y, const float* __restrict__ rows, int row_count,
           const int* __restrict__ kept_rows, const Crop* __restrict__ crops, int capacity, float* __restrict__ cells)
{
    __shared__ float weights[MASKS];
    const int picture = blockIdx.z;
    const long long slot = (long long)picture * gridDim.y + blockIdx.y;
    const Crop crop = crops[slot];
    const int first = blockIdx.x * CELLS, size = crop.height * crop.width;
    if (crop.offset < 0 || first >= size) return;  // the whole block
    const int row = kept_rows[slot];
    for (int i = threadIdx.x; i < MASKS; i += CELLS)
        weights[i] = raw_value(levels, picture, row, BOX_VALUES + NC + i) *
                     sigmoid(raw_value(levels, picture, row, BOX_VALUES - 1));
    __syncthreads();

    const int cell = first + threadIdx.x;
    if (cell >= size) return;
    const float* box = rows + ((long long)picture * row_count + row) * ROW_VALUES;
    const int grid = grid_height * grid_width, y = crop.top + cell / crop.width, x = crop.left + cell % crop.width;
    float value = 0.0f;
    if ((float)x >= box[0] * scale_x && (float)x < box[2] * scale_x && (float)y >= box[1] * scale_y &&
        (float)y < box[3] * scale_y) {
        const Head* prototype = prototypes + (long long)picture * MASKS * grid + y * grid_width + x;
        float sum = 0.0f;
        for (int i = 0; i < MASKS; ++i) sum += weights[i] * load(prototype + (long long)i * grid);
        value = sigmoid(sum);
    }
    cells[(long long)picture * capacity + crop.offset + cell] = value;
}
