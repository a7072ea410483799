"""What all operators ``torch.ops.mica.*`` share: registration, choice of path, autograd and autocast.

``define`` / ``impl`` with an autograd.Function on the Autograd key, not ``custom_op``: half the overhead
per call (51 against 87 µs forward + backward, tiny bodies, CPU), and ``opcheck``, ``torch.compile`` with
``fullgraph=True`` and autocast all hold.
"""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from mica.memory import TENSOR_TYPES, has_no_values, in_memory
from mica.ops import computed, recompute
from mica.paths import choose, tuning
from mica.paths.operands import Operands
from mica.paths.products import is_transformed

# How often each operator's body ran, eager or compiled, which shows that a path was taken. Counted in the
# bodies, which torch.compile never traces. "linear" counts every call, "linear_kernels" those on Triton,
# "linear_native" those from C++, and "linear_added" those that add to the output of a
# base layer that was called, or of another adapter.
call_counts: Counter[str] = Counter()

LIBRARY = torch.library.Library("mica", "DEF")

# Around the body of a forward. Without autograd alone a body's ``.view`` would make the output a view, and an
# in-place operation on it (nn.ReLU(inplace=True), ``y += x``) an error: autograd allows none on a Function's.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView

# Under vmap an operator is the plain formulas, which PyTorch's own rules map and autograd follows. Without a
# rule PyTorch calls the operator once for each element of the batch, and warns.
VMAP = "FuncTorchBatchedDecomposition"

AUTOCAST = ("cpu", "cuda")  # kinds of devices with autocast rules: others would cast within a body


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a kind of device, such as "cpu"; PyTorch cannot be asked about "meta"."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


_form = contextvars.ContextVar[str | None]("mica_form", default=None)


@contextmanager
def in_form(form: str) -> Iterator[None]:
    """Within it every formula runs in this form, whatever is known of it.

    Args:
        form: `choose.REFERENCE`, or a form of kernels: one of `mica.kernels.configs.FORM_NAMES`.
    """
    token = _form.set(form)
    try:
        yield
    finally:
        _form.reset(token)


def run_formula(
    formula: Callable,
    tensor: Tensor,
    rank: int,
    dtypes: tuple[torch.dtype, ...],
    *args,
    kind: Callable[[], tuning.Kind] | None = None,
    trains_B: bool = False,
    may_settle: bool = False,
):
    """Call a formula of `mica.paths.reference_path`, or what `mica.paths.triton_path` has for it on kernels.

    Args:
        formula: the function of the reference path; ``args`` are its arguments.
        tensor: x or a gradient, whose device decides.
        rank, dtypes, kind: as `choose.choice_of` takes them.
        trains_B: whether lora_B may be trained, so that no copy of it may outlive the call.
        may_settle: whether the caller can have settled which form is the fastest.

    Raises:
        RuntimeError: ``MICA_BACKEND=triton`` demands kernels that this call cannot have.
        UnsettledError: the form is not settled, and nothing has been computed or counted.
    """
    name = formula.__name__
    form = _form.get()
    # in a backward under `is_grads_batched`
    if torch._C._functorch.is_legacy_batchedtensor(tensor):
        form = choose.REFERENCE
    is_given = form is not None
    function = choose.LORA + name if trains_B else name
    if not is_given:
        choice = choose.choice_of(function, tensor.device, rank, dtypes, kind)
        if may_settle and choice.unsettled is not None:
            raise tuning.UnsettledError(choice.unsettled)
        form = choice.form
    call_counts[name] += 1
    if form == choose.REFERENCE:
        return formula(*args)
    if form == choose.ERROR:
        raise choose.demand_error(choice)

    from mica.paths import triton_path  # imports Triton

    args = [_in_memory(arg) for arg in args]
    options = {} if kind is None else {"form": form}
    try:
        result = triton_path.KERNELS[formula](*args, **options)
    except triton_path.LaunchError as error:  # before anything ran: no operand has changed
        in_capture = isinstance(error, triton_path.NotLoadedError)
        # no capture permits the formulas of experts either: they wait for the device
        has_no_other_way = in_capture and name.startswith("experts_")
        if is_given or has_no_other_way or choose.requested() == "triton":
            raise
        note = choose.note_missed if in_capture else choose.give_up
        note(tensor.device, function, rank, dtypes, error)
        return formula(*args)
    call_counts[f"{name}_kernels"] += 1
    return result


