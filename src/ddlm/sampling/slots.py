"""The state of the engine on the device, and the one step that advances all of it.

S slots, T positions (padded), D embedding width, K halting rules. Everything has static shapes; what differs from
slot to slot (time, solver, criterion, temperature) is data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ddlm.sampling.halting import Rules
from ddlm.sampling.solvers import COLUMNS, Remember
from ddlm.types import ComparesPosteriors, ConfigError, Denoiser, Posterior, ReadOut, expand_time

RULES = 4  # rules a request may combine
# numbers, because torch.compile cannot look into the enumeration
_STATE, _ESTIMATE = float(Remember.STATE), float(Remember.ESTIMATE)


@dataclass
class Slots:
    """State of S sequences.

    Attributes:
        x: ``(S, T, D)``; the clean embedding wherever ``is_noised`` is False, 0 at padding.
        memory: The tensor a solver remembers, ``(S, T, D)``.
        x0_hat: Previous estimate (self-conditioning), ``(S, T, D)``; 0 at first.
        is_noised: Still to be decided, ``(S, T)``.
        valid: False at padding, ``(S, T)``.
        tokens: Argmax of the last look, ``(S, T)``; given and frozen tokens at kept positions.
        stable: Looks since the last switch of each position, ``(S, T)`` float32.
        entropy: Of the last look in nats, ``(S, T)``; 0 at kept positions.
        active: The slot is at work, ``(S,)``.
        done_step: Step at which it ended, ``(S,)`` int64.
        reason: Code of the reason, ``(S,)`` int64; 0 "completed".
        temperature: ``(S,)``.
        top_k: ``(S,)`` int64.
        guidance: ``(S,)``.
        kind: Halting rules, ``(S, K)``, see :class:`ddlm.sampling.halting.Rules`; so the next three.
        threshold: ``(S, K)``.
        min_steps: ``(S, K)``.
        freeze: ``(S, K)``.
        hidden: Hidden states of the last look ``(S, T, H)``, while someone needs the KL.
        kept_noise: Noise of the kept positions in the unconditional estimate ``(S, T, D)``, while someone is guided.
        x0_free: Previous unconditional estimate ``(S, T, D)``, while someone is guided.
    """

    x: Tensor
    memory: Tensor
    x0_hat: Tensor
    is_noised: Tensor
    valid: Tensor
    tokens: Tensor
    stable: Tensor
    entropy: Tensor
    active: Tensor
    done_step: Tensor
    reason: Tensor
    temperature: Tensor
    top_k: Tensor
    guidance: Tensor
    kind: Tensor
    threshold: Tensor
    min_steps: Tensor
    freeze: Tensor
    hidden: Tensor | None = None
    kept_noise: Tensor | None = None
    x0_free: Tensor | None = None

    @classmethod
    @torch.inference_mode(False)  # an engine that is made in that mode may be driven outside it
    def empty(
        cls, slots: int, length: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> Slots:
        """Idle slots."""

        def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        wide, flat = (slots, length, width), (slots, length)
        return cls(
            x=zeros(*wide),
            memory=zeros(*wide),
            x0_hat=zeros(*wide),
            is_noised=zeros(*flat, kind=torch.bool),
            # an idle slot attends to its first position: a softmax over nothing would be NaN
            valid=torch.arange(length, device=device).expand(slots, length) == 0,
            tokens=zeros(*flat, kind=torch.int64),
            stable=zeros(*flat, kind=torch.float32),
            entropy=zeros(*flat, kind=torch.float32),
            active=zeros(slots, kind=torch.bool),
            done_step=zeros(slots, kind=torch.int64),
            reason=zeros(slots, kind=torch.int64),
            temperature=zeros(slots) + 1.0,
            top_k=zeros(slots, kind=torch.int64),
            guidance=zeros(slots) + 1.0,
            kind=zeros(slots, RULES, kind=torch.int64),
            threshold=zeros(slots, RULES, kind=torch.float32) + torch.inf,
            min_steps=zeros(slots, RULES, kind=torch.float32),
            freeze=zeros(slots, RULES, kind=torch.bool),
        )

    def take(self, rows: Tensor) -> Slots:
        """The given slots, in that order."""
        return self._each(lambda v: v.index_select(0, rows))

    def to(self, device: torch.device) -> Slots:
        """The same on another device; the host does not wait for a GPU to take it."""
        return self._each(lambda v: v.to(device, non_blocking=device.type != "cpu"))

    def clone(self) -> Slots:
        """The same in tensors of its own."""
        return self._each(torch.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Slots:
        changed: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            changed[f.name] = None if value is None else change(value)
        return Slots(**changed)

    def put(self, rows: Tensor, other: Slots) -> None:
        """Overwrite slots in place with the slots of ``other``; optional fields it lacks stay as they are."""
        for f in fields(self):
            mine, new = getattr(self, f.name), getattr(other, f.name)
            if mine is not None and new is not None:
                mine.index_copy_(0, rows, new)

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What a result is made of, on the CPU.

        Tokens, step of the end, code of the reason, x; entropy, stable and is_noised as the last look left them.
        """
        ended = (self.tokens, self.done_step, self.reason, self.x)
        seen = (self.entropy, self.stable, self.is_noised)
        return tuple(part.index_select(0, rows).cpu() for part in (*ended, *seen))

    def rules(self) -> Rules:
        """The halting rules as a table."""
        return Rules(self.kind, self.threshold, self.min_steps, self.freeze)


