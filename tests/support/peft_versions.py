"""Tests of what only newer versions of the supported range of PEFT can do."""

import peft
import pytest
from packaging.version import Version


def is_at_least(version: str) -> bool:
    return Version(peft.__version__) >= Version(version)


def needs_peft(version: str, reason: str):
    """Skips a test under older versions; ``reason`` says what those lack."""
    return pytest.mark.skipif(not is_at_least(version), reason=f"PEFT < {version}: {reason}")
