/* Resize of 8-bit RGB with weights in 22-bit fixed point: horizontal axis first, then the vertical one.
 *
 * Each pass sums value * weight, adds a half, shifts the fraction out and clips to a byte. Why every kernel
 * gives the same bits:
 *
 * - All sums are made modulo 2^32. `resample_axis_fits` demands that 255 times the sum of the absolute weights
 *   of an output, and the half, stay below 2^31: the true sum then fits an int32 and is what the modulus leaves,
 *   in whatever order it was added and whatever overflowed on the way.
 * - AVX2 multiplies 16 bits by 16 bits (pmaddwd: two products, added in 32 bits), so a weight is split into
 *   hi * 2^11 + lo with 0 <= lo < 2^11. hi fits 16 bits, as the same bound keeps a weight below 2^24. Two
 *   products are at most 2 * 255 * 2^15, far from 2^31. The two sums are joined at the end: hi << 11, plus lo.
 * - NEON multiplies 32 bits by 32 bits and needs no split.
 *
 * An axis has `length` inputs; output i reads `taps` inputs from `first[i]` on, `taps` being a multiple of 4.
 * Weights of inputs beyond the end are zero, so that what is read there does not matter; that it may be read is
 * arranged by `resample`. Rows wait in a ring of as many as an output reads, which stays in the cache.
 */
#ifndef LLAVA_KD_RESAMPLE_H
#define LLAVA_KD_RESAMPLE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define RESAMPLE_AVX2 1
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#define RESAMPLE_NEON 1
#include <arm_neon.h>
#endif

enum { FRACTION_BITS = 22, LOW_BITS = 11, GROUP = 4, BLOCK = 32, CHANNELS = 3 };

typedef struct {
    int64_t length, out, taps;
    const int32_t *first;   /* [out], never falling */
    const int32_t *weights; /* [out, taps] */
} Axis;

/* Four rows, `stride` bytes apart, to `axis->out` pixels each; a byte behind the last of a row may be written. */
typedef void across_t(const uint8_t *rows, int64_t stride, const Axis *axis, uint8_t *out, int64_t out_stride);
/* `width` bytes of one output row of an even number of taps; BLOCK bytes of each input row may be read from any multiple of BLOCK below. */
typedef void down_t(const uint8_t *const *rows, const int32_t *weights, int64_t taps, int64_t width, uint8_t *out);

typedef struct {
    const char *name;
    across_t *across;
    down_t *down;
} Kernel;

