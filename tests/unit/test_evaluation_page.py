from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sipo.datasets import ConflictReport, PairConflict
from sipo.evaluation.job_account import CurvePoint, JobAccount, RoundShown, StageShown, TrainingShown, TruthShown
from sipo.evaluation.page import Evaluated, write_job_page, write_page
from sipo.evaluation.page.front import staircase
from sipo.evaluation.page.words import answer, comparison_in_words, findings, number, percent, places, warnings
from sipo.evaluation.report import (
    AtWeight,
    Calibration,
    Comparison,
    EvaluationReport,
    Improvement,
    Interval,
    Kind,
    MethodResult,
    Sample,
    SampleAnswer,
    UnseenWeight,
    Verdict,
)
from sipo.preferences import Weights

pytestmark = pytest.mark.slow

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What a page's elements are and say; fails on those that are not closed in turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def around(value: float, by: float = 0.012) -> Interval:
    return Interval(value=value, low=value - by, high=value + by)


def at(weights: Weights | None, rewards: Mapping[str, float], **others: Any) -> AtWeight:
    shares = {"truncated": 0.1, "empty": 0.0, "distinct": 1.0} | others
    return AtWeight(
        weights=weights, rewards={name: around(value) for name, value in rewards.items()}, tokens=around(80, 4), **shares
    )


def method(
    name: str, kind: Kind, points: list[AtWeight], hypervolume: float = 0.05, front: list[int] | None = None
) -> MethodResult:
    return MethodResult(
        name=name,
        kind=kind,
        source="demo:1",
        points=points,
        front=list(range(len(points))) if front is None else front,
        hypervolume=around(hypervolume),
        igd_plus=around(0.0321),
        inner_product=None if kind == "base" else around(0.222),
        spread=dict.fromkeys(points[0].rewards, 0.25),
    )


def report(methods: list[MethodResult], **others: Any) -> EvaluationReport:
    objectives = list(methods[0].points[0].rewards)
    fields: dict[str, Any] = {
        "name": "small",
        "made": datetime(2026, 11, 27, 9, 30, tzinfo=UTC),
        "base": "SmolLM2-135M",
        "prompts": 300,
        "prompts_sha256": "ab" * 32,
        "objectives": objectives,
        "judges": {name: f"python:{name}" for name in objectives},
        "reference_point": dict.fromkeys(objectives, 0.0),
        "max_tokens": 128,
        "methods": methods,
        "comparisons": [],
        "samples": [],
        "seconds": {"answers": 812.0},
        "tokens": {one.name: 12345 for one in methods},
    }
    return EvaluationReport(**fields | others)


BASE = method("base", "base", [at(None, {"concise": 0.1, "warm": 0.12})], 0.012)
MOD = method(
    "mod",
    "mod",
    [at({"concise": w, "warm": 1 - w}, {"concise": 0.08 + 0.3 * w, "warm": 0.38 - 0.3 * w}) for w in (0.0, 0.25, 1.0)],
    0.101,
)


def difference(value: float, by: float, p_value: float) -> Comparison:
    return Comparison(method="sipo", against="soups", difference=around(value, by), p_value=p_value)


