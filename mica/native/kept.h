// x for the backward, without saving x. Where x is a product of what autograd keeps anyway for that product's own
// backward, those tensors are saved, which costs no memory, and multiplied again: the same operators, the same bits.
//
// A gated MLP calls its last layer on act(gate)·up: a third of what an adapted SwiGLU block would keep. With
// ``recompute="norms"`` x may also be weight·(h·rstd), as an RMS norm written in PyTorch's operators makes it. Layers
// that share such an x (q, k and v; gate and up) share what is computed again, until the last of them has had it.
//
// `mica.ops.kept` is the same for the layers that run from Python.

#pragma once

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/List.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>
#include <optional>
#include <vector>

namespace mica {

using at::ScalarType;
using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;

// ---------------------------------------------------------------------------------------------------------
// how x is computed
// ---------------------------------------------------------------------------------------------------------

struct Instruction {
  enum Kind { load, multiply, cast };
  Kind kind;
  ScalarType dtype = ScalarType::Undefined; // of a cast
};

// x in postfix order: the next tensor, the product of the last two values, the last value in another dtype.
struct Recipe {
  std::vector<Instruction> instructions;
  std::vector<Tensor> tensors; // that autograd keeps
};

inline bool describe(Node* node, int products, Recipe& recipe);

// A factor that the product's node keeps, or, if ``products`` more are allowed, one that can be computed.
inline bool describe_factor(const SavedVariable& saved, Node* made_by, int products, Recipe& recipe) {
  if (saved.has_hooks()) { // of the user, who has packed it away
    return false;
  }
  const Tensor factor = saved.unpack();
  if (!factor.defined()) {
    return made_by && describe(made_by, products, recipe);
  }
  if (factor.layout() != at::kStrided) {
    return false;
  }
  recipe.instructions.push_back({Instruction::load});
  recipe.tensors.push_back(factor);
  return true;
}

// Whether this node's output is at most so many products (and casts) of kept tensors, which ``recipe`` then says.
inline bool describe(Node* node, int products, Recipe& recipe) {
  if (dynamic_cast<torch::autograd::generated::ToCopyBackward0*>(node)) {
    Node* made_by = node->next_edge(0).function.get();
    if (!made_by || !describe(made_by, products, recipe)) {
      return false;
    }
    recipe.instructions.push_back({Instruction::cast, node->input_metadata(0).options().dtype().toScalarType()});
    return true;
  }
  auto* product = dynamic_cast<torch::autograd::generated::MulBackward0*>(node);
  if (!product || products == 0) {
    return false;
  }
  if (!describe_factor(product->self_, node->next_edge(0).function.get(), products - 1, recipe) ||
      !describe_factor(product->other_, node->next_edge(1).function.get(), products - 1, recipe)) {
    return false;
  }
  recipe.instructions.push_back({Instruction::multiply});
  return true;
}

// How x is computed, if what that takes is kept anyway. An RMS norm is two products: weight·(h·rstd).
inline std::optional<Recipe> recipe_of(const Tensor& x, bool norms) {
  const bool has_hooks = !at::SavedTensorDefaultHooks::get_tls_state().stack.empty(); // what is saved here is packed
  if (!x.grad_fn() || x._version() != 0 || has_hooks) {
    return std::nullopt;
  }
  Recipe recipe;
  try {
    if (describe(x.grad_fn().get(), norms ? 2 : 1, recipe)) {
      return recipe;
    }
  } catch (const c10::Error&) { // of `unpack`: freed already, or edited since
  }
  return std::nullopt;
}

// As numbers, for autograd's context.
inline c10::List<int64_t> as_list(const std::vector<Instruction>& instructions) {
  c10::List<int64_t> numbers;
  for (const Instruction& instruction : instructions) {
    numbers.push_back(instruction.kind);
    numbers.push_back(static_cast<int64_t>(instruction.dtype));
  }
  return numbers;
}

inline std::vector<Instruction> instructions_of(const c10::List<int64_t>& numbers) {
  std::vector<Instruction> instructions;
  for (size_t i = 0; i < numbers.size(); i += 2) {
    const int64_t kind = numbers[i];
    const int64_t dtype = numbers[i + 1];
    instructions.push_back({static_cast<Instruction::Kind>(kind), static_cast<ScalarType>(dtype)});
  }
  return instructions;
}

inline Tensor computed(const std::vector<Instruction>& instructions, at::ArrayRef<Tensor> tensors) {
  std::vector<Tensor> stack;
  size_t next = 0;
  for (const Instruction& instruction : instructions) {
    if (instruction.kind == Instruction::load) {
      stack.push_back(tensors[next++]);
    } else if (instruction.kind == Instruction::cast) {
      stack.back() = stack.back().to(instruction.dtype);
    } else {
      const Tensor right = stack.back();
      stack.pop_back();
      stack.back() = stack.back() * right;
    }
  }
  return stack.back();
}

// ---------------------------------------------------------------------------------------------------------
// the layers that have the same x
// ---------------------------------------------------------------------------------------------------------

class SharedInput : public c10::intrusive_ptr_target {
 public:
  explicit SharedInput(const Tensor& x) : x_(x.getIntrusivePtr()) {}

