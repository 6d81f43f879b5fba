// The report's page: draws the plots, and shows the samples. It fetches nothing; words of models become text, never markup.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (name, text, kind) => {
    const found = document.createElement(name);
    if (text !== undefined) found.textContent = text;
    if (kind) found.className = kind;
    return found;
  };

  // Plots. `ast` has Vega interpret its expressions: the page allows no script to be made from text.
  const save = (name, kind, text) => {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([text], { type: kind }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const csv = (rows) => {
    const inert = (value) => (typeof value === "string" ? value.replace(/^[=+\-@\t\r]/, "'$&") : String(value ?? ""));  // no formula
    const cell = (value) => `"${inert(value).replaceAll('"', '""')}"`;
    const names = Object.keys(rows[0]);
    return [names, ...rows.map((row) => names.map((name) => row[name]))].map((row) => row.map(cell).join(",")).join("\n");
  };
  const refuse = () => Promise.reject(new Error("this page fetches nothing"));
  const draw = async (place) => {
    const name = place.dataset.name;
    const spec = JSON.parse($(`spec-${name}`).textContent);
    const longest = Math.max(...spec.datasets.rows.flatMap((row) => Object.values(row)).map((cell) => (typeof cell === "string" ? cell.length : 0)));
    spec.config.legend.columns = place.clientWidth >= 420 ? 3 : longest > 16 ? 1 : 2;  // no label is cut
    const made = await vegaEmbed(place, spec, {
      renderer: "svg", ast: true, actions: false, loader: { load: refuse, http: refuse, file: refuse },
    });
    const tools = make("div", undefined, "plot-tools");
    for (const [label, act] of [
      ["SVG", async () => save(`${name}.svg`, "image/svg+xml", await made.view.toSVG())],
      ["CSV", () => save(`${name}.csv`, "text/csv", csv(spec.datasets.rows))],
    ]) {
      const button = make("button", label);
      button.type = "button";
      button.setAttribute("aria-label", `Save ${name} as ${label}`);
      button.addEventListener("click", act);
      tools.append(button);
    }
    place.after(tools);
    place.dataset.drawn = "yes";
  };
  // One after another: those in view first, the others when the page has nothing else to do.
  const rest = (patience) => new Promise((done) => {
    if (patience && "requestIdleCallback" in window) requestIdleCallback(done, { timeout: patience });
    else setTimeout(done);
  });
  const drawAll = async () => {
    const library = $("library");
    if (!library) return;
    const waiting = new Set(document.querySelectorAll(".plot"));
    const seen = new Set();
    const observer = new IntersectionObserver(
      (entries) => entries.forEach((entry) => (entry.isIntersecting ? seen.add(entry.target) : seen.delete(entry.target))),
      { rootMargin: "25%" },
    );
    waiting.forEach((place) => observer.observe(place));
    await rest(500);
    document.body.append(make("script", library.textContent));  // it would keep the first samples waiting
    while (waiting.size) {
      const place = [...seen].find((one) => waiting.has(one)) ?? [...waiting][0];
      await rest(seen.has(place) ? 0 : 500);
      waiting.delete(place);
      await draw(place).catch((error) => console.error(place.dataset.name, error));
    }
    observer.disconnect();
    document.documentElement.dataset.plots = "drawn";
  };

  // Samples: chunks of prompts, each base64 of gzip of JSON.
  const unpack = async (element) => {
    const bytes = Uint8Array.fromBase64?.(element.textContent) ?? Uint8Array.from(atob(element.textContent), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };
  const PAGE = 50;
  const prompts = [];
  let matches = [];
  let chosen = 0;

  const words = (prompt) => {
    const texts = [prompt.i, ...prompt.m.map((turn) => turn[1]), ...prompt.a.map((one) => one.t), ...(prompt.j ?? [])];
    return texts.join("\n").toLowerCase();
  };
  const number = (writer) => (writer.startsWith("policy ") ? Number(writer.slice(7)) : -1);
  const mean = (prompt, writer) => {
    const scores = prompt.a.filter((one) => one.w === writer && one.s !== undefined).map((one) => one.s);
    return scores.length ? scores.reduce((sum, score) => sum + score, 0) / scores.length : NaN;
  };
  const gain = (prompt) => {
    const newest = Math.max(...prompt.a.map((one) => number(one.w)));
    return newest > 0 ? mean(prompt, `policy ${newest}`) - mean(prompt, "policy 0") : NaN;
  };
  const TESTS = {
    pairs: (prompt) => prompt.a.some((one) => one.c || one.r),
    cut: (prompt) => prompt.a.some((one) => one.f),
    better: (prompt) => gain(prompt) > 0,
    worse: (prompt) => gain(prompt) < 0,
    teacher: (prompt) => prompt.a.every((one) => one.w === "the teacher" || !(one.s >= mean(prompt, "the teacher"))) && prompt.a.some((one) => one.w === "the teacher" && one.s !== undefined),
    unjudged: (prompt) => prompt.u !== undefined || prompt.a.every((one) => one.s === undefined),
    judge: (prompt) => (prompt.j ?? []).length > 0,
  };

  // Where more prompts have come, the chosen one stays: they come behind it.
  const filter = (keep) => {
    const asked = $("words").value.trim().toLowerCase();
    const place = $("place").value;
    const test = TESTS[$("only").value];
    matches = prompts.filter(
      (prompt) => (!place || prompt.p === place) && (!test || test(prompt)) && (!asked || (prompt.words ??= words(prompt)).includes(asked)),
    );
    if (!keep) chosen = 0;
    list();
    $("count").textContent = `${matches.length.toLocaleString("en")} of ${prompts.length.toLocaleString("en")} prompts.`;
  };
  const list = () => {
    const first = Math.floor(chosen / PAGE) * PAGE;
    const rows = matches.slice(first, first + PAGE).map((prompt, index) => {
      const row = make("li");
      row.id = `prompt-${first + index}`;
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", String(first + index === chosen));
      row.dir = "auto";
      const last = prompt.m.length ? prompt.m[prompt.m.length - 1][1] : prompt.i;
      row.append(make("small", `${prompt.p} · ${prompt.i}`), make("span", last.slice(0, 90)));
      row.addEventListener("click", () => choose(first + index));
      return row;
    });
    $("list").replaceChildren(...rows);
    $("earlier").disabled = first === 0;
    $("later").disabled = first + PAGE >= matches.length;
    if (rows.length) $("list").setAttribute("aria-activedescendant", `prompt-${chosen}`);
    else $("list").removeAttribute("aria-activedescendant");
    show(matches[chosen]);
  };
  const choose = (index) => {
    if (!matches.length) return;
    const before = chosen;
    chosen = Math.min(Math.max(index, 0), matches.length - 1);
    if (Math.floor(before / PAGE) !== Math.floor(chosen / PAGE)) {
      list();
    } else {
      $(`prompt-${before}`).setAttribute("aria-selected", "false");
      $(`prompt-${chosen}`).setAttribute("aria-selected", "true");
      $("list").setAttribute("aria-activedescendant", `prompt-${chosen}`);
      show(matches[chosen]);
    }
    const row = $(`prompt-${chosen}`);
    const box = $("list");
    if (row.offsetTop < box.scrollTop + box.offsetTop) box.scrollTop = row.offsetTop - box.offsetTop;
    const below = row.offsetTop + row.offsetHeight - box.offsetTop - box.clientHeight;
    if (below > box.scrollTop) box.scrollTop = below;
  };

  const answer = (one) => {
    const card = make("div", undefined, "answer");
    const facts = make("div", undefined, "facts");
    if (one.s !== undefined) facts.append(make("span", `score ${one.s}`));
    if (one.k !== undefined) facts.append(make("span", `${one.k.toLocaleString("en")} tokens`));
    if (one.c) facts.append(make("span", `chosen ${one.c}×`, "won"));
    if (one.r) facts.append(make("span", `rejected ${one.r}×`, "lost"));
    if (one.f) facts.append(make("span", "cut", "cut"));
    const text = make("p", one.t || "(empty)");
    text.dir = "auto";
    card.append(facts, text);
    return card;
  };
  let current;
  const show = (prompt) => {
    if (prompt && prompt === current) return;  // it may be scrolled
    current = prompt;
    const place = $("shown");
    place.scrollTop = 0;
    if (!prompt) return place.replaceChildren(make("p", "No prompt is like that."));
    const parts = [make("h3", `${prompt.p} · ${prompt.i}`)];
    for (const [role, text] of [...prompt.m, ...(prompt.b ? [["assistant begins", prompt.b]] : [])]) {
      const turn = make("div", undefined, "turn");
      const said = make("bdi", text);
      turn.dir = "auto";
      turn.append(make("b", role), said);
      parts.push(turn);
    }
    const answers = make("div", undefined, "answers");
    const writers = [...new Set(prompt.a.map((one) => one.w))].sort((a, b) => number(a) - number(b) || a.localeCompare(b));
    for (const writer of [...writers.filter((name) => number(name) >= 0), ...writers.filter((name) => number(name) < 0)]) {
      const column = make("div", undefined, "writer");
      column.append(make("h4", writer), ...prompt.a.filter((one) => one.w === writer).map(answer));
      answers.append(column);
    }
    parts.push(answers);
    if (prompt.u) parts.push(make("p", `No verdict: ${prompt.u}`, "warning"));
    if (prompt.j) {
      const said = make("details");
      said.append(make("summary", "What the judge said"), ...prompt.j.map((text) => Object.assign(make("pre", text), { dir: "auto" })));
      said.open = true;
      parts.push(said);
    }
    place.replaceChildren(...parts);
  };

  const isTyping = (element) => ["INPUT", "SELECT", "TEXTAREA"].includes(element.tagName);
  const keys = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = isTyping(event.target);
    if (event.key === "Escape" && typing) {
      $("list").focus();
    } else if (!typing && event.key === "/") {
      $("words").focus();
    } else if (!typing && event.key === "j") {
      choose(chosen + 1);
    } else if (!typing && event.key === "k") {
      choose(chosen - 1);
    } else if (event.target.id === "list" && ["ArrowDown", "ArrowUp", "Home", "End", "PageDown", "PageUp"].includes(event.key)) {
      const to = { ArrowDown: chosen + 1, ArrowUp: chosen - 1, Home: 0, End: matches.length - 1, PageDown: chosen + 10, PageUp: chosen - 10 };
      choose(to[event.key]);
    } else {
      return;
    }
    event.preventDefault();
  };
  // Shows the first samples; returns what unpacks the others, which a search does at once.
  const browse = async () => {
    const chunks = [...document.querySelectorAll("script.chunk")];
    if (!chunks.length) return undefined;
    if (!("DecompressionStream" in window)) {
      $("count").textContent = "This browser is too old to show the samples (it has no DecompressionStream).";
      return undefined;
    }
    const said = $("count").textContent;  // of all prompts, most of which are still packed
    prompts.push(...(await unpack(chunks[0])));
    $("filter").hidden = $("browser").hidden = false;
    filter();
    $("count").textContent = said;
    let all;
    const unpackAll = () => (all ??= (async () => {
      for (const chunk of chunks.slice(1)) {
        prompts.push(...(await unpack(chunk)));
        chunk.remove();
      }
      filter(true);
      document.documentElement.dataset.samples = "shown";
    })());
    const search = async () => {
      await unpackAll();
      filter();
    };
    let waiting;
    $("words").addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(search, 120);
    });
    for (const id of ["place", "only"]) $(id).addEventListener("change", search);
    $("filter").addEventListener("submit", (event) => event.preventDefault());
    $("earlier").addEventListener("click", () => choose((Math.floor(chosen / PAGE) - 1) * PAGE));
    $("later").addEventListener("click", () => choose((Math.floor(chosen / PAGE) + 1) * PAGE));
    document.addEventListener("keydown", keys);
    return unpackAll;
  };

  const open = async () => {
    const unpackAll = await browse().catch((error) => console.error("samples", error));
    await drawAll();
    await unpackAll?.();
  };
  open().catch((error) => console.error(error));
})();
