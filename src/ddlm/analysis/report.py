"""One self-contained HTML page for a study: findings, replay, samples, figures, tables, configuration.

Nothing is fetched from outside: styles, script, pictures and data are in the file.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ddlm.analysis.findings import Finding
from ddlm.analysis.gallery import Drawn, Study
from ddlm.analysis.trajectories import Trajectories, nll_half_width, repeated
from ddlm.files import write_text

SHOWN = 6  # unconditional samples
COMMON = 50  # most frequent tokens whose return alone is not marked
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(study: Study, drawn: Sequence[Drawn], path: Path) -> Path:
    """Write the page; returns its path.

    Args:
        study: The records.
        drawn: The figures, drawn already.
        path: Where.
    """
    main = study.main
    title = f"How {_name(study)} writes"
    sections = [
        ("findings", "Findings", _findings(study.findings, {d.name for d in drawn})),
        ("replay", "Replay", _REPLAY),
        ("samples", "Samples", _samples(study)),
        ("figures", "Figures", "".join(_figure(study.folder / "figures", d) for d in drawn)),
        ("tables", "Tables", _tables(study)),
        ("configuration", "Configuration", _configuration(study)),
    ]
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, name, content in sections
    )
    run = html.escape(
        f"{main.header['sequences']} sequences, {main.header['steps']} steps, {main.label}, "
        f"template {main.header['template']}"
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)}</title><link rel="icon" href="data:,">
<style>{_static("report.css")}</style></head><body>
<header><h1>{html.escape(title)}</h1><p class="quiet">{run}</p><nav><ul>{links}</ul></nav></header>
<main>{body}</main>
<script type="application/json" id="replay-data">{_json(replay(main))}</script>
<script>{_static("report.js")}</script></body></html>
"""
    write_text(path, page)
    return path


def replay(t: Trajectories) -> dict[str, Any]:
    """What the slider shows: tokens as changes from step to step, certainty as a digit, of the first sequences."""
    entropy = t.record.arrays["replay_entropy"].astype(np.float32)  # (R, n, T)
    tokens = t.tokens[: len(entropy)].astype(np.int64)
    top = max(float(np.log(len(t.header["pieces"]) + 1)), float(entropy.max()), 1e-6)
    ids = sorted({int(i) for i in np.unique(tokens)})
    number = {token: i for i, token in enumerate(ids)}
    sequences = []
    for r, row in enumerate(tokens):
        changes: list[list[int]] = [[]]
        for before, after in itertools.pairwise(row):
            moved = np.flatnonzero(before != after)
            changes.append([v for i in moved for v in (int(i), number[int(after[i])])])
        digits = np.minimum(10 * entropy[r] / top, 9).astype(int)
        sequences.append(
            {
                "first": [number[int(i)] for i in row[0]],
                "changes": changes,
                "entropy": ["".join(map(str, d)) for d in digits.tolist()],
                "given": "".join("0" if g else "1" for g in t.generated[r]),
                "settled": t.settled_step[r].tolist(),
                "mean": [round(float(v), 3) for v in t.values("entropy")[r]],
            }
        )
    pieces = [_piece(t.header["pieces"][str(i)]) for i in ids]
    return {
        "pieces": pieces,
        "times": [round(float(x), 4) for x in t.times],
        "sequences": sequences,
    }


def marked(
    tokens: Sequence[int], pieces: Sequence[str], generated: Sequence[bool], common: set[int]
) -> tuple[str, float]:
    """A text as HTML with its repetitions marked (DDLM, Table 4), and the share of generated tokens that are."""
    marks = repeated(tokens, common)
    out, hits = [], 0
    for piece, mark, written in zip(pieces, marks, generated, strict=True):
        text = html.escape(_piece(piece))
        if not written:
            out.append(f'<span class="given">{text}</span>')
        elif mark:
            out.append(f'<mark class="r{mark}">{text}</mark>')
            hits += 1
        else:
            out.append(text)
    return "".join(out), hits / max(sum(generated), 1)


def _findings(found: Iterable[Finding], names: set[str]) -> str:
    cards = []
    for f in found:
        link = f' <a href="#figure-{f.figure}">See the figure.</a>' if f.figure in names else ""
        cards.append(
            f'<div class="card"><h3>{html.escape(f.question)}</h3><p>{html.escape(f.answer)}{link}</p>'
            f'<p class="paper">The paper: {html.escape(f.paper)}.</p></div>'
        )
    return "".join(cards)


_REPLAY = """<p>Drag the slider: every step shows the most probable token of each position. Pale tokens are uncertain,
tokens that switched at the step are underlined; the bars count the switches of every step.</p>
<div class="card"><div class="controls">
<label for="sequence">Sequence</label><div class="buttons"><select id="sequence"></select>
<button id="play" type="button">Play</button></div>
<label for="step">Step</label><input id="step" type="range" min="1" max="1" value="1" step="1"></div>
<canvas id="strip" role="img" aria-label="Token switches of every step"></canvas>
<p id="readout" class="quiet" aria-live="polite"></p><p id="tokens" class="text"></p></div>"""


