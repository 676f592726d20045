// The page: what is selected, and everything that follows from it.

const data = JSON.parse(document.getElementById("trace").textContent);
const state = { prompt: 0, run: 0, token: 0 };
let tokens = [];
let pointed = null;
let tokenAtPlace = null;
const part = (id) => document.getElementById(id);
const here = () => data.prompts[state.prompt];

/** The responses that stand beside each other: all, but of a search the selected one. */
function shownRuns() {
  return here().method === null ? here().runs.map((_, i) => i) : [state.run];
}

function lineOf(run) {
  if (here().method !== null) return "second";
  return here().runs[run].guided || here().runs.length === 1 ? "second" : run === 0 ? "first" : "second";
}

/** Where the first two responses differ first; null where they do not, or are no two. */
function parting() {
  const prompt = here();
  if (prompt.method !== null || prompt.runs.length < 2) return null;
  const ids = prompt.runs.slice(0, 2).map((run) => run.path.map((_, i) => tokenAt(prompt, run, i).id));
  const at = ids[0].findIndex((id, i) => id !== ids[1][i]);
  if (at >= 0) return at < ids[1].length ? at : null;
  return null;
}

function showHead() {
  part("about").textContent = `Policy ${label(data.policy)}, scorer ${label(data.scorer)}`;
  const words = (record) => Object.entries(record).map(([key, value]) => label(`${key} ${value}`)).join(", ");
  const drawn = words(data.decoding);
  part("settings").textContent = `Guidance: ${words(data.guidance)}.${drawn && " Decoding: " + drawn + "."}`;
  const select = part("prompts");
  data.prompts.forEach((prompt, i) => {
    const text = prompt.messages.length ? prompt.messages[prompt.messages.length - 1][1] : "";
    select.append(make("option", { value: i }, label(excerpt(`${prompt.name || i + 1}: ${text}`))));
  });
  part("choose-prompt").hidden = data.prompts.length < 2;
  select.addEventListener("change", () => showPrompt(Number(select.value)));
}

function showLegend() {
  const swatches = [];
  for (const each of [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]) {
    swatches.push(make("span", { class: "swatch " + shade(each * data.scale), "aria-hidden": "true" }));
  }
  part("legend").append(make("span", {}, "Advantage of the token that was taken:"),
    make("span", {}, number(-data.scale, true)), make("span", {}, ...swatches),
    make("span", {}, number(data.scale, true)),
    make("span", {}, "(solid line: above 0, dashed: below 0, dotted: no advantage)"));
}

/** The token with the largest advantage either way: the first to look at. */
function telling(run) {
  const far = run.path.map((_, t) => Math.abs(tokenAt(here(), run, t).advantage || 0));
  return far.indexOf(Math.max(...far));
}

function showPrompt(i) {
  state.prompt = i;
  pointed = null;
  const prompt = here();
  const at = parting();
  state.run = prompt.chosen === null ? Math.max(prompt.runs.findIndex((run) => run.guided), 0) : prompt.chosen;
  state.token = at === null ? telling(prompt.runs[state.run]) : at;
  clear(part("prompt"));
  for (const [role, text] of prompt.messages) {
    part("prompt").append(make("div", { class: "message" }, make("div", { class: "role" }, role),
      put(make("div", { class: "words", dir: "auto", tabindex: "0" }), text, true)));
  }
  part("search-section").hidden = prompt.method === null;
  part("search-about").textContent = prompt.method === null ? ""
    : `${label(prompt.method)}: ${plural(prompt.runs.length, "response", "responses")}`;
  clear(part("parting"));
  part("parting").hidden = at === null;
  if (at !== null) {
    const button = make("button", { type: "button" }, `token ${at + 1}`);
    button.addEventListener("click", () => select(state.run, at, true));
    part("parting").append(`${label(prompt.runs[0].name)} and ${label(prompt.runs[1].name)} part at `, button);
  }
  showResponses();
  update();
}

function showResponses() {
  tokens = [];
  clear(part("responses"));
  for (const i of shownRuns()) {
    const run = here().runs[i];
    const list = make("div", { class: "tokens", role: "listbox", tabindex: "0", dir: "auto",
      "aria-label": `Tokens of ${label(run.name)}`, "aria-describedby": "hint", "data-run": i });
    tokens[i] = run.pieces.map((piece, t) => option(run, i, t, piece));
    list.append(...tokens[i]);
    list.addEventListener("keydown", (event) => move(event, i, list));
    list.addEventListener("focus", () => state.run === i || select(i, Math.min(state.token, run.path.length - 1)));
    part("responses").append(make("article", { class: "response" }, make("h3", {}, label(run.name)),
      make("p", { class: "facts" }, facts(run)), list));
  }
}

