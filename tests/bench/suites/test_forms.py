"""The suite of other forms: each is what its name says, or has no number."""

import torch

from bench.results.names import ATEN, BARE, BORDERED, DESCRIPTOR, FAST, FUSED, PYTORCH
from bench.suites.bench_forms import Bordered
from tests.support.dry_run import dry_run
from tests.support.oracle import problem, solve
from tests.support.tolerances import RELATIVE, error

# The forward takes the split form whatever is chosen; and another form is wrong.
BYPASSED = """
from bench.suites import layer
from mica.kernels import configs

forms_of = configs.forms_of
configs.forms_of = lambda *args: forms_of(*args)._replace(forward="split")
backward = layer.AtenControl.backward
layer.AtenControl.backward = staticmethod(lambda ctx, dy: backward(ctx, dy * 1.02))
"""


def test_a_form_that_was_not_taken_is_refused(tmp_path):
    done = dry_run(tmp_path, "bench_forms.py", injected=BYPASSED)
    refused = {one["implementation"]: one["why"] for one in done.result.refused}
    assert refused.keys() == {FUSED, DESCRIPTOR, ATEN}, done.text
    assert "calls of the fused kernel, by descriptors or not: Counter({False: 1})" in refused[FUSED]
    assert "Counter({True: 1})" in refused[DESCRIPTOR]
    assert "the relative error of dx is 2.0" in refused[ATEN]
    assert all(group.timings.keys() == {BARE, FAST, PYTORCH, BORDERED} for group in done.result.groups)


def test_all_forms_run(tmp_path):
    done = dry_run(tmp_path, "bench_forms.py")
    assert not done.result.refused
    assert len(done.result.groups) == 6  # two passes, three clocks
    for group in done.result.groups:
        assert group.timings.keys() == {BARE, FAST, FUSED, DESCRIPTOR, PYTORCH, BORDERED, ATEN}


def test_the_bordered_form_is_the_same_layer():
    p = problem((7,), 12, 10, 3, torch.float64, bias=False)
    x, lora_A = p.x.clone().requires_grad_(), p.lora_A.clone().requires_grad_()
    y = Bordered.apply(x, torch.cat([p.weight, p.lora_B], dim=1), lora_A, p.scaling)
    y.backward(p.grad_output)
    expected = solve(p)
    for name, value in {"y": y, "grad_x": x.grad}.items():
        assert error(value, expected[name]) <= RELATIVE[torch.float64], name
    assert error(lora_A.grad, expected["grad_A"]) <= RELATIVE[torch.float32]
