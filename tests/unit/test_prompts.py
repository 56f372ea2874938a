from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sipo.conversation import Message, as_messages
from sipo.errors import IncompatiblePolicy, InvalidRequest
from sipo.prompts import PromptFormat

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["<unk>", "<end>", "<system>", "<user>", "<assistant>", "be", "kind", "hello", "you"]


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = template
    return tokenizer


def words(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def test_a_chat_prompt_goes_through_the_template_with_the_system_text() -> None:
    tokenizer = make_tokenizer()
    prompt_format = PromptFormat.of(tokenizer, system="be kind")
    assert prompt_format.messages("hello") == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    ids = prompt_format.prompt_ids("hello", tokenizer)
    assert words(ids) == "<system> be kind <end> <user> hello <end> <assistant>"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_conversation_gets_the_system_text_unless_it_has_its_own(role: str) -> None:
    prompt_format = PromptFormat.of(make_tokenizer(), system="be kind")
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]
    assert prompt_format.with_system(talk) == [{"role": "system", "content": "be kind"}, *talk]
    own = [{"role": role, "content": "be brief"}, *talk]
    assert prompt_format.with_system(own) == own
    assert PromptFormat.of(make_tokenizer()).with_system(talk) == talk


TALK = (
    Message(role="user", content="It is"),
    Message(role="assistant", content="unbelievable."),
    Message(role="user", content="Why?\n"),
)


@pytest.mark.parametrize("turns", [TALK, (Message(role="system", content="Be kind."), *TALK)], ids=["plain", "own system text"])
def test_the_tokens_of_a_conversation_are_those_of_the_models_own_template(bundled_base: Path, turns: tuple[Message, ...]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_base)
    own = tokenizer.apply_chat_template(as_messages(turns), add_generation_prompt=True)["input_ids"]
    assert PromptFormat.of(tokenizer).prompt_ids(turns, tokenizer) == own
    brief = PromptFormat.of(tokenizer, system="Be brief.")
    asked = as_messages(turns) if turns[0].role == "system" else [{"role": "system", "content": "Be brief."}, *as_messages(turns)]
    assert brief.messages(turns) == brief.request(turns) == asked
    told = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert brief.prompt_ids(turns, tokenizer) == told
    assert (told == own) == (turns[0].role == "system")


def test_a_raw_format_takes_a_conversation_as_one_text() -> None:
    tokenizer = make_tokenizer(None)
    raw = PromptFormat(kind="raw", template="{prompt}\nAssistant:")
    text = "User: It is\n\nAssistant: unbelievable.\n\nUser: Why?\n\nAssistant:"
    assert raw.request(TALK) == raw.text(TALK, tokenizer) == text
    assert raw.prompt_ids(TALK, tokenizer) == tokenizer(text)["input_ids"]


def test_a_conversation_that_the_template_refuses_is_refused_in_its_words() -> None:
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="the model's chat template refuses the conversation: roles must alternate"):
        PromptFormat.of(tokenizer).prompt_ids(TALK, tokenizer)


def test_a_model_without_a_template_gets_a_raw_format() -> None:
    tokenizer = make_tokenizer(None)
    prompt_format = PromptFormat.of(tokenizer)
    assert prompt_format.kind == "raw"
    assert prompt_format.text("hello", tokenizer) == "hello\n"


def test_braces_in_a_prompt_stay_as_they_are() -> None:
    prompt_format = PromptFormat(kind="raw", template="Q: {prompt} A:")
    assert prompt_format.text("{x} {prompt}", make_tokenizer(None)) == "Q: {x} {prompt} A:"


def test_a_response_ends_with_the_end_token_once_and_only_if_it_ended() -> None:
    tokenizer = make_tokenizer()
    prompt_format = PromptFormat.of(tokenizer)
    assert words(prompt_format.response_ids("hello you", tokenizer)) == "hello you <end>"
    assert words(prompt_format.response_ids("hello you", tokenizer, ended=False)) == "hello you"


def test_another_chat_template_is_refused() -> None:
    prompt_format = PromptFormat.of(make_tokenizer())
    prompt_format.check(make_tokenizer())
    with pytest.raises(IncompatiblePolicy, match="chat template"):
        prompt_format.check(make_tokenizer(TEMPLATE + " "))
    with pytest.raises(IncompatiblePolicy, match="chat template"):
        prompt_format.check(make_tokenizer(None))


def test_a_raw_format_needs_a_place_for_the_prompt() -> None:
    with pytest.raises(ValidationError, match=r"\{prompt\}"):
        PromptFormat(kind="raw", template="no place")


def test_text_that_the_tokens_would_not_give_back_is_refused() -> None:
    tokenizer = make_tokenizer()
    prompt_format = PromptFormat.of(tokenizer)
    assert prompt_format.exact_response_ids("hello  you", tokenizer) == prompt_format.response_ids("hello you", tokenizer)
    with pytest.raises(InvalidRequest, match=r"cannot write 'hello ☃': it makes 'hello <unk>' of it"):
        prompt_format.exact_response_ids("hello ☃", tokenizer)


def test_prompt_and_response_never_share_a_token_even_where_they_would_merge(bundled_base: Path) -> None:
    """One text would be tokenised across the border: sampling never sees such tokens, so neither do training and scoring."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_base)
    raw = PromptFormat(kind="raw", template="{prompt} un")
    prompt, response = raw.prompt_ids("It is", tokenizer), raw.response_ids("believable.", tokenizer, ended=False)
    together = tokenizer("It is unbelievable.")["input_ids"]
    assert [*prompt, *response] != together
    assert tokenizer.decode([*prompt, *response]) == tokenizer.decode(together)
    for prompt_format in (raw, PromptFormat.of(tokenizer)):
        for text in ("believable.", " unbelievable", "\n\nYes", "…", "é"):
            whole = prompt_format.prompt_ids("It is", tokenizer) + prompt_format.response_ids(text, tokenizer, ended=False)
            assert tokenizer.decode(whole) == prompt_format.text("It is", tokenizer) + text