  bool is_of(const Tensor& x) const {
    return x_.lock().get() == x.unsafeGetTensorImpl();
  }

  void add_layer() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++layers_;
  }

  // x in the backward of one of the layers, from the tensors that it has saved.
  Tensor value(const std::vector<Instruction>& instructions, at::ArrayRef<Tensor> tensors) {
    if (at::GradMode::is_enabled()) { // for second derivatives, perhaps with respect to x
      const Tensor x(x_.lock());
      return x.defined() && x._version() == 0 ? x : computed(instructions, tensors);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!value_.defined()) {
      value_ = computed(instructions, tensors);
    }
    const Tensor value = value_;
    if (++served_ >= layers_) {
      value_ = Tensor();
      served_ = 0;
    }
    return value;
  }

 private:
  c10::weak_intrusive_ptr<at::TensorImpl> x_;
  std::mutex mutex_;
  int layers_ = 0;
  int served_ = 0; // in this backward
  Tensor value_;
};

// That of the layer before, if it has the same x: the layers that share one are called one after the other.
inline c10::intrusive_ptr<SharedInput> shared_input(const Tensor& x) {
  static thread_local c10::weak_intrusive_ptr<SharedInput> last = c10::weak_intrusive_ptr<SharedInput>(
      c10::intrusive_ptr<SharedInput>());
  auto shared = last.lock();
  if (!shared || !shared->is_of(x)) {
    shared = c10::make_intrusive<SharedInput>(x);
    last = c10::weak_intrusive_ptr<SharedInput>(shared);
  }
  shared->add_layer();
  return shared;
}

inline void release_shared_input(void* pointer) {
  c10::intrusive_ptr<SharedInput>::reclaim(static_cast<SharedInput*>(pointer));
}

// A tensor without elements that owns a SharedInput. Autograd's context takes a capsule too, but compiled autograd,
// which makes inputs of tensors, refuses one.
inline Tensor handle_of(c10::intrusive_ptr<SharedInput> input) {
  SharedInput* pointer = input.release();
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(),
      0,
      at::DataPtr(pointer, pointer, &release_shared_input, at::kCPU),
      /*allocator=*/nullptr,
      /*resizable=*/false);
  return at::detail::make_tensor<at::TensorImpl>(
      c10::Storage(std::move(storage)), c10::DispatchKeySet(c10::DispatchKey::CPU), caffe2::TypeMeta::Make<uint8_t>());
}

// x in the backward of the layer that has saved these tensors. Whoever has packed the handle away, or copied it, has
// x computed for this layer alone.
inline Tensor value_of(const Tensor& handle, const std::vector<Instruction>& instructions, at::ArrayRef<Tensor> tensors) {
  if (handle.has_storage() && handle.storage().data_ptr().get_deleter() == &release_shared_input) {
    auto* input = static_cast<SharedInput*>(handle.storage().data_ptr().get_context());
    return input->value(instructions, tensors);
  }
  return computed(instructions, tensors);
}

} // namespace mica
