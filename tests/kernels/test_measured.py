"""The file of what was measured on GPUs: read as it was written, and readable."""

from importlib.util import module_from_spec, spec_from_file_location

from mica.kernels import configs, measured
from mica.kernels.measured import Measured

DEVICES = {
    "a card": Measured(
        {"forms": "a.json", "layer": "b.json"}, ((8192, 16, "fused", "split"), (1, 4, "split", "mixed"))
    ),
    "B 200": Measured({"layer": "c.json"}, (), 2**31),
}


def test_it_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "measured.json"
    for devices in ({}, DEVICES):
        measured.write(devices, file)
        assert measured.read(file) == devices
    lines = file.read_text(encoding="utf-8").splitlines()
    assert '      [8192, 16, "fused", "split"],' in lines
    assert lines.index('  "B 200": {') < lines.index('  "a card": {')
    text = file.read_text(encoding="utf-8")
    measured.write(measured.read(file), file)
    assert file.read_text(encoding="utf-8") == text


def test_the_committed_file_is_as_it_would_be_written(tmp_path):
    file = tmp_path / "measured.json"
    measured.write(measured.read(), file)
    assert file.read_text(encoding="utf-8") == measured.FILE.read_text(encoding="utf-8")


def test_measured_rows_and_bounds_are_those_of_their_device(monkeypatch):
    """In a second copy of the module, imported where these devices were measured."""
    monkeypatch.setattr(measured, "read", lambda: DEVICES)
    spec = spec_from_file_location("configs_again", configs.__file__)
    again = module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.forms_of("a card", "sm_90", 9000, 16)[2:] == ("fused", "split", "measured")
    assert again.forms_of("a card", "sm_90", 5, 4)[2:] == ("split", "mixed", "measured")
    assert again.forms_of("a card", "sm_90", 9000, 128) == again.UNMEASURED
    assert again.forms_of("B 200", "sm_100", 9000, 128)[2:] == ("mixed", "mixed", "guess")
    assert again.host_bound_of("B 200") == 2**31
    assert again.host_bound_of("a card") == again.HOST_BOUND
