"""External reward models: what each kind of address gives for a prompt and its responses, and how it says what is wrong."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from sipo.conversation import Message, as_text
from sipo.errors import InvalidRequest, NotFound, SipoError, Unavailable
from sipo.evaluation.ground_truth import concise, warm
from sipo.evaluation.reward_models import open_reward_model

PROMPT = "How long does an egg boil?"
RESPONSES = ["Eight minutes, dear.", "", "Ask your own hen, as I do every day, or buy a watch.", "8"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}

TALK = (
    Message(role="system", content="Be kind."),
    Message(role="user", content="An egg?"),
    Message(role="assistant", content="Yes."),
    Message(role="user", content=PROMPT),
)

MakeClassifier = Callable[..., tuple[Path, Any]]


@pytest.fixture
def make_llama(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> MakeClassifier:
    """A random decoder-type classifier with a chat template: its folder, and itself."""

    def make(labels: list[str], **settings: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        config = LlamaConfig(
            **SIZES,
            vocab_size=len(tiny_tokenizer),
            max_position_embeddings=128,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            bos_token_id=None,
            eos_token_id=0,
            **settings,
        )
        model = LlamaForSequenceClassification(config).eval()
        model.save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        return tmp_path, model

    return make


@pytest.fixture
def pair_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """No chat template: <end> prompt <end> response <end>, of which the response and its end are of token type 1."""
    inner = copy.deepcopy(tiny_tokenizer.backend_tokenizer)
    inner.post_processor = TemplateProcessing(
        single="<end> $A <end>", pair="<end> $A <end> $B:1 <end>:1", special_tokens=[("<end>", 0)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", model_input_names=inputs)


def chat_logits(model: Any, tokenizer: PreTrainedTokenizerFast, response: str, before: str = "") -> torch.Tensor:
    """By plain transformers, for the chat template of the tiny tokenizer."""
    ids = tokenizer(f"{before}u:{PROMPT}<end>\na:{response}<end>\n", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def test_a_classifier_with_one_output_rewards_with_its_logit(
    make_llama: MakeClassifier, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, model = make_llama(["reward"])
    wanted = [chat_logits(model, tiny_tokenizer, response).item() for response in RESPONSES]
    assert max(wanted) - min(wanted) > 0.1
    assert open_reward_model(f"hf:{folder}")(PROMPT, RESPONSES) == pytest.approx(wanted, abs=1e-5)


def test_a_chat_template_gets_the_turns_of_a_conversation(
    make_llama: MakeClassifier, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, model = make_llama(["reward"])
    before = "s:Be kind.<end>\nu:An egg?<end>\na:Yes.<end>\n"
    wanted = [chat_logits(model, tiny_tokenizer, response, before).item() for response in ("8", "So.")]
    assert open_reward_model(f"hf:{folder}")(TALK, ["8", "So."]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("problem", "value"),
    [
        (None, lambda logits: logits.softmax(-1).log()),
        ("single_label_classification", lambda logits: logits.softmax(-1).log()),
        ("multi_label_classification", lambda logits: logits.sigmoid().log()),
        ("regression", lambda logits: logits),
    ],
)
def test_of_several_outputs_the_label_says_which(
    make_llama: MakeClassifier,
    tiny_tokenizer: PreTrainedTokenizerFast,
    problem: str | None,
    value: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    folder, model = make_llama(["toxic", "kind"], problem_type=problem)
    wanted = torch.stack([value(chat_logits(model, tiny_tokenizer, response)) for response in RESPONSES])
    for label, index in [("toxic", 0), ("kind", 1), ("0", 0), ("1", 1)]:
        rewards = open_reward_model(f"hf:{folder}#{label}")(PROMPT, RESPONSES)
        assert rewards == pytest.approx(wanted[:, index].tolist(), abs=1e-5)


def test_a_label_that_looks_like_an_index_is_a_name(make_llama: MakeClassifier, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    folder, model = make_llama(["1", "0"], problem_type="regression")
    wanted = chat_logits(model, tiny_tokenizer, RESPONSES[0])[1].item()
    assert open_reward_model(f"hf:{folder}#0")(PROMPT, RESPONSES[:1]) == pytest.approx([wanted], abs=1e-5)


def test_a_label_that_is_missing_or_unknown_is_refused_with_the_labels_there_are(make_llama: MakeClassifier) -> None:
    folder, _ = make_llama(["toxic", "kind"])
    with pytest.raises(InvalidRequest, match="has 2 outputs: name one of toxic, kind"):
        open_reward_model(f"hf:{folder}")
    with pytest.raises(InvalidRequest, match="has no label 'rude': name one of toxic, kind"):
        open_reward_model(f"hf:{folder}#rude")


def test_without_a_chat_template_the_model_reads_a_text_pair(pair_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(**SIZES, vocab_size=len(pair_tokenizer), pad_token_id=None, num_labels=1)
    ).eval()
    model.save_pretrained(tmp_path)
    pair_tokenizer.save_pretrained(tmp_path)

    wanted = []
    for response in RESPONSES:
        first, second = (pair_tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PROMPT, response))
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        with torch.inference_mode():
            wanted.append(model(torch.tensor([[0, *first, 0, *second, 0]]), token_type_ids=torch.tensor([types])).logits.item())
    assert open_reward_model(f"hf:{tmp_path}")(PROMPT, RESPONSES) == pytest.approx(wanted, abs=1e-5)


def test_a_decoder_without_a_chat_template_reads_the_pair_and_no_token_types(
    make_llama: MakeClassifier, pair_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, model = make_llama(["reward"])
    (folder / "chat_template.jinja").unlink()
    pair_tokenizer.save_pretrained(folder)
    encoded = pair_tokenizer(PROMPT, RESPONSES[0])
    assert 1 in encoded["token_type_ids"]
    with torch.inference_mode():
        wanted = model(torch.tensor([encoded["input_ids"]])).logits.item()
    reward = open_reward_model(f"hf:{folder}")
    assert reward(PROMPT, RESPONSES[:1]) == pytest.approx([wanted], abs=1e-5)
    assert reward(TALK, ["8"]) == reward(as_text(TALK), ["8"]) != reward(PROMPT, ["8"]), "a conversation is one text here"


def test_a_value_depends_neither_on_the_other_responses_nor_on_other_threads(make_llama: MakeClassifier) -> None:
    folder, _ = make_llama(["reward"], pad_token_id=0)
    reward = open_reward_model(f"hf:{folder}")
    alone = [reward(PROMPT, [response])[0] for response in RESPONSES]
    with ThreadPoolExecutor(4) as threads:
        for together in threads.map(lambda _: reward(PROMPT, RESPONSES[::-1]), range(8)):
            assert together[::-1] == pytest.approx(alone, abs=1e-6)


def test_what_is_too_long_is_refused_and_never_cut(make_llama: MakeClassifier) -> None:
    folder, _ = make_llama(["reward"])
    reward = open_reward_model(f"hf:{folder}")
    room = 128 - len(f"u:{PROMPT}|\na:|\n")  # a token a byte
    assert len(reward(PROMPT, ["x" * room])) == 1
    with pytest.raises(
        InvalidRequest, match=r"prompt and response 1 are too long .* 129 tokens, and it takes at most 128"
    ) as caught:
        reward(PROMPT, ["short", "x" * (room + 1)])
    assert caught.value.param == "responses"


def test_the_limit_is_the_tokenizers_where_that_is_less(
    make_llama: MakeClassifier, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, _ = make_llama(["reward"])
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.model_max_length = 50
    tokenizer.save_pretrained(folder)
    with pytest.raises(InvalidRequest, match="at most 50"):
        open_reward_model(f"hf:{folder}")(PROMPT, ["x" * 50])


def test_positions_that_a_model_keeps_for_itself_are_no_room(pair_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """RoBERTa with 66 positions: the first two are not for text."""
    config = RobertaConfig(**SIZES, vocab_size=len(pair_tokenizer), max_position_embeddings=66, type_vocab_size=2, num_labels=1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    pair_tokenizer.save_pretrained(tmp_path)
    reward = open_reward_model(f"hf:{tmp_path}")
    assert len(reward("x" * 30, ["x" * 31])) == 1
    with pytest.raises(InvalidRequest, match="65 tokens, and it takes at most 64"):
        reward("x" * 30, ["x" * 32])


def test_a_chat_template_that_refuses_the_conversation_says_so(
    make_llama: MakeClassifier, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, _ = make_llama(["reward"])
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('a system message must come first') }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(InvalidRequest, match="a system message must come first"):
        open_reward_model(f"hf:{folder}")(PROMPT, RESPONSES)


def test_a_value_that_is_not_finite_is_passed_on(make_llama: MakeClassifier) -> None:
    folder, model = make_llama(["reward"])
    torch.nn.init.constant_(model.score.weight, math.nan)
    model.save_pretrained(folder)
    assert all(math.isnan(value) for value in open_reward_model(f"hf:{folder}")(PROMPT, RESPONSES))


def test_a_model_without_a_trained_head_is_no_reward_model(tiny_base: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"its weights lack score\.weight"):
        open_reward_model(f"hf:{tiny_base}")


def test_a_classifier_that_is_not_there_is_not_found(make_llama: MakeClassifier, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(NotFound, match=r"holds no config\.json"):
        open_reward_model(f"hf:{tmp_path_factory.mktemp('empty')}")
    with pytest.raises(NotFound, match="no model 'no such model'"):
        open_reward_model("hf:no such model")
    folder, _ = make_llama(["reward"])
    (folder / "model.safetensors").unlink()
    with pytest.raises(NotFound, match="is not complete"):
        open_reward_model(f"hf:{folder}")


class ScoreServer(ThreadingHTTPServer):
    """Answers every request with `reply` (status, body, headers), and keeps what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.reply: tuple[int, Any, dict[str, str]] = (200, {}, {})
        self.asked: list[tuple[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class _Answer(BaseHTTPRequestHandler):
    server: ScoreServer

    def do_POST(self) -> None:
        self.server.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
        status, body, headers = self.server.reply
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ScoreServer]:
    server = ScoreServer()
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def scores(*values: float) -> list[dict[str, Any]]:
    return [{"index": index, "object": "score", "score": value} for index, value in enumerate(values)]


def test_an_endpoint_is_asked_once_for_all_responses(server: ScoreServer) -> None:
    server.reply = (200, {"id": "score-1", "object": "list", "data": scores(0.5, -2, 1e-3)[::-1], "usage": {}}, {})
    assert open_reward_model(f"{server.url}?key=1")(PROMPT, ["a", "b", "c"]) == [0.5, -2, 1e-3]
    assert server.asked == [("/score?key=1", {"text_1": PROMPT, "text_2": ["a", "b", "c"]})]


def test_an_endpoint_is_asked_about_a_conversation_as_one_text(server: ScoreServer) -> None:
    server.reply = (200, {"data": scores(0.5)}, {})
    assert open_reward_model(server.url)(TALK, ["a"]) == [0.5]
    assert server.asked == [("/score", {"text_1": as_text(TALK), "text_2": ["a"]})]


def test_without_responses_an_endpoint_is_not_asked(server: ScoreServer) -> None:
    assert open_reward_model(server.url)(PROMPT, []) == []
    assert server.asked == []


def test_a_score_that_is_not_finite_is_passed_on(server: ScoreServer) -> None:
    server.reply = (200, {"data": scores(math.nan, -math.inf)}, {})
    assert open_reward_model(server.url)(PROMPT, ["a", "b"]) == pytest.approx([math.nan, -math.inf], nan_ok=True)


def test_an_endpoint_that_is_away_or_full_may_work_later(server: ScoreServer) -> None:
    reward = open_reward_model(server.url)
    for status in (429, 502, 503, 504):
        server.reply = (status, {"error": {"message": "busy"}}, {"retry-after": "7"})
        with pytest.raises(Unavailable, match=f"HTTP {status}: busy") as caught:
            reward(PROMPT, ["a"])
        assert caught.value.retry_after == 7
    server.reply = (503, b"", {"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"})
    with pytest.raises(Unavailable, match="HTTP 503"):
        reward(PROMPT, ["a"])


def test_an_endpoint_that_does_not_answer_may_work_later_and_its_password_stays_secret(server: ScoreServer) -> None:
    gone = server.url.replace("http://", "http://me:secret@")
    server.shutdown()
    server.server_close()
    with pytest.raises(Unavailable, match=r"at http://127.0.0.1:\d+/score does not answer \(ConnectError\)"):
        open_reward_model(gone)(PROMPT, ["a"])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"error": {"message": "too long: at most 512 tokens", "type": "BadRequestError", "code": 400}}, "at most 512 tokens"),
        ({"detail": "no such model"}, "no such model"),
        (b"<html>not here</html>", "not here"),
        (["odd"], "odd"),
    ],
)
def test_a_request_that_an_endpoint_refuses_comes_with_its_message(server: ScoreServer, body: Any, says: str) -> None:
    for status in (400, 404, 422):
        server.reply = (status, body, {})
        with pytest.raises(InvalidRequest, match=rf"HTTP {status}: .*{says}"):
            open_reward_model(server.url)(PROMPT, ["a", "b"])


