"""Signals that this process sends to itself."""

import os
import signal
import threading

import pytest

from mica.cli.adapt import signals


def send(signum):
    os.kill(os.getpid(), signum)  # Python runs the handler before the call returns to bytecode


@pytest.fixture(autouse=True)
def _handlers_are_restored():
    before = [signal.getsignal(signum) for signum in signals.SIGNALS]
    yield
    assert [signal.getsignal(signum) for signum in signals.SIGNALS] == before


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_at_once(signum, status):
    with pytest.raises(signals.Stopped) as stopped, signals.at_once():
        send(signum)
    assert stopped.value.status == status == signals.status(signum.name)
    assert str(stopped.value) == signum.name == signals.name_of(signum)
    assert signals.name_of(0) is None


def test_a_request_is_noted_once_and_announced_once():
    said = []
    request = signals.Request(repeats_stop=False, announce=said.append)
    with signals.at_once():
        with request.heeded():
            assert request.signum == 0
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
                send(signum)
        assert (request.signum, said) == (signal.SIGTERM, ["SIGTERM"])
        with pytest.raises(signals.Stopped):  # as it was before
            send(signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once_but_no_second_sigterm():
    request = signals.Request(repeats_stop=True, announce=lambda name: None)
    with request.heeded():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        with pytest.raises(signals.Stopped) as stopped:
            send(signal.SIGINT)
    assert stopped.value.signum == signal.SIGINT
    assert request.signum == signal.SIGINT


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup does so
    try:
        request = signals.Request(repeats_stop=True, announce=lambda name: None)
        with request.heeded():
            send(signal.SIGINT)
        assert request.signum == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_changed():
    caught = []

    def work():
        try:
            with signals.at_once():
                pass
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert caught == []


def test_say_writes_past_pythons_buffers(capfd):
    signals.say("one line")
    assert capfd.readouterr().err == "\none line\n"
