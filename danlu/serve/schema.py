"""What may be asked and what is answered: OpenAI's API and vLLM's additions, as types.

Requests are checked against these, and `/openapi.json` is made from them. A key that isn't known here is
refused: what a client asks for is done, or it is told that it isn't.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Text = Annotated[str, Field(max_length=2_000_000)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
JsonObject = dict[str, JsonValue]


class Request(BaseModel):
    """Base of what is asked."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class Response(BaseModel):
    """Base of what is answered."""

    model_config = ConfigDict(protected_namespaces=())


# Messages


class TextPart(Request):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]


class FunctionCall(Request):
    name: str = Field(min_length=1, max_length=256)
    arguments: Text = Field(description="JSON, as text")


class ToolCall(Request):
    id: str = Field("", max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class SystemMessage(Request):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Request):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Request):
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)


class ToolMessage(Request):
    role: Literal["tool"]
    content: Content
    tool_call_id: str = Field("", max_length=256)
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
LongText = Annotated[str, Field(min_length=1, max_length=2_000_000)]
# The first wrong one of them is told: a complaint about each of a million would take the memory.
Tokens = Annotated[list[Token], Field(min_length=1, max_length=2_000_000, fail_fast=True)]
Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


# Tools and forms of answers


class Function(Request):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = Field(None, max_length=100_000)
    parameters: JsonObject | None = Field(None, description="JSON schema of the arguments")
    strict: bool | None = Field(None, description="calls follow the schema wherever one is made by force")


class Tool(Request):
    type: Literal["function"]
    function: Function


class NamedFunction(Request):
    name: str


class NamedTool(Request):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Request):
    name: str = Field(max_length=64)
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Request):
    type: Literal["text"]


class JsonFormat(Request):
    type: Literal["json_object"]


class SchemaFormat(Request):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Request):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


# Requests


class Sampling(Request):
    """What chat and completions have in common. null is as if left out."""

    model: str = Field(max_length=512)
    temperature: float | None = Field(None, ge=0, le=100, description="default 1; 0 = greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128, description="answers to the same prompt")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="default: drawn for each request")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024, description="{id of a token: number}; -100 bans it"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="not used")
    # vLLM's
    top_k: int | None = Field(None, ge=-1, le=10**9, description="0 and -1 = all")
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=1000)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=10**6)
    min_tokens: int | None = Field(None, ge=0, le=10**9)
    stop_token_ids: list[Token] | None = Field(None, max_length=256, description="beside the model's own")
    ignore_eos: bool | None = Field(None, description="the model's stop tokens don't end the answer")
    guided_json: JsonObject | str | None = Field(None, description="the answer follows this JSON schema")
    guided_regex: Annotated[str, Field(max_length=100_000)] | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="only requests with the same one share what is computed",
    )

    @model_validator(mode="after")
    def _fits(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream")
        forms = (self.guided_json, self.guided_regex, self.guided_choice)
        given = sum(form is not None for form in forms)
        given += self.response_format is not None and self.response_format.type != "text"
        if given > 1:
            raise ValueError("give one of response_format, guided_json, guided_regex, guided_choice")
        return self


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1, le=10**12, description="default: what the context leaves")
    max_completion_tokens: int | None = Field(None, ge=1, le=10**12, description="the same, newly named")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="default auto; required and a named function are followed whatever the model wants"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call is answered")
    metadata: JsonObject | None = Field(None, description="not used")
    store: Literal[False] | None = Field(None, description="nothing is stored")

    @model_validator(mode="after")
    def _is_whole(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice: only with tools")
        return self


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=2048)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=2048)]
    )
    max_tokens: int | None = Field(
        None, ge=0, le=10**12, description="default 16; 0 with echo only reads the prompt"
    )
    echo: bool | None = Field(
        None, description="the prompt is part of the answer, with its log-probabilities"
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="and so many alternatives of each token")
    best_of: int | None = Field(None, ge=1, le=128, description="of so many answers the n likeliest")
    suffix: None = Field(None, description="not offered")

    @model_validator(mode="after")
    def _is_whole(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of is less than n")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ValueError("best_of: not with stream")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0: only with echo")
        return self


class EmbeddingRequest(Request):
    """POST /v1/embeddings"""

    model: str = Field(max_length=512)
    input: (
        LongText
        | Tokens
        | Annotated[list[LongText], Field(min_length=1, max_length=2048)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, description="only the model's own width")
    user: str | None = None


class TokenizeRequest(Request):
    """POST /tokenize: of a text, or of messages as chat renders them."""

    model: str | None = Field(None, max_length=512, description="default: the first one that is served")
    prompt: Text | None = None
    messages: Messages | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    add_special_tokens: bool = Field(True, description="a text begins like a document")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self


class DetokenizeRequest(Request):
    """POST /detokenize"""

    model: str | None = Field(None, max_length=512)
    tokens: list[Token] = Field(max_length=2_000_000, fail_fast=True)


# Responses


class Usage(Response):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class TopLogprob(Response):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Response):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Response):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AnswerFunction(Response):
    name: str
    arguments: str


class AnswerToolCall(Response):
    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class AnswerMessage(Response):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnswerToolCall] | None = None


Finish = Literal["stop", "length", "tool_calls"]


class ChatChoice(Response):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish


class ChatResponse(Response):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class DeltaToolCall(Response):
    index: int
    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class Delta(Response):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChunkChoice(Response):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(Response):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionChoice(Response):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None


class CompletionResponse(Response):
    """Whole, and piece by piece."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Embedding(Response):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingResponse(Response):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ModelCard(Response):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "danlu"
    root: str = Field(description="what it was loaded from")
    parent: str | None = Field(None, description="of an adapter: its base")
    max_model_len: int
    chats: bool = Field(description="whether it has a chat template")


class ModelList(Response):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(Response):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Response):
    prompt: str


class Health(Response):
    status: Literal["ok", "ending", "failed"]


class ErrorBody(Response):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Response):
    error: ErrorBody
