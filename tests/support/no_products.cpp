// Matrix products of the CPU that compute nothing: they return memory of the result's size, as a launch on a device
// would, so that what is timed is the host's work. `install` replaces PyTorch's for the whole process.

#include <Python.h>

#include <ATen/ATen.h>
#include <torch/library.h>

#include <memory>

namespace {

std::unique_ptr<torch::Library> library;

at::Tensor no_mm(const at::Tensor& left, const at::Tensor& right) {
  return at::empty({left.size(0), right.size(1)}, left.options());
}

at::Tensor no_addmm(
    const at::Tensor&,
    const at::Tensor& left,
    const at::Tensor& right,
    const at::Scalar&,
    const at::Scalar&) {
  return no_mm(left, right);
}

at::Tensor& no_addmm_(
    at::Tensor& self,
    const at::Tensor&,
    const at::Tensor&,
    const at::Scalar&,
    const at::Scalar&) {
  return self;
}

PyObject* install(PyObject*, PyObject*) {
  library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library->impl("mm", TORCH_FN(no_mm));
  library->impl("addmm", TORCH_FN(no_addmm));
  library->impl("addmm_", TORCH_FN(no_addmm_));
  Py_RETURN_NONE;
}

PyObject* uninstall(PyObject*, PyObject*) {
  library.reset();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"install", install, METH_NOARGS, nullptr},
    {"uninstall", uninstall, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "no_products", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit_no_products() {
  return PyModule_Create(&definition);
}
