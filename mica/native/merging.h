// One pass over a chunk of a weight that is merged: `mica.fast.merge.merging` on a CPU, to the bit. PyTorch's operators
// make eight passes, each with its own temporary.
//
// Processors and builds of PyTorch round NaN and subnormal numbers to bfloat16 in different ways. A chunk in which one
// has to be rounded is left to PyTorch.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "loops.h"

#if !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("O3")
#endif

namespace mica {

inline float as_float(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline uint32_t as_bits(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

// Of numbers that are rounded, as integers: the largest magnitude, and the smallest but 0, minus 1.
struct Range {
  uint32_t largest = 0;
  uint32_t smallest = 0xFFFFFFFFu;

  // Neither NaN nor subnormal numbers are among them.
  bool is_ordinary() const {
    return largest <= 0x7F800000u && smallest >= 0x00800000u - 1;
  }
};

// As std::max and std::min, which are compiled for any processor and so not inlined in a loop for some.
inline uint32_t larger(uint32_t left, uint32_t right) {
  return left > right ? left : right;
}

inline uint32_t smaller(uint32_t left, uint32_t right) {
  return left < right ? left : right;
}

inline float widened(uint16_t word) {
  return as_float(static_cast<uint32_t>(word) << 16);
}

inline float widened(uint32_t word) {
  return as_float(word);
}

// To bfloat16: to the nearest, ties to even.
inline void narrowed(float number, uint16_t& word) {
  const uint32_t bits = as_bits(number);
  word = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline void narrowed(float number, uint32_t& word) {
  word = as_bits(number);
}

// What a merge has done to some weights.
struct Merged {
  Range range;
  int64_t unchanged = 0;
  double update_squared = 0.0;
  double error_squared = 0.0;
  std::vector<int64_t> lost; // positions at which subtracting the update does not give the weight back
};

constexpr int64_t merge_block = 1024; // elements whose squares are summed in fp32

// new = round(old + update) of a block of this size at most; ``lost`` gets 1 where it cannot be undone
#define MICA_MERGE_BLOCK(Word)                                                                                 \
  MICA_VECTORS inline void merge_block_of(                                                                     \
      Word* fresh, const Word* old, const float* update, uint8_t* lost, int64_t size, Merged& merged) {        \
    uint32_t largest = merged.range.largest;                                                                   \
    uint32_t smallest = merged.range.smallest;                                                                 \
    uint32_t unchanged = 0;                                                                                    \
    MICA_LOOP                                                                                                  \
    for (int64_t i = 0; i < size; ++i) {                                                                       \
      const float before = widened(old[i]);                                                                    \
      const float sum = before + update[i];                                                                    \
      Word word;                                                                                               \
      narrowed(sum, word);                                                                                     \
      const float after = widened(word);                                                                       \
      const float recovered = after - update[i];                                                               \
      Word back;                                                                                               \
      narrowed(recovered, back);                                                                               \
      fresh[i] = word;                                                                                         \
      lost[i] = back != old[i];                                                                                \
      unchanged += after == before;                                                                            \
      const uint32_t magnitude = as_bits(sum) & 0x7FFFFFFFu;                                                   \
      const uint32_t magnitude_back = as_bits(recovered) & 0x7FFFFFFFu;                                        \
      largest = larger(largest, larger(magnitude, magnitude_back));                                        \
      smallest = smaller(smallest, smaller(magnitude - 1, magnitude_back - 1));                              \
    }                                                                                                          \
    merged.range = {largest, smallest};                                                                        \
    merged.unchanged += unchanged;                                                                             \
  }                                                                                                            \
  MICA_VECTORS inline void squares_of(                                                                         \
      const Word* fresh, const Word* old, const float* update, int64_t size, Merged& merged) {                 \
    constexpr int64_t lanes = 16; /* sums of their own, so that the loop has vectors */                        \
    float updates[lanes] = {};                                                                                 \
    float errors[lanes] = {};                                                                                  \
    for (int64_t start = 0; start + lanes <= size; start += lanes) {                                           \
      for (int64_t lane = 0; lane < lanes; ++lane) {                                                           \
        const int64_t i = start + lane;                                                                        \
        const float error = (widened(fresh[i]) - update[i]) - widened(old[i]);                                 \
        updates[lane] += update[i] * update[i];                                                                \
        errors[lane] += error * error;                                                                         \
      }                                                                                                        \
    }                                                                                                          \
    for (int64_t i = size / lanes * lanes; i < size; ++i) {                                                    \
      const float error = (widened(fresh[i]) - update[i]) - widened(old[i]);                                   \
      updates[0] += update[i] * update[i];                                                                     \
      errors[0] += error * error;                                                                              \
    }                                                                                                          \
    for (int64_t lane = 0; lane < lanes; ++lane) {                                                             \
      merged.update_squared += updates[lane];                                                                  \
      merged.error_squared += errors[lane];                                                                    \
    }                                                                                                          \
  }                                                                                                            \
  /* round(weight - update) into fresh */                                                                      \
  MICA_VECTORS inline Range subtract_block_of(                                                                 \
      Word* fresh, const Word* weight, const float* update, int64_t size) {                                    \
    uint32_t largest = 0;                                                                                      \
    uint32_t smallest = 0xFFFFFFFFu;                                                                           \
    MICA_LOOP                                                                                                  \
    for (int64_t i = 0; i < size; ++i) {                                                                       \
      const float difference = widened(weight[i]) - update[i];                                                 \
      Word word;                                                                                               \
      narrowed(difference, word);                                                                              \
      fresh[i] = word;                                                                                         \
      const uint32_t magnitude = as_bits(difference) & 0x7FFFFFFFu;                                            \
      largest = larger(largest, magnitude);                                                                  \
      smallest = smaller(smallest, magnitude - 1);                                                            \
    }                                                                                                          \
    return {largest, smallest};                                                                                \
  }
MICA_MERGE_BLOCK(uint16_t)
MICA_MERGE_BLOCK(uint32_t)
#undef MICA_MERGE_BLOCK

inline void append_positions(std::vector<int64_t>& positions, const uint8_t* is_set, int64_t size, int64_t first) {
  const uint8_t* end = is_set + size;
  for (const uint8_t* next = is_set; next < end; ++next) {
    next = static_cast<const uint8_t*>(std::memchr(next, 1, end - next));
    if (!next) {
      return;
    }
    positions.push_back(first + (next - is_set));
  }
}

// All tensors are contiguous and of one number of elements; fresh and old are bfloat16 or fp32, update is fp32.
template <typename Word>
Merged merge_words(const Tensor& fresh, const Tensor& old, const Tensor& update, bool needs_lost) {
  auto* to = static_cast<Word*>(fresh.mutable_data_ptr());
  const auto* from = static_cast<const Word*>(old.const_data_ptr());
  const auto* added = static_cast<const float*>(update.const_data_ptr());
  const int64_t size = old.numel();
  std::mutex mutex;
  std::vector<std::pair<int64_t, Merged>> parts;
  const int64_t blocks = (size + merge_block - 1) / merge_block;
  in_parallel(blocks, 32, [&](int64_t first, int64_t last) {
    Merged merged;
    uint8_t lost[merge_block];
    for (int64_t block = first; block < last; ++block) {
      const int64_t start = block * merge_block;
      const int64_t count = std::min(merge_block, size - start);
      merge_block_of(to + start, from + start, added + start, lost, count, merged);
      squares_of(to + start, from + start, added + start, count, merged);
      if (needs_lost) {
        append_positions(merged.lost, lost, count, start);
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    parts.emplace_back(first, std::move(merged));
  });
  std::sort(parts.begin(), parts.end(), [](const auto& left, const auto& right) { return left.first < right.first; });
  Merged whole;
  for (const auto& [first, part] : parts) {
    whole.range.largest = std::max(whole.range.largest, part.range.largest);
    whole.range.smallest = std::min(whole.range.smallest, part.range.smallest);
    whole.unchanged += part.unchanged;
    whole.update_squared += part.update_squared;
    whole.error_squared += part.error_squared;
    whole.lost.insert(whole.lost.end(), part.lost.begin(), part.lost.end());
  }
  return whole;
}

template <typename Word>
bool subtract_words(const Tensor& fresh, const Tensor& weight, const Tensor& update) {
  auto* to = static_cast<Word*>(fresh.mutable_data_ptr());
  const auto* from = static_cast<const Word*>(weight.const_data_ptr());
  const auto* subtracted = static_cast<const float*>(update.const_data_ptr());
  std::atomic<bool> is_ordinary{true};
  in_parallel(weight.numel(), 32 * merge_block, [&](int64_t first, int64_t last) {
    if (!subtract_block_of(to + first, from + first, subtracted + first, last - first).is_ordinary()) {
      is_ordinary = false;
    }
  });
  return is_ordinary;
}

// Each row's sum of its words, each times the factor of its column, modulo 2^64: `mica.row_checksums`
MICA_VECTORS inline uint64_t weighted_sum(const uint64_t* words, const uint64_t* factors, int64_t columns) {
  uint64_t sum = 0;
  MICA_LOOP
  for (int64_t i = 0; i < columns; ++i) {
    sum += words[i] * factors[i];
  }
  return sum;
}

// words (rows×columns) and factors (columns, contiguous) int64
inline Tensor weighted_sums(const Tensor& given_words, const Tensor& factors) {
  const Tensor words = given_words.contiguous();
  const int64_t rows = words.size(0);
  const int64_t columns = words.size(1);
  const Tensor sums = at::empty({rows}, at::kLong);
  const auto* from = reinterpret_cast<const uint64_t*>(words.const_data_ptr<int64_t>());
  const auto* factor = reinterpret_cast<const uint64_t*>(factors.const_data_ptr<int64_t>());
  auto* to = reinterpret_cast<uint64_t*>(sums.mutable_data_ptr<int64_t>());
  in_parallel(rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns)), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      to[row] = weighted_sum(from + row * columns, factor, columns);
    }
  });
  return sums;
}

// Whether `merge_words` and `subtract_words` take a chunk.
inline bool takes_chunk(const Tensor& fresh, const Tensor& weight, const Tensor& update) {
  const ScalarType dtype = weight.scalar_type();
  const bool has_dtypes = (dtype == at::kBFloat16 || dtype == at::kFloat) && fresh.scalar_type() == dtype &&
      update.scalar_type() == at::kFloat;
  const bool is_one_size = fresh.numel() == weight.numel() && update.numel() == weight.numel();
  return has_dtypes && is_one_size && weight.is_cpu() && fresh.is_contiguous() && weight.is_contiguous() &&
      update.is_contiguous();
}

} // namespace mica

#if !defined(__clang__)
#pragma GCC pop_options
#endif
