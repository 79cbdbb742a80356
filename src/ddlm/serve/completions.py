"""OpenAI's completions API in terms of templates.

A diffusion model writes all positions at once: a completion has exactly ``max_tokens`` tokens, and ``suffix`` is no
special case. While it streams, text is sent as soon as it is final and everything before it is: with a criterion that
freezes tokens (``halt: "patience:10:freeze"``) from the left onwards, otherwise when the text is finished.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import torch

from ddlm.sampling.template import Template
from ddlm.serve.jobs import Done, Failed, Frame
from ddlm.serve.limits import RefusedError
from ddlm.serve.schema import Completion

if TYPE_CHECKING:
    from ddlm.serve.studio import Studio, Writing

_DEFAULT_TOKENS = 16
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Completer:
    """Answers completions.

    Args:
        studio: Where texts are written.
        name: The model's name.
    """

    def __init__(self, studio: Studio, name: str) -> None:
        self.studio, self.name = studio, name

    def begin(self, client: str, body: Completion) -> Answer:
        """Queue the texts of a completion.

        Raises:
            RefusedError: for a model that is not here, an option that is not supported or out of a limit.
            ConfigError: for an option out of range.
        """
        if body.model is not None:
            self.check_model(body.model)
        if body.stream_options and not body.stream:
            raise RefusedError(
                400,
                "invalid_value",
                "stream_options is for streams only: leave it out, or set stream to true",
                param="stream_options",
            )
        if (option := body.unsupported()) is not None:
            raise RefusedError(
                400,
                "unsupported",
                f"{option} is not supported: leave it out (see the description of the API)",
                param=option,
            )
        prompts = _prompts(body)
        if not prompts:
            raise RefusedError(400, "invalid_value", "prompt is an empty list", param="prompt")
        if len(prompts) > (most := self.studio.limits.texts):
            raise RefusedError(
                400,
                "too_many_samples",
                f"{len(prompts)} prompts were given, this server writes at most {most} texts a request: "
                "send fewer",
                param="prompt",
            )
        templates = [self._template(prompt, body) for prompt in prompts]
        writing = self.studio.submit(client, templates, body, body.n or 1, watched=body.stream)
        return Answer(self, body, writing)

    def check_model(self, name: str) -> None:
        """Refuse a model that is not here.

        Raises:
            RefusedError: 404.
        """
        if name != self.name:
            raise RefusedError(
                404,
                "model_not_found",
                f"the model '{name[:80]}' is not here: this server has '{self.name}'",
                param="model",
            )

    def _template(self, prompt: str | list[int], body: Completion) -> Template:
        studio = self.studio
        encode = studio.lm.tokenizer.encode
        count = body.max_tokens or _DEFAULT_TOKENS
        studio.check_length(count, "max_tokens")
        # not by way of a template: there a space before a slot is the slot's, here prompt + text is what was written
        ids = encode(prompt) if isinstance(prompt, str) else prompt
        after = encode(body.suffix) if body.suffix else []
        studio.check_length(len(ids) + count + len(after), "prompt")
        bad = [i for i in ids if i >= studio.lm.tokenizer.vocab_size]
        if bad:
            raise RefusedError(
                400, "invalid_value", f"token {bad[0]} is not in the vocabulary", "prompt"
            )
        tokens = torch.tensor([*ids, *[0] * count, *after])
        noised = [False] * len(ids) + [True] * count + [False] * len(after)
        return Template("", tokens, torch.tensor(noised))


class Answer:
    """The answer to one completion, whole or streamed."""

    def __init__(self, completer: Completer, body: Completion, writing: Writing) -> None:
        self.body, self.writing, self._completer = body, writing, completer
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, finished: list[Done]) -> dict[str, Any]:
        """The object ``text_completion``."""
        choices = []
        for done in finished:
            text, why = self._written(done)
            choices.append(self._choice(done.number, text, why) | _extras(done))
        return self._object(choices) | {"usage": self._usage(finished)}

    async def stream(self) -> AsyncIterator[str]:
        """Data of the events."""
        sent: dict[int, str] = {}
        finished: list[Done] = []
        counted = (self.body.stream_options or {}).get("include_usage")
        usage = {"usage": None} if counted else {}  # null in all chunks but the last
        async for event in self.writing.events():
            if isinstance(event, Failed):
                yield _json(event.error.body())
                return
            if isinstance(event, Frame):
                if self.body.stop:
                    continue  # a stop text may yet begin in what is written
                final = self._final(event)
                before = sent.get(event.number, "")
                if len(final) > len(before) and final.startswith(before):
                    sent[event.number] = final
                    choice = self._choice(event.number, final[len(before) :], None)
                    yield _json(self._object([choice]) | usage)
                continue
            finished.append(event)
            text, why = self._written(event)
            rest = text[len(sent.get(event.number, "")) :]
            choice = self._choice(event.number, rest, why) | _extras(event)
            yield _json(self._object([choice]) | usage)
        if counted:
            yield _json(self._object([]) | {"usage": self._usage(finished)})
        yield "[DONE]"

    def _final(self, frame: Frame) -> str:
        """Text from the left that will not change any more."""
        job = self.writing.jobs[frame.number]
        ids = frame.tokens.tolist()
        still_open = frame.open.tolist()
        end = still_open.index(True) if True in still_open else len(ids)
        noised = job.text.template.is_noised.tolist()
        first = noised.index(True)
        if end <= first:
            return ""
        decode = self.writing.studio.lm.tokenizer.decode
        last = len(noised) - noised[::-1].index(True)
        start = 0 if self.body.echo else len(decode(ids[:first]))
        text = decode(ids[: min(end, last)])
        return "" if text.endswith(_BROKEN) else text[start:]

    def _written(self, done: Done) -> tuple[str, str]:
        """What is answered, and why it ends: a stop text counts only where it was generated."""
        start, end = done.generated.generated[0]
        prompt, text = done.generated.text[:start], done.generated.text[start:end]
        stops = [self.body.stop] if isinstance(self.body.stop, str) else self.body.stop or []
        at = min((i for s in stops if s and (i := text.find(s)) >= 0), default=None)
        return (prompt if self.body.echo else "") + text[:at], "length" if at is None else "stop"

    def _choice(self, number: int, text: str, why: str | None) -> dict[str, Any]:
        return {"text": text, "index": number, "logprobs": None, "finish_reason": why}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self._completer.name,
            "choices": choices,
        }

    def _usage(self, finished: list[Done]) -> dict[str, int]:
        written = sum(sum(d.generated.is_noised) for d in finished)
        # OpenAI counts a prompt once however many texts it is given; a stream ends its texts in any order
        firsts = [d for d in finished if d.number % (self.body.n or 1) == 0]
        given = sum(d.generated.is_noised.count(False) for d in firsts)
        return {
            "prompt_tokens": given,
            "completion_tokens": written,
            "total_tokens": given + written,
        }


def _prompts(body: Completion) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[i for i in prompt if isinstance(i, int)]]
    return [p for p in prompt if not isinstance(p, int)]


def _extras(done: Done) -> dict[str, Any]:
    """What OpenAI's object has no place for: why and when it stopped, and how to get it again."""
    g = done.generated
    return {"ddlm": {"steps": g.steps, "allowed": done.steps, "reason": g.reason, "seed": g.seed}}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
