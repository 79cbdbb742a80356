"""The host's side of a request at work: its plan, its generator, what it becomes.

S slots, T positions (padded), D embedding width, n evaluations of a plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ddlm.sampling import refine, solvers
from ddlm.sampling.halting import REASONS, Rule, Rules
from ddlm.sampling.request import Progress, Request, Result
from ddlm.sampling.safe import least_rows
from ddlm.sampling.slots import RULES, Needs, Slots
from ddlm.sampling.trace import kl_eighth
from ddlm.types import ConfigError

if TYPE_CHECKING:
    from ddlm.sampling.trace import Trace

TIME, STEP = solvers.COLUMNS.index("time"), solvers.COLUMNS.index("step")


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Refuse tokens outside the vocabulary.

    Raises:
        ConfigError: naming one.
    """
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if low < 0 or high >= vocabulary:
        raise ConfigError(
            f"token {low if low < 0 else high} is outside the vocabulary of {vocabulary}"
        )


@dataclass
class Job:
    """A request that waits or is at work.

    Attributes:
        id: Number of the request.
        request: What is asked for.
        plan: One row an evaluation, ``(n, 8)``, see :data:`ddlm.sampling.solvers.COLUMNS`.
        rules: Its halting rules.
        generator: Everything random in it comes from here.
        rounds: The parts of the rounds of refinement that are still to come.
        before: In a round, what it refines.
        steps: Steps allowed, rounds of refinement among them.
        refined: Positions that rounds will draw anew, ``(T,)``; None without rounds.
        started: Tick of the engine at which it took its slot.
        before_draws: States of the generator before the last ticks' noise, as many as the host may have drawn in vain.
        stochastic: Its solver draws noise.
        by_kl: It halts by KL.
        guided: It is generated with guidance.
    """

    id: int
    request: Request
    plan: Tensor
    rules: tuple[Rule, ...]
    generator: torch.Generator
    rounds: Iterator[Tensor]
    steps: int
    refined: Tensor | None = None
    before: Result | None = None
    started: int = 0
    before_draws: deque[Tensor] = field(default_factory=lambda: deque(maxlen=0))

    def __post_init__(self) -> None:
        self.stochastic = self.request.solver.stochastic
        self.by_kl = any(REASONS[rule.kind] == "kl" for rule in self.rules)
        self.guided = self.request.guidance != 1.0

    @classmethod
    def make(cls, id: int, request: Request, dtype: torch.dtype, look_every: int = 1) -> Job:
        """Lay out a request's evaluations, for a host that looks every so many ticks whether it has ended."""
        generator = torch.Generator().manual_seed(request.seed)
        return cls(
            id=id,
            request=request,
            plan=solvers.plan(request.solver, request.times).coefficients.to(dtype),
            rules=request.halt.rules() if request.halt is not None else (),
            generator=generator,
            rounds=refine.parts(request.is_noised, request.refine, generator),
            steps=request.steps + request.refine,
            refined=request.is_noised if request.refine else None,
            before_draws=deque(maxlen=look_every - 1 if request.refine else 0),
        )

    def following(self, result: Result, ticks: int) -> Job | None:
        """The round of refinement that follows ``result`` from now on, or None when there is none to come."""
        in_vain = ticks - self.started - result.evaluations // (1 + self.guided)
        if self.stochastic and self.request.refine and in_vain:
            # noise was drawn until the host looked: back to where the sequence ended, whenever that was noticed
            self.generator.set_state(self.before_draws[-in_vain])
        part = next(self.rounds, None)
        if part is None:
            return None
        request = refine.round_request(self.request, result.tokens, part)
        plan = solvers.plan(request.solver, request.times).coefficients.to(self.plan.dtype)
        return replace(self, request=request, plan=plan, rules=(), before=result, started=ticks)

    def check(self, length: int, vocabulary: int, comparable: bool) -> None:
        """Refuse what an engine cannot do.

        Args:
            length: Positions of its slots.
            vocabulary: Entries of its table.
            comparable: Whether its denoiser can compare posteriors.

        Raises:
            ConfigError: naming what was asked for and what can be done.
        """
        tokens = self.request.tokens
        if len(tokens) > length:
            raise ConfigError(
                f"a sequence of {len(tokens)} tokens was given, this engine takes at most {length}"
            )
        check_tokens(tokens, vocabulary)
        if len(self.rules) > RULES:
            raise ConfigError(
                f"{len(self.rules)} halting criteria are combined, at most {RULES} can be"
            )
        if self.by_kl and not comparable:
            raise ConfigError(
                "KL halting needs a denoiser with a method divergence; use patience or entropy"
            )

    def looks(self, ticks: int) -> int:
        """Looks made when the engine has made ``ticks``."""
        at = ticks - self.started
        return int(self.plan[:at, STEP].max()) if at else 0

    def draw(self, width: int, dtype: torch.dtype) -> Tensor:
        """Standard normal ``(T, D)`` of the request's own length, drawn on the CPU: the same on every device."""
        shape = (len(self.request.tokens), width)
        return torch.randn(shape, generator=self.generator, dtype=dtype)

    def noise(self, width: int, dtype: torch.dtype) -> Tensor:
        """A tick's noise for the solver, :meth:`draw`; :meth:`following` may take it back."""
        if self.before_draws.maxlen:
            self.before_draws.append(self.generator.get_state())
        return self.draw(width, dtype)

    def result(
        self, read: Sequence[Tensor], trace: Trace | None, cancelled_at: int | None = None
    ) -> Result:
        """What became of it, from its row of :meth:`ddlm.sampling.slots.Slots.read`.

        Args:
            read: The row.
            trace: Of its steps.
            cancelled_at: Ticks of the engine when it was given up; it may have ended before, unnoticed.
        """
        tokens, done_step, code, x, entropy, stable, is_noised = read
        n = len(self.request.tokens)
        if steps := int(done_step):
            made = int((self.plan[:, STEP] == steps).nonzero()[0]) + 1
        else:
            assert cancelled_at is not None
            steps, made = self.looks(cancelled_at), cancelled_at - self.started
        last = self._progress(
            steps, tokens[:n].clone(), entropy[:n].clone(), stable[:n], is_noised[:n].clone()
        )
        first = self.before  # what a round refines keeps its state, its trace and why it ended
        reason = REASONS[int(code)] if first is None else first.reason
        made *= 2 if self.guided else 1
        return Result(
            id=self.id,
            tokens=last.tokens,
            steps=last.step,
            evaluations=made if first is None else made + first.evaluations,
            reason=reason if cancelled_at is None else "cancelled",
            x=x[:n].clone() if first is None else first.x,
            entropy=last.entropy,
            trace=trace if first is None else first.trace,
            last=last,
        )

    def _progress(
        self, step: int, tokens: Tensor, entropy: Tensor, stable: Tensor, is_noised: Tensor
    ) -> Progress:
        """What is told of a step of the request at work, tensors ``(T,)``."""
        if self.before is not None:  # a round knows the entropy of its own part only
            step += self.before.steps
            entropy = torch.where(self.request.is_noised, entropy, self.before.entropy)
        return Progress(
            id=self.id,
            step=step,
            steps=self.steps,
            tokens=tokens,
            entropy=entropy,
            stable=stable.long(),
            # what a step has frozen, and what a round leaves alone, may be drawn anew by the next one
            is_noised=is_noised if self.refined is None else self.refined,
        )

    def unstarted(self, reason: str, table: Tensor) -> Result:
        """Result of a request that never entered a slot; ``table (V, D)``."""
        r = self.request
        x = torch.nn.functional.embedding(r.tokens.to(table.device), table).cpu()
        return Result(self.id, r.tokens.clone(), 0, 0, reason, x, torch.zeros(len(r.tokens)))

    def progress(self, state: Slots, slot: int, ticks: int) -> Progress:
        """Where it stands, read from its slot; that of the last round while the next one has not looked."""
        if self.before and self.before.last and ticks == self.started:
            return self.before.last
        n = len(self.request.tokens)
        # the host counts on until it looks at the device: a sequence that has ended stays at its end
        step = int(state.done_step[slot]) or self.looks(ticks)
        parts = (state.tokens, state.entropy, state.stable, state.is_noised)
        return self._progress(step, *(part[slot, :n].cpu() for part in parts))