/* The sum as a byte; adding and shifting are those of the unsigned and of the arithmetic kind. */
static inline uint8_t rounded(uint32_t sum)
{
    int32_t value = (int32_t)(sum + (1u << (FRACTION_BITS - 1))) >> FRACTION_BITS;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

static void across_plain(const uint8_t *rows, int64_t stride, const Axis *axis, uint8_t *out, int64_t out_stride)
{
    for (int row = 0; row < GROUP; row++)
        for (int64_t x = 0; x < axis->out; x++) {
            const uint8_t *pixel = rows + row * stride + CHANNELS * (int64_t)axis->first[x];
            const int32_t *weights = axis->weights + x * axis->taps;
            uint32_t red = 0, green = 0, blue = 0;
            for (int64_t k = 0; k < axis->taps; k++, pixel += CHANNELS) {
                red += pixel[0] * (uint32_t)weights[k];
                green += pixel[1] * (uint32_t)weights[k];
                blue += pixel[2] * (uint32_t)weights[k];
            }
            uint8_t *to = out + row * out_stride + CHANNELS * x;
            to[0] = rounded(red), to[1] = rounded(green), to[2] = rounded(blue);
        }
}

static void down_plain(const uint8_t *const *rows, const int32_t *weights, int64_t taps, int64_t width, uint8_t *out)
{
    for (int64_t x = 0; x < width; x += BLOCK) {
        uint32_t sums[BLOCK] = {0};
        for (int64_t k = 0; k < taps; k++)
            for (int i = 0; i < BLOCK; i++)
                sums[i] += rows[k][x + i] * (uint32_t)weights[k];
        for (int i = 0; i < BLOCK && x + i < width; i++)
            out[x + i] = rounded(sums[i]);
    }
}

#ifdef RESAMPLE_AVX2
#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i joined_avx2(__m256i high, __m256i low)
{
    return _mm256_add_epi32(_mm256_slli_epi32(high, LOW_BITS), low);
}

/* Four inputs at a time: the first two in the lower half of a register, the others in the upper. */
AVX2 static void across_avx2(const uint8_t *rows, int64_t stride, const Axis *axis, uint8_t *out, int64_t out_stride)
{
    const __m256i spread = _mm256_setr_epi8( /* r r g g b b of two pixels, each byte widened to 16 bits */
        0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
        6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m256i pair = _mm256_setr_epi8( /* the lower 16 bits of the two weights, for each channel */
        0, 1, 4, 5, 0, 1, 4, 5, 0, 1, 4, 5, 0, 1, 4, 5,
        8, 9, 12, 13, 8, 9, 12, 13, 8, 9, 12, 13, 8, 9, 12, 13);
    const __m256i low_mask = _mm256_set1_epi32((1 << LOW_BITS) - 1);
    const __m128i half = _mm_set1_epi32(1 << (FRACTION_BITS - 1));
    for (int64_t x = 0; x < axis->out; x++) {
        const uint8_t *pixel = rows + CHANNELS * (int64_t)axis->first[x];
        const int32_t *weights = axis->weights + x * axis->taps;
        __m256i high[GROUP], low[GROUP];
        for (int row = 0; row < GROUP; row++)
            high[row] = low[row] = _mm256_setzero_si256();
        for (int64_t k = 0; k < axis->taps; k += 4, pixel += 4 * CHANNELS) {
            __m256i whole = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(weights + k)));
            __m256i above = _mm256_shuffle_epi8(_mm256_srai_epi32(whole, LOW_BITS), pair);
            __m256i below = _mm256_shuffle_epi8(_mm256_and_si256(whole, low_mask), pair);
            for (int row = 0; row < GROUP; row++) {
                __m128i read = _mm_loadu_si128((const __m128i *)(pixel + row * stride));
                __m256i values = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(read), spread);
                high[row] = _mm256_add_epi32(high[row], _mm256_madd_epi16(values, above));
                low[row] = _mm256_add_epi32(low[row], _mm256_madd_epi16(values, below));
            }
        }
        __m128i sums[GROUP];
        for (int row = 0; row < GROUP; row++) {
            __m256i both = joined_avx2(high[row], low[row]);
            __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
            sums[row] = _mm_srai_epi32(_mm_add_epi32(sum, half), FRACTION_BITS);
        }
        __m128i bytes = _mm_packus_epi16(_mm_packs_epi32(sums[0], sums[1]), _mm_packs_epi32(sums[2], sums[3]));
        uint32_t pixels[GROUP];
        _mm_storeu_si128((__m128i *)pixels, bytes);
        for (int row = 0; row < GROUP; row++)
            memcpy(out + row * out_stride + CHANNELS * x, pixels + row, 4);
    }
}

AVX2 static inline __m256i pair_avx2(int32_t first, int32_t second)
{
    return _mm256_set1_epi32((int32_t)(((uint32_t)second << 16) | ((uint32_t)first & 0xffff)));
}

