"""The documentation: links lead somewhere, commands exist, blocks run, and the references leave nothing out."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from dno_jax.cli.main import app
from dno_jax.config import RewardConfig, RunConfig, SftConfig, parse_config
from dno_jax.config.fields import described

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *ROOT.glob("*/README.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)
COMMANDS = dict(reference.commands(typer.main.get_command(app), ("dno",)))


def slugs(text):
    """Names of headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in slugs(target.read_text()), f"{page.name}: {link}"


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "page.md").write_text("# One two\n[here](#one-two) [there](other.md)")
    with pytest.raises(AssertionError, match="other"):
        test_links_lead_somewhere(tmp_path / "page.md")


def command_lines():
    for page in PAGES:
        for block in re.findall(r"(?:^    .*\n)+", page.read_text(), re.M):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                if re.match(r"    dno [a-z]", line):
                    yield page.name, line.strip()


def test_commands_of_the_documentation_exist_with_their_options():
    found = list(command_lines())
    assert len(found) > 15
    for page, line in found:
        words = shlex.split(line.partition("  #")[0], comments=False)
        size = max((size for size in (2, 3) if tuple(words[:size]) in COMMANDS), default=0)
        assert size, f"{page}: {line}"
        known = {
            name for option in COMMANDS[tuple(words[:size])].params for name in option.opts + option.secondary_opts
        }
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= known | {"--help"}, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_what_they_are_said_to_be(page):
    for language, text in FENCE.findall(page.read_text()):
        if language == "python":
            assert ast.parse(text).body
        elif language == "yaml":
            tree = yaml.safe_load(text)
            base = {"run_dir": "r", "model": {"path": "m"}}
            run = base | {"iterations": 2, "prompts": {"path": "p"}}
            kind, base = (RewardConfig, base) if "pairs" in tree else (RunConfig, run)
            config = parse_config(kind, {**base, **tree}, place=page.name)
            assert tree.keys() <= config.model_fields_set


def test_the_block_that_makes_prompts_of_beginnings_runs(tmp_path):
    (block,) = (text for kind, text in FENCE.findall((ROOT / "docs/stories.md").read_text()) if kind == "python")
    (tmp_path / "evaluation_prompts.yaml").write_text(yaml.safe_dump(["Once upon a time", "A cat: 'meow'"]))
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    rows = [json.loads(line) for line in (tmp_path / "PROMPTS.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Once upon a time", "A cat: 'meow'"]


def test_the_block_of_the_readme_computes_the_loss():
    import jax.numpy as jnp
    import numpy as np

    (block,) = (text for kind, text in FENCE.findall((ROOT / "README.md").read_text()) if kind == "python")
    rng = np.random.default_rng(0)
    embed = jnp.asarray(rng.normal(size=(11, 8)), jnp.float32)
    mask = np.zeros((4, 6), bool)
    mask[:, 3:] = True
    names = {"model": lambda ids: embed[ids], "head": embed.T, "tokens": jnp.asarray(rng.integers(0, 11, (4, 6))),
             "response_mask": jnp.asarray(mask), "reference": jnp.asarray([-3.0, -4.0, -5.0, -6.0])}  # fmt: skip
    exec(compile(block, "README.md", "exec"), names)
    logits = np.asarray(embed[names["tokens"][:, :-1]] @ embed.T, np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taken = np.take_along_axis(logprobs, np.asarray(names["tokens"])[:, 1:, None], 2)[..., 0]
    own = (taken * mask[:, 1:]).sum(1) - np.asarray(names["reference"])
    expected = np.mean(np.log1p(np.exp(-0.1 * (own[0::2] - own[1::2]))))
    assert float(names["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "launch/README.md"])
def test_messages_that_pages_quote_are_said_by_the_code(page):
    """First cells of tables; what differs from run to run stands for itself: numbers, names, places."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "dno_jax").rglob("*.py")))
    said = re.sub(r'"\s*\n\s*f?"', "", sources)  # literals that go on in the next line
    cells = [line.split("|")[1] for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")]
    quotes = [a or b for cell in cells for a, b in re.findall(r'"([^"]+)"|`([a-z]\w* [^`]+|use srun)`', cell)]
    assert len(quotes) >= 5
    for quote in quotes:
        for part in re.split(r"\.\.\.|\d+|\bN\b|HOST:PORT|node\d|SLURM|gs://|cpu", quote):
            assert part.strip(" :") in said, f"{page}: {quote!r} is not what is said"


def test_the_configuration_reference_has_every_field():
    text = reference.configuration()
    for kind in (RunConfig, SftConfig, RewardConfig):
        for field in described(kind):
            section, _, name = field.name.rpartition(".")
            assert f"| `{name}` |" in text, field.name
            assert not section or f"### `{section}`" in text, field.name
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == sum(1 for kind in (RunConfig, SftConfig, RewardConfig) for _ in described(kind))
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)  # no cell breaks its table


def test_the_command_reference_has_every_command_and_option():
    text = reference.command_line()
    assert ("dno", "report") in COMMANDS
    for path, command in COMMANDS.items():
        part = text.partition(f"## `{' '.join(path)}`\n")[2].partition("\n## ")[0]
        assert part, path
        for option in command.params:
            if option.param_type_name == "option" and not option.hidden:
                assert f"`{option.opts[0]}`" in part, (path, option.opts)


def test_links_out_of_the_folder_keep_their_names_alone():
    shown = reference.on_page_markdown("[a.md](a.md) [code](../dno_jax/x.py) [`y`](../y) ![fig](figures/a.png)")
    assert shown == "[a.md](a.md) `code` `y` ![fig](figures/a.png)"


def test_every_page_is_in_the_sites_navigation():
    class Loader(yaml.SafeLoader):
        pass

    tree = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    named = set(re.findall(r"[\w]+\.md", json.dumps(tree["nav"])))
    there = {page.name for page in (ROOT / "docs").glob("*.md")} | {"configuration.md", "command_line.md"}
    assert there == named
