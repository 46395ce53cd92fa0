// The product on AVX-512 VNNI: one instruction multiplies four codes of 16 columns by four bytes of one row.

static void tiles_begin(int rows) { (void)rows; }
static void tiles_end(void) {}

// Called with constant m and n, whose 2 * m * n sums then stay in registers.
INLINE void multiply_block(const uint8_t *a, const uint8_t *b, int64_t b_stride, int chunks, int rows, int32_t *out,
                           int64_t stride, const int m, const int n) {
    __m512i sums[2][4][4];
    for (int r = 0; r < m; r++)
        for (int i = 0; i < n; i++) sums[0][r][i] = sums[1][r][i] = _mm512_setzero_si512();
    for (int k = 0; k < chunks; k++) {
        const uint8_t *activations = a + k * CHUNK_BYTES, *codes = b + k * b_stride;
        for (int j = 0; j < 16; j++) {
            __m512i column[4];
            for (int i = 0; i < n; i++) column[i] = _mm512_load_si512(codes + i * TILE_BYTES + 64 * j);
            for (int part = 0; part < 2; part++)
                for (int r = 0; r < m; r++) {
                    int32_t four;
                    memcpy(&four, activations + 64 * (part * rows + r) + 4 * j, 4);
                    const __m512i x = _mm512_set1_epi32(four);
                    for (int i = 0; i < n; i++) sums[part][r][i] = _mm512_dpbusd_epi32(sums[part][r][i], column[i], x);
                }
        }
    }
    for (int r = 0; r < m; r++)
        for (int i = 0; i < n; i++)
            _mm512_storeu_si512(out + r * stride + 16 * i,
                                _mm512_add_epi32(_mm512_slli_epi32(sums[0][r][i], 8), sums[1][r][i]));
}

INLINE void multiply_rows(const uint8_t *a, const uint8_t *b, int64_t b_stride, int chunks, int rows, int32_t *out,
                          int64_t stride, const int n) {
    int r = 0;
    for (; r + 2 <= rows; r += 2)
        multiply_block(a + 64 * r, b, b_stride, chunks, rows, out + r * stride, stride, 2, n);
    if (r < rows) multiply_block(a + 64 * r, b, b_stride, chunks, rows, out + r * stride, stride, 1, n);
}

static void product(const uint8_t *a, const uint8_t *b, int64_t b_stride, int chunks, int tiles, int rows, int32_t *out,
                    int64_t stride) {
    int tile = 0;
    for (; tile + 4 <= tiles; tile += 4)
        multiply_rows(a, b + (int64_t)tile * TILE_BYTES, b_stride, chunks, rows, out + 16 * tile, stride, 4);
    for (; tile + 2 <= tiles; tile += 2)
        multiply_rows(a, b + (int64_t)tile * TILE_BYTES, b_stride, chunks, rows, out + 16 * tile, stride, 2);
    if (tile < tiles)
        multiply_rows(a, b + (int64_t)tile * TILE_BYTES, b_stride, chunks, rows, out + 16 * tile, stride, 1);
}
