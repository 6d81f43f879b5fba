"""The line to the coordinator: what goes over it, and what jax's side sees of its end."""

import socket
import threading

import pytest

from dno_jax.parallel.relay import Relay


@pytest.fixture
def line():
    """A relay, jax's end of a line, and the coordinator's."""
    with socket.create_server(("127.0.0.1", 0)) as coordinator:
        relay = Relay(f"127.0.0.1:{coordinator.getsockname()[1]}")
        host, port = relay.address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=10) as near, coordinator.accept()[0] as far:
            far.settimeout(10)
            yield relay, near, far


def exactly(line, count):
    said = b""
    while len(said) < count:
        said += line.recv(count - len(said))
    return said


def test_all_that_is_said_arrives_in_both_directions_at_once(line):
    relay, near, far = line
    asked, answered = bytes(range(256)) * 4096, b"answer" * 200_000  # more than any buffer of the way
    senders = [threading.Thread(target=end.sendall, args=(said,)) for end, said in ((near, asked), (far, answered))]
    for sender in senders:
        sender.start()
    assert exactly(far, 1000) == asked[:1000]
    heard = []
    reader = threading.Thread(target=lambda: heard.append(exactly(near, len(answered))))
    reader.start()
    assert exactly(far, len(asked) - 1000) == asked[1000:]
    for thread in (*senders, reader):
        thread.join(10)
    assert heard == [answered]
    assert not relay.gone.is_set()


def test_the_coordinators_end_is_noted_and_jaxs_side_stays_open(line):
    relay, near, far = line
    far.sendall(b"last words")
    far.close()
    assert exactly(near, 10) == b"last words"
    assert relay.gone.wait(10)
    near.settimeout(0.2)
    with pytest.raises(TimeoutError):
        near.recv(1)


def test_a_line_that_jax_itself_closes_is_no_end(line):
    relay, near, far = line
    near.close()
    assert far.recv(1) == b""
    far.close()
    assert not relay.gone.wait(0.2)


def test_the_coordinator_may_come_later():
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))  # not yet listening: refused
        relay = Relay(f"127.0.0.1:{late.getsockname()[1]}")
        host, port = relay.address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=10) as near:
            near.sendall(b"hello")
            late.listen()
            with late.accept()[0] as far:
                assert exactly(far, 5) == b"hello"
                assert not relay.gone.is_set()
