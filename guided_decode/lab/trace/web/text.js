// Text as it is, with everything shown that a browser would hide, obey or refuse.

// Controls, half characters, what changes the direction of text, and what has no width. The joiners
// U+200C and U+200D are letters' own, and stay.
const HIDDEN = new RegExp(
  "[\\u0000-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e" +
    "\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb\\u{e0000}-\\u{e007f}\\p{Cs}]",
  "u",
);

/** The parts of a text: [what to show, whether it stands for something else]. */
function parts(text) {
  const found = [];
  for (const character of text) {
    const hidden = HIDDEN.test(character);
    const last = found[found.length - 1];
    if (hidden) found.push([spelled(character), true, character]);
    else if (last && !last[1]) last[0] += character;
    else found.push([character, false, character]);
  }
  return found;
}

/** What stands for a character that is not shown. */
function spelled(character) {
  const code = character.codePointAt(0);
  if (code === 0x0a) return "\u21b5";
  if (code === 0x09) return "\u21e5";
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  return "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}

/** Puts text into an element; line breaks and tabs do what they do where it flows. */
function put(element, text, flows) {
  for (const [shown, hidden, character] of parts(text)) {
    if (!hidden) {
      element.append(shown);
      continue;
    }
    element.append(make("span", { class: "mark", dir: "ltr" }, shown));
    if (flows && (character === "\n" || character === "\t")) element.append(character);
  }
  return element;
}

/** A token's text on one line, with spaces at its ends that can be seen. */
function label(text) {
  const line = parts(text).map((part) => part[0]).join("");
  if (line === "") return "(part of a character)";
  return line.replace(/^ +| +$/g, (spaces) => "\u2423".repeat(spaces.length));
}

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function clear(element) {
  element.replaceChildren();
  return element;
}

/** A value or an advantage; signed: with its sign. */
function number(value, signed) {
  if (value === null) return "\u2014";
  const size = Math.abs(value);
  const digits = size !== 0 && (size < 1e-3 || size >= 1e6) ? size.toExponential(2)
    : size < 10 ? size.toFixed(3) : size < 1000 ? size.toFixed(2) : size.toFixed(1);
  if (value < 0) return "\u2212" + digits;
  return signed && value > 0 ? "+" + digits : digits;
}

function percent(share) {
  const part = share * 100;
  if (part === 0) return "0%";
  if (part < 0.01) return "<0.01%";
  return (part < 1 ? part.toFixed(2) : part.toFixed(1)) + "%";
}

function plural(count, one, many) {
  return count + " " + (count === 1 ? one : many);
}