@dataclass(frozen=True)
class Needs:
    """What the requests in the slots ask for beyond the plain step; known to the host, so no device sync.

    Attributes:
        padding: Some sequence is shorter than the engine's length.
        temperature: Someone's temperature is not 1.
        top_k: Someone cuts the posterior.
        freeze: Someone halts per token.
        kl: Positions whose KL to the previous look is needed, flat indices s * T + i, S * T for none: a few sets
            ``(N,)``, each of which is measured by itself.
        guided: Slots with guidance, ``(R,)`` int64, or None.
        trace: Someone is traced: what is seen is wanted (:class:`Look`).
    """

    padding: bool = False
    temperature: bool = False
    top_k: bool = False
    freeze: bool = False
    kl: tuple[Tensor, ...] = ()
    guided: Tensor | None = None
    trace: bool = False


@dataclass(frozen=True)
class Look:
    """What was seen at one evaluation, before the move; feeds the trace.

    Attributes:
        x: State looked at, ``(S, T, D)``.
        x0_hat: Estimate the solver used, ``(S, T, D)``.
        kl: KL to the previous look in nats ``(S, T)``, NaN where not measured, or None.
    """

    x: Tensor
    x0_hat: Tensor
    kl: Tensor | None


def advance(
    denoiser: Denoiser,
    table: Tensor,
    state: Slots,
    plan: Tensor,
    noise: Tensor | None,
    needs: Needs,
    draw_at: Tensor | None = None,
) -> tuple[Slots, Look]:
    """One evaluation of the network for every slot, halting included; a pure function of its arguments.

    Args:
        denoiser: The network.
        table: Its embeddings ``(V, D)``.
        state: All slots.
        plan: This evaluation's row of each slot's plan, ``(S, 8)``, see :data:`ddlm.sampling.solvers.COLUMNS`.
        noise: Fresh noise ``(S, T, D)`` when some solver is stochastic.
        needs: What is asked for.
        draw_at: Where tokens are drawn ``(S, T)``, as in :class:`ddlm.types.ReadOut`, while someone is refined.

    Returns:
        The next state and what was seen.
    """
    column = dict(zip(COLUMNS, plan.unbind(-1), strict=True))
    time, step = column["time"], column["step"]
    noised = state.is_noised
    posterior = denoiser(
        state.x,
        time,
        noised,
        state.x0_hat,
        valid=state.valid if needs.padding else None,
        readout=ReadOut(
            temperature=state.temperature if needs.temperature else None,
            top_k=state.top_k if needs.top_k else None,
            draw_at=draw_at,
            keep_hidden=bool(needs.kl),
        ),
    )
    estimate = posterior.x0_hat.to(state.x.dtype)  # (S, T, D)
    x0_hat, x0_free = estimate, state.x0_free
    if needs.guided is not None:
        x0_hat, x0_free = _guide(denoiser, state, time, estimate, needs)

    # what is seen: argmax, switches, entropy, KL at the positions still noised
    look = state.active & (step > 0)
    tokens = torch.where(noised & look[:, None], posterior.tokens, state.tokens)
    entropy = torch.where(noised, posterior.entropy.float(), 0.0)
    entropy = torch.where(look[:, None], entropy, state.entropy)
    same = (tokens == state.tokens) & (step > 1)[:, None]
    stable = torch.where(look[:, None], torch.where(same, state.stable + 1, 0.0), state.stable)
    kl, hidden = _divergence(denoiser, state, posterior, look, step, needs)

    # whose criterion fires, sequence by sequence, then token by token
    count = noised.sum(1).clamp_min(1)  # (S,)
    unseen = torch.full_like(entropy, torch.inf)
    kl_known = unseen if kl is None else kl
    fired = state.rules().fired(
        step.float(),
        torch.where(noised, stable, torch.inf).amin(1),
        torch.where(noised, entropy, 0.0).sum(1) / count,
        torch.where(noised, kl_known, 0.0).sum(1) / count,
    )
    fired = fired & ~state.freeze & look[:, None]  # (S, K)
    is_noised, x, tokens_in_x = noised, state.x, None
    if needs.freeze:
        by_rule = state.rules().settled(step.float(), stable, entropy, kl_known)
        by_rule = by_rule & (noised & look[:, None])[:, None]  # (S, K, T)
        settled = by_rule.any(1)  # (S, T)
        is_noised = noised & ~settled
        tokens_in_x = torch.nn.functional.embedding(tokens, table).to(x.dtype)
        x = torch.where(settled[..., None], tokens_in_x, x)
        # the reason is a rule that has settled what was left, not one that only waits beside it
        fired = fired | (by_rule.any(2) & ~is_noised.any(1)[:, None])
    last = look & (column["last"] > 0)
    halted = fired.any(1)
    done = halted | last
    first_rule = fired.to(torch.int8).argmax(1, keepdim=True)
    why = torch.where(last, 0, state.kind.gather(1, first_rule).squeeze(1))

    # the move; kept positions and slots that are through stay where they are
    moving = (state.active & ~done)[:, None] & is_noised  # (S, T)
    a, b, c, s = (expand_time(column[k].to(x.dtype), x) for k in "abcs")
    moved = a * x + b * x0_hat + c * state.memory
    if noise is not None:
        moved = moved + s * noise
    remember = expand_time(column["remember"], x)
    memory = torch.where(remember == _STATE, x, state.memory)
    memory = torch.where(remember == _ESTIMATE, x0_hat, memory)
    seen = Look(state.x, x0_hat, kl)
    return replace(
        state,
        x=torch.where(moving[..., None], moved, x),
        memory=memory,
        x0_hat=estimate,
        is_noised=is_noised,
        tokens=tokens,
        stable=stable,
        entropy=entropy,
        active=state.active & ~done,
        done_step=torch.where(state.active & done, step.long(), state.done_step),
        reason=torch.where(state.active & done, why, state.reason),
        hidden=hidden,
        x0_free=x0_free,
    ), seen


