// Non-maximum suppression: dense rows become at most max_detections boxes a picture, best first.
//
// Two launches, no host synchronisation, no counter that outlives a launch, no dependence on the order in which
// blocks run: results are repeatable, and the pair is legal in a CUDA graph.
//
//   nms_filter   one thread a row. Rows above the confidence (and of a wanted class) leave their sort key in their
//                segment, in row order, and the segment its count. Reads 8 of a row's 24 bytes.
//                Grid: x = segments, y = pictures; block FILTER_THREADS.
//   nms_select   one block a picture: gathers the keys, sorts them (stable, so equal scores keep the order of their
//                rows), and suppresses greedily a tile of TILE boxes after the other, each first against the boxes
//                that were kept before, then within the tile through a bit matrix in shared memory.
//                Up to TILE keys are ranked in shared memory; more are radix-sorted in global memory.
//                Grid: x = pictures; block THREADS.
//
// Rows:    float32 [pictures, rows, 6]: left, top, right, bottom, score, class. A score is objectness x probability and a
//          probability is at most 1, so a score above the confidence implies an objectness above it.
// Output:  int32 [pictures] counts; float32 [pictures, max_detections, 6] in the form of the rows, zeros at the end.
// Cost:    25,200 rows: 0.6 MB read once; everything after that is latency, not bandwidth.
//
// The overlap is computed in float32 in the order of yolotrt/postprocess.py; compile without contraction to FMA.
// Scores, confidence and the overlap's threshold must not be negative.
//
// Macros: THREADS (optional), a multiple of 32; KEPT_ROWS (optional): nms_select also writes int32 [pictures,
// max_detections], the row of each box, -1 at the end.

#ifndef THREADS
#define THREADS 1024
#endif
#ifndef KEPT_ROWS
#define KEPT_ROWS 0
#endif
#define WARPS (THREADS / 32)
#define FILTER_THREADS 256
#define FILTER_WARPS (FILTER_THREADS / 32)
#define TILE 512
#define WORDS (TILE / 32)
#define MAX_CANDIDATES 30000  // YOLOv5 utils/general.py, max_nms
#define ROW_VALUES 6
#define EVERY_LANE 0xffffffffu

#define DIGIT_BITS 4
#define DIGITS (1 << DIGIT_BITS)
#define SORTERS (THREADS / 2)  // threads that count digits: their counters just fit the bit matrix's memory

typedef unsigned long long Key;  // the score's bits, inverted so that the best is the smallest; then the row

__device__ __forceinline__ unsigned score_key(float score)
{
    return ~__float_as_uint(score);
}

