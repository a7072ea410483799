// What PyTorch has no fast operator for on a CPU: dropout whose mask follows from a seed (mica/paths/dropout.py has the
// same, to the bit), and the product of bfloat16 numbers in fp32.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// The loops here are worth vectors. PyTorch runs on processors that have none, so several versions are compiled.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12
#define MICA_TARGETS target_clones("arch=x86-64-v4", "avx2", "default")
#elif defined(__x86_64__) && defined(__GNUC__)
#define MICA_TARGETS target_clones("avx2", "default")
#else
#define MICA_TARGETS
#endif
#if defined(__clang__)
#define MICA_VECTORS __attribute__((MICA_TARGETS))
#define MICA_LOOP _Pragma("clang loop vectorize(enable)")
#else
#define MICA_VECTORS __attribute__((MICA_TARGETS, optimize("O3")))
#define MICA_LOOP
#endif

namespace mica {

using at::Tensor;

// -- threads ---------------------------------------------------------------------------------------------

// work(first, last) for parts of 0 … count, each of ``grain`` at least, on PyTorch's threads. Its own `at::parallel_for`
// is a template, which would bring a second OpenMP with threads of its own: PyTorch's loop over a tensor is compiled.
template <typename Work>
void in_parallel(int64_t count, int64_t grain, const Work& work) {
  if (count <= grain) {
    work(0, count);
    return;
  }
  Tensor items = at::empty({count}, at::kByte);
  const char* begin = static_cast<const char*>(items.const_data_ptr());
  auto iterator = at::TensorIterator::nullary_op(items);
  iterator.for_each(
      [&](char** data, const int64_t*, int64_t size) {
        const int64_t first = data[0] - begin;
        work(first, first + size);
      },
      grain);
}

// work(row) for rows of so many numbers
template <typename Work>
void for_each_row(int64_t rows, int64_t columns, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
  in_parallel(rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      work(row);
    }
  });
}

// -- dropout ---------------------------------------------------------------------------------------------

struct Dropout {
  double p = 0.0;
  uint64_t seed = 0;

  explicit operator bool() const {
    return p > 0.0;
  }

  // A hash's upper 24 bits of an element that is kept are this at least.
  uint32_t threshold() const {
    return static_cast<uint32_t>(std::nearbyint(p * 0x1p24));
  }
};

inline uint32_t mixed(uint32_t z, uint32_t between = 0) {
  z = ((z ^ (z >> 16)) * 0x21F0AAADu) ^ between;
  z = (z ^ (z >> 15)) * 0xD35A2D97u;
  return z ^ (z >> 15);
}

// What the hashes of a row have in common.
struct RowHash {
  uint32_t first;
  uint32_t second;

  RowHash(uint64_t seed, int64_t row) {
    first = mixed(static_cast<uint32_t>(row) ^ static_cast<uint32_t>(seed));
    second = mixed(first + static_cast<uint32_t>(seed >> 32));
  }
};

inline bool keeps(RowHash row, uint32_t column, uint32_t threshold) {
  return (mixed(column * 0x9E3779B9u + row.first, row.second) >> 8) >= threshold;
}

// out = in where it is kept, else 0, on the bits of a row of numbers: NaN that is dropped is 0, too
#define MICA_KEEP_ROW(Word)                                                                          \
  MICA_VECTORS inline void keep_row(Word* out, const Word* in, int64_t columns, RowHash row, uint32_t threshold) { \
    MICA_LOOP                                                                                        \
    for (int64_t i = 0; i < columns; ++i) {                                                          \
      out[i] = in[i] & static_cast<Word>(-static_cast<Word>(keeps(row, i, threshold)));             \
    }                                                                                                \
  }
MICA_KEEP_ROW(uint16_t)
MICA_KEEP_ROW(uint32_t)
MICA_KEEP_ROW(uint64_t)
#undef MICA_KEEP_ROW

template <typename Word>
void keep_rows(const Tensor& out, const Tensor& in, const Dropout& dropout) {
  const int64_t columns = in.size(1);
  const int64_t stride = in.stride(0);
  const auto* from = static_cast<const Word*>(in.const_data_ptr());
  auto* to = static_cast<Word*>(out.mutable_data_ptr());
  for_each_row(in.size(0), columns, [&](int64_t row) {
    const RowHash hash(dropout.seed, row);
    keep_row(to + row * columns, from + row * stride, columns, hash, dropout.threshold());
  });
}

// keep⊙x into ``out``, which is contiguous and may be x itself
inline void keep_into(const Tensor& out, const Tensor& x, const Dropout& dropout) {
  switch (x.element_size()) {
    case 2:
      return keep_rows<uint16_t>(out, x, dropout);
    case 4:
      return keep_rows<uint32_t>(out, x, dropout);
    default:
      return keep_rows<uint64_t>(out, x, dropout);
  }
}

// Whether a loop may read the numbers of a tensor: nothing is to be differentiated or batched.
inline bool is_readable(const Tensor& tensor) {
  return !at::isTensorSubclassLike(tensor) && !(at::GradMode::is_enabled() && tensor.requires_grad());
}

