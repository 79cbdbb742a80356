"""What a demonstration shows of a model: text condensing, samples of three kinds, their measures, three plots."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ddlm.live import LiveView

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ddlm.data.shards import TokenShards
    from ddlm.lm import DiffusionLM
    from ddlm.sampling.request import Progress
    from ddlm.sampling.template import Template
    from ddlm.sampling.text import Generated

UNCONDITIONAL = 30  # samples: six groups of five for distinct-n
PROMPTS, CONTINUATIONS = 3, 5  # prompts of each kind, continuations of each prompt
FIRST = (1, 2, 1)  # the same three numbers where a first look has to be there in seconds
CONTINUED = 'The old man looked out over the sea and said, "{40}'
FILLED_IN = "The doctor came into the room.{24}\nThen she began to laugh."
FRAMES = 6  # frames of the sequence that is shown, where there is no terminal
TRACED = 8  # sequences that are followed to the last step for the plots


class CondensingView(LiveView):
    """Shows a text that makes all its steps, and then its rounds of refinement with what they have changed.

    Args:
        lm: The model that writes, with the steps and rounds of its own defaults.
        console: Where to draw.
    """

    def __init__(self, lm: DiffusionLM, console: Console) -> None:
        super().__init__(lm.tokenizer, console)
        self.steps, self.rounds = lm.config.sample.steps, lm.config.sample.refine
        self._condensed: Tensor | None = None

    def show(self, number: int, progress: Progress) -> None:
        """Draw a state as it comes in a terminal, a few of them elsewhere."""
        if progress.step == self.steps:
            self._condensed = progress.tokens
        if self.console.is_terminal:
            self.update(number, progress)
        elif progress.step in frames(self.steps) | {self.steps, self.steps + self.rounds // 2}:
            self.console.print(self.frame(progress))

    def frame(self, progress: Progress) -> Text:
        """A step as in any view; in a round of refinement the tokens that differ from those of the last step."""
        if self._condensed is None or progress.step < self.steps:
            return super().frame(replace(progress, steps=self.steps))
        changed = (progress.tokens != self._condensed).tolist()
        text = Text()
        for token, differs in zip(progress.tokens.tolist(), changed, strict=True):
            text.append(self._piece(token), style="yellow" if differs else "bold green")
        if done := progress.step - self.steps:
            figures = f"round {done} of {self.rounds}, {sum(changed)} tokens differ from step {self.steps}"
        else:
            figures = f"step {self.steps} of {self.steps}"
            if self.rounds:
                figures += f", {self.rounds} rounds follow, each draws a fourth of the tokens anew"
        return text.append(f"\n{figures}\n", style="cyan")


def watch_defaults(lm: DiffusionLM, seed: int, console: Console) -> Generated:
    """One text of full length with the model's own settings: live in a terminal, a few frames elsewhere."""
    view = CondensingView(lm, console)
    with view:
        (text,) = lm.generate(f"{{{lm.length}}}", seed=seed, on_progress=view.show)
    rounds = f" and {view.rounds} rounds of refinement" if view.rounds else ""
    console.print(f"[green]the text after {view.steps} steps{rounds}[/]")
    console.print(text.text, "", markup=False)
    return text


def write_defaults(lm: DiffusionLM, seed: int, console: Console) -> dict[str, list[Generated]]:
    """A continuation and an infilling of fixed prompts, with the model's own settings."""
    with console.status("writing"):
        texts = lm.generate([CONTINUED, FILLED_IN], seed=seed)
    return {kind: [text] for kind, text in zip(("prefix", "infilled"), texts, strict=True)}


def explain_smaller(writer: DiffusionLM, given: DiffusionLM, console: Console) -> None:
    """Say why not the model that has written is trained, and what to expect of the one that is."""
    more, less = (sum(p.numel() for p in lm.model.parameters()) / 1e6 for lm in (writer, given))
    console.print(
        f"The model that wrote above is too large to train in minutes on a CPU ({more:.1f}M parameters), so a smaller "
        f"one is trained ({less:.1f}M): expect phrases and broken words from it, not sentences."
    )


def watch(lm: DiffusionLM, steps: int, patience: int, seed: int, console: Console) -> None:
    """One sequence while it condenses out of noise: live in a terminal, a few frames elsewhere."""
    from ddlm.sampling import halting

    view, shown = LiveView(lm.tokenizer, console), frames(steps)

    def show(number: int, progress: Progress) -> None:
        if console.is_terminal:
            view.update(number, progress)
        elif progress.step in shown:
            console.print(view.frame(progress))

    with view:
        (text,) = lm.generate(
            f"{{{lm.length}}}",
            steps=steps,
            halt=halting.Patience(patience),
            seed=seed,
            on_progress=show,
        )
    console.print(
        f"[green]step {text.steps} of {steps + lm.config.sample.refine} ({text.reason})[/]"
    )
    console.print(text.text, markup=False)


