// Templates and links: what is to be written, as text and as an address.

export const escape = (text) => text.replaceAll("{", "{{").replaceAll("}", "}}");

/** Number of tokens asked for by the gaps of a template. */
export function gaps(text) {
  let sum = 0;
  for (const match of text.matchAll(/\{\{|\}\}|\{\s*(\d+)\s*\}/g)) sum += Number(match[1] ?? 0);
  return sum;
}

/** A template that keeps the tokens that are not picked. */
export function noiseAgain(tokens, picked) {
  let out = "";
  for (let i = 0; i < tokens.length; ) {
    const start = i;
    const hole = picked.has(i);
    while (i < tokens.length && picked.has(i) === hole) i += 1;
    const text = tokens.slice(start, i).join("");
    // one space before a gap belongs to it: the first token written brings its own, a space that is kept is a second one
    const space = out.endsWith(" ") || (out && /^\s/.test(text) && !/\s$/.test(out));
    if (hole) out += `${space ? " " : ""}{${i - start}}`;
    else out += escape(text);
  }
  return out;
}

/** The settings as the part of an address after #; empty ones too, since a field may have something in it at first. */
export const toLink = (settings) => `#${new URLSearchParams(Object.entries(settings))}`;

export const fromLink = (hash) => Object.fromEntries(new URLSearchParams(hash.replace(/^#/, "")));
