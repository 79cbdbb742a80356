"""``ddlm evaluate``: measure samples or a model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddlm.evaluation.hub import DEFAULT_FEATURES, DEFAULT_JUDGE
from ddlm.types import local

if TYPE_CHECKING:
    from ddlm.data.tokenizer import Tokenizer
    from ddlm.evaluation.generators import Generator
    from ddlm.evaluation.protocol import Protocol


def evaluate(
    model: str | None = None,
    samples: Path | None = None,
    reference: Path | None = None,
    protocol: Literal["paper", "quick"] | None = None,
    data: str | None = None,
    judge: str = DEFAULT_JUDGE,
    features: str = DEFAULT_FEATURES,
    out: Path = Path("runs/evaluate"),
    prompts: int | None = None,
    continuations: int | None = None,
    steps: int | None = None,
    solver: Literal["euler", "heun", "dpmpp_2m", "sde"] | None = None,
    halt: str | None = None,
    noise_scale: float | None = None,
    temperature: float | None = None,
    refine: int | None = None,
    curves: bool | None = None,
    sanity: bool = True,
    tokenizer: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    model_precision: Literal["fp32", "bf16"] | None = None,
    seed: int = 0,
) -> None:
    """Measure a model by the paper's protocol, or any model's samples, and write record and tables.

    ddlm evaluate --model runs/tiny --data shards --judge runs/judge --features runs/judge

    ddlm evaluate --samples samples.jsonl --reference real.jsonl --judge none

    Args:
        model: Model folder, run folder or hub id; or a folder written by `ddlm baseline`.
        samples: Sample file instead of a model: JSON lines with a field text.
        reference: Sample file of real texts, for MAUVE and for a row to compare with.
        protocol: paper (5,000 prompts, 5 continuations each) or quick (100, 3); none: paper.
        data: Held-out text for prompts: prepared shards or raw text; none: the shards the model was trained on.
        judge: Causal language model for AR-NLL: folder, hub id (id@revision), smollm2, or none.
        features: Model for MAUVE features: folder, hub id, smollm2, or none.
        out: Folder for samples, record.json, table.md, table.tex, and curves.png and curves.svg; refused where it holds
            those of another model or sample file.
        prompts: Held-out windows to cut prompts from, instead of the protocol's number.
        continuations: Samples for each prompt, instead of the protocol's number.
        steps: Solver steps, instead of 50.
        solver: Solver, instead of euler.
        halt: Early exit, such as patience:25.
        noise_scale: Initial noise relative to t_max.
        temperature: Divides the logits; the model's own default is not used.
        refine: Rounds after the last step that draw a fourth of the tokens anew, given all others.
        curves: Also measure and draw quality against diversity over noise scale and temperature; none: yes, of a model.
        sanity: Also measure real, shuffled, unigram and repeated text.
        tokenizer: Count diversity in the tokens of this tokenizer (with --samples).
        precision: Of the judge's forward pass.
        model_precision: Of the diffusion model's matrix products; none: bf16 where the device has instructions for it.
        seed: Seed of the protocol.
    """
    from ddlm.evaluation.results import check_results
    from ddlm.files import check_folder
    from ddlm.types import ConfigError

    if (model is None) == (samples is None):
        raise ConfigError("name either a model (--model DIR) or samples (--samples FILE)")
    _refuse_strays(
        samples is not None,
        {
            "protocol": protocol,
            "data": data,
            "prompts": prompts,
            "continuations": continuations,
            "steps": steps,
            "solver": solver,
            "halt": halt,
            "noise_scale": noise_scale,
            "temperature": temperature,
            "refine": refine,
            "no-curves" if curves is False else "curves": curves,
            "model_precision": model_precision,
        },
        {"reference": reference, "tokenizer": tokenizer},
    )
    check_folder(out, "--out")
    check_results(out, samples if samples is not None else str(model))
    if samples is not None:
        _evaluate_samples(
            samples, reference, judge, features, tokenizer, precision, out, sanity, seed
        )
        return
    from dataclasses import replace

    from ddlm.evaluation.measure import MOST_SEEDS
    from ddlm.evaluation.protocol import PROTOCOLS

    check_folder(out / "samples", "--out")
    chosen = PROTOCOLS[protocol or "paper"]
    sampling: dict[str, Any] = {
        "steps": steps,
        "solver": solver,
        "halt": halt,
        "noise_scale": noise_scale,
        "temperature": temperature,
        "refine": refine,
    }
    counts: dict[str, Any] = {"prompts": prompts, "continuations": continuations}
    if model is not None and (local(model) / "plan.json").is_file():
        of_diffusion = sampling | {"model_precision": model_precision}
        for name in ("steps", "solver", "halt", "noise_scale", "refine", "model_precision"):
            if of_diffusion[name] is not None:
                raise ConfigError(
                    f"--{name} is for diffusion models and {model} is autoregressive: leave it out"
                )
    for name, number, fewest in (("prompts", prompts, 2), ("continuations", continuations, 1)):
        if number is not None and number < fewest:
            raise ConfigError(f"--{name} is {number}, it must be at least {fewest}")
    if (continuations or 0) > MOST_SEEDS:
        raise ConfigError(f"--continuations is {continuations}, it must be at most {MOST_SEEDS}")
    settings = replace(chosen.settings, **{k: v for k, v in sampling.items() if v is not None})
    chosen = replace(chosen, **{k: v for k, v in counts.items() if v is not None})
    chosen = replace(chosen, settings=settings, seed=seed, sanity=sanity)
    if curves is False:
        chosen = replace(chosen, noise_scales=(), temperatures=())
    evaluate_model(
        str(model), chosen, data, judge, features, precision, out, model_precision=model_precision
    )


def _refuse_strays(of_samples: bool, model: dict[str, Any], samples: dict[str, Any]) -> None:
    """Refuse what is only read for a model beside a sample file, and the other way round."""
    from ddlm.types import ConfigError

    strays, kind, mine = (
        (model, "--model", "--samples") if of_samples else (samples, "--samples", "--model")
    )
    given = next((name for name, value in strays.items() if value is not None), None)
    if given is not None:
        raise ConfigError(f"--{given} goes with {kind}, and {mine} was given: leave it out")


def evaluate_model(
    model: str,
    protocol: Protocol,
    data: str | None,
    judge: str,
    features: str,
    precision: Literal["fp32", "bf16"],
    out: Path,
    show: bool = True,
    model_precision: Literal["fp32", "bf16"] | None = None,
) -> dict[str, Any]:
    """Run a protocol on a model, write the record, the tables and the picture of the curves, return the record."""
    from dataclasses import asdict, replace

    from ddlm.evaluation import protocol as protocols
    from ddlm.evaluation import report
    from ddlm.evaluation.judges import refuse_seen
    from ddlm.evaluation.progress import progress_bar
    from ddlm.evaluation.results import what_is_absent, write_results

    generator, tokenizer, length, trained_on = load_generator(model, model_precision)
    protocol = replace(protocol, length=length)
    source = _source(data, trained_on, model)
    windows = protocols.held_out(source, tokenizer, length, protocol.prompts)
    if len(windows.tokens) < protocol.prompts:
        print(
            f"{protocol.prompts} prompts wanted, {source} has {len(windows.tokens)} windows: taking those"
        )
    if not generator.diffusion:
        refuse_seen(local(model), windows.hashes, f"the held-out text {windows.source}")
    changed = changed_data(model, source) if generator.diffusion else None
    if changed:
        print(changed)
    judging, featuring = load_judges(judge, features, precision)
    with progress_bar() as progress:
        found = protocols.run(
            protocol,
            generator,
            tokenizer,
            windows,
            out / "samples",
            name=Path(model).name,
            judge=judging,
            features=featuring,
            progress=progress,
        )
    notes = [*found.facts["notes"], *([changed] if changed else [])]
    record = write_results(
        out,
        "evaluate",
        {"model": model, "protocol": asdict(protocol)},
        found.rows,
        found.curves,
        found.facts | {"notes": notes},
        protocol.seed,
    )
    pictures, note = draw_pictures(record, out)
    if show:
        steps = f", {protocol.settings.steps} steps" if generator.diffusion else ""
        report.show(f"{model}{steps}", found.rows)
        if found.curves:
            report.show("quality against diversity", found.curves, report.CURVE)
        written = ", ".join([f"{out}: record.json, table.md, table.tex", *pictures])
        lines = [*what_is_absent(found.rows, found.facts), *found.facts["notes"], written]
        print("\n".join(lines))
        if note:
            print(note)
    return record


def changed_data(model: str, source: str) -> str | None:
    """A line where the shards that prompts come from are not those the model was trained on.

    Their split is made by a hash of each document, so another preparation may hold out what the model has read.
    """
    from ddlm.checkpoint import find_model
    from ddlm.data.shards import TokenShards
    from ddlm.files import read_manifest

    if not (local(source) / "index.json").is_file():
        return None
    trained = (read_manifest(find_model(model)).get("provenance") or {}).get("data")
    found = TokenShards(source).hash
    if trained is None or trained == found:
        return None
    return (
        f"note: {model} was trained on data {str(trained)[:12]}, {source} now holds data {found[:12]}: its held-out"
        " documents may be among the model's training data"
    )


def draw_pictures(record: dict[str, Any], out: Path) -> tuple[list[str], str]:
    """Draw the curves of a record beside its tables; the files, or a line that says why there are none."""
    names = ["curves.png", "curves.svg"]
    for (
        name
    ) in names:  # an earlier picture would show another measurement than the tables beside it
        (out / name).unlink(missing_ok=True)
    if not record["results"]["curves"]:
        return [], ""
    if importlib.util.find_spec("matplotlib") is None:
        return [], "no picture of the curves: matplotlib is missing, pip install 'ddlm[plots]'"
    from ddlm.analysis.curves import draw_curves

    if not draw_curves(record, out / "curves"):
        return [], "no picture of the curves: without a judge there is no AR-NLL to draw"
    return names, ""


def load_generator(
    model: str, precision: Literal["fp32", "bf16"] | None = None
) -> tuple[Generator, Tokenizer, int, str | None]:
    """What writes the samples, its tokenizer, the length of its samples and the folder of its training data.

    A folder written by `ddlm baseline` is an autoregressive model; everything else is read as a diffusion model.
    ``precision`` None: bf16 where the device has instructions for it, fp32 elsewhere.
    """
    from ddlm.data.tokenizer import Tokenizer
    from ddlm.device import find_device, resolve_precision
    from ddlm.evaluation.hub import cache_folder, fingerprint

    folder = local(model)
    if (folder / "plan.json").is_file():
        from ddlm.evaluation.autoregressive import load_baseline
        from ddlm.evaluation.generators import AutoregressiveGenerator
        from ddlm.files import read_json
        from ddlm.types import ConfigError

        tokenizer = Tokenizer.load(folder)
        mark = fingerprint(folder, cache_folder())
        plan = read_json(folder / "plan.json", context=int, length=int)
        if plan["context"] < plan["length"]:
            raise ConfigError(
                f"{folder} has a context of {plan['context']} tokens and samples of {plan['length']}: train it again"
                f" with --context {plan['length']} or more"
            )
        generator = AutoregressiveGenerator(load_baseline(folder), tokenizer.end_id, mark)
        return generator, tokenizer, int(plan["length"]), None
    from ddlm.checkpoint import find_model
    from ddlm.evaluation.generators import DiffusionGenerator
    from ddlm.lm import load

    place = find_model(model)
    lm = load(place, precision=precision or resolve_precision("auto", find_device()))
    diffusion = DiffusionGenerator(
        lambda slots: lm.engine(slots=slots),
        lm.process,
        f"{fingerprint(place, cache_folder())} {lm.precision}",
        time_warp=lm.time_warp,
    )
    return diffusion, lm.tokenizer, lm.length, lm.config.data.path or None


def load_judges(judge: str, features: str, precision: Literal["fp32", "bf16"]) -> tuple[Any, Any]:
    """The judge and the feature model, None for ``none``."""
    from ddlm.evaluation.judges import Judge
    from ddlm.evaluation.mauve import Featurizer

    return (
        None if judge == "none" else Judge(judge, precision=precision),
        None if features == "none" else Featurizer(features),
    )


def _source(data: str | None, trained_on: str | None, model: str) -> str:
    from ddlm.types import ConfigError

    source = data or trained_on
    if source is None or (data is None and not local(source).is_dir()):
        raise ConfigError(
            f"{model} does not lead to its held-out text: name prepared shards or raw text with --data"
        )
    return source


def _evaluate_samples(
    samples: Path,
    reference: Path | None,
    judge: str,
    features: str,
    tokenizer: str | None,
    precision: Literal["fp32", "bf16"],
    out: Path,
    sanity: bool,
    seed: int,
) -> None:
    from ddlm.data.tokenizer import Tokenizer
    from ddlm.evaluation import report
    from ddlm.evaluation.compare import compare, partial_samples, unlike_stretches
    from ddlm.evaluation.progress import progress_bar
    from ddlm.evaluation.results import what_is_absent, write_results
    from ddlm.evaluation.samples import read_samples

    made = read_samples(samples)
    real = read_samples(reference) if reference is not None else []
    notes = partial_samples(made, real)
    if features != "none" and not real and not any(s.reference for s in made):
        features = "none"  # nothing to compare with: no reason to load a model
        notes.append("No MAUVE: no reference texts.")
    judging, featuring = load_judges(judge, features, precision)
    with progress_bar() as progress:
        rows = compare(
            Path(samples.name.removesuffix(".gz")).stem,
            made,
            real,
            tokenizer=Tokenizer.load(tokenizer) if tokenizer is not None else None,
            tokenizer_name=tokenizer or "",
            judge=judging,
            features=featuring,
            sanity=sanity,
            seed=seed,
            progress=progress,
        )
    notes += unlike_stretches(rows)
    facts = {
        "judge": None if judging is None else judging.describe(),
        "features": None if featuring is None else featuring.describe(),
        "notes": notes,
    }
    config = {"samples": samples, "reference": reference, "tokenizer": tokenizer}
    draw_pictures(write_results(out, "evaluate-samples", config, rows, [], facts, seed), out)
    report.show(samples.name, rows)
    written = f"{out}: record.json, table.md, table.tex"
    print("\n".join([*what_is_absent(rows, facts), *notes, written]))
