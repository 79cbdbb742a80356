"""Everything that is drawn and found from the records of a study: one call, one list of figures with captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddlm.analysis import beyond, figures, paper
from ddlm.analysis.findings import Finding, find_all
from ddlm.analysis.record import Record, read
from ddlm.analysis.trajectories import Trajectories
from ddlm.types import DataError

MOST_OF_PAPER = 500
"""Steps allowed at most in Figure 1 of the paper."""


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
        name: Of its files, without suffix.
        title: Heading.
        caption: What is seen and what was run.
    """

    name: str
    title: str
    caption: str


@dataclass
class Study:
    """The records of a study, read.

    Attributes:
        folder: Of the study.
        index: Header of ``study.npz``.
        checkpoints: Trajectories by checkpoint, oldest first, the model last.
        main: The model's.
        noise: By scale of the initial noise.
        quality: Rows; empty without.
        others: Further records by kind: ``schedule``, ``frequency``, ``samples``, ``overhead``.
        metrics: Rows of the training's metrics.jsonl; empty without.
        speed: A record of ``ddlm benchmark sample``, or None.
    """

    folder: Path
    index: dict[str, Any]
    checkpoints: list[Trajectories]
    main: Trajectories
    noise: list[Trajectories]
    quality: dict[str, Any]
    others: dict[str, Record]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    speed: dict[str, Any] | None = None

    @classmethod
    def load(cls, folder: Path, run: Path | None = None, speed: Path | None = None) -> Study:
        """Read a study's records.

        Args:
            folder: Of the study, with ``records/`` in it.
            run: Run folder of the training, for its curves.
            speed: File of a speed record.

        Raises:
            DataError: when records are missing, damaged, of another version or of another model.
        """
        records = folder / "records"
        index = read(records / "study.npz", "study").header
        known: dict[str, Trajectories] = {}

        def trajectories(name: str, model: str | None = index["identity"]) -> Trajectories:
            if name not in known:
                found = read(records / name, "trajectories")
                if model not in (None, _model_of(found)):
                    raise DataError(
                        f"{records / name} is of another model than the study: record again with --overwrite"
                    )
                # Whether a label is enough to tell a checkpoint from the others depends on the others.
                label = index.get("labels", {}).get(name, found.header["label"])
                header = found.header | {"label": label}
                known[name] = Trajectories(replace(found, header=header))
            return known[name]

        identities = index.get("identities", {})  # older studies have none
        # Beside the trajectories, what another model left there is not this one's.
        others = {}
        for kind in ("schedule", "frequency", "samples", "overhead", "quality"):
            if (records / f"{kind}.npz").is_file():
                found = read(records / f"{kind}.npz", kind)
                if _model_of(found) == index["identity"]:
                    others[kind] = found
        quality = others.pop("quality", None)
        metrics = run / "metrics.jsonl" if run is not None else None
        return cls(
            folder=folder,
            index=index,
            checkpoints=[trajectories(n, identities.get(n)) for n in index["checkpoints"]],
            main=trajectories(index["main"]),
            noise=[trajectories(n) for n in index["noise"]],
            quality={} if quality is None else quality.header,
            others=others,
            metrics=figures.read_metrics(metrics) if metrics and metrics.is_file() else [],
            speed=None if speed is None else read_speed(speed),
        )

    @property
    def findings(self) -> list[Finding]:
        """The claims of section 4.1, answered."""
        rows = self.quality.get("rows", [])
        return find_all(self.main, self.noise, rows, self.others.get("frequency"))

    @property
    def recorded(self) -> list[dict[str, Any]]:
        """When, where and by which commands the records were made, oldest first; empty where one does not say."""
        headers = [t.header for t in (*self.checkpoints, self.main, *self.noise)]
        headers += [r.header for r in self.others.values()]
        headers += [self.quality] if self.quality else []
        if not all("provenance" in h for h in headers):
            return []
        once: dict[str, dict[str, Any]] = {}
        for made in sorted((h["provenance"] for h in headers), key=lambda p: str(p["date"])):
            shown = [made["date"][:10], made["command"], made["commit"], made["hardware"]]
            once.setdefault(json.dumps(shown, sort_keys=True), made)
        return list(once.values())


def _model_of(record: Record) -> str | None:
    """Identity of the model that a record is of."""
    model: str | None = record.header.get("settings", {}).get("model")
    return model


