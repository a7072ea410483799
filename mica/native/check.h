// The common case of an adapted linear layer, recognised in a microsecond: `mica.fast.forward.eligibility` takes 13 for
// the same answer. It knows all cases and every reason, and decides wherever this returns nothing.
//
// One active MiCA adapter on an nn.Linear, with autocast or without, with dropout or without; no hooks, patches, modes
// or tracing; ordinary operands. Nothing is kept between calls: every fact is read again, from the dictionaries of
// the modules. They are no subclasses and their keys are strings, so that no lookup would run Python code, and what
// they hold stays alive.

#pragma once

#include <Python.h>

#include <ATen/autocast_mode.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include "layer.h"

namespace mica {

// Names of attributes and keys, and of what is counted.
struct Names {
  PyObject* active_adapter = PyUnicode_InternFromString("_active_adapter");
  PyObject* backward_hooks = PyUnicode_InternFromString("_backward_hooks");
  PyObject* backward_pre_hooks = PyUnicode_InternFromString("_backward_pre_hooks");
  PyObject* base_layer = PyUnicode_InternFromString("base_layer");
  PyObject* bias = PyUnicode_InternFromString("bias");
  PyObject* call = PyUnicode_InternFromString("__call__");
  PyObject* cast_input_dtype_enabled = PyUnicode_InternFromString("cast_input_dtype_enabled");
  PyObject* disable_adapters = PyUnicode_InternFromString("_disable_adapters");
  PyObject* ds_id = PyUnicode_InternFromString("ds_id");
  PyObject* forward = PyUnicode_InternFromString("forward");
  PyObject* forward_hooks = PyUnicode_InternFromString("_forward_hooks");
  PyObject* forward_pre_hooks = PyUnicode_InternFromString("_forward_pre_hooks");
  PyObject* hf_tp_plan = PyUnicode_InternFromString("_hf_tp_plan");
  PyObject* linear = PyUnicode_InternFromString("linear");
  PyObject* linear_backward = PyUnicode_InternFromString("linear_backward");
  PyObject* linear_backward_native = PyUnicode_InternFromString("linear_backward_native");
  PyObject* linear_native = PyUnicode_InternFromString("linear_native");
  PyObject* lora_A = PyUnicode_InternFromString("lora_A");
  PyObject* lora_B = PyUnicode_InternFromString("lora_B");
  PyObject* lora_dropout = PyUnicode_InternFromString("lora_dropout");
  PyObject* lora_variant = PyUnicode_InternFromString("lora_variant");
  PyObject* merged_adapters = PyUnicode_InternFromString("merged_adapters");
  PyObject* modules = PyUnicode_InternFromString("_modules");
  PyObject* p = PyUnicode_InternFromString("p");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
  PyObject* scaling = PyUnicode_InternFromString("scaling");
  PyObject* tp_info = PyUnicode_InternFromString("_tp_info");
  PyObject* training = PyUnicode_InternFromString("training");
  PyObject* weight = PyUnicode_InternFromString("weight");
};

// What the classes are, and the functions that they had before anybody replaced them.
struct Known {
  PyObject* lora_linear = nullptr;
  PyObject* variant = nullptr;
  PyObject* linear = nullptr; // nn.Linear
  PyObject* identity = nullptr; // nn.Identity
  PyObject* dropout = nullptr; // nn.Dropout
  PyObject* linear_forward = nullptr;
  PyObject* identity_forward = nullptr;
  PyObject* dropout_forward = nullptr;
  PyObject* call = nullptr; // nn.Module.__call__
  PyObject* functional = nullptr; // the dictionary of torch.nn.functional
  PyObject* functional_linear = nullptr;
  PyObject* global_hooks = nullptr; // a tuple of dictionaries
};

inline Names* names = nullptr; // made with the module
inline Known known;

// ---------------------------------------------------------------------------------------------------------
// dictionaries: all references are borrowed, and nullptr stands for what is not there
// ---------------------------------------------------------------------------------------------------------

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
  return item(item(own(module), names->modules), name);
}

inline bool is_empty_dict(PyObject* object) {
  return object && PyDict_Check(object) && PyDict_GET_SIZE(object) == 0;
}