// How many rows of the segments before, and of this one, pass: writes the keys that do.
extern "C" __global__ void __launch_bounds__(FILTER_THREADS)
nms_filter(const float* __restrict__ rows, const unsigned char* __restrict__ wanted_classes, int row_count,
           int segment_rows, float confidence, Key* __restrict__ keys, int* __restrict__ counts)
{
    __shared__ int warp_counts[FILTER_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* picture = rows + (long long)blockIdx.y * row_count * ROW_VALUES;
    const long long segment = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    Key* kept_keys = keys + segment * segment_rows;

    int kept = 0;
    for (int start = 0; start < segment_rows; start += FILTER_THREADS) {
        const int row = blockIdx.x * segment_rows + start + threadIdx.x;
        bool passes = false;
        float score = 0.0f;
        if (row < row_count) {
            const float2 score_class = *(const float2*)(picture + (long long)row * ROW_VALUES + 4);
            score = score_class.x;
            passes = score > confidence && (!wanted_classes || wanted_classes[(int)score_class.y]);
        }
        const unsigned passing = __ballot_sync(EVERY_LANE, passes);
        if (lane == 0) warp_counts[warp] = __popc(passing);
        __syncthreads();
        int before = kept;
        for (int other = 0; other < FILTER_WARPS; ++other) {
            if (other < warp) before += warp_counts[other];
            kept += warp_counts[other];
        }
        if (passes) kept_keys[before + __popc(passing & ((1u << lane) - 1))] = (Key)score_key(score) << 32 | (unsigned)row;
        __syncthreads();  // before the next round overwrites the counts
    }
    if (threadIdx.x == 0) counts[segment] = kept;
}

// The sum of the values of all threads before this one; total becomes the sum of all.
__device__ __forceinline__ int exclusive_sum(int value, int& total)
{
    __shared__ int warp_sums[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int before = __shfl_up_sync(EVERY_LANE, sum, distance);
        if (lane >= distance) sum += before;
    }
    __syncthreads();  // the previous call's sums have been read
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int earlier = 0;
    total = 0;
    for (int other = 0; other < WARPS; ++other) {
        if (other < warp) earlier += warp_sums[other];
        total += warp_sums[other];
    }
    return earlier + sum - value;
}

// A warp's share of copying all segments' keys, in row order, to position 0, 1, ...
template <typename Store>
__device__ __forceinline__ void gather(const Key* keys, const unsigned* offsets, int segments, int segment_rows,
                                       Store store)
{
    for (int segment = threadIdx.x / 32; segment < segments; segment += WARPS) {
        const int offset = offsets[segment], count = offsets[segment + 1] - offset;
        for (int i = threadIdx.x % 32; i < count; i += 32) store(offset + i, keys[(long long)segment * segment_rows + i]);
    }
}

__device__ __forceinline__ int digit_of(Key key, int shift)
{
    return (int)(key >> shift) & (DIGITS - 1);
}

// One stable pass of a radix sort: each sorter counts and then moves its own stretch of the keys.
__device__ __forceinline__ void radix_pass(const Key* from, Key* to, int count, int shift, unsigned* counters)
{
    const int sorter = threadIdx.x;
    const int stretch = (count + SORTERS - 1) / SORTERS;
    const int first = sorter * stretch, end = min(first + stretch, count);
    if (sorter < SORTERS) {
        for (int digit = 0; digit < DIGITS; ++digit) counters[digit * SORTERS + sorter] = 0;
        for (int i = first; i < end; ++i) ++counters[digit_of(from[i], shift) * SORTERS + sorter];
    }
    __syncthreads();
    const int share = DIGITS * SORTERS / THREADS;
    unsigned* mine = counters + threadIdx.x * share;
    int sum = 0, total;
    for (int i = 0; i < share; ++i) sum += mine[i];
    int position = exclusive_sum(sum, total);
    for (int i = 0; i < share; ++i) {
        const int number = mine[i];
        mine[i] = position;
        position += number;
    }
    __syncthreads();
    if (sorter < SORTERS)
        for (int i = first; i < end; ++i) {
            const Key key = from[i];
            to[counters[digit_of(key, shift) * SORTERS + sorter]++] = key;
        }
    __syncthreads();
}

struct Box {
    float left, top, right, bottom, class_id;
};

// Whether the intersection over union of two boxes is above the threshold; boxes without area overlap nothing.
__device__ __forceinline__ bool overlap(const Box& box, const Box& other, float threshold, int agnostic)
{
    if (!agnostic && box.class_id != other.class_id) return false;
    const float width = fminf(box.right, other.right) - fmaxf(box.left, other.left);
    const float height = fminf(box.bottom, other.bottom) - fmaxf(box.top, other.top);
    if (!(width > 0.0f && height > 0.0f)) return false;
    const float intersection = width * height;
    const float area = (box.right - box.left) * (box.bottom - box.top);
    const float other_area = (other.right - other.left) * (other.bottom - other.top);
    return intersection / (area + other_area - intersection) > threshold;
}

extern "C" __global__ void __launch_bounds__(THREADS)
nms_select(const float* __restrict__ rows, int row_count, int segments, int segment_rows, Key* keys, Key* sorted,
           const int* __restrict__ counts, float threshold, int agnostic, int max_detections, int* __restrict__ kept_counts,
           float* detections
#if KEPT_ROWS
           ,
           int* __restrict__ kept_rows
#endif
)
{
    __shared__ unsigned scratch[TILE * WORDS];  // in turn: offsets and keys; digit counters; the bit matrix
    __shared__ float boxes[ROW_VALUES][TILE];
#if KEPT_ROWS
    __shared__ int box_rows[TILE];
    kept_rows += (long long)blockIdx.x * max_detections;
#endif
    __shared__ unsigned alive[WORDS];
    __shared__ unsigned short kept_in_tile[TILE];
    __shared__ int kept_in_tile_count;

    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const float* picture = rows + (long long)blockIdx.x * row_count * ROW_VALUES;
    keys += (long long)blockIdx.x * segments * segment_rows;
    sorted += (long long)blockIdx.x * segments * segment_rows;
    detections += (long long)blockIdx.x * max_detections * ROW_VALUES;

    auto place = [&](int position, unsigned row) {
        for (int i = 0; i < ROW_VALUES; i += 2) {
            const float2 pair = *(const float2*)(picture + (long long)row * ROW_VALUES + i);
            boxes[i][position] = pair.x;
            boxes[i + 1][position] = pair.y;
        }
#if KEPT_ROWS
        box_rows[position] = (int)row;
#endif
    };
    auto box_at = [&](int position) {
        return Box{boxes[0][position], boxes[1][position], boxes[2][position], boxes[3][position], boxes[5][position]};
    };

    int count;
    const int own_count = thread < segments ? counts[(long long)blockIdx.x * segments + thread] : 0;
    const int own_offset = exclusive_sum(own_count, count);
    unsigned* offsets = scratch;  // segments + 1 <= THREADS + 1 of them
    if (thread < segments) offsets[thread] = own_offset;
    if (thread == 0) offsets[segments] = count;
    __syncthreads();

    if (count <= TILE) {
        unsigned* key_scores = scratch + THREADS + 32;
        unsigned* key_rows = key_scores + TILE;
        unsigned* ranks = key_rows + TILE;
        gather(keys, offsets, segments, segment_rows, [&](int position, Key key) {
            key_scores[position] = (unsigned)(key >> 32);
            key_rows[position] = (unsigned)key;
            ranks[position] = 0;
        });
        __syncthreads();
        const int padded = (count + 31) / 32 * 32, helpers = padded ? max(THREADS / padded, 1) : 1;
        for (int task = thread; task < padded * helpers; task += THREADS) {
            const int position = task % padded;
            if (position >= count) continue;
            const unsigned own = key_scores[position];
            int rank = 0;
            for (int other = task / padded; other < count; other += helpers)
                rank += key_scores[other] < own || (key_scores[other] == own && other < position);
            atomicAdd(&ranks[position], rank);
        }
        __syncthreads();
        for (int position = thread; position < count; position += THREADS) place(ranks[position], key_rows[position]);
    } else {
        gather(keys, offsets, segments, segment_rows, [&](int position, Key key) { sorted[position] = key; });
        __syncthreads();
        for (int shift = 32; shift < 64; shift += 2 * DIGIT_BITS) {  // row order is there already
            radix_pass(sorted, keys, count, shift, scratch);
            radix_pass(keys, sorted, count, shift + DIGIT_BITS, scratch);
        }
    }

    const int candidates = min(count, MAX_CANDIDATES);
    int kept = 0;
    for (int first = 0; first < candidates && kept < max_detections; first += TILE) {
        const int size = min(TILE, candidates - first), words = (size + 31) / 32;
        if (count > TILE)
            for (int i = thread; i < size; i += THREADS) place(i, (unsigned)sorted[first + i]);
        if (thread < words) alive[thread] = size - thread * 32 >= 32 ? EVERY_LANE : (1u << (size - thread * 32)) - 1;
        __syncthreads();

        const int helpers = kept ? 2 : 0;  // threads that share a box's comparisons with the kept ones
        for (int task = thread; task < TILE * helpers; task += THREADS) {
            const int position = task % TILE;
            if (position >= size) continue;
            const Box box = box_at(position);
            bool suppressed = false;
            for (int i = task / TILE; i < kept && !suppressed; i += helpers) {
                const float* better = detections + (long long)i * ROW_VALUES;
                suppressed = overlap(Box{better[0], better[1], better[2], better[3], better[5]}, box, threshold, agnostic);
            }
            if (suppressed) atomicAnd(&alive[position / 32], ~(1u << position % 32));
        }
        __syncthreads();

        for (int task = warp; task < size * words; task += WARPS) {  // bit (i, j): i suppresses j
            const int i = task / words, word = task % words, j = word * 32 + lane;
            if (word < i / 32 || !(alive[i / 32] >> i % 32 & 1)) continue;  // the whole warp
            const bool suppresses = j > i && j < size && overlap(box_at(i), box_at(j), threshold, agnostic);
            const unsigned suppressed = __ballot_sync(EVERY_LANE, suppresses);
            if (lane == 0) scratch[i * WORDS + word] = suppressed;
        }
        __syncthreads();

        if (warp == 0) {  // lane w holds word w of the boxes that are still in play
            unsigned left = lane < words ? alive[lane] : 0;
            int number = 0;
            while (kept + number < max_detections) {
                const unsigned lanes_left = __ballot_sync(EVERY_LANE, left != 0);
                if (!lanes_left) break;
                const int word = __ffs(lanes_left) - 1;
                const int bit = __ffs(__shfl_sync(EVERY_LANE, left, word)) - 1;
                if (lane == 0) kept_in_tile[number] = (unsigned short)(word * 32 + bit);
                ++number;
                if (lane >= word && lane < words) left &= ~scratch[(word * 32 + bit) * WORDS + lane];
                if (lane == word) left &= ~(1u << bit);
            }
            if (lane == 0) kept_in_tile_count = number;
        }
        __syncthreads();
        const int number = kept_in_tile_count;
        for (int i = thread; i < number * ROW_VALUES; i += THREADS)
            detections[kept * ROW_VALUES + i] = boxes[i % ROW_VALUES][kept_in_tile[i / ROW_VALUES]];
#if KEPT_ROWS
        for (int i = thread; i < number; i += THREADS) kept_rows[kept + i] = box_rows[kept_in_tile[i]];
#endif
        kept += number;
        __syncthreads();  // before the next tile overwrites the boxes
    }
    for (int i = kept * ROW_VALUES + thread; i < max_detections * ROW_VALUES; i += THREADS) detections[i] = 0.0f;
#if KEPT_ROWS
    for (int i = kept + thread; i < max_detections; i += THREADS) kept_rows[i] = -1;
#endif
    if (thread == 0) kept_counts[blockIdx.x] = kept;
}