def compiled() -> Any:
    """:func:`advance` under torch.compile: made anew for each number of rows and each set of :class:`Needs`."""
    # above the default of 8, beyond which the step would run as if nothing were compiled
    options: dict[str, Any] = {"recompile_limit": 64, "isolate_recompiles": True}
    known = signature(torch.compile).parameters  # neither before torch 2.12, the second not in it
    if "recompile_limit" not in known:
        torch._dynamo.config.cache_size_limit = 64  # of the process: there is no other
    return torch.compile(advance, dynamic=False, **{k: v for k, v in options.items() if k in known})


def _guide(
    denoiser: Denoiser, state: Slots, time: Tensor, estimate: Tensor, needs: Needs
) -> tuple[Tensor, Tensor]:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): x0_u + w (x0_c - x0_u).

    The unconditional estimate is the same network's with every position declared noised and the given embeddings
    at the noise level of the time, x_t = e + t eps with one eps a request: an input the network knows from
    training at every t, in which the condition is as uncertain as the rest. Since the score is linear in x0_hat,
    this is guidance of the score. Tokens, entropy and halting go by the conditional posterior.
    """
    rows = needs.guided
    assert rows is not None
    assert state.kept_noise is not None
    assert state.x0_free is not None
    part = state.take(rows)
    assert part.kept_noise is not None
    t = time[rows]
    fixed = part.valid & ~part.is_noised
    hidden_x = torch.where(
        fixed[..., None], part.x + expand_time(t.to(part.x.dtype), part.x) * part.kept_noise, part.x
    )
    free = denoiser(
        hidden_x,
        t,
        part.valid,
        part.x0_free,
        valid=part.valid if needs.padding else None,
        readout=ReadOut(
            temperature=part.temperature if needs.temperature else None,
            top_k=part.top_k if needs.top_k else None,
        ),
    ).x0_hat.to(estimate.dtype)
    guided = free + expand_time(part.guidance, free) * (estimate[rows] - free)
    return estimate.index_copy(0, rows, guided), state.x0_free.index_copy(0, rows, free)


def _divergence(
    denoiser: Denoiser,
    state: Slots,
    posterior: Posterior,
    look: Tensor,
    step: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None]:
    """KL to the previous look ``(S, T)`` (infinite at a first look, NaN where not measured) and hidden to keep."""
    if not needs.kl:
        return None, None
    assert isinstance(denoiser, ComparesPosteriors)
    if posterior.hidden is None:
        raise ConfigError(
            "the denoiser has a method divergence but no hidden states in its posterior: fill Posterior.hidden where "
            "readout.keep_hidden asks for them"
        )
    new_hidden = posterior.hidden
    size, length = state.entropy.numel(), state.entropy.shape[1]
    flat = state.entropy.new_full((size + 1,), torch.nan)  # the last one: nowhere
    now = replace(posterior, cross_entropy=None, log_normalizer=None).reshape(-1)
    before = None if state.hidden is None else state.hidden.flatten(0, 1)
    for places in needs.kl if before is not None else ():
        assert before is not None
        at = places.clamp_max(size - 1)
        new = now[at]
        old = replace(new, hidden=before[at])
        tau = state.temperature[at // length] if needs.temperature else None
        flat = flat.index_copy(0, places, denoiser.divergence(new, old, tau).float())
    kl = torch.where((step <= 1)[:, None], torch.inf, flat[:size].view_as(state.entropy))
    old_hidden = new_hidden if state.hidden is None else state.hidden
    return kl, torch.where(look[:, None, None], new_hidden, old_hidden)
