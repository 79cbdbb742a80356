// Copying, also where the page came over plain HTTP from another host: there browsers have no navigator.clipboard.

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const before = document.activeElement;
    const field = document.createElement("textarea");
    field.className = "hidden";
    field.readOnly = true; // or phones show a keyboard
    field.value = text;
    document.body.append(field);
    field.focus({ preventScroll: true });
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    before?.focus({ preventScroll: true });
    return done;
  }
}

/** Copy `text` and say on `button` for a moment what became of it. */
export async function copy(button, text) {
  const label = (button.dataset.label ??= button.textContent);
  button.textContent = (await copied(text)) ? "Copied" : "Cannot copy";
  setTimeout(() => { button.textContent = label; }, 1200);
}
