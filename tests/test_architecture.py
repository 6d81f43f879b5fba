"""Who may import whom, read from the source: the folder list is the architecture only while this holds."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dno_jax"
# From the ground up. A file imports from its own room and from rooms that stand before it, on lower levels or its own.
LEVELS = [
    [
        "errors",
        "display",
        "stopping",
        "records",
        "files",
        "addresses",
        "statistics",
        "console",
        "faults",
        "keys",
        "bodies",
        "endpoint",
        "reasoning",
        "logprobs",
        "losses",
        "preferences",
    ],
    ["config", "bucket", "stage_dir", "run_dir", "model", "games"],
    ["parallel", "tracker"],
    ["sampling", "training", "annotation", "fake_judge", "evaluation", "data"],
    ["runtime"],
    ["report", "stages", "plan", "launch"],
    ["iteration", "smoke"],
    ["cli", "__main__"],
]
ORDER = [room for level in LEVELS for room in level]
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
HOST_ROOMS = ("annotation", "bucket", "config", "preferences", "fake_judge", "evaluation")
HOST_FILES = (
    "endpoint",
    "faults",
    "keys",
    "bodies",
    "display",
    "stopping",
    "records",
    "run_dir",
    "stage_dir",
    "files",
    "statistics",
    "console",
    "addresses",
    "reasoning",
)


def dotted(path):
    parts = ("dno_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path): path for path in MODULES}


def imports(path, *, typing=True):
    """Every module a file imports, anywhere in it, as dotted names; of the package, those that are files."""
    tree = ast.parse(path.read_text())
    skipped = set()
    if not typing:
        guards = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ]
        skipped = {inner for guard in guards for inner in ast.walk(guard)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in NAMES]
            yield from inner
            if len(inner) < len(node.names):
                yield node.module


def room(name):
    return name.split(".")[1]


def own_imports(path):
    return {name for name in imports(path, typing=False) if name.startswith("dno_jax.") and name in NAMES}


def tops(path):
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_rooms_before_its_own(path):
    if path == PACKAGE / "__init__.py":
        assert not own_imports(path)
        return
    own = ORDER.index(room(dotted(path)))
    above = [name for name in own_imports(path) if ORDER.index(room(name)) > own]
    assert not above, f"{dotted(path)} imports upward: {above}"


def test_every_room_has_a_level():
    assert {room(name) for name in NAMES if name != "dno_jax"} <= set(ORDER)


def test_the_graph_of_files_has_no_circle():
    """A package's __init__ stands for what it re-exports; who imports it imports that."""
    graph = {dotted(path): own_imports(path) - {dotted(path)} for path in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle
    assert set(graph) <= set(order)


def test_no_file_has_more_than_400_lines_and_half_are_below_160():
    lines = sorted(len(path.read_text().splitlines()) for path in MODULES)
    assert lines[-1] <= 400, [str(path) for path in MODULES if len(path.read_text().splitlines()) > 400]
    assert lines[len(lines) // 2] < 160


def test_no_function_of_stages_sampling_or_training_has_more_than_8_parameters():
    for path in MODULES:
        if room(dotted(path) + ".") in ("stages", "sampling", "training", "runtime", "data"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
                    assert count <= 8, f"{path}: {node.name} has {count} parameters"


def test_losses_and_logprobs_import_only_jax():
    for path in [PACKAGE / "logprobs.py", *(PACKAGE / "losses").rglob("*.py")]:
        outside = {name for name in imports(path) if not name.startswith("dno_jax.losses")}
        allowed = {"__future__", "collections", "dataclasses", "functools", "importlib", "typing", "jax", "jaxtyping"}
        assert {name.split(".")[0] for name in outside} <= allowed, path


def test_host_side_rooms_never_import_jax():
    files = [path for name in HOST_ROOMS for path in (PACKAGE / name).rglob("*.py")]
    files += list((PACKAGE / "games").glob("*.py"))
    files += [PACKAGE / f"{name}.py" for name in HOST_FILES if (PACKAGE / f"{name}.py").exists()]
    for path in files:
        assert not tops(path) & {"jax", "flax", "optax", "orbax"}, path
        for name in own_imports(path):  # nor by way of another room
            assert room(name) not in ("model", "parallel", "sampling", "training", "runtime"), f"{path}: {name}"


def test_the_model_knows_no_mesh_and_heavy_clients_have_one_door():
    for path in MODULES:
        name = str(path.relative_to(PACKAGE))
        if "transformers" in tops(path) or "tokenizers" in tops(path):
            assert name.startswith("model/text/"), name
        if "openai" in tops(path):
            assert name == "endpoint.py"
        if name.startswith("model/"):
            assert not [found for found in imports(path) if found.startswith("dno_jax.parallel")]


def test_nothing_loads_pickle_or_remote_code():
    for path in MODULES:
        text = path.read_text()
        assert not tops(path) & {"pickle", "dill", "joblib", "shelve"}, path
        assert "trust_remote_code=True" not in text
        assert "allow_pickle=True" not in text


def test_the_command_line_imports_nothing_heavy_until_it_has_to():
    code = "import dno_jax.cli.main, sys; print(' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "typer" in loaded
    assert not {"jax", "numpy", "pydantic", "transformers", "openai", "yaml", "etils"} & set(loaded)
