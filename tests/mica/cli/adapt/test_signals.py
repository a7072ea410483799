"""Signals that this process sends to itself."""

import os
import signal
import threading

import pytest

from mica.cli.adapt import signals
from mica.cli.adapt.signals import Request

INT, TERM = signals.SIGNALS


def send(*signums):
    for signum in signums:
        os.kill(os.getpid(), signum)  # Python runs the handler before the call returns to bytecode


@pytest.fixture(autouse=True)
def _handlers_are_restored():
    before = [signal.getsignal(signum) for signum in signals.SIGNALS]
    yield
    assert [signal.getsignal(signum) for signum in signals.SIGNALS] == before


def test_at_once():
    with pytest.raises(SystemExit) as stopped, signals.at_once():
        send(TERM)
    assert stopped.value.code == 143 == signals.status("SIGTERM")
    with pytest.raises(KeyboardInterrupt), signals.at_once():
        send(INT)
    assert signals.status("SIGINT") == 130


@pytest.mark.parametrize("speaks", [True, False])
def test_a_request_is_noted_once_and_announced_once(speaks, capfd):
    request = Request(alone=False, speaks=speaks)
    with signals.at_once():
        with request.heeded():
            assert request.signum == 0
            send(TERM, INT, INT, TERM)
        with pytest.raises(SystemExit):  # as it was before
            send(TERM)
    assert request.signum == TERM
    said = "\nmica adapt: SIGTERM: finishing this step and saving a checkpoint\n"
    assert capfd.readouterr().err == said * speaks


def test_a_second_ctrl_c_stops_at_once_but_no_second_sigterm(capfd):
    request = Request(alone=True, speaks=True)
    with request.heeded():
        send(INT, TERM)
        with pytest.raises(KeyboardInterrupt):
            send(INT)
    assert request.signum == INT
    assert capfd.readouterr().err.endswith("; Ctrl-C again stops at once\n")


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(INT, signal.SIG_IGN)  # nohup does so
    try:
        request = Request(alone=True, speaks=True)
        with request.heeded():
            send(INT)
        assert request.signum == 0
    finally:
        signal.signal(INT, before)


def test_in_another_thread_nothing_is_changed():
    done = []

    def work():
        with signals.at_once():  # which raises ValueError, were it to set a handler
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
