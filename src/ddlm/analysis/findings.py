"""What the records say about the claims of DDLM, section 4.1: each a number and a figure to look at.

Numbers are computed here and nowhere else; the report and the documentation print what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ddlm.analysis.beyond import band_masks
from ddlm.analysis.record import Array, Record
from ddlm.analysis.trajectories import Trajectories, first_lasting

CALM = 0.001  # share of the tokens that switch at a step, below which switching counts as over
NEAR = 0.95  # of sqrt(D), or of a cosine of 1


@dataclass(frozen=True)
class Finding:
    """One claim and its answer.

    Attributes:
        question: The claim, as a question.
        paper: What the paper reports.
        answer: What was measured here, with its numbers.
        figure: Name of the figure that shows it.
        numbers: The same numbers by name.
    """

    question: str
    paper: str
    answer: str
    figure: str
    numbers: dict[str, Any]

    def to_row(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def find_all(
    main: Trajectories,
    noise: Sequence[Trajectories],
    quality: Sequence[dict[str, Any]],
    frequency: Record | None,
) -> list[Finding]:
    """Every finding that the records allow.

    Args:
        main: The model's trajectories.
        noise: The same with other scales of the initial noise, in order.
        quality: Rows of the ``quality`` record, possibly none.
        frequency: The ``frequency`` record.
    """
    found = [
        switching(main),
        estimate_norm(main),
        state_norm(main),
        score_direction(main),
    ]
    if len(noise) > 1:
        found.append(noise_scale(noise))
    if quality:
        found.append(early_exit(quality))
    if frequency is not None:
        found.append(commitment(main, frequency))
    return found


def switching(t: Trajectories) -> Finding:
    """Do the switches reach zero, and at which step."""
    mean, n = t.switches.mean(0), len(t.steps)
    calm = first_lasting(mean, mean <= CALM)
    last = t.last_switch
    tail = float(mean[-max(1, n // 10) :].mean())
    never = float((last < n).mean())
    numbers = {
        "step_below_0.1_percent": calm,
        "last_switch_median": float(np.median(last)),
        "last_switch_90_percent": float(np.quantile(last, 0.9)),
        "switches_in_the_last_tenth_percent": 100 * tail,
        "sequences_without_a_switch_at_the_end": never,
    }
    over = (
        f"the mean falls below 0.1% of the tokens at step {calm} of {n} and stays there"
        if calm is not None
        else f"no: at the last of {n} steps {100 * mean[-1]:.2f}% of the tokens still switch"
    )
    answer = (
        f"{over[0].upper()}{over[1:]}. The last switch of a sequence comes at step {np.median(last):.0f} "
        f"(median; 90% of the sequences: {np.quantile(last, 0.9):.0f}); over the last tenth of the steps "
        f"{100 * tail:.3g}% of the tokens switch at a step."
    )
    return Finding(
        "Do token switches reach zero, and at which step?",
        "no switches after about step 100 of 200",
        answer,
        "checkpoints",
        numbers,
    )


def estimate_norm(t: Trajectories) -> Finding:
    """Does x0_hat reach sqrt(D) early."""
    values = t.values("x0_norm")
    step = first_lasting(values[0], values.mean(0) >= NEAR * t.radius)
    end = _pm(values[:, -1])
    when = (
        f"Its mean norm passes {NEAR:.0%} of √D = {t.radius:g} at step {step} of {len(t.steps)} "
        f"(t = {t.times[step - 1]:.2f})"
        if step is not None
        else f"Its mean norm does not stay above {NEAR:.0%} of √D = {t.radius:g}"
    )
    first = _pm(values[:, 0])
    return Finding(
        "Does the estimate reach the norm √D early?",
        "‖x̂₀‖ reaches 16 = √256 fast",
        f"{when}; it begins at {first} and ends at {end}.",
        "geometry",
        {
            "step": step,
            "radius": t.radius,
            "first": float(values[:, 0].mean()),
            "end": float(values[:, -1].mean()),
        },
    )


def state_norm(t: Trajectories) -> Finding:
    """Does |x| shrink and grow again."""
    values = t.values("x_norm")
    mean = values.mean(0)
    low = int(mean.argmin())
    dips = float((values.min(1) < 0.99 * values[:, -1]).mean())
    inside = float((values.min(1) < t.radius).mean())
    grows = mean[low] < 0.99 * mean[-1]
    inner = mean[low] < t.radius
    verdict = (
        "Yes"
        if grows and inner
        else "It grows again, but stays outside of the sphere"
        if grows
        else "No"
    )
    answer = (
        f"{verdict}: the mean norm falls from {mean[0]:.1f} to {mean[low]:.2f} at step {low + 1} "
        f"(t = {t.times[low]:.2f}) and ends at {mean[-1]:.2f} (√D = {t.radius:g}); {dips:.0%} of the sequences "
        f"rise by more than 1% after their lowest point, {inside:.0%} come below √D. Noised text x₀ + tε has the norm "
        f"√(D(1 + t²)), which is {t.radius * np.sqrt(1 + t.times[-1] ** 2):.2f} at the last step, "
        f"t = {t.times[-1]:g}."
    )
    return Finding(
        "Does ‖x‖ shrink and grow again, through the interior of the sphere?",
        "‖x‖ falls, then rises: the path crosses the interior",
        answer,
        "geometry",
        {
            "start": float(mean[0]),
            "lowest": float(mean[low]),
            "lowest_step": low + 1,
            "end": float(mean[-1]),
            "sequences_that_rise_again": dips,
            "sequences_inside": inside,
        },
    )


def score_direction(t: Trajectories) -> Finding:
    """After which step does the direction of the score stay fixed."""
    values = t.values("sequence_score_cosine")
    mean = values.mean(0)
    step = first_lasting(mean, mean >= NEAR)
    x_mean = t.values("sequence_x_cosine").mean(0)
    x_step = first_lasting(x_mean, x_mean >= NEAR)
    half = len(t.steps) // 2
    exact = "" if t.header["exact_cosines"] else " (sketched)"
    answer = (
        f"The cosine to the final score stays above {NEAR} from step {step} of {len(t.steps)} on, that of the state "
        f"to the final state from step {x_step}; half-way, at step {half}, they are {_pm(values[:, half - 1])} and "
        f"{_pm(t.values('sequence_x_cosine')[:, half - 1])}{exact}."
    )
    return Finding(
        "After which step does the score keep its direction?",
        "the cosine to the final score is stable after about step 100 of 200",
        answer,
        "geometry",
        {"score_step": step, "state_step": x_step, "score_cosine_half_way": float(mean[half - 1])},
    )


def noise_scale(runs: Sequence[Trajectories]) -> Finding:
    """What the scale of the initial noise does to the path."""
    rows = []
    for t in runs:
        mean = t.values("x_norm").mean(0)
        rows.append(
            {
                "noise_scale": t.header["noise_scale"],
                "start": float(mean[0]),
                "lowest": float(mean.min()),
                "lowest_step": int(mean.argmin()) + 1,
                "end": float(mean[-1]),
                "last_switch_median": float(np.median(t.last_switch)),
                "distinct_1": _distinct(t),
            }
        )
    parts = [
        f"noise {r['noise_scale']:g}: ‖x‖ {r['start']:.1f} → {r['lowest']:.2f} (step {r['lowest_step']}) → "
        f"{r['end']:.2f}, last switch at step {r['last_switch_median']:.0f}, distinct tokens in a text "
        f"{r['distinct_1']:.0%}"
        for r in rows
    ]
    return Finding(
        "What does the scale of the initial noise do to the path?",
        "less noise: a path nearer to the centre, lower AR-NLL, less diversity (dist-1 .13 at 0.5, .61 at 1.2)",
        "; ".join(parts) + ".",
        "noise",
        {"rows": rows},
    )


def early_exit(rows: Sequence[dict[str, Any]]) -> Finding:
    """What patience saves, and what it costs."""
    longest = max(r["steps"] for r in rows)
    parts, kept = [], []
    plain = {r["steps"]: r for r in rows if r["patience"] is None}
    for r in rows:
        if r["patience"] is None:
            continue
        whole = plain[r["steps"]]
        saved = 1 - r["performed"] / r["steps"]
        row = {
            "steps": r["steps"],
            "patience": r["patience"],
            "performed": r["performed"],
            "saved": saved,
            "agreement": r["agreement"],
        }
        text = (
            f"n = {r['steps']}, n_p = {r['patience']}: {r['performed']:.0f} steps ({saved:.0%} saved), "
            f"{r['agreement']:.1%} of the tokens as without"
        )
        if r.get("nll") is not None and whole.get("nll") is not None:
            row["nll_change"] = r["nll"] - whole["nll"]
            text += f", AR-NLL {r['nll']:.3f} against {whole['nll']:.3f}"
        kept.append(row)
        if r["patience"] == 25 or (r["steps"] == longest):
            parts.append(text)
    if not parts:  # a patience has rows only for the numbers of steps that exceed it
        parts.append(
            f"Not measured: no patience of the study is below the {longest} steps allowed, so that no sequence could "
            "end early"
        )
    return Finding(
        "What does leaving early save, and what does it cost?",
        "AR-NLL unchanged; n = 500 with n_p = 25 ends near step 200 and beats a plain 200; 10–40% of the time saved",
        "; ".join(parts) + ".",
        "quality",
        {"rows": kept},
    )


def commitment(t: Trajectories, frequency: Record) -> Finding:
    """Which tokens settle first."""
    rows: list[dict[str, Any]] = []
    for name, mask in band_masks(t, frequency):
        if mask.any():
            steps = t.settled_step[mask]
            rows.append(
                {
                    "band": name,
                    "tokens": int(mask.sum()),
                    "median": float(np.median(steps)),
                    "mean": float(steps.mean()),
                }
            )
    first = min(rows, key=lambda r: r["mean"])
    last = max(rows, key=lambda r: r["mean"])
    listed = ", ".join(f"{r['band']}: {r['mean']:.0f}" for r in rows)
    return Finding(
        "In which order are tokens committed?",
        "not in the paper",
        f"Mean step of settling by frequency in the training text: {listed}. First: {first['band']}; "
        f"last: {last['band']}.",
        "bands",
        {"rows": rows},
    )


def _distinct(t: Trajectories) -> float:
    """Distinct tokens over tokens of each text, mean."""
    shares = [
        len(np.unique(tokens[given])) / given.sum()
        for tokens, given in zip(t.tokens[:, -1], t.generated, strict=True)
    ]
    return float(np.mean(shares))


def _pm(values: Array) -> str:
    return f"{values.mean():.2f} ± {values.std():.2f}"
