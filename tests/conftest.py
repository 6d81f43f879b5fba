"""CPU, 8 virtual devices, no silent rank promotion, shapes checked by jaxtyping and beartype, warnings are errors."""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # files compile the same small programs

# Servers of tests are on this machine, and no proxy knows of them.
for _name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxtyping import install_import_hook

# The hook re-writes modules as they are imported: nothing of dno_jax may have been imported yet.
assert not [name for name in sys.modules if name.split(".")[0] == "dno_jax"]
install_import_hook("dno_jax", "beartype.beartype")

import pytest

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real checkpoints and data, where they are at hand; a test that needs them is skipped visibly elsewhere."""
    if not SHARED_DATA.exists():
        pytest.skip("../shared/data is not here")
    return SHARED_DATA


@pytest.fixture(autouse=True, scope="session")
def _own_compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the user's cache alone but share one among themselves and their child processes."""
    folder = os.environ.get("DNO_TEST_CACHE") or str(tmp_path_factory.mktemp("xla"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Let go of a file's compiled programs: each takes memory maps, of which a process has some 65,000."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


@pytest.fixture
def make_config(small_folder: Path, tmp_path: Path):
    """A small configuration with a fresh run directory, changed by nested dicts."""
    from dno_jax.config import RunConfig, parse_config
    from tests.configured import deep_merge
    from tests.small import small_tree

    def make(**changes) -> RunConfig:
        tree = deep_merge(small_tree(small_folder), {"run_dir": str(tmp_path / "run"), **changes})
        return parse_config(RunConfig, tree, place="test")

    return make
