// Merging s·B·A into a bfloat16 or fp32 weight, and unmerging it: `mica.fast.merge.merging` on a CPU, to the bit. All that
// is done with a row is done while it is in the cache; PyTorch's operators would pass over the weight 15 times.

#pragma once

#include <bit>
#include <cstring>
#include <tuple>

#include "loops.h"

namespace mica {

inline float widened(uint16_t word) {
  return std::bit_cast<float>(static_cast<uint32_t>(word) << 16);
}

inline float widened(uint32_t word) {
  return std::bit_cast<float>(word);
}

// To bfloat16: to the nearest, ties to even.
inline void narrowed(float number, uint16_t& word) {
  const auto bits = std::bit_cast<uint32_t>(number);
  word = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline void narrowed(float number, uint32_t& word) {
  word = std::bit_cast<uint32_t>(number);
}

// NaN or subnormal: processors and builds of PyTorch round these to bfloat16 in different ways.
inline uint32_t is_unusual(float number) {
  const uint32_t magnitude = std::bit_cast<uint32_t>(number) & 0x7FFFFFFFu;
  return (magnitude - 1 < 0x007FFFFFu) | (magnitude > 0x7F800000u);
}

// What is summed over a merge: how many weights have not moved, ‖update‖² and ‖error‖²
using Sums = std::array<double, 3>;

// fresh = round(old + update), or round(old - update); whether a result is unusual
#define MICA_ROUND_ROW(name, Word, sign)                                                                               \
  MICA_VECTORS inline bool name(                                                                                       \
      Word* __restrict fresh, const Word* __restrict old, const float* __restrict update, int64_t size) {              \
    uint32_t unusual = 0;                                                                                              \
    MICA_LOOP                                                                                                          \
    for (int64_t i = 0; i < size; ++i) {                                                                               \
      const float result = widened(old[i]) sign update[i];                                                             \
      narrowed(result, fresh[i]);                                                                                      \
      unusual |= is_unusual(result);                                                                                   \
    }                                                                                                                  \
    return unusual;                                                                                                    \
  }

#define MICA_ROWS(Word)                                                                                                \
  MICA_ROUND_ROW(merge_row, Word, +)                                                                                   \
  MICA_ROUND_ROW(unmerge_row, Word, -)                                                                                 \
  /* fresh = round(old + update), and the sums, which take as long again; whether a sum is unusual */                  \
  MICA_VECTORS inline bool measure_row(                                                                                \
      Word* __restrict fresh, const Word* __restrict old, const float* __restrict update, int64_t size, Sums& sums) {  \
    uint32_t unusual = 0;                                                                                              \
    uint32_t unchanged = 0;                                                                                            \
    float updates = 0;                                                                                                 \
    float errors = 0;                                                                                                  \
    _Pragma("omp simd reduction(| : unusual) reduction(+ : unchanged, updates, errors)")                               \
    for (int64_t i = 0; i < size; ++i) {                                                                               \
      const float before = widened(old[i]);                                                                            \
      const float sum = before + update[i];                                                                            \
      narrowed(sum, fresh[i]);                                                                                         \
      const float after = widened(fresh[i]);                                                                           \
      const float error = (after - update[i]) - before;                                                                \
      unusual |= is_unusual(sum);                                                                                      \
      unchanged += after == before;                                                                                    \
      updates += update[i] * update[i];                                                                                \
      errors += error * error;                                                                                         \
    }                                                                                                                  \
    sums[0] += unchanged;                                                                                              \
    sums[1] += updates;                                                                                                \
    sums[2] += errors;                                                                                                 \
    return unusual;                                                                                                    \
  }                                                                                                                    \
  /* is_lost: where round(merged - update) is not old; whether a difference is unusual */                              \
  MICA_VECTORS inline bool find_lost(                                                                                  \
      uint8_t* __restrict is_lost, const Word* __restrict old, const Word* __restrict merged,                          \
      const float* __restrict update, int64_t size) {                                                                  \
    uint32_t unusual = 0;                                                                                              \
    MICA_LOOP                                                                                                          \
    for (int64_t i = 0; i < size; ++i) {                                                                               \
      const float difference = widened(merged[i]) - update[i];                                                         \
      Word back;                                                                                                       \
      narrowed(difference, back);                                                                                      \
      is_lost[i] = back != old[i];                                                                                     \
      unusual |= is_unusual(difference);                                                                               \
    }                                                                                                                  \
    return unusual;                                                                                                    \
  }
MICA_ROWS(uint16_t)
MICA_ROWS(uint32_t)
#undef MICA_ROWS
#undef MICA_ROUND_ROW

// The sum of words, each times the factor of its column, modulo 2^64: `mica.row_checksums`
MICA_VECTORS inline uint64_t weighted_sum(const void* row, const Tensor& factors) {
  const auto* words = static_cast<const uint64_t*>(row);
  const auto* weights = static_cast<const uint64_t*>(factors.const_data_ptr());
  const int64_t columns = factors.numel();
  uint64_t sum = 0;
  MICA_LOOP
  for (int64_t i = 0; i < columns; ++i) {
    sum += words[i] * weights[i];
  }
  return sum;
}

// words (rows×columns) and factors (columns, contiguous) int64
inline Tensor weighted_sums(const Tensor& given_words, const Tensor& factors) {
  const Tensor words = given_words.contiguous();
  const Tensor sums = at::empty({words.size(0)}, at::kLong);
  for_each_row(words.size(0), words.size(1), [&](int64_t row) {
    const int64_t* from = words.const_data_ptr<int64_t>() + row * words.size(1);
    sums.mutable_data_ptr<int64_t>()[row] = weighted_sum(from, factors);
  });
  return sums;
}

// Memory that begins with a line of the cache: loops take up to a tenth longer over vectors that lie in two.
struct alignas(64) Line {
  char bytes[64];
};

// What is found in rows that follow each other, and a thread's memory for one of them.
template <typename Word>
struct Part {
  std::vector<int64_t> left; // rows that are left to PyTorch
  std::vector<uint16_t> columns; // where subtracting the update does not give a weight back,
  std::vector<Word> values; // and the weight
  Sums sums = {};
  bool is_exact = true;
  std::vector<Line> fresh;
  std::vector<uint8_t> is_lost; // whole words of 64 bytes

  explicit Part(int64_t size) : fresh(1 + size * sizeof(Word) / sizeof(Line)), is_lost((size + 63) / 64 * 64) {}

  // Keep the weights of a row where `is_lost` is 1; how many these are
  int32_t keep(const Word* old) {
    const size_t count = columns.size();
    for (size_t start = 0; start < is_lost.size(); start += 64) {
      uint64_t flags = 0; // a bit for each byte: one loop over what is lost mispredicts less than eight
      // the product has the lowest bit of byte i in bit 56 + i
      for (int shift = 0; shift < 64; shift += 8) {
        uint64_t bytes;
        std::memcpy(&bytes, is_lost.data() + start + shift, sizeof bytes);
        flags |= (bytes * 0x0102040810204080u >> 56) << shift;
      }
      for (; flags != 0; flags &= flags - 1) {
        columns.push_back(start + std::countr_zero(flags));
        values.push_back(old[columns.back()]);
      }
    }
    return columns.size() - count;
  }
};

// One field of all parts, one after the other
template <typename Word, typename Number>
Tensor joined(const std::vector<Part<Word>>& parts, std::vector<Number> Part<Word>::*field, at::ScalarType dtype) {
  int64_t size = 0;
  for (const Part<Word>& part : parts) {
    size += (part.*field).size();
  }
  const Tensor tensor = at::empty({size}, dtype);
  auto* to = static_cast<Number*>(tensor.mutable_data_ptr());
  for (const Part<Word>& part : parts) {
    to = std::copy((part.*field).begin(), (part.*field).end(), to);
  }
  return tensor;
}

// work(part, row, s·B·A of the row) for all rows of a weight, by several threads; the parts in the order of their rows.
// up, down, transposed: `mica.fast.merge.merging.Update`, multiplied for ``step`` rows at a time
template <typename Word, typename Work>
std::vector<Part<Word>> for_rows(
    const Tensor& weight, const Tensor& up, const Tensor& down, bool transposed, int64_t step, const Work& work) {
  const int64_t columns = weight.size(1);
  const int64_t grain = std::max<int64_t>(1, 32768 / columns);
  const int64_t count = weight.size(0) / up.size(0);
  const auto* words = static_cast<const Word*>(weight.const_data_ptr());
  thread_local std::vector<Line> memory; // only grows: to map and clear it takes longer than the product
  memory.resize(std::max(memory.size(), 1 + std::min(step, count) * columns * sizeof(float) / sizeof(Line)));
  auto* numbers = reinterpret_cast<float*>(memory.data());
  std::vector<Part<Word>> parts;
  for (int64_t begin = 0, size = 0; begin < weight.size(0); begin += size) {
    const int64_t start = begin % count;
    size = std::min(step, count - start);
    const Tensor left = up[begin / count];
    const Tensor right = down[begin / count];
    Tensor product = at::from_blob(numbers, {size, columns}, at::kFloat);
    if (transposed) {
      product.copy_(at::mm(left, right.narrow(1, start, size).contiguous()).t());
    } else {
      at::mm_out(product, left.narrow(0, start, size), right);
    }
    const size_t before = parts.size();
    parts.resize(before + (size + grain - 1) / grain, Part<Word>(columns));
    in_parallel(parts.size() - before, 1, [&](int64_t first, int64_t last) {
      for (int64_t row = first * grain; row < std::min(size, last * grain); ++row) {
        const Word* later = words + (begin + row + 4) * columns; // the loops are faster than memory
        for (int64_t i = 0; i < columns; i += sizeof(Line) / sizeof(Word)) {
          __builtin_prefetch(later + i, 0, 2); // not to the first cache, which the rows in work fill
        }
        work(parts[before + row / grain], begin + row, numbers + row * columns);
      }
    });
  }
  return parts;
}

// out = round(weight + s·B·A) but for the rows that are left; ``out`` may be the weight. Gives those rows, the sums
// over every ``measured``-th row, and if ``keeps`` the tensors of `mica.fast.merge.merging.Kept`.
template <typename Word>
std::tuple<Tensor, Sums, std::vector<Tensor>> merge(
    const Tensor& weight, const Tensor& out, const Tensor& up, const Tensor& down, bool transposed, int64_t step,
    const Tensor& factors, bool keeps, int64_t measured) {
  auto* to = static_cast<Word*>(out.mutable_data_ptr());
  const auto* from = static_cast<const Word*>(weight.const_data_ptr());
  const int64_t size = weight.size(1);
  const Tensor checksums = at::empty({keeps * weight.size(0), 2}, at::kLong);
  const Tensor counts = at::empty({keeps * weight.size(0)}, at::kInt);
  const auto work = [&](Part<Word>& part, int64_t row, const float* product) {
    const Word* old = from + row * size;
    auto* fresh = reinterpret_cast<Word*>(part.fresh.data());
    bool is_left = row % measured == 0 ? measure_row(fresh, old, product, size, part.sums)
                                       : merge_row(fresh, old, product, size);
    if (keeps) {
      is_left |= find_lost(part.is_lost.data(), old, fresh, product, size);
      if (is_left) { // PyTorch may round it in another way
        std::fill_n(part.is_lost.begin(), size, 1);
      }
      counts.mutable_data_ptr<int32_t>()[row] = part.keep(old);
      int64_t* sums = checksums.mutable_data_ptr<int64_t>() + 2 * row;
      sums[0] = weighted_sum(old, factors);
      sums[1] = weighted_sum(fresh, factors);
    }
    if (is_left) {
      part.left.push_back(row);
    } else {
      std::copy_n(fresh, size, to + row * size);
    }
  };
  const auto parts = for_rows<Word>(weight, up, down, transposed, step, work);
  Sums sums = {};
  for (const Part<Word>& part : parts) {
    std::transform(sums.begin(), sums.end(), part.sums.begin(), sums.begin(), std::plus());
  }
  std::vector<Tensor> kept;
  if (keeps) {
    const Tensor columns = joined(parts, &Part<Word>::columns, at::kUInt16);
    kept = {checksums, counts, columns, joined(parts, &Part<Word>::values, weight.scalar_type())};
  }
  return {joined(parts, &Part<Word>::left, at::kLong), sums, kept};
}

// weight = round(weight - s·B·A) but for the rows that are left, and every bit from before the merge in those that are as
// it left them. Gives the rows that are left, and whether all others were as the merge left them and are as before it.
template <typename Word>
std::tuple<Tensor, bool> unmerge(
    const Tensor& weight, const Tensor& up, const Tensor& down, bool transposed, int64_t step, const Tensor& factors,
    const std::array<Tensor, 4>& kept) {
  auto* words = static_cast<Word*>(weight.mutable_data_ptr());
  const int64_t size = weight.size(1);
  const auto& [checksums, counts, columns, values] = kept;
  const Tensor ends = counts.cumsum(0);
  const auto* column = columns.template const_data_ptr<uint16_t>();
  const auto* value = static_cast<const Word*>(values.const_data_ptr());
  const auto work = [&](Part<Word>& part, int64_t row, const float* product) {
    auto* fresh = reinterpret_cast<Word*>(part.fresh.data());
    Word* merged = words + row * size;
    if (unmerge_row(fresh, merged, product, size)) {
      part.left.push_back(row);
      return;
    }
    const auto* sums = checksums.template const_data_ptr<int64_t>() + 2 * row;
    const bool is_as_merged = weighted_sum(merged, factors) == sums[1];
    const int64_t end = ends.const_data_ptr<int64_t>()[row];
    const int64_t count = is_as_merged ? counts.template const_data_ptr<int32_t>()[row] : 0;
    for (int64_t i = end - count; i < end; ++i) {
      fresh[column[i]] = value[i];
    }
    part.is_exact &= is_as_merged && weighted_sum(fresh, factors) == sums[0];
    std::copy_n(fresh, size, merged);
  };
  const auto parts = for_rows<Word>(weight, up, down, transposed, step, work);
  const bool is_exact = std::all_of(parts.begin(), parts.end(), [](const auto& part) { return part.is_exact; });
  return {joined(parts, &Part<Word>::left, at::kLong), is_exact};
}

} // namespace mica
