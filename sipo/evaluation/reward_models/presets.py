"""Models whose config.json does not tell how to use them: what they read, how their outputs are called, and which way they count.

A new one is an entry of PRESETS.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePath


@dataclass(frozen=True)
class Preset:
    """How to use the models of an architecture that are named in a certain way."""

    architecture: str
    """A pattern of what config.json calls it."""
    named: str
    """A pattern of the last part of the hub's or the folder's name, in lower case."""
    outputs: tuple[str, ...]
    """Their names, in the order of the model's. Their values are rewards as they are."""
    template: str
    """The conversation with its response, as a chat template. The tokenizer adds the tokens that it adds to every text."""
    negative: bool = False
    """Less is better."""


# As safe-rlhf trains its models: every answer ends with the end token, where the score is read. They have never seen a system text.
_SAFE_RLHF = (
    "BEGINNING OF CONVERSATION: {% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ASSISTANT:' }}"
    "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% else %}{{ raise_exception('it takes no system text') }}{% endif %}{% endfor %}"
)

PRESETS = (
    # PKU-Alignment/beaver-7b-v1.0-reward and its kin. Their configurations say "reward" even where they are cost models.
    Preset(architecture="*ForScore", named="*reward*", outputs=("reward",), template=_SAFE_RLHF),
    # PKU-Alignment/beaver-7b-v1.0-cost and its kin.
    Preset(architecture="*ForScore", named="*cost*", outputs=("cost",), template=_SAFE_RLHF, negative=True),
    # RLHFlow/RewardModel-Mistral-7B-for-DPA-v1, from 0 to 100.
    Preset(
        architecture="MistralFor*",
        named="*for-dpa*",
        outputs=(
            "helpsteer-helpfulness",
            "helpsteer-correctness",
            "helpsteer-coherence",
            "helpsteer-complexity",
            "helpsteer-verbosity",
            "ultrafeedback-overall_score",
            "ultrafeedback-instruction_following",
            "ultrafeedback-truthfulness",
            "ultrafeedback-honesty",
            "ultrafeedback-helpfulness",
        ),
        template=(
            "[INST] You must read the following conversation carefully and rate the assistant's response from score 0-100 in these "
            "aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity"
            "{% for message in messages %}{{ '\n\n' + message.role | capitalize + ': ' + message.content }}{% endfor %} [/INST]"
        ),
    ),
)


def presets_of(architecture: str) -> list[Preset]:
    """All that know this architecture."""
    return [preset for preset in PRESETS if fnmatchcase(architecture, preset.architecture)]


def find_preset(name: str, architecture: str, label: str, labels: Collection[str]) -> Preset | None:
    """The one that is meant by the label, if the model has none called so among its own `labels`, or else by the model's name."""
    known = presets_of(architecture)
    by_label = [preset for preset in known if label in preset.outputs and label not in labels]
    by_name = [preset for preset in known if fnmatchcase(PurePath(name).name.lower(), preset.named)]
    return next((found[0] for found in (by_label, by_name) if len(found) == 1), None)