def frames(steps: int) -> set[int]:
    """Steps at which a frame is written where there is no terminal, evenly spaced."""
    return {max(1, round(steps * i / FRAMES)) for i in range(1, FRAMES)}


def write(
    lm: DiffusionLM,
    shards: TokenShards,
    steps: int,
    patience: int,
    seed: int,
    console: Console,
    numbers: tuple[int, int, int] = (UNCONDITIONAL, PROMPTS, CONTINUATIONS),
    mark: str = "",
) -> dict[str, list[Generated]]:
    """Unconditional samples, continuations and infillings of held-out text, with early exit.

    Args:
        lm: What writes.
        shards: Prepared data; the samples go into ``samples`` beside its folder.
        steps: Steps allowed.
        patience: Of the early exit.
        seed: Of the first sample.
        console: Where the progress is shown.
        numbers: Unconditional samples, prompts of each other kind, continuations of each prompt.
        mark: In front of the names of the sample files.
    """
    from ddlm.sampling import halting

    unconditional, prompts, continuations = numbers
    half, quarter = lm.length // 2, lm.length // 4
    windows = held_out(shards, lm.length, prompts)
    kinds: dict[str, tuple[list[str | Template], int]] = {
        "unconditional": ([f"{{{lm.length}}}"], unconditional),
        "prefix": ([template(lm, w, half, lm.length) for w in windows], continuations),
        "infilled": (
            [template(lm, w, quarter, lm.length - quarter) for w in windows],
            continuations,
        ),
    }
    texts = {}
    for kind, (templates, samples) in kinds.items():
        with console.status(f"writing: {kind}"):
            texts[kind] = lm.generate(
                templates,
                samples,
                steps=steps,
                halt=halting.Patience(patience),
                seed=seed,
                refine=0,  # rounds draw anew what the steps settled: no measure of early exit would hold
            )
        seed += len(templates) * samples  # noise of their own: no kind repeats another's words
    save(texts, Path(shards.folder).parent / "samples", mark)
    return texts


def save(texts: Mapping[str, Sequence[Generated]], folder: Path, mark: str = "") -> None:
    """Write a sample file for each kind, ``mark`` in front of its name."""
    from ddlm.evaluation.samples import write_samples

    for kind, written in texts.items():
        write_samples(folder / f"{mark}{kind}.jsonl", [t.to_row() for t in written])


def held_out(shards: TokenShards, length: int, count: int) -> list[list[int]]:
    """Windows of held-out text, evenly spaced; ``count`` at most."""
    from ddlm.data.loader import validation_batches

    batches = validation_batches(shards, length=length, batch_size=1, limit=count)
    return [row for batch in batches for row in batch.tolist()]


def template(lm: DiffusionLM, window: Sequence[int], start: int, end: int) -> Template:
    """A window of which the tokens ``start`` to ``end`` are to be written; the rest is kept as it is."""
    import torch

    from ddlm.sampling.template import Template

    def given(part: Sequence[int]) -> str:
        return lm.tokenizer.decode(part).replace("{", "{{").replace("}", "}}")

    tokens = torch.tensor(window)
    is_noised = torch.zeros(len(window), dtype=torch.bool)
    is_noised[start:end] = True
    text = f"{given(window[:start])}{{{end - start}}}{given(window[end:])}"
    return Template(text, tokens.masked_fill(is_noised, 0), is_noised)


def follow(
    lm: DiffusionLM, written: Sequence[Generated], steps: int, out: Path
) -> tuple[list[dict[str, Any]], float]:
    """The first samples again without early exit, recorded: their trajectories, and the share of equal tokens."""
    from ddlm.files import write_text

    written = written[:TRACED]
    full = lm.generate(
        [t.prompt for t in written[:1]],
        len(written),
        steps=steps,
        seed=written[0].seed,
        trace=True,
        refine=0,
    )
    pairs = [
        a == b
        for w, f in zip(written, full, strict=True)
        for a, b in zip(w.tokens, f.tokens, strict=True)
    ]
    trajectories = []
    for text in full:
        (trace,) = text.traces
        trajectories.append(
            {
                "seed": text.seed,
                "times": trace.times.tolist(),
                "switches": trace.switches.tolist(),
                "entropy": trace.mean("entropy")[0].tolist(),
                "generated": int(trace.generated.sum()),
            }
        )
    write_text(out / "samples" / "trajectories.json", json.dumps(trajectories) + "\n")
    return trajectories, sum(pairs) / len(pairs)


