// What a warp multiplies at a time: a unit of 32 rows by 128 channels. Of its 32 channels from 32 j, lane 4 g + t holds the
// eight from 32 j + 8 t, of four rows. A unit's codes are vectors of four words, [BITS][lane].
//
// Macros: BITS of a weight, IN_BFLOAT, GROUP_STEPS (2, 4 or 8: groups of 32, 64 or 128 channels).
#pragma once
#include "numbers.cuh"

constexpr int ROWS = 32, CHANNELS = 128, GROUPS = 8 / GROUP_STEPS, UNIT_WORDS = 128 * BITS;

