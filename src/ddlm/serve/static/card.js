// One text: its tokens at the step we look at, its chart, and the words picked to be noised again.

import { draw } from "./chart.js";
import { copy } from "./clipboard.js";

const NOISE = "░▒▓▒░▓░▒";

const words = {
  patience: "patience", entropy: "entropy", kl: "KL", fixed: "fixed step", completed: "every step made",
};

export class Card {
  static hot = 8; // nats at which the colour is full: the logarithm of the vocabulary

  constructor(template, number, start, onPick) {
    this.el = template.content.firstElementChild.cloneNode(true);
    this.text = this.el.querySelector(".text");
    this.canvas = this.el.querySelector("canvas");
    this.state = this.el.querySelector(".state");
    this.number = number;
    this.noised = start.is_noised;
    this.steps = start.steps;
    this.seed = start.seeds[number];
    this.frames = [{ step: 0, tokens: start.tokens, settled: null, entropy: null }];
    this.curve = [];
    this.done = null;
    this.picked = new Set();
    this.onPick = onPick;
    this.el.querySelector("strong").textContent = `seed ${this.seed}`;
    this.spans = start.tokens.map((_, i) => {
      const span = document.createElement("span");
      span.className = "tok";
      span.dataset.i = i;
      return span;
    });
    this.text.append(...this.spans);
    this.el.querySelector(".copy").addEventListener("click", (event) => copy(event.target, this.written));
    this.listen();
  }

  get written() { return this.done ? this.done.text : this.spans.map((s) => s.textContent).join(""); }

  get last() { return this.frames[this.frames.length - 1].step; }

  add(frame) {
    this.frames.push(frame);
    this.curve.push(...frame.curve);
  }

  finish(done) {
    this.done = done;
    this.curve.push(...done.curve);
    const settled = done.tokens.map(() => 1);
    const frame = { step: done.steps, tokens: done.tokens, settled, entropy: done.entropy };
    if (this.last === done.steps && this.last > 0) this.frames.pop();
    this.frames.push(frame);
    this.text.classList.add("ready");
    this.spans.forEach((span, i) => {
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      span.tabIndex = i === 0 ? 0 : -1;
    });
  }

  /** Show the latest look that is not after `step`. */
  show(step) {
    let frame = this.frames[0];
    for (const f of this.frames) if (f.step <= step) frame = f;
    frame.tokens.forEach((piece, i) => {
      const span = this.spans[i];
      const open = this.noised[i];
      const noise = piece == null;
      const text = noise ? ` ${NOISE.slice(i % 5, (i % 5) + 3)}` : piece;
      if (span.textContent !== text) span.textContent = text;
      span.classList.toggle("noise", noise);
      span.classList.toggle("settled", Boolean(open && frame.settled?.[i]));
      span.classList.toggle("flux", Boolean(open && !noise && !frame.settled?.[i]));
      const heat = open && frame.entropy && !noise ? Math.min(1, frame.entropy[i] / Card.hot) : 0;
      span.style.setProperty("--h", (0.75 * Math.sqrt(heat)).toFixed(3));
      span.title = open && frame.entropy ? `${frame.entropy[i].toFixed(2)} nats` : "";
    });
    const ended = this.done && frame.step === this.done.steps;
    this.state.classList.toggle("ended", Boolean(ended));
    if (ended) {
      const { steps, allowed, reason } = this.done;
      this.state.textContent = reason === "completed"
        ? `${steps} of ${allowed} steps` : `stopped at ${steps} of ${allowed}: ${words[reason] ?? reason}`;
    } else {
      this.state.textContent = frame.step ? `step ${frame.step} of ${this.steps}` : "noise";
    }
    draw(this.canvas, this.curve, this.steps, frame.step);
    this.canvas.setAttribute("aria-label",
      `Switches and entropy over ${this.curve.length} steps, now at step ${frame.step}`);
  }

  // ---- picking words

  pick(i, on) {
    if (on) this.picked.add(i);
    else this.picked.delete(i);
    this.spans[i].classList.toggle("picked", on);
    this.spans[i].setAttribute("aria-selected", String(on));
    this.onPick(this);
  }

  clear() {
    for (const i of [...this.picked]) this.pick(i, false);
  }

  listen() {
    let from = null, on = true, before = null;
    const at = (event) => {
      const span = document.elementFromPoint(event.clientX, event.clientY)?.closest?.(".tok");
      return span && this.text.contains(span) ? Number(span.dataset.i) : null;
    };
    this.text.addEventListener("pointerdown", (event) => {
      if (!this.done || event.button) return;
      from = at(event);
      if (from == null) return;
      this.text.setPointerCapture(event.pointerId);
      on = !this.picked.has(from);
      before = new Set(this.picked);
      this.pick(from, on);
    });
    this.text.addEventListener("pointermove", (event) => {
      if (from == null) return;
      const to = at(event);
      if (to == null) return;
      const [a, b] = [Math.min(from, to), Math.max(from, to)];
      this.spans.forEach((_, i) => {
        const want = i >= a && i <= b ? on : before.has(i);
        if (want !== this.picked.has(i)) this.pick(i, want);
      });
    });
    for (const name of ["pointerup", "pointercancel"]) {
      this.text.addEventListener(name, () => { from = null; });
    }
    this.text.addEventListener("keydown", (event) => {
      if (!this.done || !event.target.dataset?.i) return;
      const i = Number(event.target.dataset.i);
      if (event.key === " ") this.pick(i, !this.picked.has(i));
      else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
        const to = this.spans[i + (event.key === "ArrowRight" ? 1 : -1)];
        if (!to) return;
        if (event.shiftKey) { this.pick(i, true); this.pick(Number(to.dataset.i), true); }
        this.spans[i].tabIndex = -1;
        to.tabIndex = 0;
        to.focus();
      } else return;
      event.preventDefault();
      event.stopPropagation();
    });
  }
}