def measure(
    out: Path,
    texts: Mapping[str, Sequence[Generated]],
    shards: TokenShards,
    length: int,
    steps: int,
) -> dict[str, Any]:
    """The short table: held-out cross-entropy by noise level, steps used, diversity beside that of real text."""
    from ddlm.evaluation import diversity

    lines = (out / "metrics.jsonl").read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    validation = [r for r in rows if r["kind"] == "validation"]
    real = held_out(shards, length, UNCONDITIONAL)
    mine = [t.tokens for t in texts["unconditional"]]
    used = {
        kind: {
            "samples": len(written),
            "mean": sum(t.steps for t in written) / len(written),
            "most": max(t.steps for t in written),
            "early": sum(t.reason != "completed" for t in written) / len(written),
        }
        for kind, written in texts.items()
    }
    return {
        # of the weights that wrote the samples: a run stands for its best evaluation
        "validation": min(validation, key=lambda v: v["cross_entropy"], default={}),
        "validation_last": validation[-1] if validation else {},
        # only where the run began from given weights
        "validation_before": validation[0] if validation and validation[0]["step"] == 0 else {},
        "steps_allowed": steps,
        "steps_used": used,
        "unconditional": asdict(diversity.measure(mine)),
        "real": asdict(diversity.measure(real)) if len(real) > 1 else {},
    }


def show_texts(texts: Mapping[str, Sequence[Generated]], console: Console) -> None:
    """The first sample of each kind."""
    for kind, written in texts.items():
        shown, text, at = Text(), written[0].text, 0
        for start, end in written[0].generated:
            shown.append(text[at:start]).append(f"⟦{text[start:end]}⟧", "cyan")
            at = end
        shown.append(text[at:])
        console.print(f"[bold]{kind}[/], {written[0].steps} steps, {written[0].reason}")
        console.print(shown, "")


def show_measures(results: Mapping[str, Any], console: Console) -> None:
    """The short table on the terminal."""
    from rich.table import Table

    if results["validation"]:
        table = Table(title="held-out cross-entropy by noise level", title_justify="left")
        levels = results["validation"]["by_level"]
        for name in ("noise level t", *levels, "mean"):
            table.add_column(name, justify="right")
        values = [*levels.values(), results["validation"]["cross_entropy"]]
        table.add_row("nats per token", *(f"{v:.2f}" for v in values))
        console.print(table)
    if before := results["validation_before"]:
        after = results["validation_last"]
        console.print(
            f"held-out text of the bundled books: {before['cross_entropy']:.4f} nats before, "
            f"{after['cross_entropy']:.4f} nats after {after['step']:,} step{'' if after['step'] == 1 else 's'}"
        )
        if after["cross_entropy"] >= before["cross_entropy"]:
            console.print(
                "No better than before: the run stands for the weights that it began with."
            )
    table = Table(title="steps used, early exit by patience", title_justify="left")
    for name in ("samples", "number", "steps, mean", "most", "allowed", "ended early"):
        table.add_column(name, justify="left" if name == "samples" else "right")
    for kind, u in results["steps_used"].items():
        cells = (u["samples"], f"{u['mean']:.1f}", u["most"], results["steps_allowed"])
        table.add_row(kind, *map(str, cells), f"{u['early']:.0%}")
    console.print(table)
    table = Table(title="diversity and entropy of the tokens", title_justify="left")
    for name in ("", "distinct-1", "distinct-2", "distinct-3", "entropy (nats)"):
        table.add_column(name, justify="right" if name else "left")
    for name, key in (("unconditional", "unconditional"), ("held-out text", "real")):
        if d := results[key]:
            table.add_row(name, *(f"{v:.2f}" for v in (*d["dist"], d["token_entropy"])))
    console.print(table)
    console.print(
        f"Followed to step {results['steps_allowed']} without early exit, "
        f"{results['same_as_full_run']:.1%} of the tokens stay the same."
    )


def draw(
    out: Path,
    trajectories: Sequence[Mapping[str, Any]],
    written: Sequence[Generated],
    console: Console,
) -> None:
    """Loss, token switches and entropy, as PNG and SVG."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no plots: matplotlib is missing, pip install 'ddlm[plots]'")
        return
    from ddlm.analysis import figures

    folder = out / "plots"
    exits = [t.steps for t in written[:TRACED] if t.reason != "completed"]
    figures.draw_loss(figures.read_metrics(out / "metrics.jsonl"), folder / "loss")
    figures.draw_switches(trajectories, folder / "switches", exits)
    figures.draw_entropy(trajectories, folder / "entropy", exits)