// keep⊙x (M×K); the caller folds 1 / (1 − p) into something smaller
inline Tensor masked(const Tensor& x, const Dropout& dropout) {
  if (!dropout) {
    return x;
  }
  if (is_readable(x)) {
    const Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
    const Tensor out = at::empty(x.sizes(), x.options());
    keep_into(out, rows, dropout);
    return out;
  }
  const Tensor keep = at::ones(x.sizes(), at::TensorOptions(at::kInt));
  keep_into(keep, keep, dropout);
  return at::where(keep.to(at::kBool), x, at::zeros({}, x.options()));
}

// The same, in x where that is possible: of a contiguous x that nobody else has.
inline Tensor masked_(const Tensor& x, const Dropout& dropout) {
  if (!dropout || !is_readable(x)) {
    return masked(x, dropout);
  }
  keep_into(x, x, dropout);
  return x;
}

// -- bfloat16 products in fp32 ---------------------------------------------------------------------------

// Tokens and columns of a block of x, which is packed in 64 KB of the cache.
constexpr int64_t block_tokens = 128;
constexpr int64_t block_columns = 256;

// Pairs of tokens, number by number, as the processor's instructions multiply them.
MICA_VECTORS inline void pack_pair(uint32_t* out, const uint16_t* even, const uint16_t* odd, int64_t columns) {
  MICA_LOOP
  for (int64_t i = 0; i < columns; ++i) {
    out[i] = even[i] | (static_cast<uint32_t>(odd[i]) << 16);
  }
}

// Columns ``first`` … ``last`` of gᵀ x: g_t (r×M', M' even, 0 where there is no token), x (M×K), out (r×K)
inline void wide_columns(const Tensor& out, const Tensor& g_t, const Tensor& x, int64_t first, int64_t last) {
  const int64_t tokens = x.size(0);
  const int64_t stride = x.stride(0);
  const int64_t columns = last - first;
  const auto* numbers = static_cast<const uint16_t*>(x.const_data_ptr()) + first;
  const auto* left = static_cast<const at::BFloat16*>(g_t.const_data_ptr());
  auto* sums = static_cast<float*>(out.mutable_data_ptr()) + first;
  std::vector<uint32_t> packed(block_tokens / 2 * columns);
  const std::vector<uint16_t> no_token(columns);
  for (int64_t start = 0; start < tokens; start += block_tokens) {
    const int64_t size = std::min(block_tokens, tokens - start);
    for (int64_t i = 0; i < size; i += 2) {
      const uint16_t* even = numbers + (start + i) * stride;
      const uint16_t* odd = i + 1 < size ? even + stride : no_token.data();
      pack_pair(packed.data() + i / 2 * columns, even, odd, columns);
    }
    const int64_t even_size = size + size % 2;
    const auto* right = reinterpret_cast<const at::BFloat16*>(packed.data());
    const bool is_added = start > 0;
    at::native::cpublas::brgemm(
        g_t.size(0), columns, even_size, g_t.size(1), columns, out.size(1), is_added, left + start, right, sums);
  }
}

// gᵀ x (r×K) in fp32 from g (M×r) and x (M×K) in bfloat16, without a copy of x in fp32
inline Tensor wide_product(const Tensor& g, const Tensor& x) {
  const int64_t tokens = x.size(0);
  const int64_t columns = x.size(1);
  const Tensor out = at::zeros({g.size(1), columns}, x.options().dtype(at::kFloat));
  if (out.numel() == 0 || tokens == 0) {
    return out;
  }
  const Tensor g_t = at::zeros({g.size(1), tokens + tokens % 2}, g.options());
  g_t.narrow(1, 0, tokens).copy_(g.t());
  const Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
  const int64_t threads = at::get_num_threads();
  const int64_t parts = threads * ((columns + threads * block_columns - 1) / (threads * block_columns));
  const int64_t step = ((columns + parts - 1) / parts + 31) / 32 * 32;
  in_parallel((columns + step - 1) / step, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      wide_columns(out, g_t, rows, part * step, std::min(columns, (part + 1) * step));
    }
    at::native::cpublas::brgemm_release();
  });
  return out;
}

// Whether this processor multiplies so: asked once, of the product itself.
inline bool multiplies_wide() {
  static const bool does = [] {
    try {
      const Tensor ones = at::ones({2, 2}, at::TensorOptions(at::kBFloat16));
      return wide_product(ones, ones).eq(2).all().item<bool>();
    } catch (const std::exception&) {
      return false;
    }
  }();
  return does;
}

// `wide_product` where this processor has it and nothing but its value is wanted, else undefined.
inline Tensor wide_product_or_none(const Tensor& g, const Tensor& x) {
  const bool has_dtypes = g.scalar_type() == at::kBFloat16 && x.scalar_type() == at::kBFloat16;
  if (!has_dtypes || !g.is_cpu() || !is_readable(g) || !is_readable(x) || !multiplies_wide()) {
    return Tensor();
  }
  return wide_product(g, x);
}

} // namespace mica
