from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddlm.cli import main
from ddlm.sampling import SampleResult, halting, sample
from ddlm.sampling.halting import EntropyBelow, Fixed, KLBelow, Patience
from ddlm.types import ConfigError, ReadOut
from sampling.models import LENGTH, PROCESS, VOCAB, network, write_model

NETWORK = network(layers=2)


def inputs(batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (batch, LENGTH), generator=generator)
    return tokens, torch.rand(batch, LENGTH, generator=generator) > 0.3


def run(halt: halting.Criterion | None, steps: int = 40, trace: bool = True) -> SampleResult:
    tokens, noised = inputs()
    return sample(NETWORK, tokens, noised, PROCESS, steps=steps, halt=halt, trace=trace)


FULL = run(None)


def test_a_criterion_may_be_given_as_text() -> None:
    tokens, noised = inputs()
    out = sample(NETWORK, tokens, noised, PROCESS, steps=40, halt="patience:3")
    assert out.steps.tolist() == run(Patience(3)).steps.tolist()
    with pytest.raises(ConfigError, match="write fixed:STEP"):
        sample(NETWORK, tokens, noised, PROCESS, halt="patience")
    for wrong in (["patience:3"], 3, Patience):
        with pytest.raises(ConfigError, match="it must be a halting criterion"):
            sample(NETWORK, tokens, noised, PROCESS, halt=wrong)  # type: ignore[arg-type]
    for no_criterion in ("fixed:3", None):
        with pytest.raises(TypeError, match="unsupported operand"):
            Patience(3) | no_criterion  # type: ignore[operator]


def steps_by_hand(criterion: str, threshold: float, min_steps: int = 0) -> list[int]:
    """When a criterion fires, read off the full run's trace."""
    out = []
    assert FULL.trace is not None
    for trace in FULL.trace:
        stable, fired = 0, len(trace.tokens)
        for k in range(len(trace.tokens)):
            switched = k == 0 or int((trace.tokens[k] != trace.tokens[k - 1]).sum()) > 0
            stable = 0 if switched else stable + 1
            entropy = float(trace.entropy[k][trace.generated].mean())
            hit = stable >= threshold if criterion == "patience" else entropy < threshold
            if hit and k + 1 >= min_steps:
                fired = k + 1
                break
        out.append(fired)
    return out


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("least", [0, 30])
def test_patience_stops_when_no_token_has_switched(patience: int, least: int) -> None:
    out = run(Patience(patience, min_steps=least))
    assert out.steps.tolist() == steps_by_hand("patience", patience, least)
    assert min(out.steps.tolist()) < 40
    for step, reason in zip(out.steps.tolist(), out.reasons, strict=True):
        assert reason == ("completed" if step == 40 else "patience")


def test_entropy_stops_below_the_threshold() -> None:
    assert FULL.trace is not None
    means = torch.stack([t.entropy[:, t.generated].mean(1) for t in FULL.trace])
    threshold = float(means[:, 15:25].median())
    out = run(EntropyBelow(threshold))
    assert out.steps.tolist() == steps_by_hand("entropy", threshold)
    assert "entropy" in out.reasons


def test_kl_stops_below_the_threshold() -> None:
    never = run(KLBelow(1e-30))  # measured at every position then
    assert never.trace is not None
    kl = torch.stack([t.mean("kl")[0] for t in never.trace])  # type: ignore[misc]
    assert kl[:, 0].isnan().all()
    threshold = float(kl[:, 10:20].median())
    by_hand = [int((row[1:] < threshold).nonzero()[0]) + 2 for row in kl]
    out = run(KLBelow(threshold))
    assert out.steps.tolist() == by_hand
    assert set(out.reasons) == {"kl"}


