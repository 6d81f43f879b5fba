"""`dno game`: its table against docs/theory.md, its plot, its messages."""

import sys

import numpy as np
import pytest

from dno_jax import games
from dno_jax.cli import main as cli
from dno_jax.errors import DnoError
from dno_jax.report import game as report

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.fixture
def dno_game(monkeypatch, capsys):
    """Run the command; return its exit status and what it said."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dno", "game", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out + captured.err

    return run


def rows(said):
    """The table as {first cell: other cells}; a sampled row is named after the one above it."""
    found, name = {}, ""
    for line in said.splitlines():
        cells = line.split()
        if not cells:
            continue
        if cells[:2] == ["from", "samples"]:
            found[f"{name} sampled"] = cells[2:]
        elif cells[0] in games.ALGORITHMS:
            name = cells[0]
            found[name] = cells[1:]
    return found


def test_the_default_table_tells_who_reaches_the_nash_policy(dno_game):
    code, said = dno_game()
    assert code == 0
    table = rows(said)
    assert set(table) == set(report.DEFAULT_ALGORITHMS)
    assert table["dno"] == ["5", "0.58", "0.0049"]
    for name in ("onpo", "comal", "mpo"):
        gap, _ = map(float, table[name][-2:])
        assert gap < 1e-6
    _, tau, gap, _, distance, aim = table["dno_option_1"]
    assert (tau, gap, aim) == ("0.1", "0.078", "0.078")
    assert float(distance) < 1e-12
    _, _, gap, _, distance, _ = table["dno_option_2"]
    assert (gap, distance) == ("0.095", "0.00058")
    assert float(table["reward_maximisation"][1]) > 0.5
    assert "Nash policy  0: 0.3636, 1: 0.2727, 2: 0.3636" in said
    assert "in a run: outer.scheme=proximal with reference.tau >= 0.1" in " ".join(said.split())


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_plot_is_written_in_the_format_of_its_suffix_and_nothing_beside_it(dno_game, tmp_path, suffix):
    out = tmp_path / "new" / f"gaps{suffix}"
    code, said = dno_game("--iterations", 20, "--out", out)
    assert code == 0
    assert str(out) in "".join(said.split())
    assert out.read_bytes().startswith(MAGIC[suffix])
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_plot_without_matplotlib_is_refused_before_anything_is_played(dno_game, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # imports fail as where it is not installed
    monkeypatch.setattr(report, "play", None)
    code, said = dno_game("--out", tmp_path / "gaps.svg")
    assert code == 2
    assert "needs matplotlib, which is not installed: pip install 'dno_jax[plot]'" in " ".join(said.split())


def test_gaps_of_zero_do_not_break_the_log_axes(tmp_path):
    P = games.rock_paper_scissors()
    played = report.play(
        P,
        algorithms=["dno"],
        iterations=5,
        eta=None,
        tau=None,
        start=np.full(3, 1 / 3),
    )
    assert played[0].solution.gaps.min() <= 1e-15
    report.save_plot(played, tmp_path / "zero.svg", title="zero")
    assert (tmp_path / "zero.svg").stat().st_size > 1000


def test_a_plot_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    out = tmp_path / "gaps.png"
    out.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(DnoError, match=r"--out .*gaps.png cannot be written: No space left"):
        report.save_plot([], out, title="")
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    "arguments",
    [
        "--game rps --strength 0.5",
        "--game random --num-responses 6 --seed 3",
        "--game bradley-terry --strength 2 --num-responses 4",
        "--game contextual --num-responses 3 --start .2,.3,.5",
        f"--algorithms {','.join(games.ALGORITHMS)} --eta 2 --tau 0.2",
        f"--algorithms {','.join(games.ALGORITHMS)}",
    ],
)
def test_every_game_and_algorithm_can_be_played(dno_game, arguments):
    code, said = dno_game("--iterations", 10, *arguments.split())
    assert code == 0
    wanted = games.ALGORITHMS if "--algorithms" in arguments else report.DEFAULT_ALGORITHMS
    assert set(rows(said)) == set(wanted)
    assert said.count("Nash policy of prompt") == (report.NUM_PROMPTS if "contextual" in arguments else 0)


def test_the_sampled_rows_stand_below_the_exact_ones(dno_game, tmp_path):
    out = tmp_path / "gaps.svg"
    code, said = dno_game(
        "--sampled", "--algorithms", "dno,nash_md", "--iterations", 30, "--pairs", 4096, "--samples", 4, "--out", out
    )  # fmt: skip
    assert code == 0
    table = rows(said)
    assert list(table) == ["dno", "dno sampled", "nash_md", "nash_md sampled"]
    assert float(table["dno sampled"][1]) == pytest.approx(float(table["dno"][1]), abs=0.03)
    assert table["nash_md"][:2] == ["schedule", "0.1"]
    assert table["nash_md sampled"][:2] == ["1", "0.1"]
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--game chess", "--game is 'chess'; choose one of cycle, rps, random, bradley-terry, contextual"),
        ("--game rps --strength 2", "--game rps: strength must be in [0, 1], got 2.0; change --strength"),
        ("--game random --num-responses 1", "--game random: a game needs at least two responses"),
        ("--num-responses 4", "--num-responses is 4, but the game cycle always has 3"),
        ("--strength 0.5", "--strength is 0.5, but the game cycle is fixed"),
        ("--algorithms dno,ppo", "--algorithms names 'ppo'; there are dno"),
        ("--algorithms dno --tau 0.1", "--tau is 0.1, but none of dno has a tau"),
        ("--tau 2", "--algorithms dno_option_1: tau must be at most eta"),
        ("--sampled --algorithms nash_md --tau 2", "--algorithms nash_md: tau must be at most eta"),
        ("--eta -1", "--algorithms dno: eta must be a positive number, got -1.0"),
        ("--iterations 0", "--iterations is 0; it must be at least 1"),
        ("--sampled --pairs 0", "--pairs is 0; it must be at least 1"),
        ("--sampled --samples 1", "--samples is 1; it must be at least 2"),
        ("--start .5,.5", "--start is '.5,.5': it must have shape (3,)"),
        ("--start .5,.5,.5", "it must be probabilities that sum to 1"),
        ("--start 1,0,0", "it must give every response a positive probability"),
        ("--start a,b,c", "give 3 positive, comma-separated probabilities that sum to 1"),
        ("--out gaps.txt", "--out is 'gaps.txt'; its suffix says the format and must be one of .svg, .png, .pdf"),
    ],
)
def test_bad_input_is_named_with_its_mend(dno_game, arguments, message):
    code, said = dno_game(*arguments.split())
    assert code == 2
    assert said.startswith("dno: ")
    assert message in said
