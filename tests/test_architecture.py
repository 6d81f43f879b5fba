"""Who may import whom, read from the source: the folder list is the architecture only while this holds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dno_jax"
LEVELS = {
    "errors": 0, "losses": 0, "logprobs": 0, "preferences": 0, "games": 0, "records": 0, "config": 0, "run_dir": 0,
    "endpoint": 0, "addresses": 0, "statistics": 0,
    "model": 1, "sampled_games": 1,
    "parallel": 2,
    "sampling": 3, "training": 3, "annotation": 3, "evaluation": 3,
    "report": 4, "stages": 4, "plan": 4, "annotation_plan": 4,
    "iteration": 5, "annotations_cli": 5,
    "cli": 6, "__main__": 7,
}  # fmt: skip
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def room(name):
    return name.split(".")[1] if "." in name else ""


def imports(path):
    """Every module a file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "dno_jax":
                yield from (f"dno_jax.{alias.name}" for alias in node.names)


def tops(path):
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_its_own_level_or_below(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        assert not [name for name in imports(path) if name.startswith("dno_jax")]
        return
    own = parts[0]
    for name in imports(path):
        if name.startswith("dno_jax.") and room(name) != own:
            assert LEVELS[room(name)] <= LEVELS[own], f"{path} imports {name}"
            # Rooms of one level stand beside each other; only the ground floor and the stages' own console are shared.
            if LEVELS[room(name)] == LEVELS[own] and LEVELS[own] not in (0, 4):
                pytest.fail(f"{path} imports its neighbour {name}")


def test_losses_and_logprobs_import_only_jax():
    for path in [PACKAGE / "logprobs.py", *(PACKAGE / "losses").rglob("*.py")]:
        outside = {name for name in imports(path) if not name.startswith("dno_jax.losses")}
        allowed = {"__future__", "collections", "dataclasses", "functools", "importlib", "jax", "jaxtyping", "typing"}
        assert {name.split(".")[0] for name in outside} <= allowed


def test_host_side_rooms_never_import_jax():
    files = [
        *(PACKAGE / "annotation").rglob("*.py"),
        *(PACKAGE / "games").rglob("*.py"),
        *(PACKAGE / "config").rglob("*.py"),
        *(PACKAGE / "preferences").rglob("*.py"),
        *(PACKAGE / f"{n}.py" for n in ("endpoint", "records", "run_dir")),
    ]
    for path in files:
        assert not tops(path) & {"jax", "flax", "optax", "orbax"}, path


def test_the_model_knows_no_mesh_and_heavy_clients_have_one_door():
    for path in MODULES:
        name = str(path.relative_to(PACKAGE))
        if "transformers" in tops(path) or "tokenizers" in tops(path):
            assert name == "model/tokenizer.py"
        if "openai" in tops(path):
            assert name == "endpoint.py"
        if name.startswith("model/"):
            assert not [found for found in imports(path) if found.startswith("dno_jax.parallel")]


def test_where_arguments_grow_a_struct_takes_them():
    for room in ("sampling", "training", "data", "runtime", "stages"):
        for path in sorted((PACKAGE / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    given = node.args
                    names = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                    count = sum(name is not None for name in names)
                    assert count <= 8, f"{path}: {node.name} takes {count} parameters"


def test_nothing_loads_pickle_or_remote_code():
    for path in MODULES:
        text = path.read_text()
        assert not tops(path) & {"pickle", "dill", "joblib", "shelve"}, path
        assert "trust_remote_code=True" not in text
        assert "allow_pickle=True" not in text


def test_a_configuration_is_checked_without_jax():
    code = "from dno_jax.config import LossSection; LossSection(name='nash_md_pg'); import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "dno_jax.losses.registry" in loaded
    assert not {"jax", "scipy", "transformers"} & set(loaded)


def test_the_command_line_imports_nothing_heavy_until_it_has_to():
    code = "import dno_jax.cli.main, sys; print(' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "typer" in loaded
    assert not {"jax", "numpy", "pydantic", "transformers", "openai", "yaml", "etils"} & set(loaded)