def test_kl_is_the_divergence_of_successive_posteriors() -> None:
    """Against both posteriors written out in full."""
    tokens, noised = inputs(1)
    out = sample(NETWORK, tokens, noised, PROCESS, steps=2, halt=KLBelow(1e-30), trace=True)
    assert out.trace is not None
    assert out.trace[0].kl is not None
    with torch.no_grad():
        start = torch.randn(LENGTH, 16, generator=torch.Generator().manual_seed(0)) * PROCESS.t_max
        x = torch.where(noised[..., None], start, NETWORK.embed(tokens))
        high, low = torch.tensor([PROCESS.t_max]), torch.tensor([PROCESS.t_min])
        first = NETWORK(x, high, noised)
        weight, bias = NETWORK.head_weight(), NETWORK.head.bias
        linear = torch.nn.functional.linear
        log_q = linear(NETWORK.hidden_states(x, high, noised), weight, bias).log_softmax(-1)
        moved = x + (PROCESS.t_min - PROCESS.t_max) * (x - first.x0_hat) / PROCESS.t_max
        x = torch.where(noised[..., None], moved, x)
        hidden = NETWORK.hidden_states(x, low, noised, first.x0_hat)
        log_p = linear(hidden, weight, bias).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[0]
    got = out.trace[0].kl[1]
    torch.testing.assert_close(got[noised[0]], expected[noised[0]], rtol=1e-3, atol=1e-4)
    assert got[~noised[0]].isnan().all()


def test_fixed_and_completed() -> None:
    out = run(Fixed(7))
    assert out.steps.tolist() == [7] * 4
    assert out.reasons == ["fixed"] * 4
    assert FULL.reasons == ["completed"] * 4
    assert run(Fixed(40)).reasons == ["completed"] * 4
    assert FULL.trace is not None
    for i in range(4):  # the answer is the argmax of the last posterior
        assert torch.equal(
            out.tokens[i][inputs()[1][i]], FULL.trace[i].tokens[6][inputs()[1][i]].long()
        )


def test_the_first_of_several_to_fire_gives_the_reason() -> None:
    either = run(Patience(4) | Fixed(22))
    patience = run(Patience(4))
    for i in range(4):
        early = patience.steps[i] < 22
        assert either.steps[i] == (patience.steps[i] if early else 22)
        assert either.reasons[i] == ("patience" if early else "fixed")


@pytest.mark.parametrize(
    "never", [Patience(10**6), EntropyBelow(1e-30), KLBelow(1e-30), Fixed(10**6), Patience(1, min_steps=41),
              Patience(10**6, freeze=True)],
)  # fmt: skip
def test_a_criterion_that_never_fires_changes_nothing_bit_for_bit(never: halting.Criterion) -> None:
    out = run(never, trace=False)
    assert torch.equal(out.x, FULL.x)
    assert torch.equal(out.tokens, FULL.tokens)
    assert out.reasons == FULL.reasons
    assert torch.equal(out.steps, FULL.steps)


@pytest.mark.parametrize(
    "criterion",
    [Patience(3, freeze=True), EntropyBelow(0.5, freeze=True), KLBelow(0.01, freeze=True)],
)
def test_frozen_positions_become_conditions(criterion: halting.Criterion) -> None:
    _, noised = inputs()
    out = run(criterion)
    assert out.trace is not None
    table = NETWORK.embeddings().detach()
    frozen_early = 0
    for i, trace in enumerate(out.trace):
        steps = int(out.steps[i])
        assert (trace.is_noised[1:] <= trace.is_noised[:-1]).all()  # never thawed
        for k in range(1, steps):
            frozen = ~trace.is_noised[k] & noised[i]
            frozen_early += int(frozen.sum())
            assert torch.equal(trace.tokens[k][frozen], trace.tokens[k - 1][frozen])
            assert (trace.entropy[k][frozen] == 0).all()
        settled = ~trace.is_noised[-1]
        assert torch.equal(out.x[i][settled], table[out.tokens[i][settled]])
        if out.reasons[i] != "completed":
            assert torch.equal(out.x[i], table[out.tokens[i]])
    assert frozen_early > 0


def test_freezing_waits_for_every_position() -> None:
    per_token, whole = run(Patience(3, freeze=True)), run(Patience(3))
    assert (per_token.steps <= 40).all()
    assert per_token.reasons.count("patience") > 0
    assert whole.reasons.count("patience") > 0
    early = run(Patience(3, min_steps=20, freeze=True))
    assert early.trace is not None
    assert all(bool(t.is_noised[19][t.generated].all()) for t in early.trace)