def _samples(study: Study) -> str:
    main = study.main
    common: set[int] = set()
    if frequency := study.others.get("frequency"):
        common = set(np.argsort(-frequency.arrays["counts"])[:COMMON].tolist())
    legend = (
        '<p>Marked as in Table 4 of the paper: <mark class="r1">a token that occurred before in the text</mark> and '
        '<mark class="r2">a pair of tokens that occurred before</mark>'
        + (f"; the {COMMON} most frequent tokens are marked in pairs only" if common else "")
        + '. What was given is <span class="given">in italics</span>.</p>'
    )
    parts = [legend]
    if record := study.others.get("samples"):
        parts.append(f"<h3>Continuations of held-out text, {record.header['steps']} steps</h3>")
        for row in record.header["rows"]:
            text, share = marked(row["tokens"], row["pieces"], row["is_noised"], common)
            parts.append(_sample(text, f"seed {row['seed']}, {share:.0%} of the tokens repeat"))
    parts.append(f"<h3>Sequences of the study, {main.header['steps']} steps</h3>")
    for i in range(min(SHOWN, len(main.tokens))):
        final = main.tokens[i, -1].tolist()
        pieces = [main.header["pieces"][str(token)] for token in final]
        text, share = marked(final, pieces, main.generated[i].tolist(), common)
        note = f"sequence {i + 1}, last switch at step {main.last_switch[i]}, {share:.0%} of the tokens repeat"
        parts.append(_sample(text, note))
    return "".join(parts)


def _sample(text: str, note: str) -> str:
    return f'<div class="card"><p class="quiet">{note}</p><p class="text">{text}</p></div>'


def _figure(folder: Path, drawn: Drawn) -> str:
    def uri(path: Path) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()

    wide, narrow = folder / f"{drawn.name}.svg", folder / f"{drawn.name}-narrow.svg"
    source = ""
    if narrow.is_file():
        source = f'<source media="(max-width: 640px)" srcset="{uri(narrow)}">'
    title, caption = html.escape(drawn.title), html.escape(drawn.caption)
    return (
        f'<figure id="figure-{drawn.name}"><h3>{title}</h3><picture>{source}'
        f'<img src="{uri(wide)}" alt="{title}"></picture><figcaption>{caption}</figcaption></figure>'
    )


def _tables(study: Study) -> str:
    parts = []
    if rows := study.quality.get("rows"):
        judged = rows[0].get("nll") is not None
        heads = [
            "steps allowed",
            "patience",
            "steps performed",
            "tokens as without exit",
            "distinct-1",
            "repetition",
        ]
        cells = []
        for r in rows:
            line = [
                str(r["steps"]),
                "none" if r["patience"] is None else str(r["patience"]),
                f"{r['performed']:.1f} ± {r['performed_std']:.1f}",
                f"{r['agreement']:.1%}",
                f"{r['distinct_1']:.3f}",
                f"{r['repetition']:.3f}",
            ]
            if judged:
                half = nll_half_width(r)
                line.append(f"{r['nll']:.3f}" + (f" ± {half:.3f}" if half else ""))
            cells.append(line)
        parts.append(_table("Quality against steps", heads + ["AR-NLL (nats)"] * judged, cells))
    if len(study.noise) > 1:
        noise = next(f for f in study.findings if f.figure == "noise").numbers["rows"]
        parts.append(
            _table(
                "Initial noise",
                [
                    "noise",
                    "‖x‖ first",
                    "lowest",
                    "at step",
                    "last",
                    "last switch (median)",
                    "distinct-1",
                ],
                [
                    [
                        f"{r['noise_scale']:g}",
                        f"{r['start']:.1f}",
                        f"{r['lowest']:.2f}",
                        str(r["lowest_step"]),
                        f"{r['end']:.2f}",
                        f"{r['last_switch_median']:.0f}",
                        f"{r['distinct_1']:.3f}",
                    ]
                    for r in noise
                ],
            )
        )
    if cost := study.others.get("overhead"):
        h = cost.header
        with_kl = (
            f", {h['cost_with_kl']:.1%} with the KL of every position as here"
            if "cost_with_kl" in h
            else ""
        )
        parts.append(
            f"<p>Recording costs {h['cost']:.1%} of the sampling time{with_kl} "
            f"({h['sequences']} sequences, {h['steps']} steps, {html.escape(h['device'])}; "
            f"medians of {len(h['plain_seconds'])} runs each, in alternating order).</p>"
        )
    parts += [f"<p>Left out: {html.escape(n)}.</p>" for n in study.index.get("notes", [])]
    return "".join(parts)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    return (
        f'<h3>{html.escape(title)}</h3><div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _configuration(study: Study) -> str:
    config = yaml.safe_dump(study.main.header["config"], sort_keys=False)
    found = study.folder / "findings.json"
    parts = [
        f"<details open><summary>config.yaml, resolved</summary><pre>{html.escape(config)}</pre></details>"
    ]
    if found.is_file():
        record = json.loads(found.read_text(encoding="utf-8"))
        facts = {k: record[k] for k in ("command", "date", "commit", "versions", "hardware")}
        told = {"recorded": study.recorded, "drawn": facts} if study.recorded else {"drawn": facts}
        text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
        parts.append(
            f"<details><summary>where and how it was run</summary><pre>{html.escape(text)}</pre></details>"
        )
    return "".join(parts)


def _name(study: Study) -> str:
    return Path(str(study.index["model"])).name or "the model"


def _piece(text: str) -> str:
    """A token as it is shown: line breaks and tabs made visible, so that they cannot tear the page."""
    return text.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")


def _json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _static(name: str) -> str:
    return (files("ddlm.analysis") / "static" / name).read_text(encoding="utf-8")