@pytest.mark.parametrize(
    ("status", "body", "headers", "says"),
    [
        (200, b"Hello", {}, "sent 'Hello', not"),
        (200, b"\xff\xfe", {}, "not {"),
        (200, b"Hello", {"content-encoding": "gzip"}, "cannot be read"),
        (200, {"scores": [1, 2]}, {}, "scores"),
        (200, {"data": [{"index": 0, "score": None}, {"index": 1, "score": 1}]}, {}, "null"),
        (200, {"data": [{"index": 0, "score": "0.5"}, {"index": 1, "score": 1}]}, {}, "0.5"),
        (200, {"data": scores(1)}, {}, "sent 1 scores, .* for 2 responses"),
        (200, {"data": scores(1, 2, 3)}, {}, "sent 3 scores, .* for 2 responses"),
        (200, {"data": scores(1) * 2}, {}, r"indices \[0, 0\]"),
        (307, b"", {"location": "/elsewhere"}, "HTTP 307"),
        (500, {"error": {"message": "out of memory"}}, {}, "HTTP 500: out of memory"),
    ],
)
def test_a_reply_that_is_no_list_of_scores_says_what_came(
    server: ScoreServer, status: int, body: Any, headers: dict[str, str], says: str
) -> None:
    server.reply = (status, body, headers)
    with pytest.raises(SipoError, match=says) as caught:
        open_reward_model(server.url)(PROMPT, ["a", "b"])
    assert type(caught.value) is SipoError