@dataclass(frozen=True)
class Watching:
    """How an engine computes what only some of its requests ask for.

    Attributes:
        device: Of the engine.
        fixed: For a number of rows that never changes, whoever asks for it.
        comparable: Its denoiser can compare posteriors.
        uniform: A mask for attention and temperatures are given even where nobody needs them: a GPU takes other kernels
            without.
    """

    device: torch.device
    fixed: bool = False
    comparable: bool = False
    uniform: bool = False


class Schedule:
    """What the slots will do: their plans side by side, so that a tick costs the host next to nothing.

    Args:
        jobs: The request of each slot, None for idle ones.
        length: Positions of a slot.
        idle_time: Any valid time, for idle slots.
        dtype: Of the plans.
        watching: How what some requests ask for is computed.
    """

    def __init__(
        self,
        jobs: Sequence[Job | None],
        length: int,
        idle_time: float,
        dtype: torch.dtype,
        watching: Watching,
    ) -> None:
        working = [(i, job) for i, job in enumerate(jobs) if job is not None]
        idle = torch.zeros(1, len(solvers.COLUMNS), dtype=dtype)
        idle[:, TIME] = idle_time
        # in one call: a GPU waits meanwhile. What it pads with lies beyond ``_last`` and is never read
        plans = [idle if job is None else job.plan for job in jobs]
        self._plans = pad_sequence(plans, batch_first=True)
        ends = [plan.shape[0] for plan in plans]
        self._last = torch.tensor(ends) - 1
        self._started = torch.tensor([0 if job is None else job.started for job in jobs])
        self._rows = torch.arange(len(jobs))
        self.first_end = min((job.started + ends[i] for i, job in working), default=0)
        """Tick by which some slot has come to the end of its plan."""
        requests = [job.request for _, job in working]
        self.padding = any(r.tokens.shape[0] < length for r in requests)
        self.temperature = any(r.temperature != 1.0 for r in requests)
        self.top_k = any(r.top_k > 0 for r in requests)
        self.freeze = any(rule.freeze for _, job in working for rule in job.rules)
        self.guided = [i for i, job in working if job.guided]
        self.stochastic = [(i, job) for i, job in working if job.stochastic]
        self.traced = [(i, job) for i, job in working if job.request.trace]
        self.drawing = [(i, job) for i, job in working if job.before is not None]
        self._slots, self._length = len(jobs), length
        self._watch(working, watching)

    def _watch(self, working: list[tuple[int, Job]], watching: Watching) -> None:
        """Put on the device which rows and positions are computed for some requests only.

        Once for all ticks until a slot is taken or left: a copy of fresh numbers makes the host wait for a GPU.
        """
        slots, length = self._slots, self._length
        whole = [i for i, job in working if job.by_kl]
        part = [
            i for i, job in working if job.request.trace and not job.by_kl and watching.comparable
        ]

        def index(wanted: list[int], least: int) -> Tensor | None:
            """``wanted``, the last one repeated up to a number whose bits are safe; None for nothing."""
            if not wanted:
                return None
            padded = wanted + wanted[-1:] * (least - len(wanted))
            return torch.tensor(padded, dtype=torch.int64).to(watching.device, non_blocking=True)

        rows = slots if watching.fixed else 0
        self._kl_whole = index(
            [i * length + j for i in whole for j in range(length)], rows * length
        )
        self._kl_rows = index(part, rows)
        least = max(rows, least_rows(length, watching.device))
        self._needs = Needs(
            padding=self.padding or watching.uniform,
            temperature=self.temperature or watching.uniform,
            top_k=self.top_k,
            freeze=self.freeze,
            guided=index(self.guided, least),
            trace=bool(self.traced),
        )

    def needs(self, plan: Tensor) -> Needs:
        """What the requests at work ask for at a tick whose rows of the plans are ``plan (S, 8)``, on the device."""
        kl = () if self._kl_whole is None else (self._kl_whole,)
        if self._kl_rows is not None:
            look = plan[self._kl_rows, STEP].long()
            nowhere = self._slots * self._length
            kl = (*kl, kl_eighth(self._kl_rows, look, self._length, nowhere))
        return replace(self._needs, kl=kl)

    def rows(self, ticks: int) -> Tensor:
        """Each slot's row of its plan at a tick, ``(S, 8)``; the last one for a slot that waits to be emptied."""
        return self._plans[self._rows, (ticks - self._started).minimum(self._last)]

    def drawn(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is random at a tick, drawn on the CPU, on the device.

        Args:
            x: State, ``(S, T, D)``.

        Returns:
            Noise for the stochastic solvers, as ``x``, or None when nobody needs any; where rounds of refinement draw
            their tokens, ``(S, T)``, -1 in other slots, or None when there is none.
        """
        noise = at = None
        if self.stochastic:
            # pinned: the host draws the next step's while the GPU is still at work, instead of waiting to copy
            noise = torch.zeros(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            for i, job in self.stochastic:
                noise[i, : len(job.request.tokens)] = job.noise(x.shape[-1], x.dtype)
            noise = noise.to(x.device, non_blocking=True)
        if self.drawing:
            at = torch.full((self._slots, self._length), -1.0)
            for i, job in self.drawing:
                n = len(job.request.tokens)
                at[i, :n] = torch.rand(n, generator=job.generator)
            at = at.to(x.device, non_blocking=True)
        return noise, at


def enter(jobs: Sequence[Job], length: int, table: Tensor) -> Slots:
    """The state new requests start from: clean embeddings where given, noise_scale * t_max * eps elsewhere.

    In a round of refinement what is drawn anew is noised as in training, x_t = e + t eps.

    Args:
        jobs: Requests that have made no evaluation.
        length: Positions of a slot.
        table: Embeddings ``(V, D)`` in the precision of the solver's state.
    """
    width, dtype = table.shape[1], table.dtype
    fresh = Slots.empty(len(jobs), length, width, torch.device("cpu"), dtype)
    requests = [job.request for job in jobs]
    # the first draw of each request's generator
    eps = pad_sequence([job.draw(width, dtype) for job in jobs], batch_first=True)
    most = eps.shape[1]
    scale = torch.tensor([r.noise_scale * float(r.times[0]) for r in requests], dtype=dtype)
    torch.mul(eps, scale[:, None, None], out=fresh.x[:, :most])
    # a round knows the tokens that it draws anew
    known = [job.request.tokens if job.before is None else job.before.tokens for job in jobs]
    fresh.tokens[:, :most] = pad_sequence(known, batch_first=True)
    fresh.is_noised[:, :most] = pad_sequence([r.is_noised for r in requests], batch_first=True)
    lengths = torch.tensor([len(r.tokens) for r in requests])
    fresh.valid = torch.arange(length) < lengths[:, None]
    fresh.temperature[:] = torch.tensor([r.temperature for r in requests], dtype=dtype)
    fresh.top_k[:] = torch.tensor([r.top_k for r in requests])
    fresh.guidance[:] = torch.tensor([r.guidance for r in requests], dtype=dtype)
    if any(job.guided for job in jobs):
        fresh.kept_noise = torch.zeros_like(fresh.x)
        fresh.x0_free = torch.zeros_like(fresh.x)
        for i, job in enumerate(jobs):
            if job.guided:
                fresh.kept_noise[i, : len(job.request.tokens)] = job.draw(width, dtype)
    rules = Rules.table([r.halt for r in requests], RULES)
    fresh.kind, fresh.threshold = rules.kind, rules.threshold
    fresh.min_steps, fresh.freeze = rules.min_steps, rules.freeze
    fresh.active[:] = True
    state = fresh.to(table.device)
    given = torch.nn.functional.embedding(state.tokens, table)
    given = torch.where(state.valid[..., None], given, 0.0)
    in_round = torch.tensor([job.before is not None for job in jobs])
    in_round = in_round.to(table.device, non_blocking=True)
    noised = torch.where(in_round[:, None, None], given + state.x, state.x)
    state.x = torch.where(state.is_noised[..., None], noised, given)
    return state
