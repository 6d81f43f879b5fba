"""A judge's figures in tables, and in the summary of a run."""

from __future__ import annotations

import pytest
from rich.console import Console

from dno_jax.annotation.quality.figures import Quality, Response, scalars
from dno_jax.config import AnnotationSection, QualitySection, RunConfig
from dno_jax.records import Answer, Judgement
from dno_jax.report.judge import quality_lines, quality_table
from dno_jax.report.page import write_report
from dno_jax.report.summary import iteration_table
from dno_jax.run_dir import RunDir
from dno_jax.stages.quality import tell_quality


def shown(what, *, width=110):
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


@pytest.fixture(scope="module")
def figures():
    """60 lists of three in which the first shown, a student's every second time, gets the 6 and gold a 4 or a 1."""
    quality = Quality()
    for i in range(60):
        order = ((0, 1, 2), (1, 0, 2))[i % 2]
        points = (6.0, 4.0, 1.0) if i % 2 else (6.0, 1.0, 4.0)
        by_candidate = tuple(points[order.index(j)] for j in range(3))
        judgement = Judgement(
            prompt_id=str(i),
            candidate_ids=("a", "b", "c"),
            judge="j",
            state="ok",
            scores=by_candidate,
            answers=(Answer(order=order, state="ok", scores=points, judge="j"),),
        )
        told = {"a": Response(5, "policy"), "b": Response(6, "policy"), "c": Response(7, "gold")}
        quality.add(judgement, responses=told)
    return quality.figures()


def test_one_iteration_in_full(figures):
    text = shown(quality_table(figures, QualitySection(), iteration=3))
    assert "judge of iteration 3" in text
    lines = {line.strip().split("  ")[0]: line for line in text.splitlines()}
    assert lines["P(first shown wins)"].split()[3:] == ["1.000", "0.940", "to", "1.000", "120", "0.5", "+-", "0.05"]
    assert lines["P(first shown on top)"].split()[-2:] == ["chance", "0.333"]
    assert lines["tie rate"].split()[-2:] == ["<=", "0.5"]
    assert "order-flip rate" not in lines  # each list was shown in one order
    assert lines["points of gold"].split()[3:] == ["2.500", "1", "██", "6", "60"]  # ones and fours, no six
    assert lines["points of student"].split()[3:] == ["4.250", "1", "▄▄█", "6", "120"]
    assert "by place shown: +2.33 -1.17 -1.17" in text
    assert "warning: P(first shown wins) is 1.00" in text


def test_iterations_in_a_line_each(figures):
    fair = {name: figure for name, figure in figures.items() if name == "tie_rate"}
    text = shown(quality_lines({0: figures, 1: fair}, QualitySection()))
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["ties", "first", "longer", "gold"]
    assert lines[2][:4] == ["0", "0", "[0,", "6]"]
    assert lines[3] == ["1", "0", "[0,", "6]"]  # what was not measured is left blank
    assert "warning" not in text  # the last iteration's, which has none
    assert "warning: P(first shown wins)" in shown(quality_lines({0: figures}, QualitySection()))
    assert shown(quality_lines({}, QualitySection())).strip() == ""


def test_every_figure_of_an_iteration_is_whole_in_80_columns():
    names = ("flip_rate", "tie_rate", "first_wins", "longer_wins", "repeat_agreement", "calibration_agreement",
             "cyclic_share", "gold_wins")  # fmt: skip
    figure = {"value": 1.0, "low": 0.995, "high": 1.0, "n": 7, "prompts": 7}
    text = shown(quality_lines({12: dict.fromkeys(names, figure)}, QualitySection()), width=80)
    assert text.count("100 [100, 100]") == len(names)
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines if "[100," in line] == ["12", "12"]
    assert ["flips", "ties", "first", "longer"] in lines


def test_the_summary_of_a_run_tells_of_its_judge(tmp_path, figures):
    config = RunConfig.model_validate(
        {
            "run_dir": str(tmp_path),
            "iterations": 2,
            "model": {"path": "m"},
            "prompts": {"path": "p"},
            "annotation": {"kind": "openai"},
        }
    )
    run_dir = RunDir(tmp_path)
    assert "judge" not in shown(iteration_table(run_dir, config))
    stage = run_dir.stage("annotate", 0)
    stage.finish(config, inputs={}, rows=0, seconds=0.0, details={"judge": "j", "quality": figures})
    text = shown(iteration_table(run_dir, config))
    assert "judge: % with 95 % intervals" in text
    assert "100 [94, 100]" in text
    assert "warning: P(first shown wins) is 1.00" in text


def test_the_report_is_one_file_in_which_nothing_is_markup_but_its_own(tmp_path, figures):
    tree = {"run_dir": str(tmp_path), "iterations": 2, "model": {"path": "m"}, "prompts": {"path": "p"}}
    config = RunConfig.model_validate(tree | {"annotation": {"kind": "openai"}})
    run_dir = RunDir(tmp_path)
    write_report(run_dir, config)  # nothing has been judged
    details = {"judge": "<script>alert(1)</script>", "quality": figures, "warnings": []}
    run_dir.stage("annotate", 0).finish(config, inputs={}, rows=0, seconds=0.0, details=details)
    rate = {"rate": 0.625, "low": 0.5, "high": 0.75}
    won = {"policy": 1, "best": 1, "why": "it won", "win_rates": {"0": rate, "gold": None}, "lengths": {}}
    run_dir.stage("evaluate", 0).finish(config, inputs={}, rows=0, seconds=0.0, details=won)
    run_dir.receipts_path.write_text('{"usd": 12.5, "stores": {}}')
    write_report(run_dir, config)
    text = run_dir.report_path.read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "warning: P(first shown wins) is 1.00 [0.94, 1.00]" in text
    for said in ("Iteration 0", "P(first shown wins)", "0.940 to 1.000", "points of gold", "0.625", "$12.50"):
        assert said in text
    assert "Iteration 1" not in text


def test_scalars_for_metrics(figures):
    found = scalars(figures)
    assert found["first_wins"] == 1.0
    assert (found["score_gold"], found["score_student"]) == (2.5, 4.25)
    assert all(isinstance(number, float) for number in found.values())
    assert scalars({}) == {}


@pytest.mark.parametrize("kind", ["gold", "given"])
def test_where_nobody_judges_there_are_no_figures_and_no_warnings(kind, figures, tmp_path, capsys):
    """What wins by definition always wins: that says nothing of a judge."""

    class Skewed(Quality):
        def figures(self):
            return figures

    run_dir = RunDir(str(tmp_path / "run"))
    details = tell_quality(run_dir, Skewed(), AnnotationSection(kind=kind), iteration=0)
    assert details == {"quality": {}, "warnings": []}
    assert capsys.readouterr().err == ""
    assert not run_dir.metrics_path.exists()
    assert tell_quality(run_dir, Skewed(), AnnotationSection(kind="oracle"), iteration=0)["warnings"]
