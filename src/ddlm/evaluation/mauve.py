"""MAUVE (Pillutla et al. 2021) by mauve-text, on features of any local model, with seeds and intervals.

The score depends on the quantisation: the number of buckets and the k-means seed are part of the result, and the
mean over several seeds is what is reported. Features are those of mauve-text: the last layer's hidden state at the
last token of the whole text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddlm.evaluation.extras import (
    NOT_LOADED,
    missing_extra,
    no_stderr,
    quiet,
    why_not_loaded,
)
from ddlm.evaluation.hub import (
    DEFAULT_FEATURES,
    cache_folder,
    fingerprint,
    local_folder,
)
from ddlm.types import ConfigError, DataError

FEWEST = 20  # texts on each side: two buckets of n/10
_RESAMPLES = 1000

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Mauve:
    """A MAUVE score.

    Attributes:
        mauve: Mean over the k-means seeds, 0 to 1, higher is closer to the reference.
        interval: 95% interval, cut at 0 and 1: bootstrap over the texts within each quantisation, and the spread over
            seeds.
        half_width: Half of that interval before it is cut, which means of several scores are given.
        star: Mean of MAUVE*, the variant with smoothed histograms.
        seeds: k-means seeds.
        per_seed: The score of each seed.
        buckets: Number of buckets.
        scaling: Scaling factor c.
        samples: Texts on the model's side.
        references: Texts on the human side.
        settings: The remaining settings of mauve-text.
    """

    mauve: float
    interval: tuple[float, float]
    half_width: float
    star: float
    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]
    buckets: int
    scaling: float
    samples: int
    references: int
    settings: dict[str, Any] = field(default_factory=dict)


def mauve(
    references: Features,
    samples: Features,
    *,
    seeds: Sequence[int] = (25,),
    buckets: int | None = None,
    scaling: float = 5,
    redo: int = 5,
    iterations: int = 500,
) -> Mauve:
    """Compare two sets of features.

    Args:
        references: Features of real texts ``(n, d)``.
        samples: Features of generated texts ``(m, d)``.
        seeds: k-means seeds; mauve-text's own default is 25.
        buckets: Number of buckets; None means min(n, m) / 10, mauve-text's default.
        scaling: Scaling factor c of the divergence curve.
        redo: k-means restarts, the best is kept.
        iterations: Most k-means iterations.

    Raises:
        DataError: if one side has fewer than 20 texts, the features do not match, or a feature is not finite.
        ConfigError: if mauve-text is not installed, or there are more buckets than texts.
    """
    for name, side in (("reference", references), ("sample", samples)):
        if len(side) < FEWEST:
            raise DataError(
                f"{len(side)} {name} texts: MAUVE needs at least {FEWEST}, the paper uses 5,000"
            )
        bad = np.flatnonzero(~np.isfinite(side).all(axis=1))
        if bad.size:
            raise DataError(
                f"the features of {name} text {bad[0] + 1} are not finite ({bad.size} texts)"
            )
    if references.shape[1] != samples.shape[1]:
        raise DataError(
            f"features of width {references.shape[1]} and {samples.shape[1]}: use one model for both"
        )
    fewest = min(len(references), len(samples))
    if buckets is None:
        buckets = max(2, round(fewest / 10))
    if not 2 <= buckets <= fewest:
        raise ConfigError(
            f"{buckets} MAUVE buckets for {fewest} texts: need from 2 to the number of texts"
        )
    compute = missing_extra("mauve.compute_mauve", "eval")
    # k-means warns of fewer than 39 texts a bucket (the default has 20 of both sides) and of empty clusters, which
    # features of few values (a repeated line) have: both are expected here.
    with no_stderr():
        outs = [
            compute.compute_mauve(
                p_features=references,
                q_features=samples,
                num_buckets=buckets,
                mauve_scaling_factor=scaling,
                kmeans_num_redo=redo,
                kmeans_max_iter=iterations,
                seed=seed,
                verbose=False,
            )
            for seed in seeds
        ]
    scores = [
        min(1.0, float(out.mauve)) for out in outs
    ]  # its sum of trapezia may end a rounding above 1
    value = float(np.mean(scores))
    half = _half_width(outs, scores, len(references), len(samples), scaling)
    return Mauve(
        mauve=value,
        interval=(max(0.0, value - half), min(1.0, value + half)),
        half_width=half,
        star=float(np.mean([out.mauve_star for out in outs])),
        seeds=tuple(seeds),
        per_seed=tuple(scores),
        buckets=buckets,
        scaling=scaling,
        samples=len(samples),
        references=len(references),
        settings={"kmeans_redo": redo, "kmeans_iterations": iterations, "explained_variance": 0.9},
    )


def _half_width(
    outs: Sequence[Any], scores: Sequence[float], n: int, m: int, scaling: float
) -> float:
    """Half of the 95% interval around the mean: 1.96 standard deviations of bootstrap and of the seeds together.

    With the quantisation held fixed, drawing texts with replacement is drawing their bucket counts from a multinomial,
    so no k-means is repeated. The bootstrap is used for its spread only: resampling adds noise that lowers MAUVE, and
    its percentiles would lie below the score.
    """
    rng = np.random.default_rng(0)
    draws = -(-_RESAMPLES // len(outs))
    spread = []
    for out in outs:
        p = rng.multinomial(n, out.p_hist, size=draws) / n
        q = rng.multinomial(m, out.q_hist, size=draws) / m
        spread.append(np.var(area(p, q, scaling)))
    variance = float(np.mean(spread))
    if len(scores) > 1:
        variance += float(np.var(scores, ddof=1)) / len(scores)
    return float(1.96 * variance**0.5)


def area(
    p: npt.NDArray[np.float64], q: npt.NDArray[np.float64], scaling: float = 5, points: int = 25
) -> npt.NDArray[np.float64]:
    """MAUVE of histograms: area under the divergence curve, for each row of ``p`` and ``q`` ``(R, buckets)``."""
    w = np.linspace(1e-6, 1 - 1e-6, points)[:, None, None]
    mixed = w * p + (1 - w) * q  # (points, R, buckets)
    x, y = (np.exp(-scaling * _kl(side, mixed)).T for side in (q, p))  # (R, points)
    ones, zeros = np.ones((len(p), 1)), np.zeros((len(p), 1))
    x, y = np.hstack([ones, x, zeros]), np.hstack([zeros, y, ones])
    return 0.5 * (_trapezoid(x, y) + _trapezoid(y, x))


def _kl(p: npt.NDArray[np.float64], r: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sum of p log(p / r) over the last axis, 0 log 0 = 0; r is positive wherever p is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / r), 0.0)
    total: npt.NDArray[np.float64] = terms.sum(axis=-1)
    return total


def _trapezoid(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    order = np.argsort(x, axis=1, kind="stable")
    x, y = np.take_along_axis(x, order, 1), np.take_along_axis(y, order, 1)
    total: npt.NDArray[np.float64] = ((x[:, 1:] - x[:, :-1]) * (y[:, 1:] + y[:, :-1]) / 2).sum(
        axis=1
    )
    return total


class Featurizer:
    """Turns texts into MAUVE features with one model; features are cached by the content of model and text.

    Args:
        name: A folder in transformers' format or a hub id, ``id@revision`` to pin it.
        device: torch device; None takes the GPU when there is one.
        batch_tokens: Tokens of a batch, padding included.
        cache: Folder of the cache; None means the user's.

    Raises:
        ConfigError: if the model cannot be found or loaded.
    """

    def __init__(
        self,
        name: str = DEFAULT_FEATURES,
        *,
        device: str | None = None,
        batch_tokens: int = 4096,
        cache: Path | None = None,
    ) -> None:
        self.name, self.batch_tokens = name, batch_tokens
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.folder, self.revision = local_folder(name, what="feature model", flag="--features")
        self.fingerprint = fingerprint(self.folder, cache_folder(cache))
        self.cache = cache_folder(cache) / "features" / self.fingerprint[:24]
        transformers = missing_extra("transformers", "eval")
        try:
            with quiet():
                # False: None would ask, and run the folder's code where the answer is yes.
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                    self.folder, trust_remote_code=False
                )
                self._model = transformers.AutoModel.from_pretrained(
                    self.folder,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
        except NOT_LOADED as error:
            raise ConfigError(
                f"the feature model {name} cannot be loaded: {why_not_loaded(error)}"
            ) from error
        self._model.to(self.device).eval()

    def describe(self) -> dict[str, Any]:
        """What a record needs to say about the features."""
        return {"features": self.name, "revision": self.revision, "fingerprint": self.fingerprint}

    def __call__(
        self, texts: Sequence[str], *, progress: Callable[[int, int], None] | None = None
    ) -> Features:
        """Features of whole texts ``(n, d)``.

        Raises:
            DataError: naming a text that is empty or too long for the model.
        """
        from ddlm.evaluation.judges import context_length

        file = self.cache / f"{_hash(texts)}.npy"
        if file.is_file():
            known: Features = np.load(file, allow_pickle=False)
            return known
        context = context_length(self._model.config)
        rows = self.tokenizer(list(texts), add_special_tokens=True)["input_ids"]
        for number, row in enumerate(rows, 1):
            if not row:
                raise DataError(f"text {number} is empty: it has no features")
            if context is not None and len(row) > context:
                raise DataError(
                    f"text {number} has {len(row)} tokens, but {self.name} reads {context}: take another model"
                )
        # A text that occurs many times, as in the sanity row of one line, is read once.
        place: dict[str, int] = {}
        which = [place.setdefault(text, len(place)) for text in texts]
        out = self._forward(list(dict(zip(texts, rows, strict=True)).values()), progress)[which]
        self.cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as stream:
            np.save(stream, out)
        part.replace(file)
        return out

    @torch.inference_mode()
    def _forward(
        self, rows: list[list[int]], progress: Callable[[int, int], None] | None
    ) -> Features:
        from ddlm.evaluation.judges import length_batches

        out: list[Any] = [None] * len(rows)
        done = 0
        for batch in length_batches([len(r) for r in rows], self.batch_tokens):
            longest = max(len(rows[b]) for b in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            valid = torch.zeros_like(ids)
            for i, b in enumerate(batch):
                ids[i, : len(rows[b])] = torch.tensor(rows[b])
                valid[i, : len(rows[b])] = 1
            hidden = self._model(
                input_ids=ids.to(self.device),
                attention_mask=valid.to(self.device),
                output_hidden_states=True,
            ).hidden_states[-1]
            last = hidden[torch.arange(len(batch)), valid.sum(1) - 1].float().cpu().numpy()
            for i, b in enumerate(batch):
                out[b] = last[i]
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
        return np.stack(out).astype(np.float32)


def _hash(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]
