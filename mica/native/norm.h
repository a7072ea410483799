// weight·(h·rstd), the output of an RMS norm, in bfloat16 and in one pass, with the roundings of PyTorch's operators:
// these are three or four, which read and write all of h each.

#pragma once

#include <atomic>

#include "layer.h"
#include "merging.h"

namespace mica {

// Whether a number is unusual: PyTorch may round it in another way.
MICA_VECTORS inline bool norm_row(
    uint16_t* __restrict out, const uint16_t* h, const float* weight, int64_t columns, float rstd, bool rounds) {
  uint32_t unusual = 0;
  MICA_LOOP
  for (int64_t i = 0; i < columns; ++i) {
    float normed = widened(h[i]) * rstd;
    unusual |= is_unusual(normed);
    if (rounds) {
      uint16_t word;
      narrowed(normed, word);
      normed = widened(word);
    }
    const float product = normed * weight[i];
    unusual |= is_unusual(product);
    narrowed(product, out[i]);
  }
  return unusual;
}

// h (M…×K) is bfloat16, weight (K) and rstd (M…×1) are fp32. rounds: whether h·rstd is rounded to bfloat16. Nothing where
// this is not the case, or a number is unusual.
inline OptionalTensor norm(const Tensor& weight, const Tensor& h, const Tensor& rstd, bool rounds) {
  const auto has = [](const Tensor& tensor, ScalarType dtype) {
    return tensor.scalar_type() == dtype && tensor.is_cpu() && tensor.is_contiguous() && is_readable(tensor);
  };
  if (!has(weight, at::kFloat) || !has(h, at::kBFloat16) || !has(rstd, at::kFloat)) {
    return std::nullopt;
  }
  const int64_t columns = weight.numel();
  const int64_t rows = rstd.numel();
  const bool is_row_by_row = weight.dim() == 1 && rstd.dim() == h.dim() && rstd.size(-1) == 1;
  if (!is_row_by_row || h.size(-1) != columns || h.numel() != rows * columns) {
    return std::nullopt;
  }
  const Tensor out = at::empty(h.sizes(), h.options());
  auto* words = static_cast<uint16_t*>(out.mutable_data_ptr());
  const auto* numbers = static_cast<const uint16_t*>(h.const_data_ptr());
  const float* factors = weight.const_data_ptr<float>();
  const float* of_rows = rstd.const_data_ptr<float>();
  std::atomic<bool> is_unusual = false;
  for_each_row(rows, columns, [&](int64_t row) {
    const int64_t start = row * columns;
    if (norm_row(words + start, numbers + start, factors, columns, of_rows[row], rounds)) {
      is_unusual = true;
    }
  });
  return is_unusual ? std::nullopt : OptionalTensor(out);
}

} // namespace mica
