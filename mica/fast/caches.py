"""What is kept between calls because it follows from a frozen B, and the one call that drops it.

Everything else about a layer is read again at each call.
"""

from __future__ import annotations

from mica.paths import choose


def clear_caches() -> None:
    """Forget what was derived from frozen factors B: call it after an edit of B that PyTorch does not count.

    On a GPU the kernels keep a copy of each B in the layout that they need. It is made anew where PyTorch
    reports a change of the tensor: after an in-place write (`copy_` under `torch.no_grad` or
    `torch.inference_mode`, `load_state_dict`), and after another tensor has taken its place
    (``param.data = new``, ``load_state_dict(assign=True)``, `load_adapter`). PyTorch counts no writes through
    an alias that autograd does not know, so after these the old B would be used from then on:

        for parameter, saved in zip(model.parameters(), checkpoint):
            parameter.data.copy_(saved)  # also parameter.data[...] = saved, torch.distributed on .data, numpy
        mica.fast.clear_caches()

    PEFT's own hotswapping writes so too, and is followed by this call. It is cheap: everything is derived
    again, once, at its next use.
    """
    choose.clear_prepared()
