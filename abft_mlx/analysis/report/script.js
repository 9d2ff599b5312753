"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const all = (where, what) => Array.from(where.querySelectorAll(what));
  const one = (where, what) => where.querySelector(what);
  const percent = (value) => (value === null ? "–" : (100 * value).toFixed(1).replace("-", "−") + "%");
  document.documentElement.classList.add("js");

  // Buttons that copy; where the browser does not let a file copy, the text is selected.
  all(document, "[data-copy]").forEach((button) => {
    button.addEventListener("click", async () => {
      const text = document.getElementById(button.dataset.copy);
      const told = one(button.parentNode, ".copied");
      try {
        await navigator.clipboard.writeText(text.textContent);
        told.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(text);
        told.textContent = "selected: copy it with the keyboard";
      }
    });
  });

  addEventListener("beforeprint", () => {
    all(document, "details").forEach((part) => { part.open = true; });
  });

  const panel = document.getElementById("attention-panel");
  if (!panel || !data) return;
  const heads = data;
  const cells = all(panel, ".map tbody td");
  const scale = one(panel, ".scale");
  const headReading = one(panel, ".head-reading");
  const examples = all(panel, ".example").map((element, n) => ({
    element,
    ...heads.examples[n],
    spans: Object.fromEntries(
      all(element, ".tokens").map((text) => [text.dataset.state, Array.from(text.children)]),
    ),
    rows: null,
    token: -1,
  }));
  let kept = heads.start;
  let shown = kept;
  let chosen = 0;

  const layer = (head) => Math.floor(head / heads.heads);
  const name = (head) => "layer " + layer(head) + ", head " + (head % heads.heads);
  const picked = (group) => one(panel, `input[name=${group}]:checked`)?.value;

  // The map: values of one measure in one state, or what changed.
  const last = heads.states[heads.states.length - 1];
  const values = () => {
    const measure = heads.measures[picked("measure")];
    const state = picked("state") || last;
    if (state !== "change") return measure.values[state];
    const before = measure.values[heads.states[0]];
    return measure.values[last].map((value, n) =>
      value === null || before[n] === null ? null : value - before[n]);
  };
  const colour = () => {
    const measure = heads.measures[picked("measure")];
    const state = picked("state") || last;
    const change = state === "change";
    const signed = change || measure.signed;
    const now = values();
    const range = change ? now : Object.values(measure.values).flat();
    const most = range.reduce((top, value) => Math.max(top, Math.abs(value ?? 0)), 0);
    cells.forEach((cell, n) => {
      const value = now[n];
      const told = value === null ? "no head" : (change && value > 0 ? "+" : "") + percent(value);
      cell.style.setProperty("--a", most && value !== null ? Math.abs(value) / most : 0);
      cell.classList.toggle("minus", value < 0);
      cell.classList.toggle("none", value === null);
      cell.setAttribute("aria-label", name(n) + ": " + told);
    });
    scale.classList.toggle("signed", signed);
    one(scale, ".low").textContent = signed ? "−" + (100 * most).toFixed(0) + "%" : "0%";
    one(scale, ".high").textContent = (signed ? "+" : "") + (100 * most).toFixed(0) + "%";
    const when = change ? "change from " + heads.states[0] + " to " + last : state;
    one(scale, ".what").textContent =
      measure.what + ", " + when +
      (measure.mean ? ", mean of " + heads.prompts.toLocaleString("en") + " prompts" : "") +
      (signed ? "; hatched is below 0" : "");
  };

  // A prompt's rows are unpacked when they are first looked at.
  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  const load = async (example) => {
    if (example.rows) return;
    const rows = {};
    for (const [state, packed] of Object.entries(example.states)) {
      rows[state] = await unpack(packed.rows);
    }
    example.rows = rows;
  };

  const attention = (example, state, head, token) =>
    example.rows[state][head * example.tokens + token] * (example.states[state].scales[head] ?? 0);

  const readToken = (example) => {
    const reading = one(example.element, ".token-reading");
    all(example.element, ".token.current").forEach((span) => span.classList.remove("current"));
    const n = example.token;
    if (n < 0 || !example.rows) return;
    const states = Object.keys(example.spans);
    states.forEach((state) => example.spans[state][n].classList.add("current"));
    const span = example.spans[states[0]][n];
    const word = (one(span, "bdi") || span).textContent.trim() || "space";
    const told = states.map((state) => {
      const empty = example.states[state].scales[shown] === null;
      return state + " " + percent(empty ? null : attention(example, state, shown, n));
    });
    const mark = one(span, ".unseen")?.textContent ?? "";
    reading.textContent =
      "token " + n + " “" + word + "”" + mark + ", " + name(shown) + ": " + told.join(" → ");
  };

  const light = (example) => {
    if (!example.rows) return;
    const states = Object.keys(example.spans);
    const scales = states.map((state) => example.states[state].scales[shown] ?? 0);
    const most = 255 * Math.max(...scales, 0);
    states.forEach((state) => {
      const { scales: all_, right, wrong } = example.states[state];
      const missing = all_[shown] === null;
      example.spans[state].forEach((span, n) => {
        const value = attention(example, state, shown, n);
        span.style.setProperty("--a", most ? (value / most).toFixed(3) : 0);
        if (span.dataset.at !== undefined) {
          one(span, "small").textContent = percent(missing ? null : value);
        }
      });
      const sums = { right: right[shown], wrong: wrong[shown] };
      sums.labels = missing ? null : sums.right + sums.wrong;
      for (const [row, value] of Object.entries(sums)) {
        one(example.element, `[data-row=${row}] [data-state="${CSS.escape(state)}"]`).textContent = percent(value);
      }
    });
    one(example.element, ".which").textContent = name(shown);
    readToken(example);
  };

  const tell = () => {
    const parts = Object.values(heads.measures).map((measure) =>
      measure.name + " " +
      heads.states.map((state) => percent(measure.values[state][shown])).join(" → "));
    const text = name(shown);
    headReading.textContent =
      text[0].toUpperCase() + text.slice(1) + ": " + parts.join(", ") +
      " (" + heads.prompts.toLocaleString("en") + " prompts)";
  };

  const show = (head) => {
    cells[shown].classList.remove("shown");
    shown = head;
    if (shown !== kept) cells[shown].classList.add("shown");
    tell();
    if (examples.length) light(examples[chosen]);
  };
  const keep = (head) => {
    cells[kept].setAttribute("aria-selected", "false");
    cells[kept].tabIndex = -1;
    kept = head;
    cells[kept].setAttribute("aria-selected", "true");
    cells[kept].tabIndex = 0;
    show(kept);
  };

  const map = one(panel, ".map tbody");
  const under = (event) => cells.indexOf(event.target.closest("td"));
  map.addEventListener("pointerover", (event) => {
    const head = under(event);
    if (head >= 0 && event.pointerType !== "touch") show(head);
  });
  map.addEventListener("pointerleave", () => show(kept));
  map.addEventListener("click", (event) => {
    const head = under(event);
    if (head < 0) return;
    keep(head);
    cells[head].focus({ preventScroll: true });
  });
  map.addEventListener("focusin", (event) => {
    const head = under(event);
    if (head >= 0 && head !== kept) keep(head);
  });
  map.addEventListener("keydown", (event) => {
    const row = layer(kept) * heads.heads;
    const count = heads.layers * heads.heads;
    const wide = heads.heads;
    const to = {
      ArrowRight: Math.min(kept + 1, row + wide - 1),
      ArrowLeft: Math.max(kept - 1, row),
      ArrowDown: kept + wide < count ? kept + wide : kept,
      ArrowUp: kept - wide >= 0 ? kept - wide : kept,
      Home: event.ctrlKey ? 0 : row,
      End: event.ctrlKey ? count - 1 : row + wide - 1,
      PageDown: kept % wide + (heads.layers - 1) * wide,
      PageUp: kept % wide,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    keep(to);
    cells[to].focus();
  });
  all(panel, "input[name=measure], input[name=state]").forEach((input) =>
    input.addEventListener("change", colour));

  // Prompts: one at a time, its tokens by pointer and by arrow keys.
  const choose = async (n) => {
    chosen = n;
    examples.forEach((example, other) => example.element.toggleAttribute("hidden", other !== n));
    try {
      await load(examples[n]);
    } catch {
      one(examples[n].element, ".token-reading").textContent =
        "This browser cannot unpack the attention of other heads; a newer one can.";
      return;
    }
    light(examples[n]);
    panel.dataset.ready = n;
  };
  all(panel, "input[name=example]").forEach((input) =>
    input.addEventListener("change", () => choose(Number(input.value))));
  examples.forEach((example) => {
    all(example.element, ".tokens").forEach((text) => {
      text.addEventListener("pointerover", (event) => {
        const span = event.target.closest(".token");
        if (!span) return;
        example.token = Array.prototype.indexOf.call(text.children, span);
        readToken(example);
      });
      text.addEventListener("keydown", (event) => {
        const end = example.tokens - 1;
        const labels = example.labels;
        const to = {
          ArrowRight: example.token + 1,
          ArrowLeft: example.token - 1,
          ArrowDown: labels.find((at) => at > example.token) ?? example.token,
          ArrowUp: labels.findLast((at) => at < example.token) ?? example.token,
          Home: 0,
          End: end,
        }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        example.token = Math.max(0, Math.min(end, to));
        one(example.element, ".token-reading").setAttribute("aria-live", "polite");
        readToken(example);
        text.children[example.token].scrollIntoView({ block: "nearest" });
      });
    });
  });
  colour();
  keep(kept);
  if (examples.length) choose(0);
})();
