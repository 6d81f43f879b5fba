import json
from pathlib import Path

import pytest
import yaml

from dno_jax.config import (
    RewardConfig,
    RunConfig,
    SftConfig,
    changes,
    deciding,
    dump_config,
    load_config,
    parse_config,
    stage_digest,
)
from dno_jax.errors import DnoError

ROOT = Path(__file__).parents[2]
MINIMAL = {"run_dir": "runs/x", "model": {"path": "m"}, "prompts": {"path": "p.jsonl"}, "pairing": {
    "reward": "win_rate", "positive_floor": 0.5, "margin": 0.2, "student_margin": 0.2}}  # fmt: skip


def write(tmp_path, tree=MINIMAL):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_overrides_are_yaml_laid_over_the_file(tmp_path):
    config = load_config(
        RunConfig,
        write(tmp_path),
        ["sampling.num_samples=8", "optimizer.learning_rate=1.0e-6", "mesh.fsdp=-1", "mesh.data=1"],
    )
    assert (config.sampling.num_samples, config.optimizer.learning_rate, config.mesh.fsdp) == (8, 1e-6, -1)


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = load_config(RunConfig, write(tmp_path))
    again = parse_config(RunConfig, yaml.safe_load(dump_config(config)), place="dump")
    assert again == config
    assert again == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.temprature=1", r"(?s)sampling\.temprature.*known here: .*num_samples"),
        ("unknown=1", "(?s)unknown.*known here: run_dir"),
        ("sampling.num_samples=1", "num_samples is 1.*K >= 2"),
        ("sampling.top_p=1.5", r"sampling\.top_p.*got 1\.5"),
        ("loss.beta=0", r"loss\.beta"),
        ("mesh.data=0", "data is 0"),
        ("mesh.fsdp=-1", "more than one axis is -1"),
        ("pairing.positive_floor=5", "no win rate"),
        ("pairing={rule: best_worst, reward: win_rate, margin: 2}", r"margin is 2\.0, no win rate"),
        ("pairing.reward=score", "gives pairwise verdicts, no scores"),
        ("pairing.replay=0.9", "leaves no room"),
        ("training.micro_batch_size=7", "does not divide batch_size 64"),
        ("annotation.oracle.criteria=[variety, relevance]", "odd number"),
        ("prompts.held_out_path=h.jsonl", "choose one"),
        ("sampling", "expected a.b=value"),
        ("model.path.x=1", "is a value, not a section"),
        ("model.path=", r"model\.path"),
        ("model.template_date=2024-13-01", r"model\.template_date: .*month must be in 1..12"),
        pytest.param("seed=" + "[" * 1000, "not valid YAML: brackets in brackets, more than 100 deep", id="deep"),
    ],
)
def test_bad_fields_are_named(tmp_path, override, message):
    with pytest.raises(DnoError, match=message):
        load_config(RunConfig, write(tmp_path), ["prompts.held_out=2", override])


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("iterations=true", "iterations"),
        ("iterations=yes", "iterations"),
        ("mesh.data=true", r"mesh\.data"),
        ("loss.beta=on", r"loss\.beta"),
        ("sampling.temperature=no", r"sampling\.temperature"),
        ("training.save_every=false", r"training\.save_every"),
        ("annotation.max_usd=true", r"annotation\.max_usd"),
        ("annotation.table={answers: [a, b], preferences: [[0.5, true], [false, 0.5]]}", "preferences"),
    ],
)
def test_booleans_are_no_numbers(tmp_path, override, field):
    with pytest.raises(DnoError, match=rf"{field}: .*(True|False) is a boolean; expected a number"):
        load_config(RunConfig, write(tmp_path), [override])


def test_numbers_may_be_text_and_switches_may_be_words(tmp_path):
    config = load_config(RunConfig, write(tmp_path), ["optimizer.learning_rate=1e-3", "report.tensorboard=no"])
    assert (config.optimizer.learning_rate, config.report.tensorboard) == (1e-3, False)


