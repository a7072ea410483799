// The common case of an adapted linear layer, recognised in a microsecond: `mica.fast.forward.eligibility` takes 13 for
// the same answer. It knows all cases and every reason, and decides wherever this returns nothing.
//
// Active adapters, MiCA or plain LoRA, of a linear layer, whatever their dropout and autocast; no patches, modes or tracing,
// no hooks on the adapters; ordinary operands. Where the base is no ordinary frozen nn.Linear, it is called.
// Nothing is kept between calls: every fact is read again, from the modules' dictionaries. These are no subclasses and
// have strings as keys, so no lookup runs Python code, and what they hold stays alive.

#pragma once

#include <Python.h>

#include <ATen/autocast_mode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <bit>
#include <string_view>

#include "layer.h"

namespace mica {

// "name"_key: the interned string, by which dictionaries are looked up fastest
template <size_t size>
struct Text {
  char characters[size];

  constexpr Text(const char (&text)[size]) {
    std::copy_n(text, size, characters);
  }
};

template <Text text>
PyObject* operator""_key() {
  static PyObject* const key = PyUnicode_InternFromString(text.characters);
  return key;
}

// By their names what Python has told: `configure` of `mica.ops.linear` and of `mica.fast.forward.fast`.
inline PyObject* const told_by_name = PyDict_New();
inline int64_t times_told = 0;

// -- dictionaries: all references are borrowed, and nullptr stands for what is not there -----------------

inline PyObject* item(PyObject* dict, PyObject* key) {
  if (!dict || !PyDict_CheckExact(dict)) {
    return nullptr;
  }
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (!value) {
    PyErr_Clear();
  }
  return value;
}

// The ``__dict__`` of an object, which keeps it alive.
inline PyObject* own(PyObject* object) {
  PyObject* dict = object ? PyObject_GenericGetDict(object, nullptr) : nullptr;
  if (!dict) {
    PyErr_Clear();
    return nullptr;
  }
  Py_DECREF(dict);
  return dict;
}

// A module's child of this name.
inline PyObject* child(PyObject* module, PyObject* name) {
  return item(item(own(module), "_modules"_key), name);
}

// Of a dict, or of a list.
inline bool is_empty(PyObject* object) {
  const bool is_empty_dict = object && PyDict_Check(object) && PyDict_GET_SIZE(object) == 0;
  return is_empty_dict || (object && PyList_Check(object) && PyList_GET_SIZE(object) == 0);
}

inline bool is_of(PyObject* object, PyObject* type) {
  return object && reinterpret_cast<PyObject*>(Py_TYPE(object)) == type;
}

// torch's object of a dtype, or None: borrowed
inline PyObject* object_of(const OptionalDtype& dtype) {
  return dtype ? reinterpret_cast<PyObject*>(torch::getTHPDtype(*dtype)) : Py_None;
}

inline OptionalDtype dtype_or_none(PyObject* object) {
  if (!object || object == Py_None) {
    return std::nullopt;
  }
  return reinterpret_cast<THPDtype*>(object)->scalar_type;
}

inline bool has_attribute(PyObject* type, PyObject* name, PyObject* expected) {
  THPObjectPtr found(PyObject_GetAttr(type, name));
  if (!found) {
    PyErr_Clear();
  }
  return found.get() == expected;
}

// What Python has told by this name. It is looked up once after each telling: a call asks for twenty of them, and to
// look up all would be 4 % of its time.
template <Text text>
PyObject* told() {
  static PyObject* object = nullptr;
  static int64_t looked_up = 0;
  if (looked_up != times_told) {
    object = item(told_by_name, operator""_key<text>());
    looked_up = times_told;
  }
  return object;
}

// -- facts -----------------------------------------------------------------------------------------------

// Whether modules of these classes compute what they did when they were defined, and nothing watches all modules.
inline bool are_classes_plain(PyObject* dropout) {
  PyObject* global_hooks = told<"global_hooks">(); // a tuple of dictionaries
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(global_hooks); ++i) {
    if (!is_empty(PyTuple_GET_ITEM(global_hooks, i))) {
      return false;
    }
  }
  PyObject* linear = told<"linear">();
  PyObject* call = told<"call">();
  PyObject* dropout_forward = dropout == told<"dropout">() ? told<"dropout_forward">() : told<"identity_forward">();
  return has_attribute(linear, "forward"_key, told<"linear_forward">()) &&
      has_attribute(linear, "__call__"_key, call) && has_attribute(dropout, "forward"_key, dropout_forward) &&
      has_attribute(dropout, "__call__"_key, call) &&
      item(told<"functional">(), "linear"_key) == told<"functional_linear">();
}

