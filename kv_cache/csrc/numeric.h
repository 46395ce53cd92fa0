// Scalar conversions shared by the kernels. Everything rounds to nearest, ties to even, as PyTorch does.
#ifndef PARETO_NUMERIC_H
#define PARETO_NUMERIC_H

#include <stdint.h>
#include <string.h>

static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float bf16_to_float(uint16_t h) { return bits_to_float((uint32_t)h << 16); }

static inline uint16_t float_to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float f16_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    // A half's exponent and mantissa, moved to a float's place, are the value times 2**-112: subnormals come out right.
    const float magnitude = bits_to_float(rest << 13) * bits_to_float((254u - 15u) << 23);
    return bits_to_float(sign | float_to_bits(magnitude));
}

static inline uint16_t float_to_f16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds to 65536 or more
    if (rest < 0x38800000u) {  // subnormal half: add a number whose last place is 2**-24, so that the sum rounds there
        const float rounded = bits_to_float(rest) + 0.5f;
        return (uint16_t)(sign | (float_to_bits(rounded) - float_to_bits(0.5f)));
    }
    const uint32_t odd = (rest >> 13) & 1u;
    return (uint16_t)(sign | ((rest - 0x38000000u + 0xfffu + odd) >> 13));
}

static inline float load_float(const void *data, int64_t index, int dtype) {
    if (dtype == 1) return bf16_to_float(((const uint16_t *)data)[index]);
    if (dtype == 2) return f16_to_float(((const uint16_t *)data)[index]);
    return ((const float *)data)[index];
}

// A token's scale is a byte 16 * e + m (kv_cache/codec.py): the bits of the float (1 + m / 16) * 2**(e + exponent), from
// the byte or from a vector of bytes. A step has the exponent STEP_EXPONENT(bits).
#define SCALE_SHIFT 19
#define SCALE_FLOAT(byte, exponent) (((byte) + ((127 + (exponent)) << 4)) << SCALE_SHIFT)
#define SCALE_EXPONENT (-10)
#define STEP_EXPONENT(bits) (SCALE_EXPONENT + 2 - (bits))

#endif
