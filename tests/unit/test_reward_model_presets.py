"""Reward models whose configuration does not tell how to use them, in the layouts in which they are published, random and tiny."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForSequenceClassification,
    MistralModel,
    PreTrainedTokenizerFast,
)

from sipo.conversation import Message
from sipo.errors import InvalidRequest
from sipo.evaluation.reward_models import open_reward_model

PROMPT = "How long does an egg boil?"
RESPONSES = ["Eight minutes, dear.", "", "8"]
TALK = (Message(role="user", content="An egg?"), Message(role="assistant", content="Yes."), Message(role="user", content="So?"))

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
    "bos_token_id": 257,
    "eos_token_id": 0,
}
BOS = 257

BEAVER = {
    "architectures": ["LlamaForScore"],
    "bias": False,
    "do_normalize": False,
    "model_type": "llama",
    "normalizer_type": None,
    "pad_token_id": 258,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "score_bias": True,
    "score_dim": 1,
    "score_type": "reward",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
    "vocab_size": 259,
}
"""The configuration of PKU-Alignment's reward and cost models, which is the same, besides sizes."""

HEADS = [
    *("helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity", "helpsteer-verbosity"),
    *("ultrafeedback-overall_score", "ultrafeedback-instruction_following", "ultrafeedback-truthfulness"),
    *("ultrafeedback-honesty", "ultrafeedback-helpfulness"),
]
DPA = {
    "architectures": ["MistralForAttributePrediction"],
    "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.MistralForAttributePrediction"},
    "id2label": {str(index): f"LABEL_{index}" for index in range(10)},
    "label2id": {f"LABEL_{index}": index for index in range(10)},
    "model_type": "mistral",
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "vocab_size": 258,
}
ASKED = (
    "[INST] You must read the following conversation carefully and rate the assistant's response from score 0-100 in these "
    "aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity\n\n"
)


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A token a byte after <s>, as Llama's; no chat template."""
    inner = copy.deepcopy(tiny_tokenizer.backend_tokenizer)
    inner.add_special_tokens(["<s>", "<pad>"])
    inner.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<end>", pad_token="<pad>")


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two files of weights and their index, as large models have."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIZES | dict(config)))
    tokenizer.save_pretrained(folder)
    places: dict[str, str] = {}
    for number, keys in enumerate([list(weights)[::2], list(weights)[1::2]], start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(keys, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def random_bfloat16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def rounded(model: Any) -> Any:
    """In float32, with weights that bfloat16 keeps as they are. Buffers are computed, and stay."""
    for weights in model.parameters():
        weights.data = weights.data.bfloat16().float()
    return model.eval()


MakeBeaver = Callable[..., Path]


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    return rounded(LlamaModel(LlamaConfig(**SIZES, vocab_size=259, pad_token_id=258)))


@pytest.fixture
def score_head() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"score_head.weight": random_bfloat16(1, 32), "score_head.bias": random_bfloat16(1)}


@pytest.fixture
def make_beaver(llama: Any, score_head: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> MakeBeaver:
    """The folder of a score model of safe-rlhf's, all of its weights in bfloat16."""

    def make(name: str, beside: Mapping[str, Tensor] | None = None, **settings: Any) -> Path:
        decoder = {f"model.{key}": value.bfloat16() for key, value in llama.state_dict().items()}
        normaliser = {"mean": torch.tensor([0.5]), "var": torch.tensor([4.0]), "count": torch.tensor([7])}
        buffers = {f"normalizer.{key}": value.bfloat16() for key, value in normaliser.items()}
        head = score_head if beside is None else dict(beside)
        return write(tmp_path / name, BEAVER | settings, decoder | head | buffers, tokenizer)

    return make


@pytest.fixture
def score(llama: Any, score_head: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast) -> Callable[[str], float]:
    """Of a text, by hand."""

    def score(text: str) -> float:
        ids = [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.inference_mode():
            last = llama(torch.tensor([ids])).last_hidden_state[0, -1]
        return float(last @ score_head["score_head.weight"][0].float() + score_head["score_head.bias"].float())

    return score


def beaver_text(response: str) -> str:
    return f"BEGINNING OF CONVERSATION: USER: {PROMPT} ASSISTANT:{response}<end>"


def test_a_beaver_scores_at_the_end_token_and_a_cost_counts_negative(
    make_beaver: MakeBeaver, score: Callable[[str], float]
) -> None:
    wanted = [score(beaver_text(response)) for response in RESPONSES]
    assert max(wanted) - min(wanted) > 0.1
    reward, cost = (make_beaver(f"beaver-7b-v1.0-{kind}") for kind in ("reward", "cost"))
    assert open_reward_model(f"hf:{reward}")(PROMPT, RESPONSES) == pytest.approx(wanted, abs=1e-4)
    assert open_reward_model(f"hf:{cost}")(PROMPT, RESPONSES) == pytest.approx([-value for value in wanted], abs=1e-4)


def test_a_beaver_reads_the_turns_of_a_conversation_and_no_system_text(
    make_beaver: MakeBeaver, score: Callable[[str], float]
) -> None:
    reward = open_reward_model(f"hf:{make_beaver('beaver-reward')}")
    wanted = score("BEGINNING OF CONVERSATION: USER: An egg? ASSISTANT:Yes.<end>USER: So? ASSISTANT:8<end>")
    assert reward(TALK, ["8"]) == pytest.approx([wanted], abs=1e-4)
    with pytest.raises(InvalidRequest, match="it takes no system text"):
        reward((Message(role="system", content="Be kind."), *TALK), ["8"])


def test_a_score_model_whose_name_tells_nothing_is_told_apart_by_the_label(
    make_beaver: MakeBeaver, score: Callable[[str], float]
) -> None:
    folder = make_beaver("375cd6a9f0")
    with pytest.raises(InvalidRequest, match=r"its name does not tell what it scores: name one of reward, cost, as in .*#reward"):
        open_reward_model(f"hf:{folder}")
    wanted = score(beaver_text("8"))
    assert open_reward_model(f"hf:{folder}#reward")(PROMPT, ["8"]) == pytest.approx([wanted], abs=1e-4)
    assert open_reward_model(f"hf:{folder}#cost")(PROMPT, ["8"]) == pytest.approx([-wanted], abs=1e-4)


def test_a_minus_turns_a_reward_round_and_is_refused_where_it_would_turn_it_back(
    make_beaver: MakeBeaver, score: Callable[[str], float]
) -> None:
    reward, cost = make_beaver("some-reward"), make_beaver("some-cost")
    for address in (f"hf:{reward}#-", f"hf:{reward}#-reward", f"hf:{reward}#-0"):
        assert open_reward_model(address)(PROMPT, ["8"]) == pytest.approx([-score(beaver_text("8"))], abs=1e-4)
    with pytest.raises(InvalidRequest, match="counts cost negative by itself: leave out the minus"):
        open_reward_model(f"hf:{cost}#-cost")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("reward", lambda score: (score - 0.5) / 2), ("cost", lambda score: score / 2), ("critic", lambda score: score)],
)
def test_a_score_is_normalised_where_the_configuration_says_so(
    make_beaver: MakeBeaver, score: Callable[[str], float], kind: str, wanted: Callable[[float], float]
) -> None:
    folder = make_beaver("its-reward", do_normalize=True, normalizer_type="RunningMeanStd", score_type=kind)
    assert open_reward_model(f"hf:{folder}")(PROMPT, ["8"]) == pytest.approx([wanted(score(beaver_text("8")))], abs=1e-4)


def test_weights_that_are_no_decoder_with_one_head_are_refused(make_beaver: MakeBeaver) -> None:
    wrong: dict[str, dict[str, Tensor]] = {
        "none": {},
        r"lm_head\.weight": {"lm_head.weight": random_bfloat16(259, 32)},
        r"gate\.weight, score\.weight": {"score.weight": random_bfloat16(1, 32), "gate.weight": random_bfloat16(1, 32)},
        r"score\.weight": {"score.weight": random_bfloat16(1, 31)},
        r"score\.bias": {"score.bias": random_bfloat16(1)},
    }
    for number, (held, beside) in enumerate(wrong.items()):
        with pytest.raises(InvalidRequest, match=f"must hold one linear layer, such as score_head.weight, and holds {held}$"):
            open_reward_model(f"hf:{make_beaver(f'{number}-reward', beside)}")
    two = {"score_head.weight": random_bfloat16(2, 32)}
    with pytest.raises(InvalidRequest, match="has 2 outputs, and should have 1: reward"):
        open_reward_model(f"hf:{make_beaver('two-reward', two)}")


def test_an_architecture_that_nobody_knows_is_refused(make_beaver: MakeBeaver) -> None:
    folder = make_beaver("their-reward", architectures=["LlamaForRewardModelWithGating"])
    with pytest.raises(InvalidRequest, match=r"is a LlamaForRewardModelWithGating, which is no .* and has no preset"):
        open_reward_model(f"hf:{folder}")


def dpa_text(response: str) -> str:
    return f"{ASKED}User: {PROMPT}\n\nAssistant: {response} [/INST]"


@pytest.mark.parametrize("biased", [True, False])
def test_the_mistral_model_gives_ten_scores_by_name(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, biased: bool) -> None:
    torch.manual_seed(0)
    mistral = rounded(MistralModel(MistralConfig(**SIZES, vocab_size=258, sliding_window=None)))
    weight, bias = random_bfloat16(10, 32), random_bfloat16(10)
    weights = {f"model.{key}": value.bfloat16() for key, value in mistral.state_dict().items()} | {"score.weight": weight}
    if biased:
        weights["score.bias"] = bias
    folder = write(tmp_path / "snapshot", DPA, weights, tokenizer)
    wanted = []
    for response in RESPONSES:
        ids = [BOS, *tokenizer(dpa_text(response), add_special_tokens=False)["input_ids"]]
        with torch.inference_mode():
            wanted.append(weight.float() @ mistral(torch.tensor([ids])).last_hidden_state[0, -1] + bias.float() * biased)
    for index in (1, 4, 9):
        rewards = open_reward_model(f"hf:{folder}#{HEADS[index]}")(PROMPT, RESPONSES)
        assert rewards == pytest.approx([float(one[index]) for one in wanted], abs=1e-4)
    with pytest.raises(InvalidRequest, match=f"has 10 outputs: name one of {', '.join(HEADS)},"):
        open_reward_model(f"hf:{folder}")


def test_as_a_plain_classifier_the_mistral_model_is_known_by_its_name_or_by_a_label(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = MistralForSequenceClassification(MistralConfig(**SIZES, vocab_size=258, num_labels=10)).eval()
    talk = f"{ASKED}User: An egg?\n\nAssistant: Yes.\n\nUser: So?\n\nAssistant: 8 [/INST]"
    with torch.inference_mode():
        wanted = model(torch.tensor([[BOS, *tokenizer(talk, add_special_tokens=False)["input_ids"]]])).logits[0]
    for address in ("RewardModel-Mistral-7B-for-DPA-v1#4", "elsewhere#helpsteer-verbosity", "elsewhere#-helpsteer-verbosity"):
        folder = tmp_path / address.partition("#")[0]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        sign = -1 if "#-" in address else 1
        assert open_reward_model(f"hf:{tmp_path}/{address}")(TALK, ["8"]) == pytest.approx([sign * float(wanted[4])], abs=1e-4)
    with pytest.raises(InvalidRequest, match="has 10 outputs: name one of LABEL_0"):
        open_reward_model(f"hf:{tmp_path}/elsewhere")


def test_a_classifier_whose_head_has_more_than_its_class_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = MistralForSequenceClassification(MistralConfig(**SIZES, vocab_size=258, num_labels=10))
    weights = model.state_dict() | {"score.bias": torch.ones(10)}
    folder = write(tmp_path / "for-dpa", DPA | {"architectures": ["MistralForSequenceClassification"]}, weights, tokenizer)
    with pytest.raises(InvalidRequest, match=r"is no MistralForSequenceClassification, .*: that has no score\.bias$"):
        open_reward_model(f"hf:{folder}#{HEADS[0]}")


def test_a_label_of_the_models_own_is_not_taken_for_a_presets(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    labels = {0: "helpsteer-verbosity", 1: "other"}
    config = MistralConfig(**SIZES, vocab_size=258, id2label=labels, label2id={label: index for index, label in labels.items()})
    model = MistralForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.inference_mode():
        wanted = model(**tokenizer([PROMPT], ["8"], return_tensors="pt")).logits[0].log_softmax(-1)
    assert open_reward_model(f"hf:{tmp_path}#helpsteer-verbosity")(PROMPT, ["8"]) == pytest.approx([float(wanted[0])], abs=1e-4)


def test_a_chat_template_that_writes_the_first_token_gets_no_second(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Skywork-Reward-V2 on Llama 3: the template writes <s>, and the tokenizer would add one to a text."""
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n\n{{ m.content }}<end>{% endfor %}"
    torch.manual_seed(0)
    model = rounded(LlamaForSequenceClassification(LlamaConfig(**SIZES, vocab_size=259, pad_token_id=258, num_labels=1)))
    model.bfloat16().save_pretrained(tmp_path)
    model = rounded(LlamaForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32))
    tokenizer.save_pretrained(tmp_path)
    text = f"[user]\n\n{PROMPT}<end>[assistant]\n\n8<end>"
    with torch.inference_mode():
        wanted = model(torch.tensor([[BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]])).logits.item()
    assert open_reward_model(f"hf:{tmp_path}")(PROMPT, ["8"]) == pytest.approx([wanted], abs=1e-4)
