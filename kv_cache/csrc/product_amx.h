// The product on AMX tiles: a tile of activations (rows: high bytes, then low bytes) times tiles of codes.

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} tile_config;

// Tiles 0..3 are sums and 4 the activations, of 2 * rows rows; 5..7 are codes (but see product_pair). A processor multiplies no rows that a tile
// lacks. The table is constant because GCC does not know that the instruction reads memory.
#define CONFIG(n)                                                                                                      \
    {.palette = 1, .bytes_per_row = {64, 64, 64, 64, 64, 64, 64, 64},                                                  \
     .rows = {2 * (n), 2 * (n), 2 * (n), 2 * (n), 2 * (n), 16, 16, 16}}
static const tile_config TILES[UNIT_ROWS] = {CONFIG(1), CONFIG(2), CONFIG(3), CONFIG(4),
                                             CONFIG(5), CONFIG(6), CONFIG(7), CONFIG(8)};

static void tiles_begin(int rows) { _tile_loadconfig(&TILES[rows - 1]); }
static void tiles_end(void) { _tile_release(); }

INLINE void combine_tiles(int32_t (*sums)[256], int n, int rows, int32_t *out, int64_t stride) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++)
            store16i(out + r * stride + 16 * i, (load16i(sums[i] + 16 * r) << 8) + load16i(sums[i] + 16 * (rows + r)));
}

// Issue n tiles: all products, then all stores, so that nothing waits on one of them.
#define MULTIPLY_TILES(n)                                                                                              \
    do {                                                                                                               \
        _tile_zero(0);                                                                                                 \
        if (n > 1) _tile_zero(1);                                                                                      \
        if (n > 2) _tile_zero(2);                                                                                      \
        if (n > 3) _tile_zero(3);                                                                                      \
        for (int k = 0; k < chunks; k++) {                                                                             \
            const uint8_t *codes = b + k * b_stride + (int64_t)tile * TILE_BYTES;                                      \
            _tile_loadd(4, a + k * CHUNK_BYTES, 64);                                                                   \
            _tile_loadd(5, codes, 64);                                                                                 \
            _tile_dpbsud(0, 4, 5);                                                                                     \
            if (n > 1) { _tile_loadd(6, codes + TILE_BYTES, 64); _tile_dpbsud(1, 4, 6); }                              \
            if (n > 2) { _tile_loadd(7, codes + 2 * TILE_BYTES, 64); _tile_dpbsud(2, 4, 7); }                          \
            if (n > 3) { _tile_loadd(5, codes + 3 * TILE_BYTES, 64); _tile_dpbsud(3, 4, 5); }                          \
        }                                                                                                              \
        _tile_stored(0, to[0], 64);                                                                                    \
        if (n > 1) _tile_stored(1, to[1], 64);                                                                         \
        if (n > 2) _tile_stored(2, to[2], 64);                                                                         \
        if (n > 3) _tile_stored(3, to[3], 64);                                                                         \
    } while (0)

static void product(const uint8_t *a, const uint8_t *b, int64_t b_stride, int chunks, int tiles, int rows, int32_t *out,
                    int64_t stride) {
    int32_t sums[2][4][256] __attribute__((aligned(64)));
    // GCC's tile loads do not tell the compiler that they read memory: have every store done before them.
    __asm__ volatile("" ::: "memory");
    int pending = 0;
    // Sums are combined one step late, while the next tiles are on their way.
    for (int tile = 0; tile < tiles; tile += 4) {
        int32_t(*to)[256] = sums[tile / 4 & 1];
        const int n = tiles - tile < 4 ? tiles - tile : 4;
        if (n == 4) MULTIPLY_TILES(4);
        else if (n == 3) MULTIPLY_TILES(3);
        else if (n == 2) MULTIPLY_TILES(2);
        else MULTIPLY_TILES(1);
        if (tile) combine_tiles(sums[(tile / 4 - 1) & 1], 4, rows, out + 16 * (tile - 4), stride);
        pending = n;
    }
    const int last = (tiles - 1) / 4;
    combine_tiles(sums[last & 1], pending, rows, out + 64 * last, stride);
}

// Two units: sums 0 and 1 of the first, 2 and 3 of the second; activations in tiles 4 and 5, codes in 6 and 7. Loading
// codes takes longer than multiplying them, so each tile is multiplied twice. All tiles have 16 rows here.
#define MULTIPLY_PAIR(n)                                                                                               \
    do {                                                                                                               \
        _tile_zero(0);                                                                                                 \
        _tile_zero(2);                                                                                                 \
        if (n > 1) { _tile_zero(1); _tile_zero(3); }                                                                   \
        for (int k = 0; k < chunks; k++) {                                                                             \
            const uint8_t *codes = b + k * b_stride + (int64_t)tile * TILE_BYTES;                                      \
            _tile_loadd(6, codes, 64);                                                                                 \
            if (n > 1) _tile_loadd(7, codes + TILE_BYTES, 64);                                                         \
            if (chunks > 1 || !tile) {                                                                                 \
                _tile_loadd(4, a[0] + k * CHUNK_BYTES, 64);                                                            \
                _tile_loadd(5, a[1] + k * CHUNK_BYTES, 64);                                                            \
            }                                                                                                          \
            _tile_dpbsud(0, 4, 6);                                                                                     \
            _tile_dpbsud(2, 5, 6);                                                                                     \
            if (n > 1) { _tile_dpbsud(1, 4, 7); _tile_dpbsud(3, 5, 7); }                                               \
        }                                                                                                              \
        _tile_stored(0, to[0][0], 64);                                                                                 \
        _tile_stored(2, to[1][0], 64);                                                                                 \
        if (n > 1) { _tile_stored(1, to[0][1], 64); _tile_stored(3, to[1][1], 64); }                                   \
    } while (0)

static void product_pair(const uint8_t *const a[2], const uint8_t *b, int64_t b_stride, int chunks, int tiles,
                         int32_t *const out[2], int64_t stride) {
    int32_t sums[2][2][2][256] __attribute__((aligned(64)));
    __asm__ volatile("" ::: "memory");
    for (int tile = 0; tile < tiles; tile += 2) {
        int32_t(*to)[2][256] = sums[tile / 2 & 1];
        if (tiles - tile > 1) MULTIPLY_PAIR(2);
        else MULTIPLY_PAIR(1);
        if (tile)
            for (int i = 0; i < 2; i++)
                combine_tiles(sums[(tile / 2 - 1) & 1][i], 2, UNIT_ROWS, out[i] + 16 * (tile - 2), stride);
    }
    const int last = (tiles - 1) / 2;
    for (int i = 0; i < 2; i++)
        combine_tiles(sums[last & 1][i], tiles - 2 * last, UNIT_ROWS, out[i] + 32 * last, stride);
}