AVX2 static void down_avx2(const uint8_t *const *rows, const int32_t *weights, int64_t taps, int64_t width, uint8_t *out)
{
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (FRACTION_BITS - 1));
    const int32_t low_mask = (1 << LOW_BITS) - 1;
    for (int64_t x = 0; x < width; x += BLOCK) {
        __m256i high[4] = {zero, zero, zero, zero}, low[4] = {zero, zero, zero, zero};
        for (int64_t k = 0; k < taps; k += 2) {
            __m256i one = _mm256_loadu_si256((const __m256i *)(rows[k] + x));
            __m256i other = _mm256_loadu_si256((const __m256i *)(rows[k + 1] + x));
            __m256i left = _mm256_unpacklo_epi8(one, other), right = _mm256_unpackhi_epi8(one, other);
            __m256i above = pair_avx2(weights[k] >> LOW_BITS, weights[k + 1] >> LOW_BITS);
            __m256i below = pair_avx2(weights[k] & low_mask, weights[k + 1] & low_mask);
            const __m256i values[4] = {
                _mm256_unpacklo_epi8(left, zero), _mm256_unpackhi_epi8(left, zero),
                _mm256_unpacklo_epi8(right, zero), _mm256_unpackhi_epi8(right, zero)};
            for (int part = 0; part < 4; part++) {
                high[part] = _mm256_add_epi32(high[part], _mm256_madd_epi16(values[part], above));
                low[part] = _mm256_add_epi32(low[part], _mm256_madd_epi16(values[part], below));
            }
        }
        __m256i sums[4];
        for (int part = 0; part < 4; part++)
            sums[part] = _mm256_srai_epi32(_mm256_add_epi32(joined_avx2(high[part], low[part]), half), FRACTION_BITS);
        /* Packing takes the halves of the registers apart just as unpacking did: the bytes are in order again. */
        __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
        if (width - x >= BLOCK) {
            _mm256_storeu_si256((__m256i *)(out + x), bytes);
        } else {
            uint8_t last[BLOCK];
            _mm256_storeu_si256((__m256i *)last, bytes);
            memcpy(out + x, last, (size_t)(width - x));
        }
    }
}
#endif

#ifdef RESAMPLE_NEON
/* Four inputs at a time, each spread over three lanes of 32 bits. Down, the plain loop is vectorised as it is. */
static void across_neon(const uint8_t *rows, int64_t stride, const Axis *axis, uint8_t *out, int64_t out_stride)
{
    static const uint8_t places[4][16] = { /* 255 gives a zero */
        {0, 255, 255, 255, 1, 255, 255, 255, 2, 255, 255, 255, 255, 255, 255, 255},
        {3, 255, 255, 255, 4, 255, 255, 255, 5, 255, 255, 255, 255, 255, 255, 255},
        {6, 255, 255, 255, 7, 255, 255, 255, 8, 255, 255, 255, 255, 255, 255, 255},
        {9, 255, 255, 255, 10, 255, 255, 255, 11, 255, 255, 255, 255, 255, 255, 255}};
    uint8x16_t spread[4];
    for (int k = 0; k < 4; k++)
        spread[k] = vld1q_u8(places[k]);
    for (int64_t x = 0; x < axis->out; x++) {
        const uint8_t *pixel = rows + CHANNELS * (int64_t)axis->first[x];
        const int32_t *weights = axis->weights + x * axis->taps;
        uint32x4_t sums[GROUP];
        for (int row = 0; row < GROUP; row++)
            sums[row] = vdupq_n_u32(1u << (FRACTION_BITS - 1));
        for (int64_t k = 0; k < axis->taps; k += 4, pixel += 4 * CHANNELS) {
            uint32x4_t four = vreinterpretq_u32_s32(vld1q_s32(weights + k));
            for (int row = 0; row < GROUP; row++) {
                uint8x16_t read = vld1q_u8(pixel + row * stride);
#define ADD_NEON(i) \
    sums[row] = vmlaq_laneq_u32(sums[row], vreinterpretq_u32_u8(vqtbl1q_u8(read, spread[i])), four, i)
                ADD_NEON(0), ADD_NEON(1), ADD_NEON(2), ADD_NEON(3);
#undef ADD_NEON
            }
        }
        for (int row = 0; row < GROUP; row++) {
            int32x4_t sum = vshrq_n_s32(vreinterpretq_s32_u32(sums[row]), FRACTION_BITS);
            uint8x8_t bytes = vqmovun_s16(vcombine_s16(vqmovn_s32(sum), vdup_n_s16(0)));
            uint32_t pixels = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
            memcpy(out + row * out_stride + CHANNELS * x, &pixels, 4);
        }
    }
}
#endif

static const Kernel KERNELS[] = {
#ifdef RESAMPLE_AVX2
    {"avx2", across_avx2, down_avx2},
#endif
#ifdef RESAMPLE_NEON
    {"neon", across_neon, down_plain},
#endif
    {"plain", across_plain, down_plain},
};
enum { NUM_KERNELS = sizeof KERNELS / sizeof *KERNELS };

static int kernel_runs_here(const Kernel *kernel)
{
#ifdef RESAMPLE_AVX2
    if (kernel->across == across_avx2)
        return __builtin_cpu_supports("avx2") != 0;
#endif
    (void)kernel;
    return 1;
}

