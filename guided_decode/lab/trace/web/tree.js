// What a search kept: responses that begin alike share their beginning.

const EXCERPT = 90;

function tree(prompt, selected, choose) {
  const lists = [make("ul", {})];
  const own = prompt.branches.map(() => make("ul", {}));
  const current = onPath(prompt, selected.run);
  prompt.branches.forEach(([parent, of, begin, end, ending], i) => {
    const run = prompt.runs[of];
    const text = run.pieces.slice(begin, end).join("");
    const words = put(make("span", { class: "words", dir: "auto" }), excerpt(text), false);
    const value = run.path[end - 1][3];
    const worth = value === null ? "" : `value ${number(value)}`;
    const goes = ending.includes(selected.run) ? selected.run : ending.length ? ending[0] : of;
    const button = make("button", { type: "button", "data-branch": i,
      "aria-current": current.has(i) ? "true" : null }, words, " ",
      make("span", { class: "worth" }, `${plural(end - begin, "token", "tokens")}${worth && ", " + worth}`));
    for (const each of ending) {
      button.append(make("span", { class: "ends" }, ends(prompt, each)));
    }
    button.addEventListener("click", () => {
      choose(goes, begin);
      // The tree was made anew: whoever pressed a key is where they were.
      document.querySelector(`[data-branch="${i}"]`).focus();
    });
    (parent === null ? lists[0] : own[parent]).append(make("li", {}, button, own[i]));
  });
  own.forEach((list) => list.children.length || list.remove());
  return lists[0];
}

/** The branches that a response is made of. */
function onPath(prompt, run) {
  const found = new Set();
  let at = prompt.branches.findIndex((each) => each[4].includes(run));
  while (at !== null && at >= 0) {
    found.add(at);
    at = prompt.branches[at][0];
  }
  return found;
}

function ends(prompt, run) {
  const own = prompt.runs[run];
  return (run === prompt.chosen ? "\u2605 chosen: " : "") + [label(own.name), facts(own)].filter(Boolean).join(", ");
}

/** The beginning and the end of a text that is long. */
function excerpt(text) {
  const characters = Array.from(text);
  if (characters.length <= EXCERPT) return text;
  const half = EXCERPT / 2;
  return characters.slice(0, half).join("") + " \u2026 " + characters.slice(-half).join("");
}

/** What else is said of a response. */
function facts(run) {
  return Object.entries(run.facts).filter(([, value]) => value !== null).map(([name, value]) => {
    const words = label(name.replace(/_/g, " "));
    if (value === true) return words;
    if (value === false) return "not " + words;
    return words + " " + (typeof value === "number" && !Number.isInteger(value) ? number(value)
      : typeof value === "number" ? value.toLocaleString("en") : label(value));
  }).join(", ");
}