def read_speed(path: Path) -> dict[str, Any]:
    """A record of ``ddlm benchmark sample``.

    Raises:
        DataError: when it is missing or something else, or holds no measurement.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = str(found["kind"])
    except FileNotFoundError:
        raise DataError(f"no speed record at {path}: `ddlm benchmark sample` makes one") from None
    except (ValueError, KeyError, TypeError):
        kind = "something else"
    if kind != "benchmark-sample":
        raise DataError(f"{path} is {kind}, a record of `ddlm benchmark sample` is needed")
    paper.timed(found)
    return found


def draw_all(study: Study, tell: Callable[[str], None] = lambda name: None) -> list[Drawn]:
    """Draw every figure the records allow into ``FOLDER/figures`` as PNG and SVG; returns them in order."""
    folder = study.folder / "figures"
    run = paper.what_was_run(study.main)
    drawn: list[Drawn] = []

    def add(
        name: str, title: str, caption: str, draw: Callable[[Path], None], of: str = run
    ) -> None:
        tell(name)
        draw(folder / name)
        drawn.append(Drawn(name, title, f"{caption} {of[0].upper()}{of[1:]}." if of else caption))

    if study.metrics:
        add(
            "training",
            "Training",
            "Cross-entropy at the noised positions over the training: batches (times as drawn, smoothed line over the "
            "raw one) and held-out text (times uniform).",
            lambda path: figures.draw_loss(study.metrics, path),
            of="",
        )
    labels = ", ".join(t.label for t in study.checkpoints)
    add(
        "checkpoints",
        "Figure 1, left: switches and entropy by checkpoint",
        f"Share of the generated tokens whose argmax switches at each step, and mean entropy of p(x₀ | x_t), for "
        f"{labels}{'' if len(study.checkpoints) > 1 else ', the only checkpoint of the study'}. Bands: one standard "
        "deviation over the sequences.",
        lambda path: paper.draw_checkpoints(study.checkpoints, path),
        of=paper.what_was_run(study.main, label=False),
    )
    if rows := study.quality.get("rows"):
        judge = (study.quality["settings"]["judge"] or {}).get("judge")
        measure = (
            f"Mean negative log-likelihood under the judge {Path(judge).name}, 95% intervals over the texts,"
            if judge
            else "Share of the tokens that equal those of the same sequence followed to its last step,"
        )
        sequences, solver = study.main.header["sequences"], paper.solver_of(study.main)
        parts = [f"{sequences} sequences for each number of {solver} steps"]
        parts += paper.temperature_of(study.main) + ([f"judge {Path(judge).name}"] if judge else [])
        note = ", ".join([study.main.label, *parts])
        longest = max(r["steps"] for r in rows)
        absent = "" if longest >= MOST_OF_PAPER else f", not the paper's {MOST_OF_PAPER}"
        add(
            "quality",
            "Figure 1, right: quality against steps",
            f"{measure} against the steps allowed (left) and performed (right) for several patiences n_p: a sequence "
            "ends when no token has switched for n_p steps. Points of one n start from the same noise; n is at most "
            f"{longest}{absent}.",
            lambda path: paper.draw_quality(rows, path, note),
            of=note,
        )
    add(
        "geometry",
        "Figure 2: norms and directions",
        "Norm of the estimate x̂₀ and of the state x, mean over the generated positions; cosine of the score with the "
        "final score and of the state with the final state, position by position and for the whole sequence. Dotted: "
        "√D, the norm of every token's embedding. Bands: one standard deviation over the sequences.",
        lambda path: paper.draw_geometry(study.main, path),
    )
    if len(study.noise) > 1:
        add(
            "noise",
            "Figure 3, left: initial noise",
            "Norm of the state for several scales of the initial noise, relative to t_max; right: the same near the "
            "sphere of the embeddings (dotted).",
            lambda path: paper.draw_noise_scales(study.noise, path),
        )
    if (speed := study.speed) is not None:
        add(
            "speed",
            "Figure 3, right: speed",
            f"Seconds to write a sequence {_lengths(speed)}, diffusion with 50 and 200 steps beside autoregressive "
            f"models of the same size, as measured by `{speed['command']}` on {speed['date'][:10]}.",
            lambda path: paper.draw_speed(speed, path),
            of="",
        )
    add(
        "settling",
        "Where text settles",
        "Left: share of the sequences in which a position has its final token for good. Right: mean entropy of a "
        "position relative to the highest.",
        lambda path: beyond.draw_settling(study.main, path),
    )
    if frequency := study.others.get("frequency"):
        add(
            "bands",
            "The order of commitment",
            "When tokens settle, by how frequent the final token is in the training text; each band holds an equal "
            "share of that text. Left: settled share. Right: quartiles of the step of settling; triangles are means.",
            lambda path: beyond.draw_bands(study.main, frequency, path),
        )
    add(
        "halting",
        "What each halting criterion saves",
        "Share of the tokens that are already final where a criterion would have ended the sequence, against the mean "
        "number of steps performed; one point a threshold, joined by a line where they are at most "
        f"{beyond.APART:.0%} of the steps apart."
        + ("" if study.main.has_kl else " KL is left out: too little of it was recorded."),
        lambda path: beyond.draw_halting(study.main, path),
    )
    if schedule := study.others.get("schedule"):
        note = f"{study.main.label}, {schedule.header['windows']} held-out windows, masks as in training"
        add(
            "schedule",
            *_about_schedule("warp_density" in schedule.arrays),
            lambda path: beyond.draw_schedule(schedule, path, note),
            of=note,
        )
    return drawn


def _lengths(speed: Mapping[str, Any]) -> str:
    """Which lengths the figure of speed shows."""
    lengths = {case["length"] for case in paper.timed(speed)}
    return (
        "against its length"
        if len(lengths) > 1
        else f"of {min(lengths)} tokens, the only length that was measured"
    )


def _about_schedule(warped: bool) -> tuple[str, str]:
    """Title and caption of the loss over t."""
    if not warped:
        return (
            "The loss over t",
            "Held-out cross-entropy by noise level; band: one deviation over texts. Training drew t evenly: there is "
            "no time warp to compare with.",
        )
    return (
        "The loss over t and the time warp",
        "Left: held-out cross-entropy by noise level and the fit F̃(t) that the time warp learned. Right: the "
        "density it trains with, the slope of the held-out loss (what an ideal warp would equal), and uniform.",
    )
