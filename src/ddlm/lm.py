"""A model as users see it: templates in, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddlm.device import Precision, find_device, has_bf16
from ddlm.sampling import halting
from ddlm.sampling.engine import Engine, safe_length
from ddlm.sampling.grid import once
from ddlm.sampling.jobs import check_tokens
from ddlm.sampling.request import Progress, Request, make_request
from ddlm.sampling.template import Template, parse
from ddlm.sampling.text import Generated, generated_ranges, in_order
from ddlm.sampling.values import whole, wholes
from ddlm.sampling.windows import LongText, windows
from ddlm.types import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ddlm.config import Config
    from ddlm.data.tokenizer import Tokenizer
    from ddlm.diffusion.process import NoiseProcess
    from ddlm.diffusion.time_warp import TimeWarp
    from ddlm.network.denoiser import DDLM
    from ddlm.network.inference import InferenceDenoiser
    from ddlm.sampling.solvers import Solver
    from ddlm.sampling.trace import Trace


class DiffusionLM:
    """A diffusion language model with its tokenizer, ready to write.

    Args:
        model: The network.
        config: Its configuration; defaults of generation come from ``config.sample``.
        tokenizer: Its tokenizer.
        time_warp: Learned distribution of t, for the grid ``warp``.
        device: Where to generate, ``cpu`` or ``cuda``; None takes a GPU where there is one.
        precision: Of the matrix products, ``fp32`` or ``bf16``; None is bf16 on a GPU that has it, fp32
            elsewhere. Everything else is float32 in both.
        compile: Compile the step (about half a minute once; static shapes).

    Attributes:
        denoiser: What the engine samples from.
        process: Its noise process.
    """

    def __init__(
        self,
        model: DDLM,
        config: Config,
        tokenizer: Tokenizer,
        time_warp: TimeWarp | None = None,
        *,
        device: str | None = None,
        precision: Precision | None = None,
        compile: bool = False,
    ) -> None:
        from ddlm.network.inference import InferenceDenoiser

        self.device = find_device(device)
        if precision is None:
            precision = "bf16" if self.device.type == "cuda" and has_bf16(self.device) else "fp32"
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision '{precision}' is unknown: choose fp32 or bf16")
        self.precision: Precision = precision
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model, self.config = model, config
        self.tokenizer, self.time_warp = tokenizer, time_warp
        self.process: NoiseProcess = model.process
        self.denoiser: InferenceDenoiser = InferenceDenoiser(model, dtype, self.device)
        self._compile = compile

    @property
    def length(self) -> int:
        """Longest sequence the model sees at once, in tokens."""
        return self.config.model.length

    def generate(
        self,
        template: str | Template | Sequence[str | Template],
        samples: int = 1,
        steps: int | None = None,
        solver: str | Solver | None = None,
        halt: halting.Criterion | str | None = None,
        noise_scale: float | None = None,
        seed: int = 0,
        *,
        seeds: Iterable[int] | None = None,
        grid: str | Tensor | Iterable[float] | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        guidance: float = 1.0,
        refine: int | None = None,
        slots: int = 64,
        overlap: int | None = None,
        trace: bool = False,
        on_progress: Callable[[int, Progress], None] | None = None,
    ) -> list[Generated]:
        """Write texts; see :meth:`iterate`, which yields them as they are finished.

        Returns:
            ``samples`` texts for each template, in order.
        """
        options = {k: v for k, v in locals().items() if k not in ("self", "template")}
        return list(self.iterate(template, **options))

    def iterate(
        self,
        templates: str | Template | Iterable[str | Template],
        samples: int = 1,
        steps: int | None = None,
        solver: str | Solver | None = None,
        halt: halting.Criterion | str | None = None,
        noise_scale: float | None = None,
        seed: int = 0,
        *,
        seeds: Iterable[int] | None = None,
        grid: str | Tensor | Iterable[float] | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        guidance: float = 1.0,
        refine: int | None = None,
        slots: int = 64,
        overlap: int | None = None,
        trace: bool = False,
        on_progress: Callable[[int, Progress], None] | None = None,
    ) -> Iterator[Generated]:
        """Write texts, yielding them in order. Mistakes are told at the call, before anything is written.

        A template longer than the model is written window by window: each window keeps the end of the last one (and
        whatever the template gives inside it) as its condition and writes the rest. Nothing is ever cut.

        Args:
            templates: ``"The river {32} sea."``, or several; ``{n}`` are n tokens to write, the rest is kept.
            samples: Texts for each template.
            steps: Steps allowed (None: the model's default, 50 in the paper).
            solver: ``euler``, ``heun``, ``dpmpp_2m`` or ``sde``.
            halt: Early exit, a criterion of :mod:`ddlm.sampling.halting` or text such as ``"patience:25"``.
            noise_scale: Initial noise relative to t_max (DDLM, Table 8).
            seed: Sample i of template j has the seed ``seed + j * samples + i``, whatever the batch.
            seeds: Instead of ``seed``: one for each text, in order; a list, an array or a tensor.
            grid: ``uniform``, ``karras``, ``warp``, or times.
            temperature: Divides the logits before the expectation.
            top_k: Only the k most probable tokens enter the expectation (0: all).
            guidance: Weight of classifier-free guidance (1: none).
            refine: Rounds after the last step that draw a fourth of the tokens anew, given all others
                (:mod:`ddlm.sampling.refine`; None: the model's default).
            slots: Sequences advanced together.
            overlap: Tokens of a long text's last window that the next one sees again (None: half the model's length).
            trace: Record each trajectory.
            on_progress: Called with the number of the text and its state after each evaluation of the network (``heun``
                makes two a step), last with the tokens it ends with; of a long text, for each window in turn.

        Raises:
            ConfigError: for a malformed template or a setting out of range.
        """
        options = {k: v for k, v in locals().items() if k != "self"}
        return in_order(self.as_finished(**options))

    def as_finished(
        self,
        templates: str | Template | Iterable[str | Template],
        samples: int = 1,
        seed: int = 0,
        *,
        seeds: Iterable[int] | None = None,
        slots: int = 64,
        overlap: int | None = None,
        on_progress: Callable[[int, Progress], None] | None = None,
        **settings: Any,
    ) -> Iterator[tuple[int, Generated]]:
        """The number and text of each one as it is finished: short ones do not wait for a long one before them.

        Arguments and mistakes as in :meth:`iterate`.
        """
        samples, seed = whole("samples", samples), whole("seed", seed)
        if samples < 1:
            raise ConfigError(f"samples={samples} was given, at least 1 is needed")
        options = self.options(**settings)
        one = isinstance(templates, str | bytes | Template) or not isinstance(templates, Iterable)
        given: Any = [templates] if one else templates
        parsed = [t if isinstance(t, Template) else parse(t, self.tokenizer) for t in given]
        count = len(parsed) * samples
        chosen = range(seed, seed + count) if seeds is None else wholes("seed", seeds)
        if seeds is not None and len(chosen) != count:
            raise ConfigError(f"{len(chosen)} seeds were given for {count} texts: give each one")
        if not parsed:
            return iter(())
        # a range is not gone through: of a billion texts the first may be all that is wanted
        low, high = (seed, seed + count - 1) if seeds is None else (min(chosen), max(chosen))
        if low < 0 or high >= 2**63:
            raise ConfigError(
                f"seeds from {low} to {high} were asked for, they must be between 0 and 2^63 - 1"
            )
        shared = self.length // 2 if overlap is None else whole("overlap", overlap)

        def text(i: int) -> LongText:
            t = parsed[i // samples]
            return LongText(i, t, chosen[i], list(windows(len(t), self.length, shared)))

        for t in parsed:
            check_tokens(t.tokens, self.config.model.vocab_size)
        longest = min(self.length, max(len(t) for t in parsed))
        engine = self.engine(
            slots=min(whole("slots", slots), count),
            length=longest if self.device.type == "cpu" else self.length,
        )
        if (first := self._next_request(text(0), options)) is not None:
            engine.check(first)
        return self._write(engine, map(text, range(count)), count, options, on_progress)

    def options(
        self,
        steps: int | None = None,
        solver: str | Solver | None = None,
        halt: halting.Criterion | str | None = None,
        noise_scale: float | None = None,
        grid: str | Tensor | Iterable[float] | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        guidance: float = 1.0,
        trace: bool = False,
        refine: int | None = None,
    ) -> dict[str, Any]:
        """Options of :func:`ddlm.sampling.make_request`; what is None comes from the model's ``config.sample``."""
        default = self.config.sample
        return {
            "steps": default.steps if steps is None else steps,
            "solver": default.solver if solver is None else solver,
            "grid_name": once(default.grid if grid is None else grid),
            "halt": halting.make(halt),
            "noise_scale": default.noise_scale if noise_scale is None else noise_scale,
            "temperature": default.temperature if temperature is None else temperature,
            "top_k": top_k,
            "guidance": guidance,
            "trace": trace,
            "refine": default.refine if refine is None else refine,
            "time_warp": self.time_warp,
        }

    def engine(self, slots: int = 64, length: int | None = None, **options: Any) -> Engine:
        """An engine over this model, for servers and studies; options as in :class:`Engine`."""
        length = self.length if length is None else whole("length", length)
        return Engine(
            self.denoiser,
            self.process,
            slots=slots,
            length=safe_length(length, self.device, self.length),
            compile=options.pop("compile", self._compile),
            **options,
        )

    def request(self, template: str | Template, seed: int = 0, **options: Any) -> Request:
        """A request for one window; options as in :meth:`generate`, or in :func:`ddlm.sampling.make_request`.

        Raises:
            ConfigError: for a template longer than the model, naming both lengths.
        """
        t = template if isinstance(template, Template) else parse(template, self.tokenizer)
        if len(t) > self.length:
            raise ConfigError(
                f"the template has {len(t)} tokens, the model takes {self.length}: shorten it by {len(t) - self.length}"
            )
        plain = {k: options.pop(k) for k in ("grid_name", "rho", "time_warp") if k in options}
        settings = self.options(**options) | plain
        return make_request(t.tokens, t.is_noised, self.process, seed=seed, **settings)

    def text(
        self,
        template: Template,
        tokens: Tensor,
        steps: int,
        reason: str,
        seed: int,
        traces: tuple[Trace, ...] = (),
    ) -> Generated:
        """Decode a finished sequence ``tokens (T,)``."""
        ids = tokens.tolist()
        text = self.tokenizer.decode(ids)
        noised = template.is_noised.tolist()
        return Generated(
            text=text,
            tokens=ids,
            is_noised=noised,
            prompt=template.text,
            generated=generated_ranges(ids, noised, text, self.tokenizer.decode),
            steps=steps,
            reason=reason,
            seed=seed,
            traces=traces,
        )

    def _write(
        self,
        engine: Engine,
        upcoming: Iterator[LongText],
        count: int,
        options: dict[str, Any],
        on_progress: Callable[[int, Progress], None] | None,
    ) -> Iterator[tuple[int, Generated]]:
        """Drive the engine until every text is written; windows of a text follow each other."""
        running: dict[int, LongText] = {}
        finished: list[tuple[int, Generated]] = []
        left = count
        while left:
            for new in islice(upcoming, 2 * engine.slots - len(running)):
                self._submit(engine, new, running, finished, options)
            for result in engine.step():
                text = running.pop(result.id)
                text.take(result)
                if on_progress is not None and result.last is not None:
                    on_progress(text.number, result.last)
                self._submit(engine, text, running, finished, options)
            if on_progress is not None:
                for key, text in running.items():
                    if progress := engine.poll(key):
                        on_progress(text.number, progress)
            left -= len(finished)
            yield from finished
            finished.clear()

    def _submit(
        self,
        engine: Engine,
        text: LongText,
        running: dict[int, LongText],
        finished: list[tuple[int, Generated]],
        options: dict[str, Any],
    ) -> None:
        """Queue the next window of a text that has something to write, or finish it."""
        request = self._next_request(text, options)
        if request is not None:
            running[engine.submit(request)] = text
            return
        written = self.text(
            text.template, text.tokens, text.steps, text.reason, text.seed, tuple(text.traces)
        )
        finished.append((text.number, written))

    def _next_request(self, text: LongText, options: dict[str, Any]) -> Request | None:
        """The next window of a text that has something to write."""
        window = text.next_window()
        if window is None:
            return None
        part = slice(*window)
        return make_request(
            text.tokens[part], text.open[part], self.process, seed=text.window_seed, **options
        )


def load(
    path: str | Path,
    *,
    device: str | None = None,
    precision: Precision | None = None,
    compile: bool = False,
    verify: bool = True,
) -> DiffusionLM:
    """Load a model to write with.

    Args:
        path: A model folder, a run folder (its best checkpoint) or a hub id.
        device: See :class:`DiffusionLM`.
        precision: See :class:`DiffusionLM`.
        compile: See :class:`DiffusionLM`.
        verify: Check every file against its hash first.

    Raises:
        ConfigError: when there is no usable model, no tokenizer with it, or no such device.
    """
    from ddlm.checkpoint import load_model
    from ddlm.data.tokenizer import Tokenizer

    find_device(device)  # before the time is spent on reading the weights
    loaded = load_model(path, verify=verify)
    tokenizer = Tokenizer.load(loaded.folder)
    size = loaded.config.model.vocab_size
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"{loaded.folder}: the tokenizer has {tokenizer.vocab_size} entries, the model {size}: "
            "put the tokenizer there that the model was trained with"
        )
    return DiffusionLM(
        loaded.model,
        loaded.config,
        tokenizer,
        loaded.time_warp,
        device=device,
        precision=precision,
        compile=compile,
    )