// Whether a call of the module does no more than its class's forward.
inline bool is_module_plain(PyObject* module) {
  PyObject* dict = own(module);
  return !item(dict, "forward"_key) && is_empty(item(dict, "_forward_hooks"_key)) &&
      is_empty(item(dict, "_forward_pre_hooks"_key)) && is_empty(item(dict, "_backward_hooks"_key)) &&
      is_empty(item(dict, "_backward_pre_hooks"_key));
}

// The names of the active adapters: a list, or one of them.
inline std::vector<PyObject*> active_adapters(PyObject* layer_dict) {
  PyObject* active = item(layer_dict, "_active_adapter"_key);
  if (!active || !PyList_CheckExact(active)) {
    return {active};
  }
  std::vector<PyObject*> names(PyList_GET_SIZE(active));
  for (size_t i = 0; i < names.size(); ++i) {
    names[i] = PyList_GET_ITEM(active, i);
  }
  return names;
}

// Whether the layer's adapters count, and all of them.
inline bool is_state_plain(PyObject* layer_dict, PyObject* base) {
  return item(layer_dict, "_disable_adapters"_key) == Py_False &&
      is_empty(item(layer_dict, "merged_adapters"_key)) && !item(layer_dict, "_tp_info"_key) &&
      !item(own(base), "_hf_tp_plan"_key);
}

inline bool is_mica(PyObject* layer_dict, PyObject* name) {
  return is_of(item(item(layer_dict, "lora_variant"_key), name), told<"variant">());
}

// As `mica.fast.forward.eligibility.is_lora`.
inline bool is_lora(PyObject* layer_dict, PyObject* name) {
  PyObject* variants = item(layer_dict, "lora_variant"_key);
  return variants && !item(variants, name) && item(told<"settings">(), "lora"_key) == Py_True;
}

// A tensor in memory that is nobody's partition.
inline bool is_tensor_plain(PyObject* object) {
  if (!object || !THPVariable_CheckExact(object)) {
    return false;
  }
  PyObject** dict = _PyObject_GetDictPtr(object);
  if (dict && *dict && item(*dict, "ds_id"_key)) {
    return false;
  }
  const Tensor& tensor = THPVariable_Unpack(object);
  return tensor.layout() == at::kStrided && !tensor.is_meta();
}

inline bool is_frozen(PyObject* object) {
  return is_tensor_plain(object) && !THPVariable_Unpack(object).requires_grad();
}

// Whether it may have a gradient.
inline bool is_trained(PyObject* object) {
  return is_tensor_plain(object) && !THPVariable_Unpack(object).is_inference();
}

inline bool is_cast_by_autocast(const Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || is_sixteen_bit(tensor.scalar_type());
}

// Whether adapters take these dtypes: autocast's, or one for all, or fp32 masters over 16 bits.
inline bool are_multiplied(const Tensor& x, const Operands& operands, PyObject* casts_input) {
  if (operands.autocast_dtype) {
    return is_cast_by_autocast(x) && is_cast_by_autocast(operands.lora_A) && is_cast_by_autocast(operands.lora_B);
  }
  const ScalarType dtype = x.scalar_type();
  const ScalarType factor_dtype = operands.lora_A.scalar_type();
  const bool is_floating = dtype == at::kDouble || dtype == at::kFloat || is_sixteen_bit(dtype);
  if (!is_floating || operands.lora_B.scalar_type() != factor_dtype) {
    return false;
  }
  const bool is_master = factor_dtype == at::kFloat && is_sixteen_bit(dtype);
  return factor_dtype == dtype || (is_master && casts_input == Py_True);
}

// As `mica.fast.settings.compute_dtype`.
inline OptionalDtype compute_dtype(ScalarType dtype, ScalarType factor_dtype) {
  if (dtype == at::kHalf && factor_dtype == at::kFloat) {
    return at::kFloat;
  }
  const OptionalDtype wide = dtype_or_none(item(told<"settings">(), "compute_dtype"_key));
  return wide ? c10::promoteTypes(*wide, dtype) : wide;
}

