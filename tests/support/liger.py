"""Liger's kernels in Triton's interpreter, and transformers as it was afterwards."""

from transformers.models.llama import modeling_llama

from tests.support.kernel_cases import DEVICE


class _Scalar(float):
    """What a kernel's `float` argument is when compiled: it has a dtype, fp32, and can be cast."""

    def to(self, dtype):
        return self


def run_on_any_device(monkeypatch):
    """Liger replaces names of transformers' module. And the interpreter lacks two things that Liger uses."""
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    if DEVICE == "cpu":
        import triton.language as tl
        from liger_kernel.ops import rms_norm
        from triton.runtime import interpreter

        convert = interpreter._implicit_cvt
        monkeypatch.setattr(
            interpreter,
            "_implicit_cvt",
            lambda argument: _Scalar(argument) if type(argument) is float else convert(argument),
        )
        # libdevice is a library for GPUs, whose functions return None here
        monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))