/* Whether all that `resample` reads and adds by this axis is inside its bounds. */
static int resample_axis_fits(const Axis *axis)
{
    for (int64_t i = 0; i < axis->out; i++) {
        int64_t sum = 1 << (FRACTION_BITS - 1);
        if (axis->first[i] < (i ? axis->first[i - 1] : 0) || axis->first[i] >= axis->length)
            return 0;
        for (int64_t k = 0; k < axis->taps; k++) {
            int64_t weight = axis->weights[i * axis->taps + k];
            if (weight && axis->first[i] + k >= axis->length)
                return 0;
            sum += 255 * (weight < 0 ? -weight : weight);
            if (sum > INT32_MAX)
                return 0;
        }
    }
    return 1;
}

/* uint8 [rows.out, columns.out, 3] from uint8 [rows.length, columns.length, 3]; -1 where memory is short.
 * Both axes fit, and no length or count of theirs is above 2^24, so that no product below leaves an int64. */
static int resample(const Kernel *kernel, const uint8_t *pixels, const Axis *rows, const Axis *columns, uint8_t *out)
{
    const int64_t stride = CHANNELS * columns->length, width = CHANNELS * columns->out;
    const int64_t reach = CHANNELS * (columns->first[columns->out - 1] + columns->taps) + 4; /* 16 bytes for 12 */
    const int64_t ring_stride = (width + 1 + BLOCK - 1) / BLOCK * BLOCK;
    /* A power of two, so that a group lies in one piece: an output's rows, less one, and a group. */
    int64_t ring_rows = GROUP;
    while (ring_rows < rows->taps + GROUP && ring_rows < rows->length + GROUP)
        ring_rows *= 2;
    uint8_t *ring = calloc((size_t)ring_rows, (size_t)ring_stride);
    uint8_t *padded = calloc(GROUP, (size_t)(stride + reach)); /* of the rows behind which nothing may be read */
    const uint8_t **read = malloc((size_t)rows->taps * sizeof *read);
    int64_t done = rows->first[0] / GROUP * GROUP; /* rows that have been through the first pass */
    int status = -1;
    if (!ring || !padded || !read)
        goto end;
    for (int64_t y = 0; y < rows->out; y++) {
        const int64_t first = rows->first[y];
        const int64_t stop = first + rows->taps < rows->length ? first + rows->taps : rows->length;
        for (; done < stop; done += GROUP) {
            const uint8_t *group = pixels + done * stride;
            int64_t group_stride = stride;
            if ((done + GROUP - 1) * stride + reach > rows->length * stride) {
                group_stride = stride + reach;
                for (int64_t row = done; row < done + GROUP && row < rows->length; row++)
                    memcpy(padded + (row - done) * group_stride, pixels + row * stride, (size_t)stride);
                group = padded;
            }
            kernel->across(group, group_stride, columns, ring + done % ring_rows * ring_stride, ring_stride);
        }
        const int32_t *weights = rows->weights + y * rows->taps;
        int64_t taps = rows->taps;
        while (taps > 2 && !weights[taps - 1] && !weights[taps - 2])
            taps -= 2;
        for (int64_t k = 0; k < taps; k++) /* a row beyond the end has no weight: any will do */
            read[k] = ring + (first + k < stop ? first + k : first) % ring_rows * ring_stride;
        kernel->down(read, weights, taps, width, out + y * width);
    }
    status = 0;
end:
    free(ring);
    free(padded);
    free(read);
    return status;
}

/* float32 [images, 3, plane] from uint8 [images, plane, 3]: each value is looked up in its channel's table. */
static void look_up(const uint8_t *pixels, int64_t images, int64_t plane, const float *table, float *out)
{
    for (int64_t image = 0; image < images; image++) {
        float *red = out + CHANNELS * plane * image, *green = red + plane, *blue = green + plane;
        for (int64_t i = 0; i < plane; i++, pixels += CHANNELS) {
            red[i] = table[pixels[0]];
            green[i] = table[256 + pixels[1]];
            blue[i] = table[512 + pixels[2]];
        }
    }
}

#endif
