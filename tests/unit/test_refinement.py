"""Template sets: shipped ones, their two forms, and the reading of outputs."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from sipo.conversation import Message
from sipo.errors import InvalidRequest
from sipo.refinement import Task, TemplateBook, TemplateSet, name_objectives, read_template_set

SHIPPED = sorted(Path(str(files("sipo.refinement") / "templates")).glob("*.yaml"))
TWO = ["concise", "warm"]
THREE = ["correctness", "human_preference", "warm"]


def own_template(**changes: object) -> dict[str, object]:
    wording = {"system": "Help with {objectives}.", "user": "Question: {prompt}\nAnswer: {response}"}
    example = {"prompt": "Why?", "response": "So.", "review": "Say why.", "rewrite": "Because of {objectives}."}
    rewrite = wording | {"user": "Question: {prompt}\nAnswer: {response}\nReview: {review}"}
    return {"objectives": ["a", "b"], "review": wording, "rewrite": rewrite, "examples": [example]} | changes


def write(folder: Path, name: str, template: dict[str, object]) -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(template))
    return file


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_file_is_a_template_set(file: Path) -> None:
    template = read_template_set(file)
    assert len(template.examples) >= 2
    assert file.stem == ("general" if template.objectives is None else "-".join(template.objectives))


@pytest.mark.parametrize(
    "objectives",
    [["helpful", "harmless"], ["correctness", "verbosity"], TWO, ["human_preference", "conciseness"]],
    ids="-".join,
)
def test_pairs_have_their_own_set_in_any_order(objectives: list[str]) -> None:
    book = TemplateBook()
    assert book.find(objectives).objectives is not None
    assert book.find(objectives) is book.find(objectives[::-1])


@pytest.mark.parametrize("objectives", [TWO, THREE, ["coherence", "relevance"]], ids="-".join)
@pytest.mark.parametrize("kind", ["review", "rewrite"])
def test_both_forms_say_the_same_and_leave_no_placeholder(objectives: list[str], kind: str) -> None:
    template = TemplateBook().find(objectives)
    task = (
        template.review_task(objectives, "QUESTION?", "RESPONSE.")
        if kind == "review"
        else template.rewrite_task(objectives, "QUESTION?", "RESPONSE.", "REVIEW.")
    )
    messages, text = task.messages(), task.text()
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * len(task.shots), "user"]
    for message in messages:
        assert message["content"] in text
    for word in ("QUESTION?", "RESPONSE.", *(["REVIEW."] if kind == "rewrite" else [])):
        assert word in messages[-1]["content"]
        assert text.count(word) == 1
    assert "{" not in text


def test_other_objectives_get_the_general_set_which_names_them() -> None:
    task = TemplateBook().find(THREE).review_task(THREE, "Why?", "So.")
    assert "correctness, human preference and warm" in task.messages()[0]["content"]
    assert name_objectives(["a_b", "c"]) == "a b and c"


def test_what_comes_before_the_prompt_is_the_same_for_all_prompts() -> None:
    template = TemplateBook().find(TWO)
    one, other = (template.review_task(TWO, prompt, prompt) for prompt in ("Why is the sky blue?", "How are you?"))
    assert one.messages()[:-1] == other.messages()[:-1]
    fixed = one.text()[: -len(one.user)].rsplit("\n\n", 1)[0]
    assert other.text().startswith(fixed)


def test_a_conversation_is_asked_about_as_one_text() -> None:
    talk = (
        Message(role="user", content="Hello {response}"),
        Message(role="assistant", content="Hi."),
        Message(role="user", content="Why?"),
    )
    template = TemplateSet.model_validate(own_template())
    question = "Question: User: Hello {response}\n\nAssistant: Hi.\n\nUser: Why?\nAnswer: So."
    assert template.review_task(["a", "b"], talk, "So.").user == question
    assert template.rewrite_task(["a", "b"], talk, "So.", "Say why.").user == f"{question}\nReview: Say why."


def test_braces_of_a_caller_are_only_text() -> None:
    task = TemplateBook().find(TWO).rewrite_task(TWO, "What is {response}?", "{prompt} {0} {", "{objectives}")
    for written in ("What is {response}?", "{prompt} {0} {", "{objectives}"):
        assert written in task.messages()[-1]["content"]


@pytest.mark.parametrize(
    ("output", "text", "cut"),
    [
        ("  A fine answer.\n", "A fine answer.", False),
        ("A fine answer.\n\nQuestion: Why not?\nAnswer: So.", "A fine answer.", True),
        ("Question: Why not?", "", True),
        ("Better: a fine answer.", "a fine answer.", False),
        ("To the Question: a fine answer.", "To the Question: a fine answer.", False),
        (" \n ", "", False),
    ],
)
def test_an_output_is_read_up_to_the_next_example(output: str, text: str, cut: bool) -> None:
    parsed = Task(system="s", shots=(), user="Question: x", lead="Better:", marker="Question:").parse(output)
    assert (parsed.text, parsed.cut) == (text, cut)


def test_a_folder_extends_and_overrides_the_shipped_sets(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", own_template())
    write(tmp_path, "kinder.yaml", own_template(objectives=["warm", "concise"]))
    book = TemplateBook(tmp_path)
    assert book.find(["b", "a"]).review_task(["b", "a"], "x", "y").system == "Help with b and a."
    assert book.find(TWO).review.system == "Help with {objectives}."
    assert book.find(["helpful", "harmless"]) == TemplateBook().find(["helpful", "harmless"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objectives": ["a"]}, "two or more different names"),
        ({"objectives": ["a", "a"]}, "two or more different names"),
        ({"review": {"system": "s", "user": "Question: {prompt}"}}, "review.user must contain {response} once"),
        ({"rewrite": {"system": "s", "user": "Question: {prompt}\n{response}"}}, "rewrite.user must contain {review} once"),
        ({"review": {"system": "s", "user": "Q: {prompt} {response} {review}"}}, "there is none yet"),
        ({"review": {"system": "s", "user": "{prompt} {response}"}}, "must begin with some words of its own"),
        ({"examples": [{"prompt": "p"}]}, "examples.0.response"),
        ({"hint": "x"}, "hint"),
    ],
)
def test_a_bad_template_file_is_refused_by_name(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    file = write(tmp_path, "bad.yaml", own_template(**changes))
    with pytest.raises(InvalidRequest) as refusal:
        TemplateBook(tmp_path)
    assert str(file) in refusal.value.message
    assert says in refusal.value.message


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no template folder"):
        TemplateBook(tmp_path / "none")


def test_placeholders_in_examples_are_filled() -> None:
    task = TemplateSet.model_validate(own_template()).rewrite_task(["a", "b"], "x", "y", "z")
    assert task.shots == (("Question: Why?\nAnswer: So.\nReview: Say why.", "Because of a and b."),)
