"""CPU, 8 virtual devices, no silent rank promotion, shapes checked by jaxtyping and beartype, warnings are errors."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # files compile the same small programs

# Most of the suite's time would go into machine code of programs that run once, so LLVM's optimisations are left out,
# and kernels are emitted the older way where XLA still has it. XLA's other passes (partitioning, fusion, buffers) stay
# as they are. DNO_TEST_OPTIMISED=1 compiles as users do; `make soak` sets it.
if os.environ.get("DNO_TEST_OPTIMISED", "0") == "0":
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if version("jaxlib").startswith("0.10."):  # XLA ends a process that is given a flag unknown to it
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

# Servers of tests are on this machine, and no proxy knows of them.
for _name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxtyping import install_import_hook

import tests.typechecked  # noqa: F401  (what the hook looks up by its name)

# The hook re-writes modules as they are imported: nothing of dno_jax may have been imported yet.
assert not [name for name in sys.modules if name.split(".")[0] == "dno_jax"]
install_import_hook("dno_jax", "tests.typechecked.check")

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


# What needs programs of XLA is marked `compiles`: whole rooms, but for what is on the host side alone.
COMPILING = ("end_to_end", "losses", "model", "parallel", "plan", "runtime", "sampling", "stages")
COMPILING += ("training", "test_logprobs.py", "games/test_sampled_games.py", "annotation/test_embedded.py")
COMPILING += ("report/test_verify.py", "test_smoke.py")
HOST_SIDE = ("model/text", "model/test_family_configs.py", "stages/test_pair.py", "sampling/test_stops.py")
HOST_SIDE += ("training/test_batches.py", "stages/test_answers.py")
HOST_SIDE += ("model/test_as_brought.py", "model/test_hub.py", "model/test_rewritten.py")
HOST_SIDE += ("stages/test_judged_answers.py", "stages/test_two_policies.py", "parallel/test_launchers.py")
HOST_SIDE += ("parallel/test_relay.py",)
HOST_SIDE += (
    "stages/test_suites.py",
    "stages/test_compare.py",
    "stages/test_labels.py",
    "stages/test_exports.py",
    "stages/test_arena_hard.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what compiles, and let it come first: what is quick then fills up the workers at the end."""
    for item in items:
        path = item.path.relative_to(TESTS)
        names = {str(path), *map(str, path.parents)}
        if names.intersection(COMPILING) and not names.intersection(HOST_SIDE):
            item.add_marker("compiles")
    items.sort(key=lambda item: item.get_closest_marker("compiles") is None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real checkpoints and data, where they are at hand; a test that needs them is skipped visibly elsewhere."""
    if not SHARED_DATA.exists():
        pytest.skip("../shared/data is not here")
    return SHARED_DATA


@pytest.fixture(autouse=True, scope="session")
def _short_pause_before_asking_once_more() -> None:
    from dno_jax.annotation import late

    late.PAUSE_SECONDS = 0.05


@pytest.fixture(autouse=True, scope="session")
def _own_compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the user's cache alone but share one among themselves, all workers and their child processes."""
    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's folder is in that of the whole run
        run = run.parent
    folder = os.environ.get("DNO_TEST_CACHE") or str(run / "xla")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.fixture(scope="module", autouse=True)
def _plots_where_they_are_looked_at(request: pytest.FixtureRequest):
    """Every stage of every small run writes a report; its plots are drawn in their own room alone."""
    if request.path.parent.name == "report":
        yield
        return
    from dno_jax.report import plots

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "installed", lambda: False)
        yield


# Their programs run for longer than they take to compile.
OPTIMISED = ("games/test_sampled_games.py", "training/test_torch_parity.py", "sampling/test_transforms.py")
OPTIMISED += ("end_to_end/test_cyclic_game.py", "end_to_end/test_reward_recipe.py")


@pytest.fixture(scope="module", autouse=True)
def _optimised_where_it_pays(request: pytest.FixtureRequest):
    """Compile as users do in the files that run long."""
    before = jax.config.read("jax_disable_most_optimizations")
    if str(request.path.relative_to(TESTS)) in OPTIMISED:
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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
