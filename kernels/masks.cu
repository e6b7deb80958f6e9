// Masks of segmentation models: from the detections that NMS kept to bits of the picture's size.
//
// Two launches, no host synchronisation, no atomics, every value written: legal in a CUDA graph.
//
//   mask_cells   one thread a cell of the prototypes' grid: the sigmoid of the prototypes weighed by the detection's
//                coefficients times its objectness, where the cell's left upper corner is in the box, else 0
//                (YOLOv5 utils/general.py, non_max_suppression; utils/segment/general.py, process_mask, crop_mask).
//                Grid: x = cells / 256, y = detections, z = pictures; block 256.
//   mask_bits    one thread 32 pixels of a row: interpolates linearly between the cells, at the centres of the
//                picture's pixels, and sets the bits of those above 0.5. A launch for each picture, since sizes differ.
//                Grid: x = words of a row / 32, y = rows / 8, z = detections; block 32 x 8.
//
// Levels:  a table of {head's address, height, width}, finest first as in yololayer.cu.
// Heads:   [pictures, ANCHORS * (5 + NC + MASKS), height, width], prototypes [pictures, MASKS, grid height, grid width];
//          float32 or half.
// Kept:    what nms.cu gives with KEPT_ROWS: counts, boxes (6 values, network-input pixels), rows.
// Cells:   float32 [pictures, max_detections, grid height, grid width]; those of detections that are not there stay.
// Bits:    [max_detections, height, words] of 32 pixels, the leftmost in the lowest bit, zero beyond the right edge.
// Cost:    640 x 640, 32 prototypes: a detection reads at most 3.3 MB from the L2 cache and writes 0.1 MB; its bits for
//          a 1080 x 1920 picture are 0.26 MB.
//
// Macros: ANCHORS a level, NC, MASKS, HALF_HEADS.

#define BOX_VALUES 5
#define VALUES (BOX_VALUES + NC + MASKS)
#define DETECTION_VALUES 6
#define CELLS 256
#define WORD 32
#define THRESHOLD 0.5f

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

extern "C" __global__ void __launch_bounds__(CELLS)
mask_cells(const Level* __restrict__ levels, const Head* __restrict__ prototypes, int grid_height, int grid_width,
           float scale_x, float scale_y, const int* __restrict__ counts, const float* __restrict__ detections,
           const int* __restrict__ rows, float* __restrict__ cells)
{
    __shared__ float weights[MASKS];
    const int picture = blockIdx.z, detection = blockIdx.y, max_detections = gridDim.y;
    if (detection >= counts[picture]) return;  // the whole block
    const long long slot = (long long)picture * max_detections + detection;
    const int row = rows[slot];
    for (int i = threadIdx.x; i < MASKS; i += CELLS)
        weights[i] = raw_value(levels, picture, row, BOX_VALUES + NC + i) *
                     sigmoid(raw_value(levels, picture, row, BOX_VALUES - 1));
    __syncthreads();

    const int grid = grid_height * grid_width, cell = blockIdx.x * CELLS + threadIdx.x;
    if (cell >= grid) return;
    const float* box = detections + slot * DETECTION_VALUES;
    const float x = (float)(cell % grid_width), y = (float)(cell / grid_width);
    float value = 0.0f;
    if (x >= box[0] * scale_x && x < box[2] * scale_x && y >= box[1] * scale_y && y < box[3] * scale_y) {
        const Head* prototype = prototypes + (long long)picture * MASKS * grid + cell;
        float sum = 0.0f;
        for (int i = 0; i < MASKS; ++i) sum += weights[i] * load(prototype + (long long)i * grid);
        value = sigmoid(sum);
    }
    cells[slot * grid + cell] = value;
}

// Where a pixel lies between two cells: the first of them and the second's share. Beyond the border is the border.
struct Place {
    int first, second;
    float share;
};

__device__ __forceinline__ Place locate(int pixel, float step, float offset, int cell_count)
{
    const float place = fminf(fmaxf(step * (float)pixel + offset, 0.0f), (float)(cell_count - 1));
    const int first = (int)place;
    return Place{first, min(first + 1, cell_count - 1), place - (float)first};
}

extern "C" __global__ void mask_bits(const float* __restrict__ cells, const int* __restrict__ count, int grid_height,
                                     int grid_width, float step_x, float offset_x, float step_y, float offset_y,
                                     int height, int width, unsigned* __restrict__ bits)
{
    const int words = (width + WORD - 1) / WORD;
    const int word = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y;
    const int detection = blockIdx.z;
    if (detection >= *count || word >= words || row >= height) return;
    const Place y = locate(row, step_y, offset_y, grid_height);
    const float* grid = cells + (long long)detection * grid_height * grid_width;
    const float *upper = grid + (long long)y.first * grid_width, *lower = grid + (long long)y.second * grid_width;
    unsigned mask = 0;
    for (int bit = 0; bit < WORD && word * WORD + bit < width; ++bit) {
        const Place x = locate(word * WORD + bit, step_x, offset_x, grid_width);
        const float above = upper[x.first] + (upper[x.second] - upper[x.first]) * x.share;
        const float below = lower[x.first] + (lower[x.second] - lower[x.first]) * x.share;
        if (above + (below - above) * y.share > THRESHOLD) mask |= 1u << bit;
    }
    bits[((long long)detection * height + row) * words + word] = mask;
}
