// What Python calls: a layer by its check, a layer by its operands, and loops.

#include <pybind11/stl.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/utils/pybind.h>

#include "check.h"
#include "norm.h"

namespace py = pybind11;

namespace mica {

// -- what is counted -------------------------------------------------------------------------------------

// In `mica.ops.call_counts` one more of each. Under the GIL.
static void count(std::initializer_list<PyObject*> names) {
  for (PyObject* key : names) {
    PyObject* before = PyDict_GetItemWithError(told<"call_counts">(), key);
    THPObjectPtr after(PyLong_FromLongLong(1 + (before ? PyLong_AsLongLong(before) : 0)));
    if (!after || PyDict_SetItem(told<"call_counts">(), key, after.get()) < 0) {
      throw python_error();
    }
  }
}

void count_backward() {
  const py::gil_scoped_acquire gil;
  count({"linear_backward"_key, "linear_backward_native"_key});
}

Tensor value_of(const Tensor& token) {
  const py::gil_scoped_acquire gil;
  auto* computed = static_cast<PyObject*>(token.mutable_data_ptr());
  THPObjectPtr x(PyObject_CallOneArg(told<"value_of">(), computed));
  if (!x) {
    python_error error;
    error.persist();
    throw error;
  }
  return THPVariable_Unpack(x.get());
}

namespace {

// As `mica.fast.forward.layer_calls.note` where operators run.
void note(PyObject* layer, const Tensor& x, const OptionalDtype& autocast_dtype) {
  if (torch::autograd::get_current_graph_task_id() != -1) { // a backward computes the layer again
    return;
  }
  THPObjectPtr reference(PyWeakref_NewRef(layer, nullptr));
  PyObject* before = reference ? PyDict_GetItemWithError(told<"noted">(), reference.get()) : nullptr;
  const Py_ssize_t count = 1 + (before ? PyLong_AsSsize_t(PyTuple_GET_ITEM(before, 0)) : 0);
  THPObjectPtr entry(Py_BuildValue(
      "(nO(ONNO))", count, Py_None, object_of(x.scalar_type()), py::cast(x.sizes()).release().ptr(),
      py::cast(x.strides()).release().ptr(), object_of(autocast_dtype)));
  if (!reference || !entry || PyDict_SetItem(told<"noted">(), reference.get(), entry.get()) < 0) {
    throw python_error();
  }
}

// -- a layer ---------------------------------------------------------------------------------------------

Tensor call_here(const Tensor& x, const Operands& operands) {
  count({"linear"_key, "linear_native"_key});
  if (operands.base_output) {
    count({"linear_added"_key});
  }
  const py::gil_scoped_release no_gil;
  return layer(x, operands);
}

// Stands for the `Computed` of x of `mica.ops.recompute`, which lives as long: a tensor is all that autograd can save.
// Undefined: x has to be saved.
Tensor token_or_none(PyObject* x) {
  THPObjectPtr computed(PyObject_CallOneArg(item(told<"recompute">(), "claim"_key), x));
  if (!computed) {
    throw python_error();
  }
  if (computed.get() == Py_None) {
    return Tensor();
  }
  const auto drop = [](void* object) {
    const py::gil_scoped_acquire gil;
    Py_DECREF(static_cast<PyObject*>(object));
  };
  return at::from_blob(computed.release(), {1}, drop, at::TensorOptions(at::kByte));
}

// `mica.ops.linear.linear`
PyObject* call_python(PyObject* x, PyObject* base_output, const Operands& operands) {
  const py::handle linear = told<"python_linear">();
  py::object y = linear(
      py::handle(x), operands.weight.defined() ? OptionalTensor(operands.weight) : std::nullopt, operands.lora_A,
      operands.lora_B, operands.scaling, operands.bias, py::handle(object_of(operands.compute_dtype)),
      operands.dropout_p, operands.seed, py::handle(object_of(operands.autocast_dtype)), operands.trains_B,
      py::handle(base_output ? base_output : Py_None));
  return y.release().ptr();
}

// y of one adapter: with the base product, or with what the base layer, or the adapter before, has returned.
PyObject* call_adapter(PyObject* given_x, PyObject* base_output, Operands& operands) {
  const Tensor& x = THPVariable_Unpack(given_x);
  if (operands.dropout_p > 0.0) {
    // by torch's generator: checkpointing restores that, and so the mask
    const auto on_device = at::TensorOptions(at::kLong).device(x.device());
    operands.seed = at::randint(0, INT64_MAX, {1}, on_device);
  }
  const bool asks = may_be_computed_again(x, operands);
  const bool is_cast = operands.autocast_dtype.value_or(x.scalar_type()) != x.scalar_type();
  const bool is_usual = !base_output || is_output_of(base_output, x, operands);
  if (!is_usual || !runs_here(x, operands) || (asks && is_cast)) { // Python tells `mica.ops.recompute` of the cast
    return call_python(given_x, base_output, operands);
  }
  if (base_output) {
    operands.is_ours = is_ours(base_output);
    operands.base_output = THPVariable_Unpack(base_output);
  }
  if (asks) {
    operands.token = token_or_none(given_x);
  }
  return THPVariable_Wrap(call_here(x, operands));
}

// fast(layer, x): y, or None where anything is unusual. `mica.fast.forward.fast`
PyObject* fast(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(num_args == 2, "fast takes 2 arguments, not ", num_args);
  Common common = is_switched_on() ? common_case(args[0], args[1]) : Common();
  if (common.adapters.empty()) {
    Py_RETURN_NONE;
  }
  const Operands& first = common.adapters.front();
  note(args[0], THPVariable_Unpack(args[1]), first.autocast_dtype);
  THPObjectPtr y;
  if (!first.weight.defined()) {
    y = PyObject_CallOneArg(common.base, args[1]);
    if (!y) {
      throw python_error();
    }
  }
  for (Operands& operands : common.adapters) {
    y = call_adapter(args[1], y.get(), operands);
  }
  return y.release();
  END_HANDLE_TH_ERRORS
}

// What `mica.ops.linear` calls with x and the fields of `mica.paths.operands.Operands`.
template <auto function>
auto with_operands(
    const Tensor& x, const OptionalTensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const OptionalTensor& bias, const py::object& compute_dtype, double dropout_p, const OptionalTensor& seed,
    const py::object& autocast_dtype, bool trains_B, const OptionalTensor& base_output) {
  const OptionalDtype compute = dtype_or_none(compute_dtype.ptr());
  const OptionalDtype autocast = dtype_or_none(autocast_dtype.ptr());
  Operands operands{weight.value_or(Tensor()), lora_A, lora_B, scaling, bias, compute, dropout_p, seed, autocast, trains_B,
                    base_output};
  return function(x, operands);
}

// y, or undefined, which is None in Python, where kernels may run
Tensor call_here_or_none(const Tensor& x, Operands& operands) {
  return runs_here(x, operands) ? call_here(x, operands) : Tensor();
}

// `mica.paths.dropout.dropped`
Tensor dropped(const Tensor& x, double dropout_p, int64_t seed) {
  return masked(x, {dropout_p, static_cast<uint64_t>(seed)});
}

// -- what Python tells -----------------------------------------------------------------------------------

// By their names what is looked at later, for as long as the process lives.
void tell(const py::kwargs& objects) {
  PyDict_Update(told_by_name, objects.ptr());
  ++times_told;
}

void configure_linear(
    const std::tuple<int64_t, int64_t, int64_t, int64_t>& limits, bool wide_sums, const std::string& text,
    const py::kwargs& objects) {
  std::tie(few_to_round, few_rows, chunk, tokens_per_chunk) = limits;
  has_wide_sums = wide_sums;
  edited = text;
  tell(objects);
}

PyMethodDef quickly_called[] = {
    {"fast", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fast)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

} // namespace
} // namespace mica

PYBIND11_MODULE(mica_native, module) {
  PyModule_AddFunctions(module.ptr(), mica::quickly_called);
  module.def("linear", mica::with_operands<mica::call_here_or_none>);
  module.def("linear_on_reference", mica::with_operands<mica::call_here>);
  module.def("key_of", mica::with_operands<mica::key_of>);
  module.def("wide_product", mica::wide_product_or_none, py::call_guard<py::gil_scoped_release>());
  module.def("weighted_sums", mica::weighted_sums, py::call_guard<py::gil_scoped_release>());
  module.def("masked", mica::dropped, py::call_guard<py::gil_scoped_release>());
  module.def("norm", mica::norm, py::call_guard<py::gil_scoped_release>());
  module.def("merge_bfloat16", mica::merge<uint16_t>, py::call_guard<py::gil_scoped_release>());
  module.def("merge_float32", mica::merge<uint32_t>, py::call_guard<py::gil_scoped_release>());
  module.def("unmerge_bfloat16", mica::unmerge<uint16_t>, py::call_guard<py::gil_scoped_release>());
  module.def("unmerge_float32", mica::unmerge<uint32_t>, py::call_guard<py::gil_scoped_release>());
  module.def("configure_linear", mica::configure_linear);
  module.def("tell", mica::tell);
}