@pytest.mark.parametrize("text", ["- a list", "a: [1", "", "day: 2024-13-01"])
def test_bad_files_are_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(DnoError, match=r"broken\.yaml"):
        load_config(RunConfig, path)
    with pytest.raises(DnoError, match="no such configuration file"):
        load_config(RunConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize("contents", [None, "seed: 1  # \u00e9".encode("latin-1")], ids=["folder", "latin-1"])
def test_files_that_cannot_be_read_are_named(tmp_path, contents):
    path = tmp_path / "odd.yaml"
    path.mkdir() if contents is None else path.write_bytes(contents)
    with pytest.raises(DnoError, match=r"odd\.yaml: cannot be read: .*; expected a YAML file in UTF-8"):
        load_config(RunConfig, path)
    over = write(tmp_path, MINIMAL | {"base": "odd.yaml"})
    with pytest.raises(DnoError, match=rf"odd\.yaml: cannot be read \(the base of {over}\): "):
        load_config(RunConfig, over)


def test_changes_that_decide_results_are_named_and_others_are_not(tmp_path):
    config = load_config(RunConfig, write(tmp_path))
    other = load_config(
        RunConfig,
        write(tmp_path),
        [
            "loss.beta=0.2",
            "mesh.fsdp=4",
            "run_dir=elsewhere",
            "annotation.openai.max_concurrency=4",
            "annotation.quality.max_longer_wins=null",
            "annotation.quality.max_cyclic_share=0.4",
        ],
    )
    assert changes(deciding(config, "train"), deciding(other, "train")) == ["loss.beta: 0.1 -> 0.2"]
    for stage in ("sample", "annotate", "pair", "score", "evaluate"):
        assert stage_digest(config, stage) == stage_digest(other, stage)
    same = load_config(RunConfig, write(tmp_path), ["mesh.fsdp=4", "training.save_every=7"])
    assert stage_digest(same, "train") == stage_digest(config, "train") != stage_digest(other, "train")


def test_no_field_holds_a_secret():
    """The key's variable is named, the key never is: a field called key or token would invite it."""

    def names(kind):
        for name, field in kind.model_fields.items():
            yield name
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                yield from names(field.annotation)

    assert "api_key_env" in set(names(RunConfig))
    assert not [name for name in names(RunConfig) if name in ("api_key", "key", "token", "secret", "password")]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_loads(path):
    kind = {"sft.yaml": SftConfig, "reward_model.yaml": RewardConfig}.get(path.name, RunConfig)
    config = load_config(kind, path)
    assert config.run_dir
    assert "shared" not in path.read_text().replace("split: shared", "")


WIN_RATES = {"pairing.reward": "win_rate", "pairing.opponents": "policy", "pairing.replay": 0.0}
MATCHING = WIN_RATES | {"pairing.rule": "matching"}
MIXTURE = {"reference.kind": "mixture", "reference.tau": 0.01}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # sections
        ({"sampling.source": "mixture", "sampling.num_opponents": 2}, "num_opponents is 2 with source=mixture"),
        ({"loss.name": "spin", "loss.target": "soft"}, "name=spin takes no target; target=soft is for dno, chi_po"),
        ({"loss.name": "rebel", "loss.label_smoothing": 0.1}, "name=rebel takes no label_smoothing; it is for dno"),
        ({"loss.name": "sft", "loss.length_penalty": 0.1}, "name=sft has no reference that length_penalty"),
        ({"loss.name": "ppo"}, r"loss\.name: .*unknown loss 'ppo'; there are dno, "),
        ({"loss.label_smoothing": 0.5}, r"loss\.label_smoothing.*less than 0\.5"),
        ({"reference.kind": "mixture"}, r"kind=mixture with tau=0\.0; tau > 0 goes with kind=mixture"),
        ({"reference.kind": "initial", "reference.tau": 0.1}, r"kind=initial with tau=0\.1"),
        ({"outer.scheme": "proximal", **MIXTURE}, "scheme=proximal with every=None; `every` goes with"),
        ({"outer.scheme": "average", "outer.every": 2}, "scheme=average with every=2"),
        ({"pairing.rule": "restrictive", "pairing.margin": 2.0}, r"margin is 2\.0, no win rate"),
        ({"pairing.replay_decay": 1.0, "pairing.replay": 1.0}, "leaves no room for new pairs"),
        ({"annotation.kind": "oracle", "annotation.quality.repeat": 0.1}, "quality.repeat=0.1 asks an endpoint"),
        (
            {"annotation.kind": "self", "annotation.quality.calibration": "f"},
            "calibration=.*annotation.kind=self is not asked",
        ),
        ({"annotation.kind": "openai", "annotation.apart": True}, "apart=true without annotation.store"),
        ({"annotation.kind": "table"}, r"kind=table needs annotation\.table"),
        # the judge
        ({"annotation.kind": "gold", "pairing.reward": "score"}, "kind=gold gives pairwise verdicts, no scores"),
        ({"annotation.kind": "gold", "prompts.held_out": 2}, "kind=gold cannot judge held-out responses"),
        ({"annotation.kind": "self", "prompts.held_out_path": "h"}, "kind=self cannot judge held-out responses"),
        ({"evaluation.annotation": {"kind": "given"}, "prompts.held_out": 2}, "kind=given cannot judge held-out"),
        # the mixture
        ({"sampling.source": "mixture", "pairing.opponents": "mixture"}, "sampling from the mixture needs its weight"),
        ({"sampling.num_opponents": 2, "pairing.opponents": "mixture"}, "sampling from the mixture needs its weight"),
        ({"sampling.source": "mixture", **MIXTURE}, "opponents=pool with sampling.source=mixture"),
        ({"pairing.opponents": "mixture"}, "opponents=mixture with sampling.source=policy and num_opponents=0"),
        ({"loss.beta_schedule": "nash_md"}, "beta_schedule=nash_md is made of tau"),
        ({"reference.kind": "mixture", "reference.tau": 0.2}, r"tau is 0\.2, above loss\.beta 0\.1"),
        # the loss
        ({"loss.name": "inpo"}, r"loss\.name=inpo is regularised: set reference\.kind=mixture"),
        ({"loss.name": "nash_md_pg", **MATCHING}, r"loss\.name=nash_md_pg is regularised"),
        ({"loss.name": "spin"}, r"loss\.name=spin with pairing\.rule=large_margin: set pairing\.rule=spin"),
        ({"loss.name": "sppo", **WIN_RATES}, r"loss\.name=sppo reads each sample's own win rate"),
        ({"loss.name": "sppo", **MATCHING, "pairing.opponents": "pool"}, "reads each sample's own win rate"),
        ({"loss.name": "spo", **MATCHING, "pairing.replay": 0.3}, r"loss\.name=spo needs samples of policy t"),
        ({"loss.name": "spo", **MATCHING, "sampling.source": "data"}, r"loss\.name=spo needs samples of policy t"),
        # the scheme
        ({"outer.scheme": "proximal", "outer.every": 2}, r"proximal moves the initial reference: set reference\.kind"),
        ({"outer.scheme": "lookahead", "iterations": 1}, "lookahead pools .* iterations >= 2"),
    ],
    ids=lambda value: ",".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else "",
)
def test_sections_that_do_not_fit_together_are_refused(tmp_path, changes, message):
    overrides = [f"{name}={json.dumps(value)}" for name, value in changes.items()]  # JSON is YAML
    with pytest.raises(DnoError, match=f"(?s){message}"):
        load_config(RunConfig, write(tmp_path), overrides)


