"""The one prompt format of a policy set: how a prompt and a response become tokens, in sampling, training and scoring alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sipo.conversation import Message, as_messages, as_text
from sipo.errors import IncompatiblePolicy, InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatMessage = dict[str, str]


class PromptFormat(BaseModel):
    """`chat`: the tokenizer's chat template, or the policies' own, with an optional system text. `raw`: `template` with "{prompt}"
    in it, which a conversation fills as one text.

    A response ends with the tokenizer's end-of-sequence token: in a chat format, that is what the template puts after a turn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["chat", "raw"] = "chat"
    system: str | None = None
    template: str | None = None
    chat_template_sha256: str | None = None
    chat_template: str | None = Field(default=None, exclude_if=lambda template: template is None)
    """The policies' own, if it is not the tokenizer's: left out of manifests otherwise, as before there was any."""

    @model_validator(mode="after")
    def _check(self) -> PromptFormat:
        if self.kind == "raw" and "{prompt}" not in (self.template or ""):
            raise ValueError("a raw prompt format needs a template with {prompt} in it")
        if self.kind == "raw" and self.chat_template is not None:
            raise ValueError("a raw prompt format has no chat template")
        return self

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, chat_template: str | None = None) -> PromptFormat:
        """The natural format of a model: its chat template if it has one, otherwise the bare prompt and a newline; or one with a
        `chat_template` of its own."""
        template = tokenizer.chat_template if chat_template is None else chat_template
        if template is None:
            return cls(kind="raw", template="{prompt}\n")
        return cls(kind="chat", system=system, chat_template_sha256=_sha256(template), chat_template=chat_template)

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises IncompatiblePolicy if this tokenizer would render prompts in another way than the policies were trained on."""
        if self.chat_template is not None:
            return
        template = tokenizer.chat_template
        if self.kind == "chat" and (template is None or _sha256(template) != self.chat_template_sha256):
            raise IncompatiblePolicy("the policies were trained with another chat template than this model's tokenizer has")

    def messages(self, prompt: str | Sequence[Message]) -> list[ChatMessage]:
        """The conversation that a chat server is asked with; `kind` must be chat."""
        assert self.kind == "chat"
        return self.with_system(as_messages(prompt))

    def with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A caller's conversation as the policies know conversations: with their system text, unless it has one of its own."""
        if self.system is None or any(message.get("role") in ("system", "developer") for message in messages):
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def request(self, prompt: str | Sequence[Message]) -> list[ChatMessage] | str:
        """What an OpenAI server is asked with: chat messages, or one text for its completions route."""
        return self.messages(prompt) if self.kind == "chat" else self._raw(prompt)

    def _raw(self, prompt: str | Sequence[Message]) -> str:
        assert self.template is not None
        return self.template.replace("{prompt}", as_text(prompt))

    def text(self, prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
        """Everything before the response's first token, as text. Raises InvalidRequest for a conversation that the chat template
        refuses: many want user and assistant in turn, some know no system text."""
        from jinja2 import TemplateError

        if self.kind == "raw":
            return self._raw(prompt)
        try:
            return str(
                tokenizer.apply_chat_template(
                    self.messages(prompt), chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses the conversation: {error}", param="prompt") from error

    def prompt_ids(self, prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Everything before the response's first token. A chat template writes its special tokens itself; a raw text gets the
        tokenizer's own (a BOS where the model has one)."""
        ids: list[int] = tokenizer(self.text(prompt, tokenizer), add_special_tokens=self.kind == "raw")["input_ids"]
        return ids

    def response_ids(self, text: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool = True) -> list[int]:
        """A response on its own (never tokenised together with the prompt), and the end token where it `ended` by itself."""
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.end_token_id(tokenizer)] if ended else ids

    def exact_response_ids(self, text: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool = True) -> list[int]:
        """As response_ids. Raises InvalidRequest for text that these tokens would not give back (unknown characters, text that the
        tokenizer rewrites): its log-probability would be another text's. Spaces may differ: some tokenizers add one in front."""
        ids = self.response_ids(text, tokenizer, ended=ended)
        written = str(tokenizer.decode(ids[:-1] if ended else ids, clean_up_tokenization_spaces=False))
        if "".join(written.split()) != "".join(text.split()):
            raise InvalidRequest(
                f"the tokenizer cannot write {_excerpt(text)}: it makes {_excerpt(written)} of it", param="responses"
            )
        return ids

    def end_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        end = tokenizer.eos_token_id
        if not isinstance(end, int):
            raise IncompatiblePolicy("the tokenizer has no end-of-sequence token: responses could not end")
        return end


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _sha256(template: str | dict[str, str] | Sequence[object]) -> str:
    return hashlib.sha256(str(template).encode()).hexdigest()