def _in_memory(arg):
    if isinstance(arg, Operands):
        return Operands(*map(_in_memory, arg))
    return in_memory(arg) if isinstance(arg, Tensor) else arg


def on_reference(body: Callable) -> Callable:
    """The body on the reference path only, which autograd and every function transform can follow."""

    def run(*args, **options):
        with in_form(choose.REFERENCE):
            return body(*args, **options)

    return run


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether a call may go straight to a body: eager, and only autograd and autocast need to see it.

    torch.library's dispatch costs about 15 µs per call (measured), a whole layer of stock PEFT 40. It is
    needed where a graph is traced or compiled, under a dispatch or function mode (selective checkpointing,
    flop counters), a function transform, forward-mode AD, and for tensors of other classes (DTensor).
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and type(tensor) not in TENSOR_TYPES:
            return False
    return not (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    )


def _is_counted(x: Tensor) -> bool:
    """Whether a call with gradients computes nothing, and is not traced either: its memory is looked at.

    Its operators are the registered ones, which allocate what a kernel does, but it keeps for the backward
    what an eager call keeps.
    """
    if not has_no_values(x) or not torch.is_grad_enabled():
        return False
    return TracingContext.try_get() is None and get_proxy_mode() is None


def save(ctx, *tensors: Tensor | None, outputs: Sequence[Tensor | None] = ()) -> None:
    """Save tensors for the backward as they are now; `saved` returns them there, then the ``outputs``.

    ``parameter.data = other`` gives a tensor other memory, which no version shows, and a saved tensor is the
    tensor itself: the gradient would be that of values the forward has never seen. Optimisers and loaders
    assign so. What is saved is therefore an alias: it keeps the memory and shares the version, so that an
    edit in place is still reported. Where a gradient is needed autograd follows it, for second derivatives.
    It is a view, which knows its base: the kernels' copy of B is kept for that. A view takes 1 µs.
    """
    torch._C._set_grad_enabled(True)  # `torch.enable_grad` takes 0.5 µs more
    try:
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        ctx.save_for_backward(*aliases, *outputs)  # autograd knows an output by its identity
    finally:
        torch._C._set_grad_enabled(False)  # as it is in every forward


def without_values(tensor: Tensor) -> Tensor:
    """For a backward that needs the shape, dtype and device alone, to which no edit in place matters."""
    return tensor.data  # has a version of its own


def saved(ctx, name: str = computed.OPERANDS) -> tuple[Tensor | None, ...]:
    """What the forward has given to `save`; ``name``: of what of it may be edited, for the error.

    Raises:
        RuntimeError: a tensor was edited; stock PEFT forgives that where it saved an fp32 copy of x.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(computed.EDITED.format(name)) from error


def run_backward(
    operator: Callable,
    body: Callable,
    tensors: Sequence[Tensor | None],
    *args,
    mask: Sequence[bool] | None = None,
    grad_h: Tensor | None = None,
):
    """Run a backward; with ``create_graph=True``, for higher derivatives, by plain formulas.

    The body runs below autograd although gradients are disabled there: PyTorch's calls take 1 µs less each.

    Args:
        operator: The registered operator, for calls that are traced or watched.
        body: The function behind it.
        tensors: The tensors among the arguments, which decide between the two.
        args: The arguments of both.
        mask: Which of several gradients are needed; the others are None. Without one it is a single gradient.
        grad_h: The gradient of the h that a forward returned, which second derivatives have. Only the plain
            formulas take it.
    """
    if grad_h is not None:
        grads = on_reference(partial(body, grad_h=grad_h))(*args)
    elif torch.is_grad_enabled():
        grads = on_reference(body)(*args)
    elif not is_eager(*tensors):
        grads = operator(*args)
    else:
        with below_autograd():
            grads = body(*args)
    if mask is None:
        return grads
    return [grad if is_needed else None for grad, is_needed in zip(grads, mask, strict=True)]


def without_gradient(grad_h: Tensor, weight: Tensor | None, lora_B: Tensor) -> Tensor:
    """A gradient dy of zeros for a backward in which only h has a gradient: in second derivatives.

    Args:
        grad_h: The gradient of h, (..., rank).
        weight: The base weight, whose dtype dy gets; None where x needs no gradient.
        lora_B: The factor (..., out_features, rank).
    """
    dtype = grad_h.dtype if weight is None else weight.dtype
    return grad_h.new_zeros(*grad_h.shape[:-1], lora_B.shape[-2], dtype=dtype)


def as_matrix(tensor: Tensor) -> Tensor:
    """(..., n) as a matrix (tokens, n).

    Raises:
        ValueError: a tensor without dimensions.
    """
    if tensor.dim() == 2:
        return tensor
    if tensor.dim() == 0:
        raise ValueError("the input of a layer must be (..., in_features), but it has no dimensions.")
    columns = tensor.shape[-1]  # a reshape takes twice as long as a view
    return tensor.view(-1, columns) if columns and tensor.is_contiguous() else tensor.reshape(-1, columns)


# A view that autograd does not know to be one.
_unsafe_view = torch.ops.aten._unsafe_view.default


def like(shape: torch.Size, matrix: Tensor) -> Tensor:
    """(tokens, n) with all but the last dimension of ``shape``, and nobody's view.

    A body may run above autograd: function transforms, second derivatives. A ``.view`` would then make the
    output a view. A hook on it would be lost once it is changed in place, and ``detach_()`` and functions
    that mark it as dirty would raise.
    """
    if len(shape) == 2:
        return matrix
    return _unsafe_view(matrix, (*shape[:-1], matrix.shape[-1]))


# Around a body: a backward that is called inside autocast gives the same dA. `torch.autocast` takes 3 µs.
no_autocast = torch._C._DisableAutocast


def autocast_to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As in PEFT's layers: products in autocast's dtype, fp64 unchanged; A stays an fp32 master."""
    if tensor is None or tensor.dtype in (dtype, torch.float64):
        return tensor
    return tensor.to(dtype)