// -- the check -------------------------------------------------------------------------------------------

// The probability with which a layer drops now; nothing where that is no number of [0, 1).
inline std::optional<double> dropout_p(PyObject* dropout) {
  if (!is_of(dropout, told<"dropout">())) {
    return 0.0; // nn.Identity
  }
  PyObject* p = item(own(dropout), "p"_key);
  PyObject* training = item(own(dropout), "training"_key);
  if (!p || !PyFloat_CheckExact(p) || !training || !PyBool_Check(training)) {
    return std::nullopt;
  }
  const double probability = PyFloat_AS_DOUBLE(p);
  if (!(probability >= 0.0 && probability < 1.0)) { // NaN, too
    return std::nullopt;
  }
  return training == Py_True ? probability : 0.0;
}

// The weight of an nn.Linear without a bias; nullptr where there is one.
inline PyObject* factor_of(PyObject* module) {
  PyObject* parameters = item(own(module), "_parameters"_key);
  return item(parameters, "bias"_key) == Py_None ? item(parameters, "weight"_key) : nullptr;
}

// What an adapter is called with, but for the base; nothing where it is not an ordinary MiCA or LoRA adapter.
inline std::optional<Operands> operands_of(PyObject* layer_dict, PyObject* name, const Tensor& x) {
  const bool trains_B = is_lora(layer_dict, name);
  if (!trains_B && !is_mica(layer_dict, name)) {
    return std::nullopt;
  }
  PyObject* modules = item(layer_dict, "_modules"_key);
  PyObject* lora_A = child(item(modules, "lora_A"_key), name);
  PyObject* lora_B = child(item(modules, "lora_B"_key), name);
  PyObject* dropout = child(item(modules, "lora_dropout"_key), name);
  PyObject* scaling = item(item(layer_dict, "scaling"_key), name);
  const bool is_dropout = is_of(dropout, told<"dropout">()) || is_of(dropout, told<"identity">());
  const bool is_plain = is_of(lora_A, told<"linear">()) && is_of(lora_B, told<"linear">()) && is_dropout && scaling &&
      PyFloat_CheckExact(scaling) && are_classes_plain(reinterpret_cast<PyObject*>(Py_TYPE(dropout))) &&
      is_module_plain(lora_A) && is_module_plain(lora_B) && is_module_plain(dropout);
  const std::optional<double> p = is_plain ? dropout_p(dropout) : std::nullopt;
  if (!p) {
    return std::nullopt;
  }
  PyObject* A = factor_of(lora_A);
  PyObject* B = factor_of(lora_B);
  if (!is_trained(A) || !(trains_B ? is_trained(B) : is_frozen(B))) {
    return std::nullopt;
  }
  Operands operands{Tensor(), THPVariable_Unpack(A), THPVariable_Unpack(B), PyFloat_AS_DOUBLE(scaling)};
  operands.dropout_p = *p;
  operands.trains_B = trains_B;
  if (at::autocast::is_autocast_enabled(x.device().type())) {
    operands.autocast_dtype = at::autocast::get_autocast_dtype(x.device().type());
  } else {
    operands.compute_dtype = compute_dtype(x.scalar_type(), operands.lora_A.scalar_type());
  }
  const bool fits = are_multiplied(x, operands, item(layer_dict, "cast_input_dtype_enabled"_key));
  return fits ? std::optional(operands) : std::nullopt;
}

// Give an adapter the base weight, which its operator multiplies; without it the base layer is called.
inline void read_base(PyObject* layer, PyObject* base, const Tensor& x, Operands& operands) {
  const bool is_conv1d =
      is_of(base, told<"conv1d">()) && has_attribute(told<"conv1d">(), "forward"_key, told<"conv1d_forward">());
  const bool is_read = is_of(base, told<"linear">()) || is_conv1d;
  if (!is_of(layer, told<"lora_linear">()) || !is_read || !is_module_plain(base)) {
    return;
  }
  PyObject* parameters = item(own(base), "_parameters"_key);
  PyObject* weight = item(parameters, "weight"_key);
  if (!weight) { // where a parametrization has been
    weight = item(item(own(base), "_buffers"_key), "weight"_key);
  }
  PyObject* bias = item(parameters, "bias"_key);
  const bool has_bias = bias && bias != Py_None;
  if (!is_frozen(weight) || (has_bias && !is_frozen(bias))) {
    return;
  }
  const auto fits = [&](PyObject* tensor) {
    const Tensor& own = THPVariable_Unpack(tensor);
    return operands.autocast_dtype ? is_cast_by_autocast(own) : own.scalar_type() == x.scalar_type();
  };
  if (!fits(weight) || (has_bias && !fits(bias))) {
    return;
  }
  operands.weight = is_conv1d ? THPVariable_Unpack(weight).t() : THPVariable_Unpack(weight);
  if (has_bias) {
    operands.bias = THPVariable_Unpack(bias);
  }
}

