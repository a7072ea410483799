"""Functions that replace one of PEFT's and get it as their first argument."""

from __future__ import annotations

from collections.abc import Callable

from mica.fast.settings import settings


def around(function: Callable) -> Callable:
    """``function(stock, *args, **kwargs)`` as a patch: stock -> its replacement."""

    def patch(stock):
        def replacement(*args, **kwargs):
            return function(stock, *args, **kwargs)

        return replacement

    return patch


def while_enabled(function: Callable) -> Callable:
    """`around`, but stock alone while the backend is disabled."""

    def patch(stock):
        def replacement(*args, **kwargs):
            if not settings.enabled:
                return stock(*args, **kwargs)
            return function(stock, *args, **kwargs)

        return replacement

    return patch