@pytest.mark.parametrize(
    ("text", "criterion"),
    [
        ("patience:25", Patience(25)),
        ("entropy:0.1:min=20", EntropyBelow(0.1, 20)),
        ("kl:1e-4:freeze", KLBelow(1e-4, freeze=True)),
        ("fixed:100", Fixed(100)),
        ("patience:5, fixed:9", Patience(5) | Fixed(9)),
        ("none", None),
        ("patience:5:freeze:min=3", Patience(5, 3, freeze=True)),
    ],
)
def test_criteria_are_read_from_text(text: str, criterion: halting.Criterion | None) -> None:
    assert halting.parse(text) == criterion


@pytest.mark.parametrize(
    "text",
    ["patience", "patience:x", "patience:0", "patience:-1", "entropy:0", "entropy:nan", "kl:-1", "fixed:0",
     "fixed:5:freeze", "entropy:0.1:max=3", "patience:2.5", "hope:3", "patience:5:min=-1", "kl:inf",
     "fixed:1000001", "fixed:" + "9" * 40, "patience:" + "9" * 40, "patience:5:min=" + "9" * 40,
     "kl:1:min=" + "9" * 4000],
)  # fmt: skip
def test_thresholds_out_of_range_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        halting.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["min=20", "freeze"])
def test_fixed_says_that_it_takes_no_options(option: str) -> None:
    with pytest.raises(ConfigError, match=r"fixed takes a step alone: write fixed:100$"):
        halting.parse(f"fixed:100:{option}")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Patience(2.5),  # type: ignore[arg-type]
        lambda: Patience("3"),  # type: ignore[arg-type]
        lambda: Patience(3, min_steps=None),  # type: ignore[arg-type]
        lambda: Fixed(True),
        lambda: EntropyBelow(0.1, min_steps=1.0),  # type: ignore[arg-type]
    ],
)
def test_steps_are_whole_numbers(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="a whole number is needed"):
        make()


def test_steps_may_be_whole_numbers_of_another_library() -> None:
    assert Patience(np.int64(3), np.int32(1)).rules() == Patience(3, 1).rules()  # type: ignore[arg-type]


def test_the_reason_is_a_rule_that_settled_something() -> None:
    """Of two criteria that freeze, one that never fires ends nothing, wherever it stands."""
    never, patience = EntropyBelow(1e-30, freeze=True), Patience(2, freeze=True)
    alone = run(patience, trace=False)
    assert "patience" in alone.reasons
    for both in (never | patience, patience | never):
        out = run(both, trace=False)
        assert out.reasons == alone.reasons
        assert torch.equal(out.tokens, alone.tokens)


