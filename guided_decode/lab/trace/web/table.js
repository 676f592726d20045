// The candidates of one token.

const ADVANTAGES = 4;

/** How far an advantage is from 0, as a class: low4 ... low1, "", high1 ... high4, none. */
function shade(advantage) {
  if (advantage === null) return "none";
  const far = Math.min(Math.abs(advantage) / data.scale, 1);
  if (far < 0.02) return "";
  return (advantage < 0 ? "low" : "high") + Math.ceil(far * ADVANTAGES);
}

/** What a token of a response is: its step, its own row, and its numbers. */
function tokenAt(prompt, run, i) {
  const [place, row, outside, after] = run.path[i];
  const [baseline, considered, rows] = prompt.steps[place];
  const [token, probability, guided, value, advantage] = rows[row];
  return { place, row, outside, after, baseline, considered, rows, probability, guided, value,
    advantage: outside ? null : advantage, id: data.tokens[token][0] };
}

/** One sentence on the selected token, for eyes and ears. */
function sentence(prompt, run, i) {
  const token = tokenAt(prompt, run, i);
  const where = `${label(run.name)}, token ${i + 1} of ${run.path.length}`;
  const own = label(run.pieces[i]);
  const odds = `probability ${percent(token.probability)}, guided ${percent(token.guided)}`;
  if (token.outside) return `${where}: \u201c${own}\u201d, no candidate, ${odds}`;
  const worth = token.advantage === null ? "not scored" : `advantage ${number(token.advantage, true)}`;
  return `${where}: \u201c${own}\u201d, ${worth}, ${odds}`;
}

function table(prompt, run, i) {
  const token = tokenAt(prompt, run, i);
  const visits = new Map(run.visits.length ? run.visits[i] : []);
  const heads = ["Token", "Probability", "Guided", "Value", "Advantage"];
  if (visits.size) heads.push("Visits");
  const head = make("tr", {}, ...heads.map((each) => make("th", { scope: "col" }, each)));
  const body = make("tbody", {});
  const order = token.rows.map((_, row) => row);
  order.sort((a, b) => token.rows[b][1] - token.rows[a][1] || a - b);
  for (const row of order) {
    // A token that only another response took here is none of this step's candidates.
    if (row >= Math.max(token.considered, 1) && row !== token.row && token.rows[row][4] === null
      && token.rows[row][3] === null) continue;
    body.append(line(token, row, visits));
  }
  const step = token.baseline === null ? "This step was not scored."
    : data.summed ? "" : `The value before it is ${number(token.baseline)}.`;
  const odds = " Probabilities are those at temperature 1.";
  const few = token.considered > token.rows.length ? ` The likeliest of ${token.considered} candidates.` : "";
  return make("table", {}, make("caption", {}, (step + odds + few).trim()), make("thead", {}, head), body);
}

function line(token, row, visits) {
  const [place, probability, guided, value, advantage] = token.rows[row];
  const [id, text] = data.tokens[place];
  const taken = row === token.row;
  const outside = taken && token.outside;
  const name = make("th", { scope: "row" }, make("bdi", {}, label(text)), " ",
    make("span", { class: "id" }, "#" + id));
  if (taken) name.append(" ", make("span", { class: "note" }, outside ? "\u2714 taken, no candidate" : "\u2714 taken"));
  const cells = [
    share(probability),
    share(guided),
    make("td", { "data-number": value }, number(value)),
    make("td", { "data-number": advantage, class: shade(advantage) }, number(advantage, true)),
  ];
  if (visits.size) cells.push(make("td", { "data-number": visits.get(row) || 0 }, String(visits.get(row) || 0)));
  const styles = [taken ? "taken" : "", outside ? "outside" : ""].join(" ").trim();
  return make("tr", { class: styles || null, "aria-current": taken ? "true" : null, "data-id": id }, name, ...cells);
}

function share(part) {
  const cell = make("td", { class: "share", "data-number": part }, percent(part));
  cell.style.setProperty("--part", (100 * part).toFixed(1) + "%");
  return cell;
}
