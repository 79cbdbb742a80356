"""What the bodies of requests look like."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _sendable(text: str) -> str:
    """Refuse lone surrogates: JSON can escape them, but they are no characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds a lone surrogate, which is not a character") from None
    return text


Text = Annotated[str, AfterValidator(_sendable)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
StreamOptions = dict[Literal["include_usage", "include_obfuscation"], Flag | None]
Id = Annotated[int, Field(ge=0, lt=2**31, strict=True)]


def _with_null(schema: dict[str, Any]) -> None:
    """Say of every field that may be left out that it may be null too."""
    for name, field in schema["properties"].items():
        kinds = field.get("anyOf")
        if name in schema.get("required", ()) or {"type": "null"} in (kinds or ()):
            continue
        if kinds is None:
            told = {"title", "description", "default", "examples"}
            kinds = [{key: field.pop(key) for key in sorted(field.keys() - told)}]
        field["anyOf"] = [*kinds, {"type": "null"}]


class Sampling(BaseModel):
    """Options of sampling; what is left out, or null, comes from the model's own settings."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_with_null)

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, body: Any) -> Any:
        """Null says no more than leaving the field out does, where it may be left out."""
        if not isinstance(body, dict):
            return body
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {k: v for k, v in body.items() if v is not None or k not in optional}

    steps: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        None, description="Solver steps allowed."
    )
    solver: Literal["euler", "heun", "dpmpp_2m", "sde"] | None = Field(
        None, description="How to integrate from noise to text."
    )
    grid: Literal["uniform", "karras", "warp"] | None = Field(
        None, description="How the steps are spread over the time."
    )
    halt: Annotated[Text, Field(max_length=200)] | None = Field(
        None,
        description="Early exit, e.g. patience:25, entropy:0.1:min=20, kl:0.001:freeze, fixed:100; "
        "several joined with a comma.",
    )
    noise_scale: Annotated[Number, Field(ge=0, le=100)] | None = Field(
        None, description="Initial noise relative to t_max."
    )
    temperature: Annotated[Number, Field(ge=1e-3, le=1000)] | None = Field(
        None, description="Divides the logits before the expectation; above 0."
    )
    top_k: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = Field(
        0, description="Only the k most probable tokens enter the expectation; 0: all."
    )
    guidance: Annotated[Number, Field(ge=-100, le=100)] = Field(
        1.0, description="Weight of classifier-free guidance towards what is given; 1: none."
    )
    refine: Annotated[int, Field(ge=0, le=10_000, strict=True)] | None = Field(
        None,
        description="Rounds after the last step that draw a fourth of the tokens anew, given all others; "
        "null: the model's default.",
    )
    seed: Seed | None = Field(
        None, description="Seed of the first text, the next one's is one more; null draws one."
    )
    stream: Flag = Field(False, description="Answer with server-sent events.")


class Generate(Sampling):
    """Write texts from a template."""

    template: Text = Field(
        description="{n} are n tokens to write, the rest is kept, literal braces are doubled.",
        examples=["The river {24} the sea."],
    )
    samples: Annotated[int, Field(ge=1, strict=True)] = Field(1, description="Texts to write.")
    overlap: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None, description="Tokens that the windows of a text longer than the model share."
    )
    settled_after: Annotated[int, Field(ge=1, le=100_000, strict=True)] = Field(
        10, description="Steps without a switch after which a streamed token counts as settled."
    )


class Completion(Sampling):
    """OpenAI's legacy completions, with the options of sampling beside them."""

    model: Text | None = Field(None, description="As /v1/models names it.")
    prompt: Text | list[Text] | list[Id] | list[list[Id]] = Field(
        "", description="What the text begins with: text or token ids, one or several."
    )
    suffix: Text | None = Field(None, description="What the text ends with: the gap is filled in.")
    max_tokens: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        16, description="Tokens to write: exactly so many, unless a stop text cuts them."
    )
    n: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        1, description="Texts for each prompt."
    )
    best_of: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        None, description="Accepted when equal to n."
    )
    echo: Flag | None = Field(False, description="Give the prompt back with the text.")
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = Field(
        None, description="The text is cut before the first of these."
    )
    stream_options: StreamOptions | None = Field(
        None,
        description="For streams only. include_usage: a last chunk counts the tokens; "
        "include_obfuscation: ignored.",
    )
    top_p: Number | None = Field(1.0, description="Accepted when 1.")
    presence_penalty: Number | None = Field(0.0, description="Accepted when 0.")
    frequency_penalty: Number | None = Field(0.0, description="Accepted when 0.")
    logprobs: int | None = Field(None, description="Accepted when null.")
    logit_bias: dict[str, Any] | None = Field(None, description="Accepted when empty.")
    user: Text | None = Field(None, description="Ignored.")

    def unsupported(self) -> str | None:
        """Name of the first option that asks for what a diffusion model here does not do."""
        refused = {
            "top_p": self.top_p not in (None, 1.0),
            "presence_penalty": bool(self.presence_penalty),
            "frequency_penalty": bool(self.frequency_penalty),
            "logprobs": self.logprobs is not None,
            "logit_bias": bool(self.logit_bias),
            "best_of": self.best_of is not None and self.best_of != (self.n or 1),
        }
        return next((name for name, is_bad in refused.items() if is_bad), None)
