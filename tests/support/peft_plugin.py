"""pytest plugin for PEFT's own test-suite: the backend is imported first, and its calls are printed."""

import mica.fast


def pytest_terminal_summary(terminalreporter):
    counts = ", ".join(f"{name} {count}" for name, count in sorted(mica.fast.call_counts.items())) or "none"
    terminalreporter.write_line(f"calls of mica's operators: {counts}")