@pytest.mark.parametrize(
    "changes",
    [
        MATCHING | {"loss.name": "sppo", "pairing.replay": 0.3},  # a regression may replay
        MATCHING | MIXTURE | {"loss.name": "nash_md_pg"},
        MIXTURE | MATCHING | {"loss.name": "inpo", "outer.scheme": "optimistic", "prompts.split": "shared"},
        MIXTURE | {"reference.tau": 0.1},  # tau = beta: the reference is pi_ref
        MIXTURE | {"reference.tau": 0.5, "loss.beta_schedule": "nash_md"},  # beta is not read
        {"reference.kind": "initial", "outer.scheme": "proximal", "outer.every": 3},
        {"pairing.opponents": "mixture", "sampling.num_opponents": 2, "sampling.mixture_weight": 0.5},
        {"pairing.rule": "all", "pairing.positive_floor": 5.0, "pairing.margin": 2.0},  # which this rule does not read
        {"annotation.kind": "gold", "prompts.held_out": 2, "evaluation.annotation": {"kind": "oracle"}},
        {"outer.scheme": "lookahead", "iterations": 2},
    ],
    ids=str,
)
def test_sections_that_fit_together_load(tmp_path, changes):
    overrides = [f"{name}={json.dumps(value)}" for name, value in changes.items()]  # JSON is YAML
    assert load_config(RunConfig, write(tmp_path), overrides)


def test_the_nash_md_schedule_replaces_beta(tmp_path):
    schedule = ["reference.kind=mixture", "reference.tau=0.02", "loss.beta_schedule=nash_md", "loss.beta=7"]
    config = load_config(RunConfig, write(tmp_path), schedule)
    assert [config.loss_at(t).beta for t in range(4)] == pytest.approx([0.02, 0.03, 0.04, 0.05])
    constant = load_config(RunConfig, write(tmp_path))
    assert constant.loss_at(5) == constant.loss
    assert [c.uses_initial for c in (config, constant)] == [True, False]


