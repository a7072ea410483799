"""How long a 16-bit product takes on this CPU, measured against fp32's."""

import time

_NUM_TOKENS, _FEATURES = 64, 512
# A processor without bf16 instructions takes 0.2 s for one dy W of this size, hundreds of times fp32's.
_SECONDS, _RUNS = 0.05, 20


def product_ratios() -> dict[str, dict[str, float | None]]:
    """dtype ("bfloat16", "float16") -> product -> its time over float32's; None where PyTorch has none.

    The products are those of a frozen layer: "x Wᵀ" of its forward, "dy W" of its backward. Below a second in
    all, with one thread: on a busy machine threads that wait for each other take longer than the products.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = {dtype: _times(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    finally:
        torch.set_num_threads(threads)
    reference = times.pop(torch.float32)
    return {
        str(dtype).removeprefix("torch."): {
            name: seconds and seconds / reference[name] for name, seconds in found.items()
        }
        for dtype, found in times.items()
    }


def _times(dtype) -> dict[str, float | None]:
    """The quickest of some runs, in seconds."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_NUM_TOKENS, _FEATURES, generator=generator).to(dtype)
    weight = torch.randn(_FEATURES, _FEATURES, generator=generator).to(dtype)
    found = {}
    for name, factor in (("x Wᵀ", weight.t()), ("dy W", weight)):
        runs = []
        try:
            while sum(runs) < _SECONDS and len(runs) < _RUNS:
                start = time.perf_counter()
                x @ factor
                runs.append(time.perf_counter() - start)
            found[name] = min(runs)
        except RuntimeError:  # no such product in this PyTorch
            found[name] = None
    return found
