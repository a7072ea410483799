"""pytest plugin for PEFT's own tests: the backend is imported first, and its calls are counted in each."""

import os

import pytest

import mica.fast

mica.fast.enable(lora=os.environ["CONFORMANCE_MODE"] == "with lora=True")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = mica.fast.call_counts.total()
    try:
        return (yield)
    finally:
        item.user_properties.append(("calls", mica.fast.call_counts.total() - before))  # in the report
