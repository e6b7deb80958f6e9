// Copy: bytes between page-locked host memory and device memory, either way, by the multiprocessors.
//
// A copy command of the driver waits in a queue of a copy engine, which is in order and shared by all streams: a few
// kilobytes of one batch can wait there for a batch of another stream. A captured graph of kernels alone waits for
// nothing but its own stream.
// Grid:    x = units of 16 bytes / 256; block 256; a thread copies one unit.
// Memory:  both addresses and the size are multiples of 16.
// Cost:    the copied bytes, over the bus.

#ifdef __CUDACC__
typedef uint4 Unit16;
#else
struct alignas(16) Unit16 {
    unsigned x, y, z, w;
};
#endif

extern "C" __global__ void copy(const Unit16* __restrict__ source, int units, Unit16* __restrict__ target)
{
    const int unit = blockIdx.x * blockDim.x + threadIdx.x;
    if (unit < units) target[unit] = source[unit];
}