@pytest.mark.parametrize("tau", [0.5, 0.8])
def test_kl_is_that_of_the_tempered_posteriors(tau: float) -> None:
    """The entropy beside it is of the posterior at the temperature; with top_k the KL counts every token."""
    tokens, noised = inputs(1)
    options = {"steps": 2, "halt": KLBelow(1e-30), "trace": True}
    cold = sample(NETWORK, tokens, noised, PROCESS, temperature=tau, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        eps = torch.randn(LENGTH, 16, generator=torch.Generator().manual_seed(0))
        x = torch.where(noised[..., None], eps * PROCESS.t_max, NETWORK.embed(tokens))
        high, low = torch.tensor([PROCESS.t_max]), torch.tensor([PROCESS.t_min])
        first = NETWORK(x, high, noised, readout=ReadOut(temperature=torch.tensor([tau])))
        moved = x + (PROCESS.t_min - PROCESS.t_max) * (x - first.x0_hat) / PROCESS.t_max
        states = [
            NETWORK.hidden_states(x, high, noised),
            NETWORK.hidden_states(
                torch.where(noised[..., None], moved, x), low, noised, first.x0_hat
            ),
        ]
        head = NETWORK.head_weight(), NETWORK.head.bias
        log_q, log_p = (
            (torch.nn.functional.linear(h, *head) / tau).log_softmax(-1) for h in states
        )
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[0]
    assert cold.trace is not None
    assert cold.trace[0].kl is not None
    found = cold.trace[0].kl[1][noised[0]]
    torch.testing.assert_close(found, expected[noised[0]], rtol=1e-3, atol=1e-4)
    cut = sample(NETWORK, tokens, noised, PROCESS, temperature=tau, top_k=3, **options)  # type: ignore[arg-type]
    assert cut.trace is not None
    assert cut.trace[0].kl is not None
    assert cut.trace[0].kl[1][noised[0]].isfinite().all()


def test_below_is_strict() -> None:
    rules = halting.Rules.table([EntropyBelow(0.5)], 1)
    zero = torch.zeros(1)
    for entropy, fires in ((0.5, False), (math.nextafter(0.5, 0) - 1e-7, True), (0.51, False)):
        assert bool(rules.fired(zero + 5, zero, zero + entropy, zero + 9).any()) is fires


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("patience:500", "patience:500 ends nothing early: it can fire at step 501 at the earliest"),
        ("patience:39", "patience:39 ends nothing early: it can fire at step 40 at the earliest"),
        ("patience:3:min=900:freeze", "patience:3:min=900:freeze ends nothing early: it can fire at step 900"),
        ("fixed:40", "fixed:40 ends nothing early: it can fire at step 40 at the earliest, 40 steps are"),
        ("kl:0.1:min=40", "kl:0.1:min=40 ends nothing early: it can fire at step 40"),
        ("entropy:1000", "entropy:1000 holds from step 1 on, whatever is written: no entropy over 96 tokens is "
                         "above 4.564 nats"),
        (f"entropy:{math.log(VOCAB)}:min=9", "holds from step 9 on"),
        ("entropy:1000:min=40", "ends nothing early"),
    ],
)  # fmt: skip
def test_a_threshold_that_says_nothing_is_remarked(text: str, said: str) -> None:
    (line,) = halting.remarks(halting.parse(text), 40, VOCAB)
    assert said in line
    assert "\n" not in line
    (both,) = halting.remarks(Patience(3) | halting.parse(text), 40, VOCAB)  # type: ignore[operator]
    assert both == line
    if "ends nothing early" in said:  # and it is so
        assert set(run(halting.parse(text), trace=False).reasons) == {"completed"}
    else:
        assert set(run(halting.parse(text), trace=False).reasons) == {"entropy"}
        assert len(set(run(halting.parse(text), trace=False).steps.tolist())) == 1


@pytest.mark.parametrize(
    "text", ["none", "patience:38", "fixed:39", "kl:1000", "entropy:4.5", "patience:3:min=39"]
)
def test_nothing_is_remarked_of_a_threshold_that_may_fire(text: str) -> None:
    assert halting.remarks(halting.parse(text), 40, VOCAB) == []


@pytest.mark.parametrize("to_file", [True, False])
def test_the_command_remarks_on_it_and_writes(
    to_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", "the {4}", "--model", str(write_model(tmp_path)), "--steps", "20"]
    if to_file:
        common += ["--out", str(tmp_path / "s.jsonl"), "--overwrite"]
    halts = ["--halt", "entropy:5.8,patience:500"]  # ln 300 is 5.704
    assert main([*common, *halts]) == 0
    notes = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
    assert notes == [
        "note: halting by entropy:5.8 holds from step 1 on, whatever is written: no entropy over 300 tokens is above "
        "5.704 nats; lower it",
        "note: halting by patience:500 ends nothing early: it can fire at step 501 at the earliest, 20 steps are "
        "allowed; lower it or allow more steps",
    ]
    assert main([*common, "--halt", "entropy:5.6"]) == 0
    assert "note: " not in capsys.readouterr().err
    assert main([*common, "--halt", "entropy:5.6", "--top-k", "9"]) == 0
    assert "no entropy over 9 tokens" in capsys.readouterr().err
