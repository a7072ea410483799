// What Python calls: the check of a layer, and the layer itself.

#include <torch/csrc/Dtype.h>

#include "check.h"
#include "layer.h"
#include "merging.h"

namespace mica {
namespace {

// ---------------------------------------------------------------------------------------------------------
// `mica.ops.call_counts`
// ---------------------------------------------------------------------------------------------------------

PyObject* call_counts = nullptr;

// One call more of this function, and one more of it from C++. Under the GIL.
void count(PyObject* name, PyObject* name_from_cpp) {
  for (PyObject* key : {name, name_from_cpp}) {
    PyObject* before = PyDict_GetItemWithError(call_counts, key);
    THPObjectPtr after(PyLong_FromLongLong(1 + (before ? PyLong_AsLongLong(before) : 0)));
    if (!after || PyDict_SetItem(call_counts, key, after.get()) < 0) {
      throw python_error();
    }
  }
}

void count_backward() {
  const pybind11::gil_scoped_acquire gil;
  count(names->linear_backward, names->linear_backward_native);
}

// ---------------------------------------------------------------------------------------------------------
// functions
// ---------------------------------------------------------------------------------------------------------

OptionalDtype dtype_or_none(PyObject* object) {
  if (object == Py_None) {
    return std::nullopt;
  }
  return reinterpret_cast<THPDtype*>(object)->scalar_type;
}

// As autocast: fp64 stays as it is.
Tensor autocast_to(const Tensor& tensor, const OptionalDtype& dtype) {
  return dtype && tensor.scalar_type() != at::kDouble ? cast(tensor, *dtype) : tensor;
}

// linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed, autocast_dtype):
// `mica.ops.linear.linear_eager`
PyObject* linear_function(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(num_args == 10, "linear takes 10 arguments, not ", num_args);
  const Tensor& given_x = THPVariable_Unpack(args[0]);
  const Tensor& given_weight = THPVariable_Unpack(args[1]);
  const Tensor& lora_A = THPVariable_Unpack(args[2]);
  const Tensor& lora_B = THPVariable_Unpack(args[3]);
  const double scaling = PyFloat_AsDouble(args[4]);
  OptionalTensor given_bias;
  if (args[5] != Py_None) {
    given_bias = THPVariable_Unpack(args[5]);
  }
  const OptionalDtype compute_dtype = dtype_or_none(args[6]);
  const OptionalDtype autocast_dtype = dtype_or_none(args[9]);
  Dropout dropout;
  dropout.p = PyFloat_AsDouble(args[7]);
  if (dropout) {
    const Tensor& seed = THPVariable_Unpack(args[8]);
    TORCH_CHECK(seed.is_cpu() && given_x.is_cpu(), "dropout is for tensors on a CPU here");
    dropout.seed = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  }
  count(names->linear, names->linear_native);

  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    // cast here, where autograd follows it
    const Tensor x = autocast_to(given_x, autocast_dtype);
    const Tensor weight = autocast_to(given_weight, autocast_dtype);
    OptionalTensor bias;
    if (given_bias) {
      bias = autocast_to(*given_bias, autocast_dtype);
    }
    const ScalarType factor_dtype = lora_A.scalar_type();
    const Numbers numbers{
        scaling,
        compute_dtype.value_or(x.scalar_type()),
        factor_dtype,
        autocast_dtype.value_or(factor_dtype),
        dropout,
    };
    const bool needs_grad = at::GradMode::is_enabled() && (x.requires_grad() || lora_A.requires_grad());
    if (needs_grad) {
      y = Layer::apply(x, weight, lora_A, lora_B, bias, numbers);
    } else {
      y = forward_of(x, weight, lora_A, lora_B, bias, numbers);
    }
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// operands(layer, x): `mica.fast.forward.fast_check`
PyObject* operands_function(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(num_args == 2, "operands takes 2 arguments, not ", num_args);
  PyObject* found = operands(args[0], args[1]);
  if (!found && !PyErr_Occurred()) {
    Py_RETURN_NONE;
  }
  return found;
  END_HANDLE_TH_ERRORS
}

// A function of two tensors as Python calls it; None where its result is undefined.
template <Tensor (*function)(const Tensor&, const Tensor&)>
PyObject* of_two_tensors(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(num_args == 2, "this function takes 2 arguments, not ", num_args);
  const Tensor& first = THPVariable_Unpack(args[0]);
  const Tensor& second = THPVariable_Unpack(args[1]);
  Tensor result;
  {
    const pybind11::gil_scoped_release no_gil;
    result = function(first, second);
  }
  if (!result.defined()) {
    Py_RETURN_NONE;
  }
  return THPVariable_Wrap(std::move(result));
  END_HANDLE_TH_ERRORS
}

// merge_chunk(new, old, update, needs_lost): (positions that are lost or None, unchanged, ‖update‖², ‖error‖²), or None
// where PyTorch's operators have to do it; ``new`` is then undefined. For `mica.fast.merge.merging`
PyObject* merge_chunk_function(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(num_args == 4, "merge_chunk takes 4 arguments, not ", num_args);
  const Tensor& fresh = THPVariable_Unpack(args[0]);
  const Tensor& old = THPVariable_Unpack(args[1]);
  const Tensor& update = THPVariable_Unpack(args[2]);
  const bool needs_lost = args[3] == Py_True;
  if (!takes_chunk(fresh, old, update)) {
    Py_RETURN_NONE;
  }
  Merged merged;
  Tensor lost;
  {
    const pybind11::gil_scoped_release no_gil;
    const bool is_short = old.element_size() == 2;
    merged = is_short ? merge_words<uint16_t>(fresh, old, update, needs_lost)
                      : merge_words<uint32_t>(fresh, old, update, needs_lost);
    if (needs_lost) {
      lost = at::empty({static_cast<int64_t>(merged.lost.size())}, at::kLong);
      std::copy(merged.lost.begin(), merged.lost.end(), lost.mutable_data_ptr<int64_t>());
    }
  }
  if (!merged.range.is_ordinary()) {
    Py_RETURN_NONE;
  }
  THPObjectPtr positions(needs_lost ? THPVariable_Wrap(std::move(lost)) : Py_NewRef(Py_None));
  return Py_BuildValue(
      "(OLdd)",
      positions.get(),
      static_cast<long long>(merged.unchanged),
      merged.update_squared,
      merged.error_squared);
  END_HANDLE_TH_ERRORS
}

// subtract_chunk(new, weight, update): whether ``new`` is now round(weight - update)
PyObject* subtract_chunk_function(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(num_args == 3, "subtract_chunk takes 3 arguments, not ", num_args);
  const Tensor& fresh = THPVariable_Unpack(args[0]);
  const Tensor& weight = THPVariable_Unpack(args[1]);
  const Tensor& update = THPVariable_Unpack(args[2]);
  bool is_done = false;
  if (takes_chunk(fresh, weight, update)) {
    const pybind11::gil_scoped_release no_gil;
    const bool is_short = weight.element_size() == 2;
    is_done = is_short ? subtract_words<uint16_t>(fresh, weight, update)
                       : subtract_words<uint32_t>(fresh, weight, update);
  }
  return PyBool_FromLong(is_done);
  END_HANDLE_TH_ERRORS
}

// configure_linear(call_counts, few_to_round, tokens_per_chunk, has_wide_sums, edited)
PyObject* configure_linear(PyObject*, PyObject* args) {
  long long rows = 0;
  long long tokens = 0;
  int wide_sums = 0;
  const char* text = nullptr;
  PyObject* counts = nullptr;
  if (!PyArg_ParseTuple(args, "O!LLps", &PyDict_Type, &counts, &rows, &tokens, &wide_sums, &text)) {
    return nullptr;
  }
  Py_XSETREF(call_counts, Py_NewRef(counts));
  few_to_round = rows;
  tokens_per_chunk = tokens;
  has_wide_sums = wide_sums;
  edited = text;
  on_backward = count_backward;
  Py_RETURN_NONE;
}

// configure_check(...): the fields of `Known`, in their order
PyObject* configure_check(PyObject*, PyObject* args) {
  Known given;
  if (!PyArg_ParseTuple(
          args,
          "OOOOOOOOOO!OO!",
          &given.lora_linear,
          &given.variant,
          &given.linear,
          &given.identity,
          &given.dropout,
          &given.linear_forward,
          &given.identity_forward,
          &given.dropout_forward,
          &given.call,
          &PyDict_Type,
          &given.functional,
          &given.functional_linear,
          &PyTuple_Type,
          &given.global_hooks)) {
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
    Py_INCREF(PyTuple_GET_ITEM(args, i)); // for as long as the process lives
  }
  known = given;
  Py_RETURN_NONE;
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"linear", fast(linear_function), METH_FASTCALL, nullptr},
    {"wide_product", fast(of_two_tensors<wide_product_or_none>), METH_FASTCALL, nullptr},
    {"merge_chunk", fast(merge_chunk_function), METH_FASTCALL, nullptr},
    {"weighted_sums", fast(of_two_tensors<weighted_sums>), METH_FASTCALL, nullptr},
    {"subtract_chunk", fast(subtract_chunk_function), METH_FASTCALL, nullptr},
    {"operands", fast(operands_function), METH_FASTCALL, nullptr},
    {"configure_linear", configure_linear, METH_VARARGS, nullptr},
    {"configure_check", configure_check, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "mica_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

} // namespace
} // namespace mica

PyMODINIT_FUNC PyInit_mica_native() {
  mica::names = new mica::Names();
  return PyModule_Create(&mica::definition);
}
