"""What a sequence classifier reads of a prompt and a response: the one answer for whoever trains one and whoever asks one."""

from __future__ import annotations

from typing import Any

from sipo.conversation import Prompt, as_messages, as_text
from sipo.errors import InvalidRequest


def encode(tokenizer: Any, prompt: Prompt, response: str, *, name: str, template: str | None = None) -> Any:
    """The inputs of the classifier called `name`, each [1, length]: its chat template's, or those of two texts if it has none. By
    `template` instead, as text that the tokenizer adds its own special tokens to, where that is how it was trained.

    Raises InvalidRequest for a conversation that the template refuses.
    """
    from jinja2 import TemplateError

    if template is None and tokenizer.chat_template is None:
        # In lists, because an empty text on its own would count as no second text.
        return tokenizer([as_text(prompt)], [response], return_tensors="pt")
    conversation = [*as_messages(prompt), {"role": "assistant", "content": response}]
    try:
        if template is not None:
            return tokenizer(
                tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False), return_tensors="pt"
            )
        return tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
    except TemplateError as error:
        raise InvalidRequest(f"the chat template of the reward model {name} refuses the conversation: {error}") from error