function option(run, i, t, piece) {
  const { advantage } = tokenAt(here(), run, t);
  const worth = advantage === null ? "no advantage" : `advantage ${number(advantage, true)}`;
  const element = put(make("span", { id: `token-${i}-${t}`, role: "option", "aria-selected": "false",
    class: `token ${shade(advantage)}`.trim(), "data-token": t,
    "aria-label": `${label(piece)}, ${worth}` }), piece, true);
  if (piece === "") element.append("\u22ef");
  element.addEventListener("click", () => select(i, t, true));
  element.addEventListener("mouseenter", () => point(i, t));
  element.addEventListener("mouseleave", () => point(null));
  return element;
}

/** The token that is spoken of: the one under the pointer, else the selected one. */
function showTable() {
  const { run, token } = pointed || state;
  clear(part("table")).append(table(here(), here().runs[run], token));
  const words = sentence(here(), here().runs[run], token);
  part("which").textContent = words;
  // What the pointer passes is not read out.
  if (!pointed) part("said").textContent = words;
}

function point(run, token) {
  if (pointed && tokens[pointed.run]) tokens[pointed.run][pointed.token].classList.remove("pointed");
  pointed = run === null ? null : { run, token };
  if (pointed) tokens[run][token].classList.add("pointed");
  showTable();
}

function select(run, token, focus) {
  point(null);
  const other = here().method !== null && run !== state.run;
  state.run = run;
  state.token = Math.max(0, Math.min(token, here().runs[run].path.length - 1));
  if (other) showResponses();
  update();
  if (!focus) return;
  const list = tokens[run][state.token].parentElement;
  list.focus({ preventScroll: true });
  keepInView(tokens[run][state.token], list);
}

/** No further than it takes: the list first, then the page, where the panel may cover its foot. */
function keepInView(token, list) {
  const room = 8;
  const frame = list.getBoundingClientRect();
  let own = token.getBoundingClientRect();
  if (own.top < frame.top) list.scrollTop -= frame.top - own.top + room;
  if (own.bottom > frame.bottom) list.scrollTop += own.bottom - frame.bottom + room;
  own = token.getBoundingClientRect();
  const panel = part("panel");
  const stays = getComputedStyle(panel).position === "sticky";
  const foot = stays ? panel.getBoundingClientRect().top : window.innerHeight;
  if (own.bottom > foot) window.scrollBy(0, own.bottom - foot + room);
  if (own.top < 0) window.scrollBy(0, own.top - room);
}

function move(event, run, list) {
  const across = getComputedStyle(list).direction === "rtl" ? -1 : 1;
  const shown = shownRuns();
  const beside = (by) => shown[(shown.indexOf(run) + by + shown.length) % shown.length];
  const last = here().runs[run].path.length - 1;
  const steps = {
    ArrowRight: [run, state.token + across],
    ArrowLeft: [run, state.token - across],
    ArrowDown: [beside(1), state.token],
    ArrowUp: [beside(-1), state.token],
    Home: [run, 0],
    End: [run, last],
  };
  if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(...steps[event.key], true);
}

function update() {
  for (const i of shownRuns()) {
    tokens[i].forEach((element, t) => {
      const selected = i === state.run && t === state.token;
      element.classList.toggle("selected", selected);
      element.setAttribute("aria-selected", String(selected));
      if (selected) element.parentElement.setAttribute("aria-activedescendant", element.id);
    });
    if (i !== state.run) tokens[i][0].parentElement.removeAttribute("aria-activedescendant");
  }
  if (here().method !== null) {
    clear(part("tree")).append(tree(here(), state, (run, token) => select(run, token)));
  }
  showTable();
  showCurve();
}

function showCurve() {
  tokenAtPlace = curve(here(), shownRuns(), lineOf, state);
  clear(part("curve-legend"));
  for (const i of shownRuns()) {
    const key = draw("svg", { viewBox: "0 0 36 10", "aria-hidden": "true" });
    key.append(draw("path", { class: "run " + lineOf(i), d: "M0 5L36 5" }));
    part("curve-legend").append(make("span", {}, key, label(here().runs[i].name)));
  }
  const unit = data.summed ? "Sum of the tokens' own values so far" : "Value after each token, in the scorer's units";
  part("curve-legend").append(make("span", {}, unit));
}

part("curve").addEventListener("click", (event) => select(state.run, tokenAtPlace(event.clientX)));
new ResizeObserver(() => showCurve()).observe(part("curve"));
showHead();
showLegend();
showPrompt(0);