// A layer that C++ calls: its base, and what its adapters are called with, in their order.
struct Common {
  PyObject* base; // borrowed
  std::vector<Operands> adapters; // none: anything is unusual
};

inline Common common_case(PyObject* layer, PyObject* given_x) {
  PyObject* kind = reinterpret_cast<PyObject*>(Py_TYPE(layer));
  const bool is_linear = kind == told<"lora_linear">() || PySet_Contains(told<"quantised_layers">(), kind) == 1;
  if (!is_linear || !THPVariable_CheckExact(given_x) || !is_eager()) {
    return {};
  }
  const Tensor& x = THPVariable_Unpack(given_x);
  const bool is_ordinary = x.layout() == at::kStrided && !x.is_nested() && x.dim() > 0;
  if (!is_ordinary || !(x.is_cpu() || x.is_cuda())) {
    return {};
  }
  PyObject* layer_dict = own(layer);
  PyObject* modules = item(layer_dict, "_modules"_key);
  PyObject* base = item(modules, "base_layer"_key);
  if (!base || !is_state_plain(layer_dict, base)) {
    return {};
  }
  Common common{base, {}};
  for (PyObject* name : active_adapters(layer_dict)) {
    if (!name || !PyUnicode_CheckExact(name)) {
      return {};
    }
    if (!child(item(modules, "lora_A"_key), name)) {
      continue; // an adapter of other layers
    }
    std::optional<Operands> operands = operands_of(layer_dict, name, x);
    if (!operands) {
      return {};
    }
    common.adapters.push_back(*std::move(operands));
  }
  if (!common.adapters.empty()) {
    read_base(layer, base, x, common.adapters.front());
  }
  return common;
}

// -- who computes ----------------------------------------------------------------------------------------

// The environment, where it is now: `datasets` replaces os.environ.
inline PyObject* environment() {
  return item(own(item(told<"os">(), "environ"_key)), "_data"_key);
}

// Whether MICA_NATIVE, as it is now, has led to a module.
inline bool is_switched_on() {
  static PyObject* const name = PyBytes_FromString("MICA_NATIVE"); // keys and values of the environment are bytes
  PyObject* setting = item(environment(), name);
  PyObject* found = item(told<"modules">(), setting ? setting : Py_None);
  return found && !PyUnicode_Check(found);
}

inline bool has_instructions(ScalarType dtype) {
  PyObject* answer = item(told<"instructions">(), object_of(OptionalDtype(dtype)));
  return !answer || answer == Py_True;
}

// What `mica.paths.tuning.Kind` says of a call, and its device: calls with the same key run in the same form.
inline pybind11::bytes key_of(const Tensor& x, const Operands& operands) {
  const int64_t in_features = operands.weight.size(1);
  const int64_t tokens = in_features ? x.numel() / in_features : 0;
  const ScalarType dtype = operands.autocast_dtype.value_or(x.scalar_type());
  const bool is_aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  const auto number = [](auto fact) { return static_cast<int64_t>(fact); };
  const std::array<int64_t, 11> facts{
      x.get_device(), operands.trains_B || operands.lora_B.requires_grad(), number(dtype),
      number(operands.compute_dtype.value_or(dtype)), number(operands.lora_A.scalar_type()),
      number(operands.lora_B.scalar_type()), operands.lora_A.size(0), in_features, operands.weight.size(0),
      number(std::bit_ceil(static_cast<uint64_t>(tokens))), is_aligned};
  return {reinterpret_cast<const char*>(facts.data()), sizeof(facts)};
}

