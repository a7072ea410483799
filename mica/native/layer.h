// An adapted linear layer's forward and backward without Python between PyTorch's operators: `mica.paths.reference_path`
// step by step and to the bit, as one node of autograd. No kernel is launched from here, so the same code serves every
// device of PyTorch, and all of it runs on a CPU. Dropout is a loop of this folder: for CPUs only.
//
// What M, K, N, r and s are, and what is computed: tests/support/definition.py. Why each product runs in its dtype:
// mica/paths/reference_path.py and products.py, whose functions have the names of those here.

#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstring>

#include "loops.h"

namespace mica {

using at::ScalarType;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using OptionalDtype = std::optional<ScalarType>;

// Set once by `configure_linear`, from the constants of mica.paths.
inline int64_t few_to_round = 0;
inline int64_t few_rows = 0;
inline int64_t chunk = 0;
inline int64_t tokens_per_chunk = 1;
inline bool has_wide_sums = false; // of 16-bit products on CUDA
inline std::string edited; // the message where what was saved has been edited in place

void count_backward();
Tensor value_of(const Tensor& token); // x, computed again by `mica.ops.recompute`

// What a layer takes beside x, before autocast has cast anything: `mica.paths.operands.Operands`.
struct Operands {
  Tensor weight; // (out_features, in_features); undefined where the base layer was called
  Tensor lora_A; // (rank, in_features)
  Tensor lora_B; // (out_features, rank)
  double scaling = 1.0;
  OptionalTensor bias; // (out_features)
  OptionalDtype compute_dtype; // that of the low-rank products; none: that of x
  double dropout_p = 0.0;
  OptionalTensor seed; // int64 (1), where dropout_p > 0
  OptionalDtype autocast_dtype; // autocast's where it is on
  bool trains_B = false; // lora_B may be trained, now or later
  OptionalTensor base_output; // (..., out_features), of a base layer that was called: weight is undefined
  bool is_ours = false; // nobody else has base_output, so that y may be written into it
  bool is_widened = false; // dy W is multiplied in fp32, as the processor has no instructions for its dtype
  Tensor token; // stands for an x that the backward computes again; undefined: x is saved
};

// The numbers among them, which a backward needs, too.
struct Numbers {
  double scaling;
  ScalarType compute_dtype;
  ScalarType factor_dtype; // of lora_A
  ScalarType grad_dtype; // to which dA and dB may be rounded first, as PyTorch does under autocast
  bool is_called; // the base layer: there is a base_output
  bool is_widened;
  Dropout dropout;
};

// -- shapes ----------------------------------------------------------------------------------------------

// (..., n) as a matrix (tokens, n)
inline Tensor as_matrix(const Tensor& tensor) {
  if (tensor.dim() == 2) {
    return tensor;
  }
  const int64_t columns = tensor.size(-1);
  return columns && tensor.is_contiguous() ? tensor.view({-1, columns}) : tensor.reshape({-1, columns});
}

// (tokens, n) with all but the last dimension of shape, and nobody's view
inline Tensor like(at::IntArrayRef shape, const Tensor& matrix) {
  if (shape.size() == 2) {
    return matrix;
  }
  auto sizes = shape.vec();
  sizes.back() = matrix.size(1);
  return at::_unsafe_view(matrix, sizes);
}

// -- the formula -----------------------------------------------------------------------------------------

inline bool is_sixteen_bit(ScalarType dtype) {
  return dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

inline Tensor cast(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

// As autocast: fp64 stays as it is.
inline Tensor autocast_to(const Tensor& tensor, const OptionalDtype& dtype) {
  return dtype && tensor.scalar_type() != at::kDouble ? cast(tensor, *dtype) : tensor;
}

// y + left @ right in y, whose dtype they have; vmap cannot write batched values into an unbatched y.
inline Tensor added(const Tensor& y, const Tensor& left, const Tensor& right) {
  return is_transformed() ? at::addmm(y, left, right) : y.addmm_(left, right);
}

inline ScalarType product_dtype(const Tensor& left, ScalarType lora_A, ScalarType lora_B, ScalarType dtype) {
  if (!is_sixteen_bit(dtype) || left.size(0) > few_to_round || !left.is_cpu()) {
    return dtype;
  }
  return lora_A == at::kFloat && lora_B == at::kFloat ? at::kFloat : dtype;
}

// Whether the scaling is a power of two that rounds nothing wherever it is applied.
inline bool is_exact(double scaling, ScalarType dtype) {
  int exponent = 0;
  const bool is_power_of_two = std::abs(std::frexp(scaling, &exponent)) == 0.5;
  const double size = std::abs(scaling);
  return dtype != at::kHalf && is_power_of_two && size >= 0x1p-32 && size <= 0x1p32;
}

// scaling·left @ factor in dtype
inline Tensor scaled_product(const Tensor& left, const Tensor& factor, double scaling, ScalarType dtype) {
  if (scaling == 1.0) {
    return at::mm(cast(left, dtype), cast(factor, dtype));
  }
  if (left.size(0) < factor.size(0) && is_exact(scaling, dtype)) {
    return at::mm(cast(left, dtype), cast(factor, dtype)).mul_(scaling);
  }
  return at::mm(cast(left, dtype), cast(factor * scaling, dtype));
}

// h (M×r) from x (M×K), lora_A (r×K)
inline Tensor low_rank(const Tensor& x, const Operands& operands, const Numbers& numbers) {
  const ScalarType dtype =
      product_dtype(x, numbers.factor_dtype, operands.lora_B.scalar_type(), numbers.compute_dtype);
  const double scaling = operands.scaling / (1.0 - numbers.dropout.p);
  return scaled_product(masked(x, numbers.dropout), operands.lora_A.t(), scaling, dtype);
}

// y + h Bᵀ (M×N) in the dtype of y: in y if that is ours, else a new tensor
inline Tensor updated(const Tensor& y, const Tensor& h, const Tensor& lora_B, bool is_ours) {
  const ScalarType wide = c10::promoteTypes(y.scalar_type(), h.scalar_type());
  const Tensor left = cast(h, wide);
  const Tensor factor = cast(lora_B, wide).t();
  if (wide != y.scalar_type()) {
    return added(y.to(wide), left, factor).to(y.scalar_type());
  }
  return is_ours ? added(y, left, factor) : at::addmm(y, left, factor);
}

// y (M×N) from x (M×K), h (M×r), lora_B (N×r), and weight (N×K) and bias (N) or base_output (M×N)
inline Tensor linear(const Tensor& x, const Tensor& h, const Operands& operands) {
  const Tensor& lora_B = operands.lora_B;
  if (operands.base_output) {
    return updated(as_matrix(*operands.base_output), h, lora_B, operands.is_ours);
  }
  const ScalarType wide = c10::promoteTypes(x.scalar_type(), h.scalar_type());
  const Tensor left = cast(h, wide);
  const Tensor factor = cast(lora_B, wide).t();
  const Tensor update = operands.bias
      ? at::addmm(cast(autocast_to(*operands.bias, x.scalar_type()), wide), left, factor)
      : at::mm(left, factor);
  const Tensor weight = autocast_to(operands.weight, x.scalar_type());
  return added(cast(update, x.scalar_type()), x, weight.t());
}

// dA (r×K) from g (M×r) and x (M×K), summed in fp32 at least
inline Tensor grad_a(const Tensor& g, const Tensor& x, ScalarType grad_dtype) {
  const ScalarType dtype = g.scalar_type();
  if (dtype == x.scalar_type()) {
    if (!is_sixteen_bit(dtype) || (dtype == grad_dtype && g.is_cpu())) {
      return at::mm(g.t(), x);
    }
    // PyTorch 2.13 has no derivative of a product of 16-bit numbers in fp32
    const bool needs_grad = at::GradMode::is_enabled() && (g.requires_grad() || x.requires_grad());
    if (g.is_cuda() && has_wide_sums && !needs_grad && !is_transformed()) {
      return at::mm(g.t(), x, at::kFloat);
    }
    if (const Tensor whole = wide_product_or_none(g, x); whole.defined()) {
      return whole;
    }
  }
  const ScalarType wide = c10::promoteTypes(c10::promoteTypes(dtype, x.scalar_type()), at::kFloat);
  const int64_t tokens = g.size(0);
  if (tokens <= tokens_per_chunk) {
    return at::mm(cast(g, wide).t(), cast(x, wide));
  }
  Tensor grad;
  for (int64_t start = 0; start < tokens; start += tokens_per_chunk) {
    const int64_t size = std::min(tokens_per_chunk, tokens - start);
    const Tensor g_part = cast(g.narrow(0, start, size), wide).t();
    const Tensor x_part = cast(x.narrow(0, start, size), wide);
    grad = grad.defined() ? at::addmm(grad, g_part, x_part) : at::mm(g_part, x_part);
  }
  return grad;
}

// dB (N×r) from dy (M×N) and h (M×r), summed as dA
inline Tensor grad_b(const Tensor& grad_output, const Tensor& h, ScalarType grad_dtype) {
  if (grad_output.size(0) > few_to_round) {
    return grad_a(h, grad_output, grad_dtype).t().contiguous();
  }
  const ScalarType wide = c10::promoteTypes(c10::promoteTypes(grad_output.scalar_type(), h.scalar_type()), at::kFloat);
  return at::mm(cast(grad_output, wide).t(), cast(h, wide));
}

// The adapter's part of dx (M×K), in the dtype of g (M×r)
inline Tensor grad_x_update(const Tensor& g, const Tensor& lora_A, const Dropout& dropout) {
  return masked_(at::mm(g, cast(lora_A, g.scalar_type())), dropout);
}

// dx (M×K) from dy (M×N), weight (N×K), g (M×r) and lora_A (r×K)
inline Tensor grad_x(
    const Tensor& grad_output, const Tensor& weight, const Tensor& g, const Tensor& lora_A, const Numbers& numbers) {
  const ScalarType dtype = grad_output.scalar_type();
  const ScalarType product = numbers.is_widened ? at::kFloat : dtype;
  const Tensor dx = at::mm(cast(grad_output, product), cast(autocast_to(weight, dtype), product)).to(dtype);
  if (g.scalar_type() == dtype && !numbers.dropout) {
    return added(dx, g, cast(lora_A, dtype));
  }
  return dx.add_(grad_x_update(g, lora_A, numbers.dropout).to(dtype));
}

// -- autograd --------------------------------------------------------------------------------------------

// Autocast's casts have been made before: within a formula it would cast each product's operands.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

inline Tensor h_of(const Tensor& x, const Operands& operands, const Numbers& numbers) {
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return like(x.sizes(), low_rank(as_matrix(x), operands, numbers));
}

inline Tensor y_of(const Tensor& x, const Tensor& h, const Operands& operands) {
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return like(x.sizes(), linear(as_matrix(x), as_matrix(h), operands));
}

// A tensor of this shape in the memory of one number, for which others are put in later.
inline Tensor placeholder(const Tensor& x, int64_t columns) {
  auto sizes = x.sizes().vec();
  sizes.back() = columns;
  return at::empty_strided(sizes, std::vector<int64_t>(sizes.size(), 0), x.options());
}

// What a node has saved; undefined what no gradient needs.
struct Saved {
  bool needs_x;
  Tensor weight;
  Tensor lora_A;
  Tensor lora_B;
  Tensor x;
  Tensor h;
};

// {dx, dA, dB}; undefined unless needs_x, and where x or h is. grad_h: of the h that the forward returned, in second derivatives.
inline variable_list backward_of(
    const Tensor& grad_output, const Tensor& grad_h, const Saved& saved, const Numbers& numbers) {
  const Tensor dy = as_matrix(grad_output);
  const double scaling = numbers.scaling / (1.0 - numbers.dropout.p);
  Tensor dx, dA, dB;
  if (saved.needs_x || saved.x.defined()) {
    const ScalarType dtype =
        product_dtype(dy, numbers.factor_dtype, saved.lora_B.scalar_type(), numbers.compute_dtype);
    Tensor g = scaled_product(dy, saved.lora_B, scaling, dtype);
    if (grad_h.defined()) {
      g = g + cast(as_matrix(grad_h) * scaling, dtype);
    }
    if (saved.needs_x) {
      const Tensor rows = numbers.is_called ? grad_x_update(g, saved.lora_A, numbers.dropout)
                                            : grad_x(dy, saved.weight, g, saved.lora_A, numbers);
      dx = like(grad_output.sizes(), rows);
    }
    if (saved.x.defined()) {
      dA = cast(grad_a(g, masked(as_matrix(saved.x), numbers.dropout), numbers.grad_dtype), numbers.factor_dtype);
    }
  }
  if (saved.h.defined()) {
    dB = cast(grad_b(dy, as_matrix(saved.h), numbers.grad_dtype), saved.lora_B.scalar_type());
  }
  return {dx, dA, dB};
}

// As `mica.ops.operator.save`: an alias keeps the memory that ``tensor.data = other`` replaces, shares the version,
// and is followed by autograd where a second derivative may need it.
inline Tensor alias_of(const Tensor& tensor) {
  return tensor.requires_grad() ? tensor.view_as(tensor) : tensor.detach();
}

inline variable_list saved(AutogradContext* ctx) {
  try {
    return ctx->get_saved_variables();
  } catch (const c10::Error& error) {
    const bool is_edited = std::strstr(error.what_without_backtrace(), "modified by an inplace operation");
    TORCH_CHECK(!is_edited, edited);
    throw;
  }
}

// As `mica.ops.operator.is_eager`: only autograd and autocast need to see the call.
inline bool is_eager() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
      !is_transformed() && !torch::autograd::ForwardADLevel::try_get_by_idx(0) &&
      !c10::impl::tls_is_dispatch_key_included(at::DispatchKey::Tracer);
}

// What a node keeps beside the tensors that autograd keeps for it is in types that compiled autograd can compare: a
// compiled backward serves every call whose "numbers" are the same, and has "seed" as an input.
inline void save_numbers(AutogradContext* ctx, const Numbers& numbers) {
  const auto number = [](ScalarType dtype) { return static_cast<double>(dtype); };
  ctx->saved_data["numbers"] = c10::List<double>(
      {numbers.scaling, number(numbers.compute_dtype), number(numbers.factor_dtype), number(numbers.grad_dtype),
       static_cast<double>(numbers.is_called), static_cast<double>(numbers.is_widened), numbers.dropout.p});
  if (numbers.dropout) {
    ctx->saved_data["seed"] = static_cast<int64_t>(numbers.dropout.seed);
  }
}

inline Numbers saved_numbers(AutogradContext* ctx) {
  const auto saved = ctx->saved_data["numbers"].toDoubleVector();
  const auto dtype = [&](size_t i) { return static_cast<ScalarType>(saved[i]); };
  Numbers numbers{saved[0], dtype(1), dtype(2), dtype(3), saved[4] != 0.0, saved[5] != 0.0, Dropout{saved[6]}};
  if (numbers.dropout) {
    numbers.dropout.seed = static_cast<uint64_t>(ctx->saved_data["seed"].toInt());
  }
  return numbers;
}

// The x of the node that runs, computed again, followed by autograd where a second derivative may need it.
inline Tensor x_of(const Tensor& token) {
  const Tensor x = value_of(token);
  const auto node = torch::autograd::get_current_node();
  if (!at::GradMode::is_enabled() || !node) {
    return x;
  }
  const Tensor followed = x.detach(); // other nodes have x, too
  torch::autograd::impl::set_gradient_edge(followed, node->next_edge(0));
  return followed;
}

struct Layer : torch::autograd::Function<Layer> {
  // lora_A, lora_B and base_output are the operands', given as arguments so that autograd sees them. {y}, or {y, h} where
  // lora_B is trained: an output, so that second derivatives reach x and lora_A through it. Where the base is not called
  // y is a placeholder: once all is saved, a checkpoint stops computing a layer again, so the product with the weight
  // comes after that, as F.linear's does. h_of_x: a pointer, which autograd does not take for an input; it may point to
  // an undefined tensor where neither of the two needs it.
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
      const OptionalTensor& base_output, const Operands& operands, const Numbers& numbers, const Tensor* h_of_x) {
    const bool needs_x = x.requires_grad();
    const bool needs_A = lora_A.requires_grad();
    const bool has_token = operands.token.defined();
    const Tensor h = lora_B.requires_grad() ? *h_of_x : Tensor();
    Tensor y = numbers.is_called ? y_of(x, *h_of_x, operands) : placeholder(x, operands.weight.size(0));
    ctx->set_materialize_grads(false);
    if (numbers.is_called && y.is_alias_of(*base_output)) {
      y = *base_output;
      ctx->mark_dirty({y});
    }
    {
      const at::AutoGradMode with_grad(true);
      // no fp32 copy, no mask, and nothing that no gradient needs; perhaps no x: `mica.ops.recompute`
      ctx->save_for_backward(
          {needs_x && !numbers.is_called ? alias_of(operands.weight) : Tensor(), needs_x ? alias_of(lora_A) : Tensor(), alias_of(lora_B),
           needs_A ? alias_of(has_token ? operands.token : x) : Tensor(), h});
    }
    if (has_token) {
      ctx->saved_data["has_token"] = true;
    }
    save_numbers(ctx, numbers);
    return h.defined() ? variable_list{y, h} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    count_backward();
    const variable_list tensors = saved(ctx);
    const Tensor grad_h = grad_outputs.size() > 1 ? grad_outputs[1] : Tensor();
    const auto of = [&](size_t position, size_t input) {
      return ctx->needs_input_grad(input) ? tensors[position] : Tensor();
    };
    Saved saved{ctx->needs_input_grad(0), of(0, 0), tensors[1], tensors[2], of(3, 1), of(4, 2)};
    Tensor grad_output = grad_outputs[0];
    if (!grad_output.defined() && !grad_h.defined()) {
      return variable_list(7);
    }
    const Numbers numbers = saved_numbers(ctx);
    const Tensor grad_base = numbers.is_called ? grad_output : Tensor();
    if (saved.x.defined() && ctx->saved_data.count("has_token")) {
      saved.x = x_of(saved.x);
    }
    if (!grad_output.defined()) { // in a second derivative, where only h has a gradient
      auto sizes = grad_h.sizes().vec();
      sizes.back() = saved.lora_B.size(0);
      grad_output = at::zeros(sizes, grad_h.options());
    }

    const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (!at::GradMode::is_enabled() && is_eager()) { // neither second derivatives nor tangents are wanted
      below_autograd.emplace(); // PyTorch's calls take less time there
    }
    const variable_list grads = backward_of(grad_output, grad_h, saved, numbers);
    return {grads[0], grads[1], grads[2], grad_base, Tensor(), Tensor(), Tensor()};
  }
};

// y of a call, with autograd and autocast
inline Tensor layer(const Tensor& given_x, const Operands& operands) {
  const OptionalDtype& autocast_dtype = operands.autocast_dtype;
  const Tensor x = autocast_to(given_x, autocast_dtype); // here, where autograd follows it
  const ScalarType factor_dtype = operands.lora_A.scalar_type();
  const ScalarType compute_dtype = operands.compute_dtype.value_or(x.scalar_type());
  Dropout dropout{operands.dropout_p};
  if (dropout) {
    dropout.seed = static_cast<uint64_t>(*operands.seed->const_data_ptr<int64_t>());
  }
  const OptionalTensor& base_output = operands.base_output;
  const Numbers numbers{operands.scaling, compute_dtype, factor_dtype, autocast_dtype.value_or(factor_dtype),
                        base_output.has_value(), operands.is_widened, dropout};
  const bool needs_grad = x.requires_grad() || operands.lora_A.requires_grad() || operands.lora_B.requires_grad() ||
      (base_output && base_output->requires_grad());
  if (!at::GradMode::is_enabled() || !needs_grad) {
    return y_of(x, h_of(x, operands, numbers), operands);
  }
  const bool saves_h = operands.lora_B.requires_grad();
  const Tensor h = saves_h || base_output ? h_of(x, operands, numbers) : Tensor();
  try {
    const Tensor y = Layer::apply(x, operands.lora_A, operands.lora_B, base_output, operands, numbers, &h)[0];
    if (!base_output) {
      y.set_data(y_of(x, h.defined() ? h : h_of(x, operands, numbers), operands));
    }
    return y;
  } catch (...) {
    // A checkpoint ends its computation by an error while this node saves. Node and h would then hold each other, and
    // through x all that was computed again, for good: a step of 12 layers lost 1 GB
    if (saves_h) {
      h.unsafeGetTensorImpl()->set_autograd_meta(nullptr);
    }
    throw;
  }
}

} // namespace mica
