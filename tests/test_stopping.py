"""Signals of a process: what is under way ends by itself, or not at all; nothing lasts beyond the grace."""

import signal
import subprocess
import sys
import time

import pytest

BEGIN = """
import os, signal, sys, threading, time
from dno_jax import stopping
from dno_jax.cli import main as cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored

def at_work():
    print("at work", flush=True)

@cli.app.command()
def work():
"""
ENDS = """
    at_work()
    while True: time.sleep(60)
"""
FINISHES = """
    with stopping.finishing():
        at_work()
        while not stopping.asked(): time.sleep(0.01)
        print("saved", flush=True)
    print("never here", flush=True)
"""
STUCK = """
    stopping.allow({grace})
    with stopping.finishing():
        at_work()
        time.sleep(600)
"""
DEAF = """
    import ctypes
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    stopping.allow({grace})
    threading.Timer(0.3, at_work).start()
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # in a library, for ever: Python's own handlers never run
"""
ASYNC = """
    import asyncio
    async def ask():
        at_work()
        try:
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.01)
            print("stored", flush=True)
    asyncio.run(ask())
"""
TALKS = """
    with stopping.conversing():
        for turn in range(2):
            try:
                if not turn: at_work()
                time.sleep(60)
            except KeyboardInterrupt: print("heard", flush=True)
    print(stopping.asked(), flush=True)
"""
SWALLOWED = """
    from dno_jax.parallel import cluster
    try:
        at_work()
        time.sleep(60)
    except BaseException: pass  # as some library may
    print("whole", flush=True)
    cluster.wait_until(lambda: True)
    print("never here", flush=True)
"""
DROPPED = """
    import ctypes
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    class Last:
        def __del__(self):  # what is raised here, Python drops
            library.pthread_mutex_lock(mutex)
            threading.Timer(0.3, at_work).start()
            threading.Timer(1.8, library.pthread_mutex_unlock, [mutex]).start()
            library.pthread_mutex_lock(mutex)  # longer than two signals are taken for one request
            time.sleep(60)
    try:
        Last()
        while True: time.sleep(60)
    finally: print("saved", flush=True)
"""
STOPPED = "dno: stopped by SIGTERM; the same command goes on from what is saved\n"
END = """
sys.argv = ["dno", "work"]
cli.main()
"""


class Working:
    """A command that has begun."""

    def __init__(self, body: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN + body + END], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "at work\n"

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        assert "Traceback" not in err
        return self.process.returncode, out, err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize(("body", "said"), [(ENDS, ""), (FINISHES, "saved\n"), (ASYNC, "stored\n")])
def test_a_signal_ends_the_command_by_its_status(number, status, body, said):
    working = Working(body)
    working.send(number)
    assert working.ended()[:2] == (status, said)


IGNORES = "\n    signal.signal(signal.SIGINT, signal.SIG_IGN)"


@pytest.mark.parametrize("body", [ENDS, FINISHES])
def test_who_ignores_ctrl_c_still_heeds_sigterm(body):
    working = Working(IGNORES + body)
    working.send(signal.SIGINT)
    time.sleep(0.1)
    assert working.process.poll() is None
    working.send(signal.SIGTERM)
    assert working.ended()[0] == 75


@pytest.mark.parametrize(("before", "number", "status"), [("", signal.SIGINT, 130), (IGNORES, signal.SIGTERM, 75)])
def test_an_interrupt_that_python_drops_is_sent_again_and_is_no_second_request(before, number, status):
    working = Working(before + DROPPED)
    working.send(number)
    assert working.ended() == (status, "saved\n", "" if status == 130 else STOPPED)


def test_an_interrupt_that_a_library_swallows_ends_the_command_where_its_work_is_whole():
    working = Working(SWALLOWED)
    working.send(signal.SIGTERM)
    assert working.ended()[:2] == (75, "whole\n")


@pytest.mark.parametrize("body", [STUCK, DEAF])
def test_nothing_lasts_beyond_the_grace(body):
    working = Working(body.format(grace=0.2))
    working.send(signal.SIGTERM)
    status, _, said = working.ended()
    assert status == 75
    assert "grace_seconds" in said


def test_a_second_signal_ends_at_once_and_an_echo_of_the_first_does_not():
    working = Working(STUCK.format(grace=600))
    working.send(signal.SIGTERM)
    time.sleep(0.1)
    working.send(signal.SIGTERM)  # launchers send it by several ways
    working.send(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        working.process.wait(1.2)
    working.send(signal.SIGINT)
    status, _, said = working.ended()
    assert status == 75  # what it was asked first
    assert "a second time" in said


def test_a_conversation_keeps_its_ctrl_c():
    working = Working(TALKS)
    for _ in range(2):
        working.send(signal.SIGINT)
        assert working.process.stdout.readline() == "heard\n"
        time.sleep(1.1)  # or they would be one request
    assert working.process.stdout.readline() == "False\n"  # it may have come with the line before
    assert working.ended()[0] == 0
