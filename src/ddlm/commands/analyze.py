"""``ddlm analyze``: record how a model's text comes about, draw it, and put it all on one page."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ddlm.analysis.gallery import Study


def analyze(
    *,
    model: str,
    out: Path = Path("runs/analysis"),
    checkpoints: list[str] | None = None,
    sequences: int = 64,
    steps: int = 200,
    solver: Literal["euler", "heun", "dpmpp_2m", "sde"] | None = None,
    temperature: float | None = None,
    noise_scales: list[float] = [0.5, 0.8, 1.0, 1.2],  # noqa: B006 - read only; shown in the help
    step_counts: list[int] = [25, 50, 100, 200, 500],  # noqa: B006
    patience: list[int] = [5, 10, 25, 50],  # noqa: B006
    judge: str = "none",
    data: str | None = None,
    speed: Path | None = None,
    template: str | None = None,
    seed: int = 0,
    slots: int = 32,
    page: Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
) -> None:
    """Record trajectories of a model and its checkpoints, draw the figures, answer the paper's claims, write a report.

    OUT/records holds what was recorded, OUT/figures the figures as PNG and SVG, OUT/report.html everything on one
    page that needs no connection, OUT/findings.json the numbers. What is recorded already is not recorded again, so
    the same command goes on after an interruption; a study of one setting takes minutes on a CPU for the tiny model.

    ddlm analyze --model runs/tiny --judge runs/judge --out runs/analysis

    Args:
        model: Model folder, run folder (its best checkpoint) or hub id.
        out: Folder of the study.
        checkpoints: Checkpoints to compare with, steps of the same run or model folders; none: up to four of the run.
        sequences: Sequences of every setting.
        steps: Solver steps of the trajectories.
        solver: Of everything that is sampled; none: each model's own.
        temperature: Divides the logits, of everything that is sampled; none: each model's own.
        noise_scales: Scales of the initial noise, relative to t_max.
        step_counts: Numbers of steps allowed, for quality against steps.
        patience: Steps without a token switch after which a sequence would end early.
        judge: Causal language model for AR-NLL: folder, hub id, smollm2, or none.
        data: Prepared shards for the loss curve, the frequency bands and the prompts; none: those of the training.
        speed: Record of `ddlm benchmark sample`, for the figure of speed.
        template: What is written; none: whole sequences from nothing.
        seed: Of the first sequence; every setting starts from the same noise.
        slots: Sequences advanced together.
        page: Markdown page with the marks of a study, whose part between them is written anew from the records.
        overwrite: Replace records of another model or other settings.
        device: cpu, cuda or cuda:N; none: a GPU where there is one.
        precision: Of the matrix products; none: bf16 on a GPU that has it, fp32 elsewhere.
    """
    from rich.console import Console

    from ddlm import study
    from ddlm.evaluation.progress import progress_bar
    from ddlm.files import check_folder

    if importlib.util.find_spec("matplotlib") is None:  # before hours of recording
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    console = Console(stderr=True, highlight=False)
    wanted = study.Study(
        model=model,
        out=out,
        checkpoints=checkpoints,
        sequences=sequences,
        steps=steps,
        solver=solver,
        temperature=temperature,
        noise_scales=noise_scales,
        step_counts=step_counts,
        patience=patience,
        judge=None if judge == "none" else judge,
        data=data,
        template=template,
        seed=seed,
        slots=slots,
        overwrite=overwrite,
        device=device,
        precision=precision,
    )
    for folder in (out, out / "records", out / "figures"):
        check_folder(folder, "--out")
    if page is not None:
        from ddlm.analysis.page import check_page

        check_page(page)
    if speed is not None:
        from ddlm.analysis.gallery import read_speed

        read_speed(speed)  # before hours of recording
    with progress_bar() as tell:
        try:
            recording = study.Recording(wanted, tell)
            recording.run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; what was recorded is kept, go on with: {_again()}"
            ) from None
    for note in recording.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    _draw(out, _run_folder(model), speed, page)


def _run_folder(model: str) -> Path | None:
    from ddlm.checkpoint import find_model
    from ddlm.study import run_of

    return run_of(find_model(model))


def _draw(
    out: Path,
    run: Path | None,
    speed: Path | None,
    page: Path | None,
) -> None:
    """Figures, findings, report and page from the records."""
    from ddlm.analysis.gallery import Study, draw_all
    from ddlm.analysis.paper import what_was_run
    from ddlm.analysis.report import write_report
    from ddlm.record import make_record, write_record

    found: Study = Study.load(out, run, speed)
    drawn = draw_all(found)
    rows = [f.to_row() for f in found.findings]
    results = {
        "studied": what_was_run(found.main),
        "recorded": found.recorded,
        "findings": rows,
        "figures": [vars(d) for d in drawn],
    }
    config = dict(found.main.header["config"])
    # The record is made to be shown: where the text lay on this machine says nothing.
    config["data"] = config["data"] | {"path": Path(config["data"]["path"]).name}
    write_record(out / "findings.json", make_record("analyze", config, results))
    report = write_report(found, drawn, out / "report.html")
    if page is not None:
        from ddlm.analysis.page import fill_page

        fill_page(page, out)
    for finding in found.findings:
        print(f"{finding.question}\n  {finding.answer}")
    print(f"\n{len(drawn)} figures in {out / 'figures'}, everything on one page: {report}")


def _again() -> str:
    return shlex.join(["ddlm", *sys.argv[1:]])
