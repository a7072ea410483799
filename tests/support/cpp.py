"""What needs the C++."""

import pytest

from mica import native

needs_cpp = pytest.mark.skipif(native.module() is None, reason=str(native.why_not()))