inline bool is_empty_list(PyObject* object) {
  return object && PyList_Check(object) && PyList_GET_SIZE(object) == 0;
}

inline bool is_of(PyObject* object, PyObject* type) {
  return object && reinterpret_cast<PyObject*>(Py_TYPE(object)) == type;
}

inline bool has_attribute(PyObject* type, PyObject* name, PyObject* expected) {
  THPObjectPtr found(PyObject_GetAttr(type, name));
  if (!found) {
    PyErr_Clear();
  }
  return found.get() == expected;
}

// ---------------------------------------------------------------------------------------------------------
// facts
// ---------------------------------------------------------------------------------------------------------

// Whether modules of these classes compute what they did when they were defined, and nothing watches all modules.
inline bool are_classes_plain(PyObject* dropout) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(known.global_hooks); ++i) {
    if (!is_empty_dict(PyTuple_GET_ITEM(known.global_hooks, i))) {
      return false;
    }
  }
  PyObject* dropout_forward = dropout == known.dropout ? known.dropout_forward : known.identity_forward;
  return has_attribute(known.linear, names->forward, known.linear_forward) &&
      has_attribute(known.linear, names->call, known.call) &&
      has_attribute(dropout, names->forward, dropout_forward) && has_attribute(dropout, names->call, known.call) &&
      item(known.functional, names->linear) == known.functional_linear;
}

// Whether a call of the module does no more than its class's forward.
inline bool is_module_plain(PyObject* module) {
  PyObject* dict = own(module);
  return !item(dict, names->forward) && is_empty_dict(item(dict, names->forward_hooks)) &&
      is_empty_dict(item(dict, names->forward_pre_hooks)) && is_empty_dict(item(dict, names->backward_hooks)) &&
      is_empty_dict(item(dict, names->backward_pre_hooks));
}

// The name of the one active adapter.
inline PyObject* active_adapter(PyObject* layer_dict) {
  PyObject* name = item(layer_dict, names->active_adapter);
  if (name && PyList_Check(name) && PyList_GET_SIZE(name) == 1) {
    name = PyList_GET_ITEM(name, 0);
  }
  return name && PyUnicode_CheckExact(name) ? name : nullptr;
}

// Whether nothing but the layer's one adapter counts.
inline bool is_state_plain(PyObject* layer_dict, PyObject* base, PyObject* name) {
  return item(layer_dict, names->disable_adapters) == Py_False &&
      is_empty_list(item(layer_dict, names->merged_adapters)) && !item(layer_dict, names->tp_info) &&
      !item(own(base), names->hf_tp_plan) && is_of(item(item(layer_dict, names->lora_variant), name), known.variant);
}

// A tensor in memory that is nobody's partition.
inline bool is_tensor_plain(PyObject* object) {
  if (!object || !THPVariable_CheckExact(object)) {
    return false;
  }
  PyObject** dict = _PyObject_GetDictPtr(object);
  if (dict && *dict && item(*dict, names->ds_id)) {
    return false;
  }
  const Tensor& tensor = THPVariable_Unpack(object);
  return tensor.layout() == at::kStrided && !tensor.is_meta();
}

inline bool is_frozen(PyObject* object) {
  return is_tensor_plain(object) && !THPVariable_Unpack(object).requires_grad();
}

inline bool is_cast_by_autocast(const Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || is_sixteen_bit(tensor.scalar_type());
}

// Whether a layer without autocast takes these dtypes: one for all, or fp32 masters over 16 bits.
inline bool are_multiplied(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& lora_A,
    const Tensor& lora_B,
    PyObject* casts_input) {
  const ScalarType dtype = x.scalar_type();
  const bool is_floating = dtype == at::kDouble || dtype == at::kFloat || is_sixteen_bit(dtype);
  if (!is_floating || weight.scalar_type() != dtype || lora_A.scalar_type() != lora_B.scalar_type()) {
    return false;
  }
  const bool is_master = lora_A.scalar_type() == at::kFloat && is_sixteen_bit(dtype);
  return lora_A.scalar_type() == dtype || (is_master && casts_input == Py_True);
}

// ---------------------------------------------------------------------------------------------------------
// the check
// ---------------------------------------------------------------------------------------------------------

