// Interface of the CPU kernels: plain C, called through ctypes (kv_cache/cpu_kernels.py mirrors these structs).
// The arithmetic and its reasons are described in attention_impl.h; the page layout in kv_cache/layout.py.
#ifndef PARETO_CPU_H
#define PARETO_CPU_H

#include <stdint.h>

enum pareto_dtype { PARETO_F32 = 0, PARETO_BF16 = 1, PARETO_F16 = 2 };
#define TURN_SPAN 256  // kv_cache/rotary.py, SPAN

enum pareto_isa { PARETO_GENERIC = 0, PARETO_AVX2 = 1, PARETO_AVX512 = 2, PARETO_AMX = 3 };

// A plane of a page: where it starts, in bytes, and the bits of a channel in it; width 0: no such plane.
typedef struct {
    int32_t offset, width;
} pareto_plane;

// One layer's pages and how to read them. Strides are in bytes.
typedef struct {
    uint8_t *base;          // page of block b and KV head h: base + b * block_stride + h * head_stride
    int64_t block_stride;
    int64_t head_stride;
    int32_t block_size;     // tokens of a page
    int32_t num_kv_heads;
    int32_t head_dim;
    pareto_plane planes[2][2];      // of keys and of values: their lowest bits, and those above
    int32_t meta_offset;            // four bytes a token: key scale, key zero, value scale, value zero
    int32_t pairs;                  // of channels, padded with zero means to a multiple of 32
    int32_t num_anchors;
    const float *key_inverse;       // [num_kv_heads][head_dim][head_dim]
    const float *key_first;         // [num_kv_heads][head_dim]
    const float *value_decode;      // [num_kv_heads]
    const float *value_mirror;      // [num_kv_heads][head_dim]
    // Centres of keys (kv_cache/rotary.py).
    const float *key_mean;          // [num_kv_heads][2][pairs]: first, second channel
    const int32_t *pair_channels;   // [2][pairs]
    const float *turn_fine;         // [TURN_SPAN][2][pairs]: cosine, sine, as the bytes read
    const float *turn_anchors;      // [num_anchors][2][pairs]
    const uint8_t *turn_tiles;      // the bytes, in tiles of product.h: [pairs / 32][16 tiles of 16 positions][1024]
} pareto_cache;

typedef struct {
    pareto_cache cache;
    const void *query;          // [tokens][heads][head_dim]; strides in elements, channels contiguous
    void *out;
    int64_t query_token_stride, query_head_stride;
    int64_t out_token_stride, out_head_stride;
    // The query tokens' own keys and values, as they were before they were coded; null: they are read from codes too.
    const void *key;            // [tokens][num_kv_heads][head_dim]; strides in elements, channels contiguous
    const void *value;
    int64_t key_token_stride, key_head_stride;
    int64_t value_token_stride, value_head_stride;
    const float *sinks;         // [num_heads], a logit more in each head's softmax, without a value; null: none
    const int32_t *block_table; // [num_reqs][table_stride]
    int64_t table_stride;
    const int32_t *seq_lens;    // [num_reqs], the new tokens included
    const int32_t *query_start; // [num_reqs + 1]
    int32_t num_reqs;
    int32_t num_heads;
    int32_t dtype;              // enum pareto_dtype of query, out, key and value
    int32_t window;             // a token attends to the last `window` tokens, itself included; 0: to all
    int32_t num_threads;
    float scale;                // of q.k, before the soft cap
    float soft_cap;             // 0: none
} pareto_attention_args;

typedef struct {
    pareto_cache cache;
    const void *key;            // [tokens][num_kv_heads][head_dim]; strides in elements, channels contiguous
    const void *value;
    int64_t key_token_stride, key_head_stride;
    int64_t value_token_stride, value_head_stride;
    const float *key_transform; // [num_kv_heads][head_dim][head_dim]
    const float *value_encode;  // [num_kv_heads]
    // Of keys and of values: what a token's range, what -lowest / step and what is rounded are multiplied by
    // (kv_cache/codec.py, factors).
    float range_factor[2], zero_factor[2], gain[2];
    const int64_t *slots;       // [num_tokens] block * block_size + offset; negative: not stored
    const int64_t *positions;   // [num_tokens] in the sequence; not read where a slot is negative
    int64_t num_tokens;
    int32_t dtype;
    int32_t num_threads;
} pareto_store_args;

int pareto_attention_generic(const pareto_attention_args *);
int pareto_attention_avx2(const pareto_attention_args *);
int pareto_attention_avx512(const pareto_attention_args *);
int pareto_attention_amx(const pareto_attention_args *);

int pareto_store_generic(const pareto_store_args *);
int pareto_store_avx2(const pareto_store_args *);
int pareto_store_avx512(const pareto_store_args *);

#endif
