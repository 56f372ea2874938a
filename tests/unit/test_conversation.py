"""A prompt that is a conversation, from the JSON that it comes in to everything that is asked with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError
from transformers import PreTrainedTokenizerFast

from gateway.cli.client import Gateway
from gateway.cli.demo.results import show_answers
from gateway.routes.jobs import _pairs
from services.common.contract.job_files import JobFiles
from services.common.contract.messages import Candidate, PromptDecided, PromptQueued, ScoredCandidate
from services.common.web.clients import DecoderClient
from services.reviewer.app import create_app
from services.reviewer.settings import ReviewerSettings
from services.scorer.passes import Passes
from services.scorer.scoring import Given, Scorer
from services.trainer.reporting import ground_truth
from sipo.conversation import Message, Prompt, as_json, as_messages, as_prompt, as_text
from sipo.evaluation.ground_truth import REWARDS
from sipo.lora import ADAPTABLE_MODULES
from sipo.policies import PolicyStore
from sipo.preferences import Example
from sipo.prompts import PromptFormat
from sipo.rewards import RewardModel
from sipo.selection import Chosen
from tests.fakes import FakeDecoder, write_policy_set
from tests.plans import sampling_plan
from tests.policies import publish_random, rewards_one_by_one

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "How are you? ☃"},
]
CONVERSATION = tuple(Message.model_validate(turn) for turn in TURNS)


class Asked(BaseModel):
    prompt: Prompt


def example(prompt: Any) -> Example:
    return Example(prompt=prompt, response_0="n", response_1="y", labels={"a": 1, "b": 0})


def test_a_conversation_reads_back_from_json_equal_and_hashable() -> None:
    read = Asked.model_validate_json(json.dumps({"prompt": TURNS})).prompt
    assert read == CONVERSATION == as_prompt(TURNS) == as_prompt(CONVERSATION)
    assert len({read, CONVERSATION, "Hello"}) == 2
    assert json.loads(Asked(prompt=read).model_dump_json()) == {"prompt": TURNS}
    assert as_json(read) == as_messages(read) == TURNS
    assert as_prompt(as_json("Hello")) == "Hello"
    assert as_text(read) == "System: Be kind.\n\nUser: Hello\n\nAssistant: \n\nUser: How are you? ☃"


def test_a_lone_users_turn_is_its_text() -> None:
    lone = [{"role": "user", "content": "Hello"}]
    assert Asked.model_validate({"prompt": lone}).prompt == as_prompt(lone) == "Hello"
    assert as_messages("Hello") == lone


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "a prompt is a text, not empty, or a conversation"),
        (7, "a prompt is a text, not empty, or a conversation"),
        ({"role": "user", "content": "Hello"}, "a prompt is a text, not empty, or a conversation"),
        ([], "a conversation ends with what the user says"),
        (TURNS[:3], "a conversation ends with what the user says"),
        ([*TURNS, {"role": "user", "content": ""}], "a conversation ends with what the user says"),
        ([TURNS[0], {"role": "tool", "content": "4"}], "message 1, counted from 0, is none: a prompt is a text"),
        ([{"role": "user", "content": None}], "message 0, counted from 0, is none: a prompt is a text"),
    ],
)
def test_what_is_no_prompt_is_one_fault_of_its_field(prompt: Any, says: str) -> None:
    with pytest.raises(ValidationError) as in_python:
        Asked(prompt=prompt)
    with pytest.raises(ValidationError) as in_json:
        Asked.model_validate_json(json.dumps({"prompt": prompt}))
    for caught in (in_python, in_json):
        (fault,) = caught.value.errors()
        assert fault["loc"] == ("prompt",)
        assert says in fault["msg"]


def test_an_example_with_a_conversation_goes_through_the_queue() -> None:
    queued = PromptQueued(job="job-1", round=1, prompt="0", example=example(TURNS), plan=sampling_plan())
    read = PromptQueued.model_validate_json(queued.model_dump_json())
    assert read == queued and read.example.prompt == CONVERSATION


async def test_the_reviewer_is_asked_about_a_conversation_as_one_text(tiny_base: Path, tmp_path: Path) -> None:
    write_policy_set(tmp_path / "policies", "demo:1", ["a", "b"])
    decoder = FakeDecoder()
    body = {"response": "So.", "objectives": ["a", "b"], "weights": {"a": 0.5, "b": 0.5}, "policy_set": "demo:1"}
    async with DecoderClient("http://decoder", transport=httpx.ASGITransport(decoder.app)) as client:
        app = create_app(ReviewerSettings(data_dir=tmp_path, model=str(tiny_base)), client)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://reviewer") as http:
            reply = await http.post("/v1/reviews", json=body | {"prompt": TURNS})
            refused = await http.post("/v1/reviews", json=body | {"prompt": TURNS[:1]})
    assert reply.json()["review"] == decoder.answer
    (asked,) = decoder.bodies
    assert as_text(CONVERSATION) in asked["messages"][-1]["content"]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert "a conversation ends with what the user says" in refused.json()["error"]["message"]


def accepted(prompt: str, asked: Example) -> PromptDecided:
    best = Candidate(text="Both.", token_ids=[1], finish_reason="stop", weights=None, stage="distilled", teacher="t")
    scored = [ScoredCandidate(candidate=best, rewards={"a": 1.0}, rejected=None)]
    chosen = [Chosen(candidate=0, objective="a")]
    return PromptDecided(job="job-1", round=1, prompt=prompt, outcome="accepted", example=asked, chosen=chosen, candidates=scored)


def pairs_of(folder: Path, examples: list[Example]) -> list[dict[str, Any]]:
    """As `GET /v1/jobs/{id}/pairs` gives them for a job that accepted an answer to each of the examples."""
    files = JobFiles(folder)
    files.input.write_text("".join(f"{one.model_dump_json()}\n" for one in examples))
    decisions = [accepted(str(row), one) for row, one in enumerate(examples)]
    files.decisions.write_text("".join(f"{one.model_dump_json()}\n" for one in decisions))
    return [json.loads(line) for line in _pairs(files)]


def test_the_ground_truth_reads_a_conversation_as_one_text() -> None:
    asked = Example(prompt=TURNS, response_0="Fine, thanks.", response_1="I am well today.", labels={"warm": 1, "concise": 0})
    found = ground_truth(["warm"], [accepted("0", asked).model_copy(update={"chosen": [Chosen(candidate=0)]})])
    assert found["warm"].response_1 == REWARDS["warm"](as_text(CONVERSATION), "I am well today.")


@pytest.mark.slow
async def test_the_rewards_of_a_conversation_are_those_of_its_tokens(
    tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    prompt_format = PromptFormat.of(tiny_tokenizer)
    store, targets = PolicyStore(tmp_path / "policies"), dict.fromkeys(("a", "b"), ADAPTABLE_MODULES)
    policies = publish_random(store, tiny_base, tmp_path, targets, base_sha256="0", prompt_format=prompt_format)
    async with Passes(lambda: RewardModel.load(tiny_base, store, base_sha256="0")) as passes:
        scorer = Scorer(passes, tiny_tokenizer, {})
        asked = scorer.ask("demo", CONVERSATION, [Given(text="yes"), Given(text="no")])
        (rewards,) = [batch async for batch in scorer.rewards(asked)]
    text = "s:Be kind.<end>\nu:Hello<end>\na:<end>\nu:How are you? ☃<end>\na:"
    prompt, *answers = (tiny_tokenizer(said)["input_ids"] for said in (text, "yes<end>", "no<end>"))
    for got, wanted in zip(rewards, rewards_one_by_one(tiny_base, policies, prompt, answers, []), strict=True):
        assert got == pytest.approx(wanted, abs=1e-4)


def test_the_demo_asks_with_the_turns_and_prints_one_text(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    class Answering(Gateway):
        def post(self, path: str, **content: Any) -> Any:
            asked.append(content["json"]["messages"])
            return {"choices": [{"message": {"content": "Fine."}}]}

    show_answers(Answering("http://gateway"), "demo:1", ["a", "b"], CONVERSATION)
    assert asked == [TURNS] * 3
    assert as_text(CONVERSATION) in capsys.readouterr().out


def test_pairs_are_texts_unless_the_job_has_a_conversation(tmp_path: Path) -> None:
    common = {"round": 1, "objective": "a"}
    text = {"prompt": "Hello", "chosen": "Both.", "rejected": "y", **common}
    assert pairs_of(tmp_path, [example("Hello")]) == [text]
    answers = {"chosen": [{"role": "assistant", "content": "Both."}], "rejected": [{"role": "assistant", "content": "y"}]}
    assert pairs_of(tmp_path, [example("Hello"), example(TURNS)]) == [
        {"prompt": [{"role": "user", "content": "Hello"}], **answers, **common},
        {"prompt": TURNS, **answers, **common},
    ], "a column has one type"


@pytest.mark.slow
def test_trl_reads_the_pairs_as_the_policies_were_asked(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl.data_utils import apply_chat_template, is_conversational

    prompts: list[Prompt] = ["Hello", CONVERSATION]
    rows = Dataset.from_list(pairs_of(tmp_path, [example(prompt) for prompt in prompts]))
    for row, prompt in zip(rows, prompts, strict=True):
        assert is_conversational(row)
        texts = apply_chat_template({name: row[name] for name in ("prompt", "chosen", "rejected")}, tiny_tokenizer)
        asked = PromptFormat.of(tiny_tokenizer).text(prompt, tiny_tokenizer)
        assert texts == {"prompt": asked, "chosen": "Both.<end>\n", "rejected": "y<end>\n"}
