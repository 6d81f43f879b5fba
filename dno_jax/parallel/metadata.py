"""What the metadata server of a Cloud TPU VM says of it. Nothing here imports jax."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request

from dno_jax.errors import DnoError
from dno_jax.parallel.launchers import FLAGS, Environment, Metadata

_TRIES, _PAUSE_SECONDS = 3, 1.0  # the server starts with the machine


def metadata_of(environment: Environment, *, tpu_chips: int) -> Metadata | None:
    """Return the reader of a TPU VM's metadata; None on a machine that has no TPU and names no such server."""
    host = environment.get("GCE_METADATA_IP") or environment.get("GCE_METADATA_HOST")
    if host is None and (not tpu_chips or "TPU_SKIP_MDS_QUERY" in environment or _wants_cpu(environment)):
        return None
    return lambda name: _attribute(host or "metadata.google.internal", name, sure=bool(tpu_chips))


def _wants_cpu(environment: Environment) -> bool:
    return environment.get("JAX_PLATFORMS", "").strip() == "cpu"


def _attribute(host: str, name: str, *, sure: bool) -> str | None:
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine's
    error: Exception | None = None
    for attempt in range(_TRIES):
        if attempt and sure:
            time.sleep(_PAUSE_SECONDS)
        try:
            with opener.open(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5.0) as reply:
                return reply.read().decode(errors="replace")
        except urllib.error.HTTPError as refused:
            refused.close()
            if refused.code == 404:
                return None
            error = refused
        except (OSError, http.client.HTTPException) as failed:
            error = failed
    if not sure:
        return None
    raise DnoError(
        f"this machine has TPUs, and its metadata server does not say which host of them it is ({error}); give {FLAGS}"
    )
