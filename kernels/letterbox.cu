// Letterbox: a uint8 BGR frame of any size and pitch becomes one slot of the network's input.
//
// One thread makes one input pixel (three values, one a plane).
// Grid:    x = input columns / 32, y = input rows / 8, z = batch slots; block 32 x 8.
// Plans:   one record a slot, plan_bytes apart: struct Plan, then a Tap for every scaled column, then one for every
//          scaled row, then what upload.cu reads. yolotrt/cuda/kernels.py writes them once a frame size: the
//          coordinates need float64 and particular roundings, so tables make the device code pure integer arithmetic,
//          exact and equally fast on GPUs with slow float64. A changed frame pointer is a change of data, not of launch arguments, so one
//          captured CUDA graph serves every frame, and frames of different sizes share a launch.
// Output:  [slots, 3, rows, columns], RGB, value / 255 in float32, then rounded to half if HALF_OUTPUT.
// Cost:    reads the frame rows that the taps touch (1080p -> 640: 1 of 3, 2.1 MB), writes 6 or 12 bytes a pixel. What
//          takes the time is instructions: pixels without weight are not read (all but one of four where the frame
//          shrinks by an odd whole number), and a division is three multiplications.
//
// The resized bytes are those of OpenCV's INTER_LINEAR for uint8 (modules/imgproc/src/resize.cpp): 11-bit weights, a
// horizontal pass kept in 32 bits, a vertical pass that drops 4 bits before its product and 16 after it.
//
// Macros: HALF_OUTPUT 0 or 1.

#define CHANNELS 3
#define PAD_VALUE 114

#if HALF_OUTPUT
typedef unsigned short Output;  // the bits of an IEEE half
#else
typedef float Output;
#endif

#ifdef __CUDACC__  // host builds bring their own conversion; cuda_fp16.h would need an installed toolkit
__device__ __forceinline__ unsigned short float_to_half(float value)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

// One output coordinate: the first of two neighbouring source coordinates and the weights of both, in 1/2048.
struct Tap {
    int first;  // columns: in bytes from the row's start; rows: -1 stands for a row above the frame
    short weight, next_weight;
};

struct Plan {
    const unsigned char* pixels;
    long long pitch;    // bytes from one row to the next
    int last_column;    // byte offset of the frame's last pixel in a row
    int last_row;
    int scaled_height, scaled_width;
    int top, left;      // padding
    const unsigned char* source;  // from here on for upload.cu
    long long source_pitch;
    int row_bytes, row_count, is_listed, unused;
};

struct Pixel {
    int blue, green, red;
};

// A pixel and the one after it, weighted, in 1/128.
__device__ __forceinline__ Pixel horizontal(const unsigned char* row, int last_column, Tap tap)
{
    const unsigned char* pixel = row + tap.first;
    Pixel sum = {pixel[0] * tap.weight, pixel[1] * tap.weight, pixel[2] * tap.weight};
    if (tap.next_weight) {
        const unsigned char* next = row + min(tap.first + CHANNELS, last_column);
        sum.blue += next[0] * tap.next_weight;
        sum.green += next[1] * tap.next_weight;
        sum.red += next[2] * tap.next_weight;
    }
    return {sum.blue >> 4, sum.green >> 4, sum.red >> 4};
}

__device__ __forceinline__ int vertical(int upper, int lower, Tap tap)
{
    // at most 255 without saturation: two rounded weights sum to at most 2049
    return (((upper * tap.weight) >> 16) + ((lower * tap.next_weight) >> 16) + 2) >> 2;
}

__device__ __forceinline__ Output normalized(int byte)
{
    // byte / 255, correctly rounded: the remainder of a quotient that may be one unit off corrects it
    const float value_times_255 = (float)byte, reciprocal = 1.0f / 255.0f;
    const float near = value_times_255 * reciprocal;
    const float value = fmaf(fmaf(-255.0f, near, value_times_255), reciprocal, near);
#if HALF_OUTPUT
    return float_to_half(value);
#else
    return value;
#endif
}

extern "C" __global__ void letterbox(const unsigned char* __restrict__ plans, int plan_bytes, int rows, int columns,
                                     Output* __restrict__ output)
{
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    const int row = blockIdx.y * blockDim.y + threadIdx.y;
    if (column >= columns || row >= rows) return;

    const unsigned char* record = plans + (long long)blockIdx.z * plan_bytes;
    const Plan plan = *(const Plan*)record;
    const int x = column - plan.left, y = row - plan.top;
    Pixel made = {PAD_VALUE, PAD_VALUE, PAD_VALUE};
    if (x >= 0 && x < plan.scaled_width && y >= 0 && y < plan.scaled_height) {
        const Tap* taps = (const Tap*)(record + sizeof(Plan));
        const Tap across = taps[x], down = taps[plan.scaled_width + y];
        const Pixel upper = horizontal(plan.pixels + max(down.first, 0) * plan.pitch, plan.last_column, across);
        Pixel lower = {};
        if (down.next_weight)  // the same for a whole warp
            lower = horizontal(plan.pixels + min(down.first + 1, plan.last_row) * plan.pitch, plan.last_column, across);
        made.blue = vertical(upper.blue, lower.blue, down);
        made.green = vertical(upper.green, lower.green, down);
        made.red = vertical(upper.red, lower.red, down);
    }
    const long long plane = (long long)rows * columns;
    Output* pixel = output + blockIdx.z * (CHANNELS * plane) + (long long)row * columns + column;
    pixel[0] = normalized(made.red);
    pixel[plane] = normalized(made.green);
    pixel[2 * plane] = normalized(made.blue);
}