def test_the_ground_truths_are_installed_by_name() -> None:
    for name, function in [("concise", concise), ("warm", warm)]:
        wanted = [function(PROMPT, response) for response in RESPONSES]
        assert open_reward_model(f"python:{name}")(PROMPT, RESPONSES) == wanted
        assert open_reward_model(f"python:{name}")(TALK, RESPONSES) == [function(as_text(TALK), one) for one in RESPONSES]
        assert max(wanted) > 0


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of someone else's, with reward models of all sorts."""
    (tmp_path / "elsewhere_rewards.py").write_text(
        "import numpy\n"
        "def length(prompt, response): return len(response)\n"
        "def narrow(prompt, response): return numpy.float32(0.5)\n"
        "def infinite(prompt, response): return float('nan')\n"
        "def broken(prompt, response): return 1 / len(response)\n"
        "def mute(prompt, response): return None\n"
    )
    names = ("length", "narrow", "infinite", "broken", "mute", "missing")
    about = tmp_path / "elsewhere_rewards-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere-rewards\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[sipo.reward_models]\n" + "".join(f"{name} = elsewhere_rewards:{name}\n" for name in names)
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_functions_of_other_packages_are_found_and_their_numbers_are_floats() -> None:
    assert open_reward_model("python:length")(PROMPT, ["a", "abc"]) == [1.0, 3.0]
    for name, wanted in [("length", 3.0), ("narrow", 0.5), ("infinite", math.nan)]:
        (value,) = open_reward_model(f"python:{name}")(PROMPT, ["abc"])
        assert type(value) is float
        assert value == pytest.approx(wanted, nan_ok=True)


@pytest.mark.usefixtures("installed")
def test_a_function_that_fails_is_named_with_its_exception() -> None:
    with pytest.raises(SipoError, match="python:broken failed: ZeroDivisionError: division by zero"):
        open_reward_model("python:broken")(PROMPT, ["a", ""])
    with pytest.raises(SipoError, match="python:mute returned None, which is no number"):
        open_reward_model("python:mute")(PROMPT, ["a"])
    with pytest.raises(SipoError, match="python:missing cannot be imported: AttributeError"):
        open_reward_model("python:missing")


def test_a_function_that_is_not_installed_is_not_found_and_the_others_are_listed() -> None:
    with pytest.raises(NotFound, match=r"no reward model 'kindness' is installed: .* are .*concise.*, warm"):
        open_reward_model("python:kindness")


@pytest.mark.parametrize(
    "address", ["", "warm", "hf:", "python:", "ftp://host/score", "http:", "https://", "http://host:port/score"]
)
def test_an_address_of_no_known_kind_is_refused_with_those_there_are(address: str) -> None:
    with pytest.raises(InvalidRequest, match=r"give hf:FOLDER_OR_HUB_NAME .*, http\(s\)://HOST/score, or python:NAME"):
        open_reward_model(address)
