"""The report in a browser: nothing is logged or asked for, everything is drawn, keys work, no text acts."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from dno_jax.display import printable
from dno_jax.report import plots
from dno_jax.report.page import write_report
from dno_jax.run_dir import RunDir
from tests.end_to_end.processes import start
from tests.report.chromium import READY, SHOWN, chromium, opened
from tests.report.synthetic import HOSTILE, build

pytestmark = [pytest.mark.soak, pytest.mark.skipif(chromium() is None, reason="chromium is not installed")]
ROOT = Path(__file__).parents[2]
COUNT = "document.getElementById('count').textContent"
CHOSEN = "document.querySelector('[aria-selected=true]').textContent"
FOCUS = "document.activeElement.id"
ANSWERS = "[...document.querySelectorAll('.answer p')].map((p) => p.textContent)"


def in_browser(work):
    program = chromium()
    assert program is not None

    async def run():
        async with opened(program) as tab:
            await tab.look()
            return await work(tab)

    return asyncio.run(run())


def page_of(run):
    config, run_dir = run
    return Path(write_report(run_dir, config))


def until():
    return READY if plots.installed() else SHOWN


def quiet(tab, page):
    assert tab.logged == []
    assert tab.requests == [page.resolve().as_uri()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo as a newcomer runs it, one iteration of it."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    done = start("run", ROOT / "configs/demo.yaml", f"run_dir={folder}", "iterations=1", timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"report: {folder}/report.html" in done.stdout
    run_dir = RunDir(folder)
    return run_dir.load_config(), run_dir


@pytest.mark.parametrize("kind", ["whole", "hostile", "demo"])
def test_it_opens_quietly_and_draws_every_plot(kind, request):
    page = page_of(request.getfixturevalue(kind))

    async def work(tab):
        for width, dark in ((1280, False), (1280, True), (390, False), (390, True)):
            await tab.look(width=width, dark=dark)
            await tab.open(page, until=until())
            drawn = await tab.evaluate(
                "[...document.querySelectorAll('.plot')].map((p) => "
                "[p.dataset.name, p.querySelectorAll('svg .role-mark path, svg .role-mark line').length])"
            )
            assert bool(drawn) == plots.installed()
            assert [name for name, marks in drawn if not marks] == []
            wide = await tab.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, "the page scrolls sideways"
            quiet(tab, page)
            tab.events.clear()
            assert await tab.evaluate("typeof window.owned") == "undefined"
            if folder := os.environ.get("DNO_TEST_PICTURES"):
                name = f"{kind}-{width}-{'dark' if dark else 'light'}.png"
                await tab.picture(Path(folder) / name)

    in_browser(work)


def test_samples_are_searched_filtered_and_walked_by_keyboard(tmp_path):
    page = page_of(build(tmp_path, prompts=140, held_out=6))

    async def settled(tab, said):
        for _ in range(200):
            if (await tab.evaluate(COUNT)).startswith(said):
                return
            await asyncio.sleep(0.05)
        raise AssertionError((said, await tab.evaluate(COUNT)))

    async def work(tab):
        await tab.open(page, until=until())
        await settled(tab, "146 of 146")
        assert "h0" in await tab.evaluate(CHOSEN)
        await tab.press("j", "j", "k")
        assert "h1" in await tab.evaluate(CHOSEN)
        await tab.press("/")
        assert await tab.evaluate(FOCUS) == "words"
        await tab.press("p139")
        await settled(tab, "1 of 146")
        assert "p139" in await tab.evaluate(CHOSEN)
        assert len(await tab.evaluate(ANSWERS)) == 4
        await tab.press("j")  # a letter of the search
        await settled(tab, "0 of 146")
        await tab.press("Escape")
        assert await tab.evaluate(FOCUS) == "list"
        await tab.evaluate("document.getElementById('words').value = ''")
        await tab.evaluate("document.getElementById('place').focus()")
        await tab.press("h")  # a select takes the option that begins so
        await settled(tab, "6 of 146")
        await tab.evaluate("document.getElementById('place').value = 'iteration 1'")
        await tab.evaluate("document.getElementById('place').dispatchEvent(new Event('change'))")
        await settled(tab, "70 of 146")
        await tab.evaluate("document.getElementById('list').focus()")
        await tab.press("End")  # beyond the first page of the list
        assert "p139" in await tab.evaluate(CHOSEN)
        await tab.press("ArrowUp")
        assert "p137" in await tab.evaluate(CHOSEN)
        await tab.press("Home", "ArrowDown")
        assert "p3" in await tab.evaluate(CHOSEN)
        for only, count in (("cut", 70), ("pairs", 70), ("unjudged", 0), ("judge", 70), ("better", 0)):
            await tab.evaluate(f"document.getElementById('only').value = '{only}'")
            await tab.evaluate("document.getElementById('only').dispatchEvent(new Event('change'))")
            await settled(tab, f"{count} of 146")
        quiet(tab, page)

    in_browser(work)


def test_hostile_words_are_shown_as_words(hostile):
    page = page_of(hostile)

    async def work(tab):
        await tab.open(page, until=until())
        seen = set()
        for _ in range(28):
            seen.update(await tab.evaluate(ANSWERS))
            assert await tab.evaluate("document.querySelectorAll('#shown script, #shown img, #shown a').length") == 0
            await tab.press("j")
        assert {printable(text) for text in HOSTILE} <= seen
        assert any(text.endswith("996,000 more characters") for text in seen)
        assert await tab.evaluate("typeof window.owned") == "undefined"
        assert (await tab.evaluate("document.title")).startswith(printable("<b>run\x1b[31m"))
        # What a text would need, if it ever became code, the page itself may not do either.
        assert await tab.evaluate("fetch('data:,x').then(() => 'fetched', () => 'refused')") == "refused"
        inline = "const s = document.createElement('script'); s.textContent = 'window.owned = 1';"
        assert (
            await tab.evaluate(f"(() => {{ {inline} document.body.append(s); return typeof window.owned }})()")
            == "undefined"
        )

    in_browser(work)


def test_it_is_read_without_scripts_and_printed(whole):
    page = page_of(whole)

    async def work(tab):
        await tab.call("Emulation.setScriptExecutionDisabled", value=True)
        await tab.call("Page.navigate", url=page.resolve().as_uri())
        await asyncio.sleep(1.0)
        printed = await tab.call("Page.printToPDF")
        assert len(printed["data"]) > 20_000
        assert tab.logged == []

    in_browser(work)