def lay(folder, name, tree):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_file_says_only_what_it_changes_in_its_base(tmp_path, monkeypatch):
    lay(tmp_path, "base.yaml", MINIMAL | {"sampling": {"num_samples": 8, "temperature": 1.0}, "seed": 5})
    lay(tmp_path, "a/middle.yaml", {"base": "../base.yaml", "sampling": {"temperature": 0.5}, "loss": {"beta": 0.3}})
    top = lay(tmp_path, "a/b/top.yaml", {"base": "../middle.yaml", "seed": 6, "loss": {"label_smoothing": 0.1}})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # a base is relative to its file, not to where the command runs
    config = load_config(RunConfig, top, ["loss.beta=0.4"])
    assert (config.sampling.num_samples, config.sampling.temperature, config.seed) == (8, 0.5, 6)
    assert (config.loss.beta, config.loss.label_smoothing) == (0.4, 0.1)
    assert config.pairing.margin == 0.2
    assert "base" not in config.model_dump()


def test_an_overlay_replaces_lists_and_can_unset_a_section(tmp_path):
    judged = MINIMAL | {
        "annotation": {"kind": "oracle", "oracle": {"criteria": ["relevance", "variety", "brevity"]}},
        "evaluation": {"annotation": {"kind": "oracle"}, "num_samples": 3},
    }
    lay(tmp_path, "base.yaml", judged)
    changes = {
        "annotation": {"oracle": {"criteria": ["variety", "brevity", "freshness"]}},
        "evaluation": {"annotation": None},
    }
    config = load_config(RunConfig, lay(tmp_path, "top.yaml", {"base": "base.yaml"} | changes))
    assert config.annotation.oracle.criteria == ("variety", "brevity", "freshness")
    assert (config.evaluation.annotation, config.evaluation.num_samples) == (None, 3)


def test_a_base_that_is_not_there_is_named_with_the_file_that_names_it(tmp_path):
    top = lay(tmp_path, "top.yaml", {"base": "absent.yaml"})
    with pytest.raises(DnoError, match=r"absent\.yaml: no such configuration file \(the base of .*top\.yaml\)"):
        load_config(RunConfig, top)


@pytest.mark.parametrize("names", [["one.yaml"], ["one.yaml", "two.yaml"], ["one.yaml", "two.yaml", "three.yaml"]])
def test_bases_in_a_circle_are_refused(tmp_path, names):
    for name, base in zip(names, [*names[1:], names[0]], strict=True):
        lay(tmp_path, name, {"base": base})
    with pytest.raises(DnoError, match=r"one\.yaml: base: .* leads back to this file"):
        load_config(RunConfig, tmp_path / "one.yaml")


@pytest.mark.parametrize("base", [[], [3], ["a.yaml", ["b.yaml"]], 3, {"path": "a.yaml"}])
def test_a_base_is_a_path_or_several(tmp_path, base):
    with pytest.raises(DnoError, match=r"top\.yaml: base: expected the path of a YAML file, or a list of them, got"):
        load_config(RunConfig, lay(tmp_path, "top.yaml", MINIMAL | {"base": base}))


