// The value after each token, of all responses that are shown.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 58, right: 14, top: 12, bottom: 30 };

function draw(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** The value before the first token, and after each: an array, null where there is none. */
function curveOf(prompt, run) {
  const first = run.path.length ? prompt.steps[run.path[0][0]][0] : null;
  return [data.summed ? 0 : first, ...run.path.map((each) => each[3])];
}

/** About five round numbers that span the values. */
function ticks(low, high) {
  const span = high - low || Math.abs(high) || 1;
  const power = Math.pow(10, Math.floor(Math.log10(span / 4)));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => span / each <= 5);
  const found = [];
  for (let i = Math.floor(low / step); i * step < high + step; i += 1) found.push(i * step);
  return found;
}

function path(values, x, y) {
  let line = "";
  let open = false;
  values.forEach((value, i) => {
    if (value !== null) line += (open ? "L" : "M") + x(i).toFixed(1) + " " + y(value).toFixed(1);
    open = value !== null;
  });
  return line;
}

/** The curves, and a function that gives the token at a place of the picture. */
function curve(prompt, shown, lineOf, selected) {
  const box = document.getElementById("curve");
  const width = Math.max(box.clientWidth, 280);
  const height = 240;
  const curves = prompt.runs.map((run) => curveOf(prompt, run));
  const every = curves.flat().filter((value) => value !== null);
  const marks = every.length ? ticks(Math.min(...every), Math.max(...every)) : [0, 1];
  const [low, high] = [marks[0], marks[marks.length - 1]];
  const most = Math.max(...curves.map((each) => each.length - 1), 1);
  const x = (i) => MARGIN.left + (i / most) * (width - MARGIN.left - MARGIN.right);
  const y = (value) =>
    height - MARGIN.bottom - ((value - low) / (high - low || 1)) * (height - MARGIN.top - MARGIN.bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label":
    "Value after each token. " + shown.map((i) => spoken(prompt.runs[i], curves[i])).join(" ") });
  for (const mark of marks) {
    svg.append(draw("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(mark), y2: y(mark) }));
    svg.append(draw("text", { x: MARGIN.left - 6, y: y(mark) + 4, "text-anchor": "end" }, tick(mark)));
  }
  for (const i of [0, most]) {
    const anchor = i ? "end" : "start";
    svg.append(draw("text", { x: x(i), y: height - 8, "text-anchor": anchor }, i ? "token " + i : "prompt"));
  }
  const others = prompt.runs.map((_, i) => i).filter((i) => !shown.includes(i));
  for (const i of [...others, ...shown]) {
    const style = shown.includes(i) ? lineOf(i) : "thin";
    svg.append(draw("path", { class: "run " + style, d: path(curves[i], x, y), "data-run": i }));
  }
  const at = selected.token + 1;
  const value = curves[selected.run][at];
  svg.append(draw("line", { class: "at", x1: x(at), x2: x(at), y1: MARGIN.top, y2: height - MARGIN.bottom }));
  if (value !== null) {
    svg.append(draw("circle", { class: "dot", cx: x(at), cy: y(value), r: 6, "data-token": selected.token }));
  }
  clear(box).append(svg);
  return (clientX) => {
    const from = svg.getBoundingClientRect().left + (MARGIN.left / width) * svg.clientWidth;
    const span = ((width - MARGIN.left - MARGIN.right) / width) * svg.clientWidth;
    return Math.round(((clientX - from) / span) * most) - 1;
  };
}

function tick(value) {
  return String(Number(value.toPrecision(6))).replace("-", "\u2212");
}

function spoken(run, values) {
  const known = values.filter((value) => value !== null);
  if (!known.length) return label(run.name) + ": no value.";
  return `${label(run.name)}: from ${number(known[0])} to ${number(known[known.length - 1])}.`;
}
