"""What a store refuses, or does not answer: one sentence with the URL and the fix, and no key in it."""

import errno
import os
import sys

import pytest

from dno_jax.bucket import store
from dno_jax.bucket.place import read_url
from dno_jax.bucket.store import Store, Unreachable
from dno_jax.bucket.work import Bucket
from dno_jax.errors import DnoError

URL = "memory://pail/runs/mine"


def theirs(name, module):
    """An exception as a library of that name has them."""
    return type(name, (Exception,), {"__module__": module})


@pytest.fixture
def kept(bucket, machine, monkeypatch):
    monkeypatch.setattr(store.time, "sleep", lambda seconds: None)
    return Store(read_url(URL))


def failing(kept, monkeypatch, method, *errors):
    """Have the file system fail so often, and then do as it should; count the calls."""
    left, original, calls = list(errors), getattr(type(kept._fs), method), []

    def call(self, *arguments, **options):
        calls.append(arguments)
        if left:
            raise left.pop(0)
        return original(self, *arguments, **options)

    monkeypatch.setattr(type(kept._fs), method, call)
    return calls


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("Access Denied"),
        OSError("Forbidden: https://storage/b/pail\nme@x does not have storage.objects.create access"),
        theirs("NoCredentialsError", "botocore.exceptions")("Unable to locate credentials"),
        theirs("RefreshError", "google.auth.exceptions")("invalid_grant: Bad Request"),
        theirs("HttpError", "gcsfs.retry")("Invalid Credentials, 401"),
        theirs("ClientError", "botocore.exceptions")("An error occurred (ExpiredToken) when calling PutObject"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_refused_is_said_at_once(kept, monkeypatch, error):
    calls = failing(kept, monkeypatch, "pipe_file", error)
    with pytest.raises(DnoError, match=rf"run_dir {URL}: may not write a ") as caught:
        kept.write("a", b"1")
    assert not isinstance(caught.value, Unreachable)
    assert len(calls) == 1


def test_a_run_without_permission_ends_before_it_works(bucket, machine, monkeypatch):
    one = Bucket.of(URL)
    failing(one._mirror.store, monkeypatch, "pipe_file", *[PermissionError("Access Denied")] * 9)
    with pytest.raises(DnoError, match="may not write"), one.working(weights=True):
        raise AssertionError("let in")


def test_a_bucket_that_is_not_there_is_named(kept, monkeypatch):
    failing(kept, monkeypatch, "pipe_file", FileNotFoundError("The specified bucket does not exist"))
    with pytest.raises(DnoError, match=rf"run_dir {URL}: there is no bucket pail; make it"):
        kept.write("a", b"1")


def test_what_fails_for_a_while_is_tried_again(kept, monkeypatch):
    later = [ConnectionResetError("reset"), TimeoutError(), theirs("HttpError", "gcsfs.retry")("Backend Error, 503")]
    calls = failing(kept, monkeypatch, "cat_file", *later)
    kept.write("a", b"1")
    assert kept.read("a") == b"1"
    assert len(calls) == 4
    assert kept.read("b") is None


def test_what_never_answers_is_given_up_and_where_the_work_lies_is_said(kept, monkeypatch):
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.0)
    failing(kept, monkeypatch, "put_file", *[ConnectionRefusedError(errno.ECONNREFUSED, "refused")] * 9)
    path = kept.place.folder
    path.mkdir(parents=True)
    (path / "a").write_text("1")
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr(store.time, "monotonic", lambda: float(next(now)))
    with pytest.raises(Unreachable, match=rf"cannot be reached to write a .*it lies in {path}, and the same command"):
        kept.upload("a", path / "a")
    assert kept.sent_objects == 0


def test_no_key_is_in_what_is_said(kept, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2/hunter2")
    said = "https://store/pail/a?X-Amz-Signature=abcdef signed by hunter2/hunter2, AKIAABCDEFGHIJKLMNOP\x1b[31m"
    kept = Store(read_url(URL))
    failing(kept, monkeypatch, "cat_file", PermissionError(said))
    with pytest.raises(DnoError) as caught:
        kept.read("a")
    for part in ("hunter2", "abcdef", "AKIAABC"):
        assert part not in str(caught.value)


def test_a_full_disk_here_is_no_fault_of_the_bucket(kept, monkeypatch, tmp_path):
    failing(kept, monkeypatch, "get_file", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/a"))
    with pytest.raises(DnoError, match="see to the disk") as caught:
        kept.download("a", tmp_path / "a")
    assert not isinstance(caught.value, Unreachable)


def test_a_defect_keeps_its_traceback(kept, monkeypatch):
    failing(kept, monkeypatch, "cat_file", AttributeError("ours"))
    with pytest.raises(AttributeError):
        kept.read("a")


@pytest.mark.parametrize(("url", "extra"), [("gs://pail/run", "gcs"), ("s3://pail/run", "s3")])
def test_a_missing_extra_is_named(monkeypatch, url, extra):
    registry = pytest.importorskip("fsspec.registry")._registry
    for name in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("gs", "s3"):
        monkeypatch.delitem(registry, name, raising=False)
    with pytest.raises(DnoError, match=rf"run_dir {url}: .*pip install 'dno_jax\[{extra}\]'"):
        Store(read_url(url))
