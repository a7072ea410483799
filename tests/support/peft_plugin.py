"""pytest plugin for PEFT's own tests: the backend is imported first, and its calls are counted in each."""

import os

import pytest

import mica.fast

mica.fast.enable(lora=os.environ["CONFORMANCE_MODE"] == "with lora=True")


def _calls() -> int:
    return sum(mica.fast.call_counts.values())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = _calls()
    try:
        return (yield)
    finally:
        item.user_properties.append(("calls", _calls() - before))  # a property of the test in the report
