"""Event files that TensorBoard reads, without a thread."""

import struct
import threading

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dno_jax.errors import DnoError
from dno_jax.run_dir import RunDir
from dno_jax.tracker import tensorboard as module
from dno_jax.tracker.tensorboard import Board


def events(folder):
    """Read TFRecords: a length, its checksum, so many bytes, their checksum."""
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_what_is_written_is_read_and_no_thread_is_left(tmp_path):
    folder = RunDir(tmp_path).tensorboard_path / "train_000"
    before = threading.active_count()
    board = Board(folder, first_step=3)
    board.write(3, {"train/loss": 0.5, "train/kl": 2.0})
    board.write(4, {"train/loss": float("nan")})
    assert threading.active_count() == before
    board.close()
    version, begun, third, fourth = events(folder)
    assert version.file_version == "brain.Event:2"
    assert (begun.step, begun.session_log.status) == (3, SessionLog.START)  # later steps of older files are hidden
    assert third.step == 3
    assert {value.tag: value.simple_value for value in third.summary.value} == {"train/loss": 0.5, "train/kl": 2.0}
    assert fourth.summary.value[0].simple_value != fourth.summary.value[0].simple_value


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    board = Board(RunDir(tmp_path).tensorboard_path, first_step=0)
    monkeypatch.setattr(module, "_FLUSH_SECONDS", -1.0)

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board._file, "flush", full)
    with pytest.raises(DnoError, match="tensorboard: cannot be written"):
        board.write(0, {"loss": 1.0})
    monkeypatch.undo()
    board.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(DnoError, match="tensorboard/train_000: cannot be written"):
        Board(RunDir(tmp_path).tensorboard_path / "train_000", first_step=0)