def test_a_page_stands_alone_and_says_what_was_found(tmp_path: Path) -> None:
    compared = Comparison(method="mod", against="base", difference=around(0.089, 0.01), p_value=0.002)
    page = Page(write_page(report([BASE, MOD], comparisons=[compared]), tmp_path / "new"))
    for words in (
        "300 (SHA-256 abababababab) Judge of concise python:concise Judge of warm python:warm",
        "128 tokens Date 2026-11-27 09:30 UTC",
        "demo:1, its policies mixed in logit space",
        "The highest hypervolume is mod’s, 0.101 (95 %: 0.089 to 0.113). mod’s hypervolume is 0.089 higher than base’s",
        "concise 0.25, warm 0.75 0.155 (0.143 to 0.167) 0.305 (0.293 to 0.317) yes 80.0 (76.0 to 84.0) 10 % 0 % 100 %",
        "mod 0.101 (0.089 to 0.113) 0.032 (0.020 to 0.044) 0.222 (0.210 to 0.234) 0.250 0.250",
        "Warnings None",
        "answers 14 min",
        "mod 12,345",
    ):
        assert words in page.text
    order = ["The highest hypervolume", "The front", "By weight", "Indicators", "Warnings", "What it took"]
    assert [page.text.index(words) for words in order] == sorted(page.text.index(words) for words in order)
    for _, attributes in page.elements:
        assert not {"src", "srcset", "onload", "onclick"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
    assert "//" not in (tmp_path / "new" / "index.html").read_text()
    assert "default-src 'none'" in str(page.all("meta")[1])


def test_pictures_are_in_the_page_with_words_for_those_who_do_not_see_them(tmp_path: Path) -> None:
    page = Page(write_page(report([BASE, MOD]), tmp_path))
    front, volumes = page.all("svg")
    assert front["role"] == volumes["role"] == "img"
    assert "mod: at weights concise 0, warm 1 rewards concise 0.080 (0.068 to 0.092), warm 0.380" in str(front["aria-label"])
    assert volumes["aria-label"] == "Hypervolumes, with 95 % intervals: base 0.012 (0.000 to 0.024); mod 0.101 (0.089 to 0.113)."
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    uses = page.all("use")
    assert uses
    assert {str(use["href"]).removeprefix("#") for use in uses} <= set(ids)
    assert len(page.all("style")) == 1  # a picture's own would style the page
    assert "var(--c1)" in str(page.elements)
    for table in page.all("th"):
        assert table["scope"] in {"col", "row", "rowgroup"}
    assert len(page.all("caption")) == len(page.all("table")) == 4


def test_points_are_labelled_with_their_weight(tmp_path: Path) -> None:
    write_page(report([BASE, MOD]), tmp_path)
    drawn = [text.text for text in ET.parse(tmp_path / "front.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"0.25", "1", "base", "mod", "concise", "warm"} <= set(drawn)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_same_report_makes_the_same_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_page(report([BASE, MOD]), tmp_path / folder)
    made = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert made == ["front.png", "front.svg", "hypervolume.png", "hypervolume.svg", "index.html"]
    for name in made:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_models_said_is_text_and_never_markup(tmp_path: Path) -> None:
    said = "</div></body><script>alert(1)</script> & <b>bold</b>\n\n{{ 7 * 7 }}"
    name = '<i>mod</i> & "$x$" id="a"'
    samples = [
        Sample(
            prompt="ما الجري؟ <img src=x onerror=alert(1)>",
            answers=[
                SampleAnswer(method="base", weights=None, text=" \n", rewards={"concise": 0.0, "warm": 0.5}),
                SampleAnswer(
                    method=name, weights={"concise": 0.25, "warm": 0.75}, text=said, rewards={"concise": -0.1234, "warm": 1}
                ),
            ],
        )
    ]
    renamed = MOD.model_copy(update={"name": name})
    page = Page(write_page(report([BASE, renamed], samples=samples, name="<title>"), tmp_path))
    assert not {"script", "b", "i", "img"} & {tag for tag, _ in page.elements}
    assert said in page.texts
    assert "ما الجري؟ <img src=x onerror=alert(1)>" in page.texts
    assert {"<title>", name} <= set(page.texts)
    assert "Without weights base concise 0, warm 0.5 (empty) concise 0.25, warm 0.75" in page.text
    assert "concise −0.123, warm 1" in page.text
    assert [element["dir"] for element in page.all("div") if "dir" in element] == ["auto", "auto"]


@pytest.mark.slow
def test_three_objectives_are_a_matrix_of_pairs(tmp_path: Path) -> None:
    names = ["concise", "warm", "simple"]
    points = [
        at({name: float(name == most) for name in names}, {name: 0.1 + 0.4 * (name == most) for name in names}) for most in names
    ]
    page = Page(write_page(report([method("mod", "mod", points, front=[0, 1])]), tmp_path))
    drawn = [text.text for text in ET.parse(tmp_path / "front.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert [drawn.count(name) for name in names] == [2, 2, 2]
    assert drawn.count("w3") == 3
    assert "w1 is concise 1, warm 0, simple 0; w2" in page.text
    assert "w3: concise 0, warm 0, simple 1 0.100 (0.088 to 0.112) 0.100 (0.088 to 0.112) 0.500 (0.488 to 0.512) no" in page.text


def test_one_method_alone_has_a_page(tmp_path: Path) -> None:
    lonely = report([BASE], reference_point={"concise": -50.0, "warm": 0.2}, standardised={"warm": (1.25, 0.5)})
    page = Page(write_page(lonely, tmp_path))
    assert "base’s hypervolume is 0.012 (95 %: 0.000 to 0.024). There was no other method to compare it with." in page.text
    assert "python:warm; standardised by the base’s rewards, mean 1.25, standard deviation 0.5" in page.text
    assert "reference point (concise −50, warm 0.2)" in page.text


@pytest.mark.parametrize(
    ("comparison", "words"),
    [
        (difference(0.0164, 0.0135, 0.02), "sipo’s hypervolume is 0.016 higher than soups’ (95 %: 0.003 to 0.030, p = 0.02)."),
        (difference(-0.2, 0.1, 0.0002), "sipo’s hypervolume is 0.20 lower than soups’ (95 %: −0.30 to −0.10, p < 0.001)."),
        (
            difference(0.006, 0.011, 0.312),
            "Between sipo and soups no difference is certain: sipo’s hypervolume is 0.006 higher than soups’ "
            "(95 %: −0.005 to 0.017, p = 0.31).",
        ),
    ],
)
def test_a_comparison_is_a_sentence(comparison: Comparison, words: str) -> None:
    assert comparison_in_words(comparison).replace("\xa0", " ") == words


def test_the_answer_says_first_that_nothing_is_certain() -> None:
    corrected = difference(0.02, 0.01, 0.06)  # its own interval is above 0, but it is one of many
    assert answer(report([BASE, MOD], comparisons=[corrected])).startswith(
        "No difference is certain. The highest hypervolume is mod’s"
    )


def test_useless_answers_and_weights_that_get_less_are_warned_of() -> None:
    def point(w: float, warm: float, **shares: float) -> AtWeight:
        return at({"concise": w, "warm": 1 - w}, {"concise": 0.1 + w, "warm": warm}, **shares)

    bad = method(
        "bad", "mod", [point(0, 0.25, truncated=0.304), point(0.5, 0.4, distinct=0.4), point(1, 0.41, empty=0.12, truncated=0.995)]
    )
    endless = method("base", "base", [at(None, {"concise": 0.1, "warm": 0.1}, truncated=0.81)])
    assert [words.replace("\xa0", " ") for words in warnings(report([endless, bad]))] == [
        "base: answers are cut off by the limit of tokens (81 %).",
        "bad: answers are empty (12 % at concise 1, warm 0).",
        "bad: answers are cut off by the limit of tokens (30 % at concise 0, warm 1; > 99 % at concise 1, warm 0).",
        "bad: answers are alike, few are given to one prompt only (40 % at concise 0.5, warm 0.5).",
        "bad is miscalibrated in warm: weight 1 asks more of it than 0 but gets less, 0.250 instead of 0.410.",
    ]


def test_figures_have_as_many_places_as_their_intervals_carry() -> None:
    assert [places([around(0, by)]) for by in (0.0135, 0.1, 6.5, 130, 0)] == [3, 2, 0, 0, 3]
    assert (number(-0.0004, 3), number(-1.5, 1)) == ("0.000", "−1.5")
    assert [percent(share).replace("\xa0", " ") for share in (0, 0.004, 0.05, 0.996, 1)] == [
        "0 %",
        "< 1 %",
        "5 %",
        "> 99 %",
        "100 %",
    ]


def test_a_front_in_two_objectives_leaves_out_what_is_dominated() -> None:
    assert staircase([(0.1, 0.5), (0.3, 0.2), (0.2, 0.2), (0.2, 0.4), (0.3, 0.2), (0.1, 0.4)]) == [
        (0.1, 0.5),
        (0.2, 0.4),
        (0.3, 0.2),
    ]


def full(seed: int) -> MethodResult:
    """A method's result with all that there may be."""

    def point(w: float) -> AtWeight:
        return at(
            {"concise": w, "warm": 1 - w},
            {"concise": 0.1 + 0.3 * w, "warm": 0.4 - 0.3 * w},
            dominating=around(0.4),
            over_originals={"concise": 0.25, "warm": None},
            length_controlled={"concise": around(0.15), "warm": around(0.25)},
            got={"concise": w**2, "warm": 1 - w**2},
            also={"loud": around(2.5)},
            also_difference={"loud": around(-0.5)},
            histograms={"concise": [1, 5, 2], "warm": [0, 8, 0]},
            divergence=around(0.31),
        )

    plain = method(f"mod@{seed}", "mod", [point(w) for w in (0.0, 0.5, 1.0)], 0.1)
    unseen = UnseenWeight(
        weights={"concise": 0.25, "warm": 0.75},
        rewards={"concise": around(0.2), "warm": around(0.3)},
        inner_product=around(0.275),
        gap=around(-0.033),
    )
    calibration = Calibration(difference=around(0.083), monotonicity={"concise": 1.0, "warm": None})
    return plain.model_copy(update={"unseen": [unseen], "calibration": calibration})


def over_base(seed: int) -> Comparison:
    improvements = [
        Improvement(
            weights={"concise": w, "warm": 1 - w},
            rewards={"concise": around(0.1), "warm": around(-0.02)},
            average=around(0.04),
            relative={"concise": 0.5, "warm": -0.125},
            dominating=around(0.2),
            relative_dominating=None,
        )
        for w in (0.0, 0.5, 1.0)
    ]
    return Comparison(
        method=f"mod@{seed}", against="base", difference=around(0.07 + seed / 100), p_value=0.004, improvements=improvements
    )


CONFLICTS = ConflictReport(385, {}, 385, 218, [PairConflict("concise", "warm", 385, 218)])
JOB = JobAccount(
    job="job-7",
    policy="demo",
    rounds=[
        RoundShown(
            round=1,
            prompts=300,
            failed=2,
            candidates=2400,
            rejected={"worse_than_original": 1800},
            accepted=160,
            pairs=320,
            stages={"rewrite": StageShown(candidates=1200, truncated=60, truly_better=300)},
            ground_truth={"warm": TruthShown(originals=(0.31, 0.28), accepted=0.412)},
            chosen=160,
            chosen_better=80,
            available=190,
            order={"warm": (75, 100)},
        )
    ],
    trainings=[
        TrainingShown(
            round=0,
            objective="warm",
            pairs=300,
            steps=2,
            loss=(0.693, 0.512),
            accuracy=(0.5, 0.78),
            held_out=True,
            curve=[CurvePoint(step=step, loss=0.7 - step / 10, validation=step == 2) for step in (1, 2)],
        )
    ],
)


def test_a_page_shows_all_that_a_report_may_have(tmp_path: Path) -> None:
    compared = [over_base(1), over_base(2)]
    base = BASE.model_copy(update={"points": [full(1).points[0].model_copy(update={"weights": None, "got": None})]})
    whole = report(
        [base, full(1), full(2)],
        comparisons=compared,
        verdicts=[Verdict(method="mod", against="base", seeds=["1", "2"], verdict="wins")],
        also={"loud": "python:loud"},
        filtered={"warm": "kind"},
        originals={"concise": {"concise": 0.3, "warm": 0.1}, "warm": {"concise": 0.2, "warm": 0.35}},
        agreement={"warm": around(0.71)},
        bins={"concise": [0.0, 0.25, 0.5, 0.75], "warm": [0.0, 0.5, 1.0, 1.5]},
        data={"train.jsonl": CONFLICTS},
        jobs=[JOB],
    )
    page = Page(write_page(whole, tmp_path))
    for words in (
        "python:warm; it filtered the training pairs Judge of loud python:loud; no objective",
        "mod wins over base, in every seed: hypervolume differs by 0.080 to 0.090 over seeds 1, 2; greatest p = 0.004.",
        "Each seed is compared by itself",
        "mod against base: wins mod@1, base 0.080 (0.068 to 0.092) 0.004 yes",
        "The judge of warm filtered the training pairs (the job’s reward model kind)",
        "mod@2 0.083 (0.071 to 0.095) 1.00 –",
        "mod@1 over base concise 0, warm 1 0.040 (0.028 to 0.052) 0.100 (0.088 to 0.112) +50 % −0.020 (−0.032 to −0.008) −12 %",
        "+20 % (+19 % to +21 %) –",
        "better in warm 0.200 0.350",
        "concise 0, warm 1 0.100 0.400 +25 % –",
        "concise 0.25, warm 0.75 0.200 (0.188 to 0.212) 0.300 (0.288 to 0.312) 0.275 (0.263 to 0.287) −0.033",
        "2.500 (2.488 to 2.512) −0.500",
        "0.310 (0.298 to 0.322)",
        "warm 71 % (70 % to 72 %)",
        "train.jsonl concise and warm 385 218 57 %",
        "rejected: worse than original 1,800",
        "made by rewrite 1,200 5 % 25 %",
        "prompts with a better one 190",
        "warm: order of the implicit reward 100 75 %",
        "Response 0 Response 1 Accepted Round 1 warm 0.310 0.280 0.412",
        "First alignment warm 300 2 0.693 0.512 0.500 0.780 held-out pairs",
    ):
        assert words in page.text, words
    pictures = ["calibration", "front", "hypervolume", "improvement", "rewards-1", "rewards-2", "training-1"]
    assert sorted(path.stem for path in tmp_path.glob("*.svg")) == pictures
    assert len(page.all("svg")) == len(pictures)
    assert any("mod@1: asked concise 0, warm 1, got concise 0, warm 1" in str(one["aria-label"]) for one in page.all("svg"))
    drawn = [text.text for text in ET.parse(tmp_path / "front.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert "mod (seeds 1, 2)" in drawn
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_job_has_a_page_of_its_own(tmp_path: Path) -> None:
    second = JOB.rounds[0].model_copy(update={"round": 2, "prompts": 140, "accepted": 1, "pairs": 1})
    tuned = JOB.trainings[0].model_copy(update={"objective": "fine-tuning", "accuracy": None, "curve": []})
    job = JOB.model_copy(
        update={
            "rounds": [*JOB.rounds, second],
            "trainings": [tuned, *JOB.trainings],
            "policy_set": "demo:3",
            "activated": True,
            "reason": "round 2 of 3 left <nothing>",
            "reward_models": {"kind": "http://host/score", "lost": ""},
        }
    )
    found = Comparison(method="after", against="before", difference=around(0.02), p_value=0.01)
    evaluations = [
        Evaluated(1, 32, found, link="evaluations/1/index.html"),
        Evaluated(2, 32, "the judge is silent", link=None),
    ]
    path = tmp_path / "report.html"
    write_job_page(job, path, data={"the job’s input": CONFLICTS}, evaluations=evaluations)
    page = Page(path)
    for words in (
        "Job job-7 Policies demo Published demo:3, which became current",
        "Reward model kind http://host/score Reward model lost not known any more",
        "Round 1: of 300 prompts 160 have a response that passed the filter, which makes 320 training pairs.",
        "after’s hypervolume is 0.020 higher than before’s (95 %: 0.008 to 0.032, p = 0.01). The evaluation, on 32 prompts",
        "Round 2: of 140 prompts 1 has a response that passed the filter, which makes 1 training pair. It could not be evaluated: "
        "the judge is silent.",
        "There are no more rounds: round 2 of 3 left <nothing>.",
        "rejected: worse than original 1,800 1,800",
        "Response 0 Response 1 Accepted Round 1 warm 0.310 0.280 0.412",
        "made by rewrite 1,200 5 % 25 %",
        "First alignment fine-tuning 300 2 0.693 0.512 – – held-out pairs",
        "the job’s input concise and warm 385 218 57 %",
    ):
        assert words in page.text, words
    assert [link["href"] for link in page.all("a")] == ["evaluations/1/index.html"]
    assert [picture["aria-label"] for picture in page.all("svg")] == ["Losses of the trainings of job-7 over their steps."]
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"], "pictures are in the page alone"

    bare = JobAccount(job="job-8", policy="demo", rounds=JOB.rounds, trainings=[])
    write_job_page(bare, path)
    page = Page(path)
    assert "Published none so far Round 1: of 300 prompts" in page.text
    assert "Trainings" not in page.text and not page.all("svg")


def test_what_seeds_do_not_agree_on_is_not_decided() -> None:
    verdict = Verdict(method="mod", against="base", seeds=["1", "2"], verdict="not decided")
    page = report([BASE, full(1), full(2)], comparisons=[over_base(1), over_base(2)], verdicts=[verdict])
    assert findings(page) == [
        "Between mod and base it is not decided: hypervolume differs by 0.080 to 0.090 over seeds 1, 2; greatest p\xa0=\xa00.004."
    ]