// Whether this processor multiplies the layer's 16-bit numbers fast, or all products are in fp32 as there are few tokens.
// Then dy W is too, for which the weight is cast: of one that is larger, Python casts chunks.
inline bool has_products(const Tensor& x, Operands& operands) {
  const ScalarType dtype = operands.autocast_dtype.value_or(x.scalar_type());
  const ScalarType compute_dtype = operands.compute_dtype.value_or(dtype);
  if (!x.is_cpu() || (has_instructions(dtype) && has_instructions(compute_dtype))) {
    return true;
  }
  const int64_t tokens = x.size(-1) ? x.numel() / x.size(-1) : 0;
  const bool are_masters = operands.lora_A.scalar_type() == at::kFloat && operands.lora_B.scalar_type() == at::kFloat;
  if (!are_masters || tokens > (operands.weight.defined() ? few_rows : few_to_round)) {
    return false;
  }
  operands.is_widened = true;
  return !operands.weight.defined() || (operands.weight.numel() <= chunk && operands.weight.stride(1) == 1);
}

// Whether a call is computed here, by PyTorch's operators. `mica.paths.choose` decides about all others.
inline bool runs_here(const Tensor& x, Operands& operands) {
  static PyObject* const name = PyBytes_FromString("MICA_BACKEND");
  PyObject* setting = item(environment(), name);
  const std::string_view backend = setting && PyBytes_Check(setting) ? PyBytes_AS_STRING(setting) : "";
  if (!backend.empty() && backend != "auto" && backend != "reference") {
    return false;
  }
  const bool is_reference = backend == "reference";
  if (!has_products(x, operands)) {
    return false;
  }
  THPObjectPtr index(PyLong_FromLong(x.get_device()));
  const bool has_kernels = !is_reference && PySet_Contains(told<"devices_without_kernels">(), index.get()) == 0;
  if (operands.dropout_p > 0.0 && (has_kernels || !x.is_cpu())) { // the loop over a mask is for CPUs
    return false;
  }
  if (!has_kernels || x.numel() == 0) {
    return true;
  }
  return operands.weight.defined() && PySet_Contains(told<"cpp_keys">(), key_of(x, operands).ptr()) == 1;
}

// Whether it is what a base layer usually returns for x.
inline bool is_output_of(PyObject* object, const Tensor& x, const Operands& operands) {
  if (!THPVariable_CheckExact(object)) {
    return false;
  }
  const Tensor& y = THPVariable_Unpack(object);
  const auto is_floating = y.scalar_type() == at::kDouble || y.scalar_type() == at::kFloat || is_sixteen_bit(y.scalar_type());
  return is_floating && y.layout() == at::kStrided && !y.is_nested() && y.device() == x.device() && y.dim() == x.dim() &&
      y.size(-1) == operands.lora_B.size(0) && y.sizes().slice(0, y.dim() - 1) == x.sizes().slice(0, x.dim() - 1);
}

// Whether the memory is PyTorch's own. Memory that was lent to it (NumPy's, DLPack's, mapped, shared between processes) is
// given back in another way, and its owner, who sees what is written, counts no reference here.
inline bool is_from_pytorch(const c10::Storage& storage) {
  c10::Allocator* allocator = storage.allocator();
  return allocator && storage.data_ptr().get_deleter() == allocator->raw_deleter();
}

// Whether nobody else has this tensor or its memory, or watches it: what adds to it may write into it.
inline bool is_ours(PyObject* object) {
  const Tensor& y = THPVariable_Unpack(object);
  const auto* autograd = torch::autograd::impl::get_autograd_meta(y);
  const bool is_watched = autograd && (!autograd->hooks_.empty() || autograd->retains_grad_);
  return Py_REFCNT(object) == 1 && y.use_count() == 1 && y.storage().use_count() == 1 &&
      is_from_pytorch(y.storage()) && y.is_contiguous() && !y.is_inference() && !is_watched;
}

// Whether `mica.ops.recompute` has to be asked, which may spare the layer from keeping x.
inline bool may_be_computed_again(const Tensor& x, const Operands& operands) {
  if (!at::GradMode::is_enabled() || !operands.lora_A.requires_grad() || !x.grad_fn()) {
    return false;
  }
  return x.numel() >= PyLong_AsLongLong(item(told<"recompute">(), "MIN_NUMBERS"_key));
}

} // namespace mica