def without_none(like: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients as an operator returns them: empty tensors in the place of None."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def operator(
    name: str,
    schema: str,
    body: Callable,
    fake: Callable,
    apply: Callable | None = None,
    cast: Callable | None = None,
    transformed: Callable | None = None,
) -> Callable:
    """Register ``torch.ops.mica.<name>``; returns a function that bypasses the dispatcher where `is_eager`.

    The returned function takes and gives what the operator does. Without a gradient there is no
    autograd.Function either.

    Args:
        name: The operator's name.
        schema: Its arguments and results, as `torch.library` spells them.
        body: The function that computes it on every device.
        fake: The function that gives results without values, for tracing.
        apply: ``apply(run, *args)`` of an autograd.Function whose forward calls ``run`` below autograd.
            Without one, as for a backward, the operator itself is returned: it has neither autograd nor
            autocast.
        cast: ``cast(device_type, *args)`` gives the arguments under autocast.
        transformed: The function that function transforms differentiate; None means ``body``.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mica::{name}", fake, lib=LIBRARY)
    registered = getattr(torch.ops.mica, name).default
    followed = on_reference(transformed or body)
    if apply is None:
        LIBRARY.impl(name, followed, VMAP)
        return registered

    def batched(*args):
        """Above autocast, which has to cast here: within the body it would cast each product's operands."""
        device_type = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        if device_type not in AUTOCAST or not torch.is_autocast_enabled(device_type):
            return followed(*args)
        args = cast(device_type, *args)
        with no_autocast():
            return followed(*args)

    def autograd(*args):
        if is_transformed():
            return followed(*args)
        if _is_counted(args[0]):
            return recompute.call(partial(apply, registered), *args)
        return apply(registered, *args)

    def autocast(device_type, *args):
        args = cast(device_type, *args)
        with no_autocast():
            return registered(*args)

    LIBRARY.impl(name, batched, VMAP)
    LIBRARY.impl(name, autograd, "Autograd")
    for device_type in AUTOCAST:
        LIBRARY.impl(name, partial(autocast, device_type), f"Autocast{device_type.upper()}")

    applied = partial(apply, body)

    def call(*args):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        device_type = tensors[0].device.type
        if device_type not in AUTOCAST or not is_eager(*tensors):
            return registered(*args)
        if torch.is_autocast_enabled(device_type):
            args = cast(device_type, *args)
            with no_autocast():
                return call(*args)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return recompute.call(applied, *args)
        with below_autograd():
            return body(*args)

    return call
