// Upload: the rows of frames that the letterbox needs, from page-locked host memory into device memory.
//
// Few blocks share the rows of all slots; a thread copies units of 16, 4 or 1 bytes, as the addresses allow, with
// several loads under way, which is what hides the bus's latency. A copy command of the driver would be no faster, and
// has its addresses fixed in a captured CUDA graph. It leaves other streams' kernels alone, though, which this one slows:
// where frames of a batch come by commands before the graph, their plans have no rows to copy.
// Grid:    x = any number of blocks; block: any.
// Plans:   as for letterbox.cu, the same records: source, source_pitch, row_bytes and row_count say what to copy; the
//          rows lie side by side at `pixels`. If is_listed, their numbers stand behind the taps, else they are the
//          first ones. row_count 0: nothing to copy, the frame is in device memory already.
// Cost:    the copied bytes, over the bus.

#define IN_FLIGHT 4

#ifdef __CUDACC__
typedef uint4 Unit16;
#else
struct alignas(16) Unit16 {
    unsigned x, y, z, w;
};
#endif

struct Tap {
    int first;
    short weight, next_weight;
};

struct Plan {
    unsigned char* pixels;
    long long pitch;
    int last_column, last_row, scaled_height, scaled_width, top, left;
    const unsigned char* source;
    long long source_pitch;
    int row_bytes, row_count, is_listed, unused;
};

template <typename Unit>
__device__ __forceinline__ void copy_rows(const Plan& plan, const int* rows)
{
    const int units = plan.row_bytes / (int)sizeof(Unit), total = units * plan.row_count;
    const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    Unit* target = (Unit*)plan.pixels;
    for (int start = first; start < total; start += step * IN_FLIGHT) {
        Unit values[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const int unit = start + i * step;
            if (unit >= total) continue;
            const int row = unit / units;
            const long long source_row = plan.is_listed ? rows[row] : row;
            values[i] = ((const Unit*)(plan.source + source_row * plan.source_pitch))[unit - row * units];
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i)
            if (start + i * step < total) target[start + i * step] = values[i];
    }
}

extern "C" __global__ void upload(const unsigned char* __restrict__ plans, int plan_bytes, int slots)
{
    for (int slot = 0; slot < slots; ++slot) {
        const unsigned char* record = plans + (long long)slot * plan_bytes;
        const Plan plan = *(const Plan*)record;
        const int* rows = (const int*)(record + sizeof(Plan) + (plan.scaled_width + plan.scaled_height) * sizeof(Tap));
        const long long places = (long long)plan.pixels | (long long)plan.source | plan.source_pitch | plan.row_bytes;
        if (places % 16 == 0)
            copy_rows<Unit16>(plan, rows);
        else if (places % 4 == 0)
            copy_rows<unsigned>(plan, rows);
        else
            copy_rows<unsigned char>(plan, rows);
    }
}
