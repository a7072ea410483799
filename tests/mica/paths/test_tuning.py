"""Measuring which form is the fastest, with a clock that the test winds, and the files that keep it."""

import itertools
import json
import threading
import warnings

import pytest
import torch

from mica.paths import choose, tuning
from mica.paths.tuning import CALLS, NATIVE, REFERENCE, ROUNDS, Kind, Layer, Part

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
KIND = Kind(False, (BF16, BF16, FP32, FP32), 16, 32, 48, 64, has_dropout=False, is_aligned=True)
OTHER = KIND._replace(trains_B=True, tokens=128)
FORWARD, BACKWARD = Part("split", {"reference": 120.0, "split": 60.0}), Part("reference", {"reference": 9.0})
LAYER = Layer(FORWARD, BACKWARD, "2026-12-01")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MICA_TUNE", str(tmp_path / "tuning"))
    tuning.clear()
    yield tmp_path / "tuning"
    tuning.clear()


# -- the clock ---------------------------------------------------------------------------------------


class Clock:
    """Seconds pass only in calls: ``costs`` are those of each round in turn."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(tuning, "clock", lambda: self.now)

    def call(self, form, costs, result=1.0):
        is_compared = form == REFERENCE  # by a call of its own
        calls = itertools.count(-tuning.UNTIMED - is_compared)

        def run():
            number = next(calls)
            if number >= 0:
                self.now += costs[number // (CALLS + 1) % len(costs)]
            if callable(result):
                return [result(number)]
            return [torch.full((3,), result)]

        return run

    def rounds(self, left_out=None, tolerance=1e-2, **forms):
        out = {} if left_out is None else left_out
        calls = {form: self.call(form, *arguments) for form, arguments in forms.items()}

        def leave_out(form, error):
            out[form] = str(error)

        return tuning.timed(calls, tolerance, lambda: None, leave_out)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


STEADY = [10.0] * ROUNDS


@pytest.mark.parametrize(
    ("split", "fused", "expected"),
    [
        ([9.0], [11.0], "split"),
        ([9.0], [8.0], "fused"),
        ([8.0], [9.0], "split"),
        ([11.0], [12.0], REFERENCE),
        ([9.9], [11.0], REFERENCE),  # less than the margin
        ([8.0, 8.0, 8.0, 8.0, 30.0], [11.0], "split"),  # one slow moment
        ([8.0, 8.0, 8.0, 12.0, 12.0], [11.0], REFERENCE),  # too much noise to tell
        ([8.0, 8.0, 8.0, 12.0, 12.0], [9.0], "fused"),  # certain, though not the lowest median
    ],
)
def test_a_form_is_taken_if_it_is_faster_by_more_than_the_noise(clock, split, fused, expected):
    rounds = clock.rounds(reference=(STEADY,), split=(split,), fused=(fused,))
    assert {form: len(seconds) for form, seconds in rounds.items()} == dict.fromkeys(rounds, ROUNDS)
    assert tuning.fastest(rounds) == expected


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ([10.0, 10.0, 10.0, 10.0, 5.0], "split"),  # one fast moment of the reference
        ([10.0, 10.0, 10.0, 5.0, 5.0], REFERENCE),
    ],
)
def test_the_noise_of_the_reference_counts_too(clock, reference, expected):
    assert tuning.fastest(clock.rounds(reference=(reference,), split=([9.0],))) == expected


@pytest.mark.parametrize(
    ("forward", "backward", "native", "expected"),
    [
        (8.0, 8.0, 9.0, ("split", "split")),
        (8.0, 11.0, 9.5, ("split", REFERENCE)),  # 8 + 10 from Python, 19 from C++
        (8.0, 11.0, 8.5, (REFERENCE, REFERENCE)),
        (11.0, 8.0, 9.5, (REFERENCE, "split")),
        (8.0, 8.0, 8.0, (REFERENCE, REFERENCE)),
        (11.0, 11.0, 20.0, (REFERENCE, REFERENCE)),
        (8.0, 8.0, None, ("split", "split")),  # there is no C++
    ],
)
def test_the_passes_are_apart_but_c_plus_plus_has_both(clock, forward, backward, native, expected):
    cpp = {} if native is None else {NATIVE: ([native],)}
    both = [clock.rounds(reference=(STEADY,), **cpp, split=([cost],)) for cost in (forward, backward)]
    parts = tuning.chosen(*both)
    assert tuple(part.form for part in parts) == expected
    assert parts[0].microseconds["split"] == 1e6 * forward


def raising(when, error):
    def result(number):
        if number >= when:
            raise error
        return torch.ones(3)

    return result


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (1.005, None),
        (1.02, "its result is off by 2.0e-02, more than 0.01"),
        (torch.nan, "its result is off by nan"),
        (lambda number: torch.ones(2), "must match the size"),
        (raising(-tuning.UNTIMED, RuntimeError("no such kernel")), "no such kernel"),
        (raising(5, RuntimeError("later")), "later"),
        (raising(-1, torch.OutOfMemoryError("no memory")), "no memory"),
    ],
)
def test_a_form_that_raises_or_lies_is_out(clock, result, reason):
    out = {}
    rounds = clock.rounds(out, reference=(STEADY,), split=([1.0], result), fused=([9.0],))
    assert tuning.fastest(rounds) == ("fused" if reason else "split")
    assert ("split" in rounds) == (reason is None)
    assert reason is None or reason in out.pop("split")
    assert out == {}


def test_what_the_reference_raises_is_raised(clock):
    for when in (-tuning.UNTIMED, 3):
        with pytest.raises(torch.OutOfMemoryError):
            clock.rounds(reference=(STEADY, raising(when, torch.OutOfMemoryError())), split=([1.0],))


def test_a_call_is_timed_back_to_back_with_one_wait_at_the_end(clock):
    events = []
    rounds = tuning.timed(
        {REFERENCE: lambda: events.append("call") or []}, 1e-2, lambda: events.append("wait"), None
    )
    untimed = ["call"] * (tuning.UNTIMED + 1)  # one for the result to compare with
    assert events == untimed + (["call", "wait", *["call"] * CALLS, "wait"]) * ROUNDS
    assert rounds == {REFERENCE: [0.0] * ROUNDS}


@pytest.mark.parametrize(
    ("changes", "forms"),
    [
        ({}, "split first mixed fused"),
        ({"is_aligned": False}, "split first mixed"),
        ({"has_dropout": True}, "split fused"),
        ({"rank": 24}, "split first fused"),  # which is padded
        ({"dtypes": (BF16,) * 4}, "split first mixed fused"),
        ({"dtypes": (FP32,) * 4}, "split fused"),
        ({"dtypes": (BF16, *(FP32,) * 3)}, "split fused"),
        ({"dtypes": (torch.float16, BF16, FP32, FP32)}, "split fused"),
    ],
)
def test_the_forms_that_a_kind_of_layer_can_have(changes, forms):
    assert tuning.forms_of(KIND._replace(**changes)) == forms.split()


# -- what is known -----------------------------------------------------------------------------------


def other_process():
    """As another process sees it."""
    tuning.clear()
    return tuning.table(CPU)


def settled(home, *kinds):
    """The file in which so much is known, by default of `KIND`."""
    for kind in kinds or (KIND,):
        tuning.table(CPU).settle(kind, LAYER)
    (file,) = home.glob("*.json")
    return file


def test_what_was_settled_is_known_to_the_next_process(home, monkeypatch):
    table = tuning.table(CPU)
    assert table.find(KIND) is None
    table.settle(KIND, LAYER)
    table.settle(OTHER, LAYER._replace(day=""))  # not measured well enough to last
    assert table.find(KIND) == table.find(OTHER)._replace(day=LAYER.day) == LAYER
    stored = other_process()
    assert stored.stored == {str(KIND): LAYER._replace(is_settled=False)}
    (file,) = home.glob("*.json")
    assert {path.suffix for path in home.iterdir()} <= {".json", ".lock"}  # and nothing temporary
    with monkeypatch.context() as patch:  # its folder may be read-only
        patch.setattr(tuning.filelock, "FileLock", pytest.fail)
        stored.settle(KIND, stored.find(KIND))
    assert stored.find(KIND) == LAYER
    with file.open(encoding="utf-8") as opened:  # by who reads at this moment
        stored.settle(KIND._replace(rank=8), LAYER)
        assert [*json.load(opened)["layers"]] == [str(KIND)]
    assert torch.__version__ in file.name
    text = file.read_text(encoding="utf-8")
    assert '"split": 60.0' in text
    assert f'"{KIND}"' in text


@pytest.mark.parametrize("damage", ["half", "other", "list", "binary"])
def test_a_file_that_cannot_be_believed_is_measured_anew(home, damage):
    file = settled(home)
    content = file.read_text(encoding="utf-8")
    damaged = {
        "half": content[: len(content) // 2],
        "other": content.replace(torch.__version__, "0.1"),
        "list": "[]",
        "binary": "\udcff",
    }[damage]
    file.write_text(damaged, encoding="utf-8", errors="surrogateescape")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        table = other_process()
    assert table.stored == {}
    assert ["it is damaged" in str(each.message) for each in warned] == [True] * (damage != "other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table.settle(OTHER, LAYER)
    assert [*other_process().stored] == [str(OTHER)]


# What the record of an unaligned layer has instead, in its forward or itself
DAMAGE = """
{"form": ["split"]}
{"form": "first"}
{"form": "fused", "microseconds": {"reference": 2.0, "fused": 1.0}}
{"form": "C++", "microseconds": {"reference": 2.0, "C++": 1.0}}
{"microseconds": {"split": 60.0}}
{"microseconds": [120.0, 60.0]}
{"microseconds": {"reference": 0.0, "split": 60.0}}
{"microseconds": {"reference": NaN, "split": 60.0}}
{"microseconds": {"reference": 120.0, "split": Infinity}}
{"microseconds": {"reference": 120.0, "split": "60"}}
{"more": 1}
{"day": 1}
""".strip().splitlines()


@pytest.mark.parametrize("changes", DAMAGE)
def test_a_record_is_whole_or_ignored_and_replaced(home, changes):
    kind = KIND._replace(is_aligned=False)
    file = settled(home, kind, OTHER)
    content = json.loads(file.read_text(encoding="utf-8"))
    record = content["layers"][str(kind)]
    changed = record if "day" in changes else record["forward"]
    changed |= json.loads(changes)
    file.write_text(json.dumps(content), encoding="utf-8")
    table = other_process()
    assert (table.find(kind), table.find(OTHER).forward) == (None, FORWARD)
    table.settle(kind, LAYER)
    assert other_process().find(kind).forward == FORWARD


def test_of_two_processes_that_write_at_once_neither_loses(monkeypatch):
    """The second settles after the first has read the file, and before it writes."""
    first, second = other_process(), other_process()
    other = threading.Thread(target=second.settle, args=(OTHER, LAYER))
    content = tuning._content

    def beside(layers):
        if other.ident is None:
            other.start()
            other.join(timeout=0.2)  # it waits for the lock
        return content(layers)

    monkeypatch.setattr(tuning, "_content", beside)
    first.settle(KIND, LAYER)
    other.join()
    assert other_process().stored.keys() == {str(KIND), str(OTHER)}


def test_of_two_processes_the_first_to_write_stays(home):
    first, second = other_process(), other_process()
    first.settle(KIND, LAYER)
    second.settle(KIND, LAYER._replace(forward=Part("fused")))
    second.settle(OTHER, LAYER)
    assert first.find(KIND).forward.form == "split"
    assert second.find(KIND).forward.form == "fused"  # all calls of a process run one form
    third = other_process()
    assert third.find(KIND).forward.form == "split"
    assert third.find(OTHER) is not None


def test_a_home_that_cannot_be_written_to_costs_a_warning(home):
    home.write_text("a file, where a folder should be")
    table = tuning.table(CPU)
    with pytest.warns(UserWarning, match="so the next process measures it again: "):
        table.settle(KIND, LAYER)
    assert table.find(KIND) == LAYER
    assert other_process().find(KIND) is None


@pytest.mark.parametrize("value", ["again", " AGAIN "])
def test_again_forgets(monkeypatch, tmp_path, value):
    monkeypatch.setattr(tuning.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setenv("MICA_TUNE", "1")
    other_process().settle(KIND, LAYER)
    assert other_process().find(KIND) is not None
    (file,) = (tmp_path / "mica" / "tuning").glob("*.json")
    monkeypatch.setenv("MICA_TUNE", value)
    table = other_process()
    assert table.find(KIND) is None
    assert not file.exists()
    table.settle(OTHER, LAYER)
    monkeypatch.delenv("MICA_TUNE")
    assert [*other_process().stored] == [str(OTHER)]


@pytest.mark.parametrize("value", ["0", "off", "no"])
def test_switched_off_it_knows_nothing(monkeypatch, tmp_path, value):
    monkeypatch.setattr(tuning.constants, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("MICA_TUNE")
    other_process().settle(KIND, LAYER)
    monkeypatch.setenv("MICA_TUNE", value)
    assert other_process().find(KIND) is None
    torch.use_deterministic_algorithms(False)
    assert tuning.why_not_now(CPU) == f"MICA_TUNE={value}"


def test_when_nothing_is_measured(monkeypatch):
    assert tuning.why_not_now(CPU) == "nothing is measured in a deterministic run"
    torch.use_deterministic_algorithms(False)
    assert tuning.why_not_now(CPU) is None
    within = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: within.append(tuning.why_not_now(CPU)))
    y.backward()
    assert within == ["nothing is measured within a backward"]
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert tuning.why_not_now(CPU) == "nothing is measured while saved-tensor hooks are disabled"
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(tuning, "device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.why_not_now(gpu) == "nothing is measured while a CUDA graph is captured"


def test_choose_forgets_with_the_rest(home):
    file = settled(home)
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "layers": {}}), encoding="utf-8")
    choose.clear()
    assert tuning.table(CPU).find(KIND) is None


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (4097, 8192)])
def test_tokens_are_rounded_up(tokens, expected):
    assert tuning.rounded_up(tokens) == expected


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (FORWARD, "split, 2.00 times as fast as the reference path"),
        (Part("split", {"reference": 99.0, "C++": 66.0, "split": 60.0}), "split, 1.10 times as fast as the"),
        (Part("reference", {"reference": 50.0, "split": 60.0}), "reference, 1.20 times as fast as kernels"),
        (Part("reference", {"reference": 50.0}), "reference, as no form on kernels can run"),
        (Part("split"), "split"),
    ],
)
def test_a_part_in_words(part, text):
    assert part.found().startswith(text)
    assert str(part) == (f"measured here: {part.found()}" if part.microseconds else "not measured")
    assert str(KIND) == "48 x 32, up to 64 tokens, MiCA, r = 16, bfloat16, bfloat16, float32, float32"
    assert str(OTHER._replace(has_dropout=True, is_aligned=False)).endswith("float32, dropout, unaligned")