// (weight, lora_A, lora_B, scaling, bias, p of the dropout, dtype of autocast or None), or nullptr.
inline PyObject* operands(PyObject* layer, PyObject* given_x) {
  if (!is_of(layer, known.lora_linear) || !THPVariable_CheckExact(given_x) || !is_eager()) {
    return nullptr;
  }
  const Tensor& x = THPVariable_Unpack(given_x);
  const bool is_ordinary = x.layout() == at::kStrided && !x.is_nested();
  if (!is_ordinary || !(x.is_cpu() || x.is_cuda())) {
    return nullptr;
  }

  PyObject* layer_dict = own(layer);
  PyObject* modules = item(layer_dict, names->modules);
  PyObject* name = active_adapter(layer_dict);
  PyObject* base = item(modules, names->base_layer);
  if (!name || !is_of(base, known.linear) || !is_state_plain(layer_dict, base, name)) {
    return nullptr;
  }
  PyObject* lora_A = child(item(modules, names->lora_A), name);
  PyObject* lora_B = child(item(modules, names->lora_B), name);
  PyObject* dropout = child(item(modules, names->lora_dropout), name);
  PyObject* scaling = item(item(layer_dict, names->scaling), name);
  const bool has_dropout = is_of(dropout, known.dropout);
  if (!is_of(lora_A, known.linear) || !is_of(lora_B, known.linear) || !scaling || !PyFloat_CheckExact(scaling) ||
      !(has_dropout || is_of(dropout, known.identity))) {
    return nullptr;
  }
  if (!are_classes_plain(has_dropout ? known.dropout : known.identity) || !is_module_plain(base) ||
      !is_module_plain(lora_A) || !is_module_plain(lora_B) || !is_module_plain(dropout)) {
    return nullptr;
  }
  double dropout_p = 0.0;
  if (has_dropout) {
    PyObject* p = item(own(dropout), names->p);
    PyObject* training = item(own(dropout), names->training);
    if (!p || !PyFloat_CheckExact(p) || !training || !PyBool_Check(training)) {
      return nullptr;
    }
    const double probability = PyFloat_AS_DOUBLE(p);
    if (!(probability >= 0.0 && probability < 1.0)) { // NaN, too
      return nullptr;
    }
    dropout_p = training == Py_True ? probability : 0.0;
  }

  PyObject* base_parameters = item(own(base), names->parameters);
  PyObject* A_parameters = item(own(lora_A), names->parameters);
  PyObject* B_parameters = item(own(lora_B), names->parameters);
  PyObject* weight = item(base_parameters, names->weight);
  PyObject* bias = item(base_parameters, names->bias);
  PyObject* A = item(A_parameters, names->weight);
  PyObject* B = item(B_parameters, names->weight);
  const bool has_bias = bias && bias != Py_None;
  if (item(A_parameters, names->bias) != Py_None || item(B_parameters, names->bias) != Py_None ||
      !is_frozen(weight) || !is_tensor_plain(A) || !is_frozen(B) || (has_bias && !is_frozen(bias))) {
    return nullptr;
  }

  const Tensor& weight_tensor = THPVariable_Unpack(weight);
  const Tensor& A_tensor = THPVariable_Unpack(A);
  const Tensor& B_tensor = THPVariable_Unpack(B);
  if (A_tensor.is_inference()) {
    return nullptr;
  }
  PyObject* autocast_dtype = Py_None;
  if (at::autocast::is_autocast_enabled(x.device().type())) {
    if (!is_cast_by_autocast(x) || !is_cast_by_autocast(weight_tensor) || !is_cast_by_autocast(A_tensor) ||
        !is_cast_by_autocast(B_tensor) || (has_bias && !is_cast_by_autocast(THPVariable_Unpack(bias)))) {
      return nullptr;
    }
    autocast_dtype =
        reinterpret_cast<PyObject*>(torch::getTHPDtype(at::autocast::get_autocast_dtype(x.device().type())));
  } else if (!are_multiplied(x, weight_tensor, A_tensor, B_tensor, item(layer_dict, names->cast_input_dtype_enabled))) {
    return nullptr;
  }
  return Py_BuildValue("(OOOOOdO)", weight, A, B, scaling, has_bias ? bias : Py_None, dropout_p, autocast_dtype);
}

} // namespace mica
