// The product on 16-bit pairs: AVX2's multiply-add of pairs, or plain vectors.

static void tiles_begin(int rows) { (void)rows; }
static void tiles_end(void) {}

#if defined(__AVX2__)

// Called with a constant m, whose 2 * m sums then stay in registers.
INLINE void multiply_block(const uint8_t *a, const uint8_t *b, int64_t b_stride, int chunks, int32_t *out,
                           int64_t stride, const int m) {
    const __m256i mask = _mm256_set1_epi32(0x00ff00ff);
    __m256i sums[4][2];
    for (int r = 0; r < m; r++) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int k = 0; k < chunks; k++) {
        const uint8_t *activations = a + k * CHUNK_BYTES, *codes = b + k * b_stride;
        for (int j = 0; j < 16; j++) {
            __m256i even[2], odd[2];
            for (int i = 0; i < 2; i++) {
                const __m256i four = _mm256_load_si256((const __m256i *)(codes + 64 * j + 32 * i));
                even[i] = _mm256_and_si256(four, mask);
                odd[i] = _mm256_srli_epi16(four, 8);
            }
            for (int r = 0; r < m; r++) {
                int32_t pairs[2];
                memcpy(pairs, activations + 128 * r + 4 * j, 4);
                memcpy(pairs + 1, activations + 128 * r + 64 + 4 * j, 4);
                const __m256i x = _mm256_set1_epi32(pairs[0]), y = _mm256_set1_epi32(pairs[1]);
                for (int i = 0; i < 2; i++) {
                    sums[r][i] = _mm256_add_epi32(sums[r][i], _mm256_madd_epi16(even[i], x));
                    sums[r][i] = _mm256_add_epi32(sums[r][i], _mm256_madd_epi16(odd[i], y));
                }
            }
        }
    }
    for (int r = 0; r < m; r++)
        for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i *)(out + r * stride + 8 * i), sums[r][i]);
}

static void product(const uint8_t *a, const uint8_t *b, int64_t b_stride, int chunks, int tiles, int rows, int32_t *out,
                    int64_t stride) {
    for (int tile = 0; tile < tiles; tile++, b += TILE_BYTES, out += 16) {
        int r = 0;
        for (; r + 4 <= rows; r += 4) multiply_block(a + 128 * r, b, b_stride, chunks, out + r * stride, stride, 4);
        if (rows - r == 3) multiply_block(a + 128 * r, b, b_stride, chunks, out + r * stride, stride, 3);
        else if (rows - r == 2) multiply_block(a + 128 * r, b, b_stride, chunks, out + r * stride, stride, 2);
        else if (rows - r == 1) multiply_block(a + 128 * r, b, b_stride, chunks, out + r * stride, stride, 1);
    }
}

#else

static void product(const uint8_t *a, const uint8_t *b, int64_t b_stride, int chunks, int tiles, int rows, int32_t *out,
                    int64_t stride) {
    const v16i byte = splati(255);
    for (int tile = 0; tile < tiles; tile++)
        for (int r = 0; r < rows; r++) {
            v16i sum = splati(0);
            for (int k = 0; k < chunks; k++)
                for (int j = 0; j < 16; j++) {
                    const v16u codes = (v16u)load16i(b + k * b_stride + tile * TILE_BYTES + 64 * j);
                    int16_t even[2], odd[2];
                    memcpy(even, a + k * CHUNK_BYTES + 128 * r + 4 * j, 4);
                    memcpy(odd, a + k * CHUNK_BYTES + 128 * r + 64 + 4 * j, 4);
                    sum += ((v16i)codes & byte) * splati(even[0]) + ((v16i)(codes >> 8) & byte) * splati(odd[0])
                        + ((v16i)(codes >> 16) & byte) * splati(even[1]) + (v16i)(codes >> 24) * splati(odd[1]);
                }
            store16i(out + r * stride + 16 * tile, sum);
        }
}

#endif
