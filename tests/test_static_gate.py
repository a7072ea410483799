"""What the static gate has found is on the kernels' page, and it does not run where it would find nothing."""

import re

from tests.support.processes import ROOT, start


def test_the_page_shows_the_latest_table():
    """Registers and shared memory in kernels/README.md are lines of the committed result."""
    page = (ROOT / "kernels/README.md").read_text()
    (shown,) = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    (path,) = re.findall(r"\(\.\./(bench/results/static/triton-[\d.]+txt)\)", page)
    assert set(shown.splitlines()) <= set((ROOT / path).read_text().splitlines())


def test_it_does_not_pretend_to_compile_interpreted_kernels():
    done = start("tests.static_gate", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "unset TRITON_INTERPRET" in done.stderr