RECIPES = [path for folder in ("variants", "ablations") for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_on_another_base(recipe, tmp_path):
    """On the recipe of the paper it is itself; on the demo it changes what it changes there, and leaves all else."""
    paper, demo = ROOT / "configs" / "mistral_7b_ultrafeedback.yaml", ROOT / "configs" / "demo.yaml"
    own = load_config(RunConfig, recipe)
    assert load_config(RunConfig, paper, variants=[recipe]).model_copy(update={"run_dir": own.run_dir}) == own
    on_demo = load_config(RunConfig, demo, variants=[recipe])
    before = load_config(RunConfig, demo)
    assert (on_demo.model, on_demo.prompts.path, on_demo.run_dir) == (before.model, before.prompts.path, before.run_dir)
    assert on_demo.loss.name == own.loss.name
    assert on_demo.outer.scheme == own.outer.scheme
    assert on_demo.annotation.kind in (own.annotation.kind, before.annotation.kind)
    listed = tmp_path / "listed.yaml"
    listed.write_text(yaml.safe_dump({"base": [str(demo), str(recipe)], "seed": 3}))
    assert load_config(RunConfig, listed) == on_demo.model_copy(update={"seed": 3})


def test_variants_are_laid_over_each_other_in_their_order(tmp_path):
    def file(name, tree):
        (tmp_path / name).write_text(yaml.safe_dump(tree))
        return tmp_path / name

    file("root.yaml", MINIMAL | {"seed": 1, "iterations": 4})
    file("one.yaml", {"base": "root.yaml", "run_dir": "runs/one", "loss": {"beta": 0.2, "nll_weight": 0.1}})
    two = file("two.yaml", {"base": "one.yaml", "loss": {"beta": 0.3}})
    bare = file("bare.yaml", {"loss": {"beta": 0.4}, "run_dir": "runs/bare"})
    mine = file("mine.yaml", MINIMAL | {"run_dir": "runs/mine", "seed": 7})
    found = load_config(RunConfig, mine, ["loss.nll_weight=0.2"], variants=[two, bare])
    assert (found.seed, found.iterations) == (7, load_config(RunConfig, mine).iterations)  # not the variants' root's
    assert (found.loss.beta, found.loss.nll_weight) == (0.4, 0.2)
    assert found.run_dir.endswith("runs/mine")
    assert load_config(RunConfig, mine, variants=[bare, two]).loss.beta == 0.3
    over = file("over.yaml", {"base": ["mine.yaml", "bare.yaml", "one.yaml"], "loss": {"nll_weight": 0.0}})
    assert load_config(RunConfig, over).loss.beta == 0.2
    assert load_config(RunConfig, over).loss.nll_weight == 0.0
    with pytest.raises(DnoError, match=r"absent\.yaml: no such configuration file"):
        load_config(RunConfig, mine, variants=[tmp_path / "absent.yaml"])
    file("round.yaml", {"base": ["mine.yaml", "round.yaml"]})
    with pytest.raises(DnoError, match="leads back to this file"):
        load_config(RunConfig, tmp_path / "round.yaml")


@pytest.mark.parametrize("command", ["run", "pair", "train", "annotate", "sft", "import", "inspect"])
def test_every_command_takes_variants(command, tmp_path, monkeypatch, capsys):
    from dno_jax.cli import main as cli

    config = write(tmp_path)
    monkeypatch.setattr("sys.argv", ["dno", command, str(config), "--with", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "none.yaml: no such configuration file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("run_dir=/runs/a #2", "run_dir", "/runs/a #2"),
        ("run_dir=/010", "run_dir", "/010"),
        ("model.chat_template=010", "model.chat_template", "010"),
        ("model.chat_template=no", "model.chat_template", "no"),
        ("model.chat_template=2024-07-26", "model.chat_template", "2024-07-26"),
        ("model.chat_template=1.10", "model.chat_template", "1.10"),
        ("model.chat_template='#1'", "model.chat_template", "#1"),
        ("prompts.path=/data/*.jsonl", "prompts.path", "/data/*.jsonl"),
        ("prompts.path=[/a.jsonl, /b.jsonl]", "prompts.path", ("/a.jsonl", "/b.jsonl")),
        ("prompts.path=/my #1.jsonl", "prompts.path", "/my #1.jsonl"),
        ("prompts.path=/a: b.jsonl", "prompts.path", "/a: b.jsonl"),
        ("prompts.path=owner/name@main:train", "prompts.path", "owner/name@main:train"),
        ("prompts.held_out_path=null", "prompts.held_out_path", None),
        ("seed=010", "seed", 10),
        ("iterations=08", "iterations", 8),
    ],
)
def test_a_text_is_taken_as_it_stands(tmp_path, override, field, value):
    config = load_config(RunConfig, write(tmp_path), [override])
    for name in field.split("."):
        config = getattr(config, name)
    assert config == value


@pytest.mark.parametrize("override", ["seed=3 # more", "seed=1:30", "iterations=2 #", "loss.beta=0.1 # eta"])
def test_what_yaml_would_drop_or_recount_is_refused(tmp_path, override):
    name, _, value = override.partition("=")
    with pytest.raises(DnoError, match=rf"{name}: .*\(got '{value}'\)"):
        load_config(RunConfig, write(tmp_path), [override])


def test_a_number_of_a_file_is_no_octal_and_a_name_that_comes_twice_is_refused(tmp_path):
    path = write(tmp_path)
    text = path.read_text()
    path.write_text(text + "seed: 010\n")
    assert load_config(RunConfig, path).seed == 10
    path.write_text(text + "seed: 1\nseed: 2\n")
    with pytest.raises(DnoError, match=r"config\.yaml: not valid YAML: 'seed' is there twice"):
        load_config(RunConfig, path)


def test_variables_of_the_environment_are_put_into_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    tree = MINIMAL | {"run_dir": "$SCRATCH/run", "prompts": {"path": ["${SCRATCH}/a.jsonl", "gs://b/$SCRATCH"]}}
    config = load_config(RunConfig, write(tmp_path, tree), ["model.path=$SCRATCH/model"])
    assert (config.run_dir, config.model.path) == ("/scratch/me/run", "/scratch/me/model")
    assert config.prompts.path == ("/scratch/me/a.jsonl", "gs://b//scratch/me")
    with pytest.raises(
        DnoError, match=r"run_dir: .*'\$NOWHERE/x' names the environment variable \$NOWHERE, which is not"
    ):
        load_config(RunConfig, write(tmp_path), ["run_dir=$NOWHERE/x"])


def test_paths_of_a_file_start_at_its_folder_and_those_of_overrides_at_the_working_directory(
    tmp_path, monkeypatch, capsys
):
    lay(tmp_path, "shared/base.yaml", MINIMAL | {"model": {"path": "model", "chat_template": "chat.jinja"}})
    top = lay(tmp_path, "mine/top.yaml", {"base": "../shared/base.yaml", "prompts": {"path": ["p.jsonl", "*.parquet"]}})
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    config = load_config(RunConfig, top, ["prompts.held_out_path=h.jsonl"])
    assert (config.run_dir, config.model.path) == (str(tmp_path / "shared/runs/x"), str(tmp_path / "shared/model"))
    assert config.model.chat_template == str(tmp_path / "shared/chat.jinja")
    assert config.prompts.path == (str(tmp_path / "mine/p.jsonl"), str(tmp_path / "mine/*.parquet"))
    assert config.prompts.held_out_path == str(here / "h.jsonl")
    assert "top.yaml: its relative paths (" in " ".join(capsys.readouterr().err.split())
    assert parse_config(RunConfig, yaml.safe_load(dump_config(config)), place="dump") == config
    lay(
        tmp_path,
        "mine/ids.yaml",
        MINIMAL | {"prompts": {"path": "owner/name:train"}, "model": {"chat_template": "raw", "path": "m"}},
    )
    config = load_config(RunConfig, tmp_path / "mine/ids.yaml")
    assert (config.prompts.path, config.model.chat_template) == ("owner/name:train", "raw")
    (here / "p.jsonl").write_text("")  # where earlier versions would have looked
    with pytest.raises(
        DnoError, match=r"prompts\.path: p\.jsonl is relative to this file's folder .*here/p\.jsonl is: write"
    ):
        load_config(RunConfig, top)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param(LAUGHS, "its aliases .* stand for billions of values; expected at most 20,000", id="laughs"),
        pytest.param(MERGES, "its aliases .* stand for billions of values; expected at most 20,000", id="merges"),
        pytest.param("a: &a [*a]", "an alias that stands for what it is in", id="circle"),
        pytest.param("a: " + "[" * 100_000, "brackets in brackets, more than 100 deep", id="brackets"),
        pytest.param("a: " + "{b: " * 5000, "brackets in brackets, more than 100 deep", id="braces"),
        pytest.param("a: " + "x" * 300_000, "more than 262,144 bytes", id="long"),
    ],
)
def test_yaml_that_stands_for_more_than_a_recipe_is_refused(tmp_path, text, why):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(DnoError, match=rf"config\.yaml: .*{why}"):
        load_config(RunConfig, path)


def test_anchors_that_a_recipe_may_have_are_read(tmp_path):
    path = write(tmp_path)
    path.write_text(
        path.read_text()
        + "loss: &l {beta: 0.3}\nreference: {kind: mixture, tau: 0.1}\nsampling: {top_p: &p 0.9, temperature: *p}\n"
    )
    config = load_config(RunConfig, path)
    assert (config.loss.beta, config.sampling.temperature) == (0.3, 0.9)


def test_a_recipe_of_the_other_command_says_so(tmp_path):
    with pytest.raises(
        DnoError, match=r"config\.yaml: a recipe of `dno run` \(it has the section prompts\); `dno sft` reads"
    ):
        load_config(SftConfig, write(tmp_path))
    tree = {"run_dir": "r", "model": {"path": "m"}, "data": {"path": "d.jsonl"}}
    with pytest.raises(
        DnoError, match=r"a recipe of `dno sft` \(it has the section data\); `dno run` reads one with prompts"
    ):
        load_config(RunConfig, write(tmp_path, tree))
    assert load_config(SftConfig, write(tmp_path, tree)).data.turns == "last"
