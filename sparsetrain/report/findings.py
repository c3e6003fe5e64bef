"""The sentences of a report: findings and cautions, and the arm that serves as the baseline."""

from __future__ import annotations

import math

from sparsetrain.report.schema import STAGES, Arm, Report, Scored
from sparsetrain.report.text import brackets, clean, percent

STAGE_NAMES = {
    "pretrain": "pre-training",
    "adapt": "adaptation",
    "finetune": "fine-tuning",
    "prompt": "soft prompt",
    "scratch": "scratch",
    "evaluate": "evaluation",
}

FLOPS_ARE_THEORETICAL = (
    "Training FLOPs follow from a formula: they count what a machine does that skips every zero. Wall time was "
    "measured on this one, which does more than its products: a reduction by the formula is not a speed-up here."
)


def baseline(report: Report) -> Arm:
    """Return the arm with which FLOPs are compared: the first of lowest sparsity."""
    return min(report["arms"], key=lambda arm: arm["sparsity"])


def reduction(report: Report, arm: Arm) -> float | None:
    """Return the training FLOPs of the baseline over those of ``arm``, by the formula; None if ``arm`` has none."""
    return baseline(report)["train_flops"] / arm["train_flops"] if arm["train_flops"] > 0 else None


def diverged(loss: float | None) -> bool:
    """Return whether a loss is null, infinite or NaN."""
    return loss is None or not math.isfinite(loss)


def scored(arm: Arm) -> list[tuple[str, Scored]]:
    """Return the stages of ``arm`` that ended in an accuracy, in order."""
    return [(stage, result) for stage in STAGES if (result := arm.get(stage)) is not None]


def findings(report: Report) -> list[str]:
    """Return one sentence per arm: sparsity, FLOPs against the baseline's, and accuracies after its stages.

    The sentence says whether intervals overlap, since the difference may then be noise of a finite test set.
    """
    reference = baseline(report)
    scores = dict(scored(reference))
    sentences = []
    for arm in report["arms"]:
        name = clean(arm["name"])
        phrases = []
        factor = reduction(report, arm)
        if arm is not reference and factor is not None:
            phrases.append(f"{factor:.2f}x fewer training FLOPs by the formula than {clean(reference['name'])}")
        for stage, result in scored(arm):
            other = scores.get(stage)
            phrase = f"{percent(result['accuracy'])} {brackets(result['ci95'])} after {STAGE_NAMES[stage]}"
            if arm is not reference and other is not None:
                verb = "overlaps" if _overlap(result["ci95"], other["ci95"]) else "does not overlap"
                phrase += f", an interval that {verb} {clean(reference['name'])}'s"
            phrases.append(phrase)
        if phrases:
            sentences.append(f"{name} ({percent(arm['sparsity'])} sparse): {'; '.join(phrases)}.")
    return sentences


def cautions(report: Report) -> list[str]:
    """Return sentences that a reader must know before trusting the accuracies; empty without a reason for doubt."""
    result = []
    overlap = report["overlap_train_test"]
    if overlap > 0:
        result.append(f"{overlap} test examples also occur in the training text: accuracies are too high.")
    if baseline(report)["sparsity"] > 0:
        result.append(
            f"There is no dense arm; FLOPs are compared with {clean(baseline(report)['name'])}, the least sparse one."
        )
    for arm in report["arms"]:
        if diverged(arm["pretrain"]["loss_last"]):
            result.append(f"{clean(arm['name'])}: pre-training diverged; no later number of this arm means anything.")
        for stage, outcome in scored(arm):
            where = f"{clean(arm['name'])} after {STAGE_NAMES[stage]}"
            majority, scratch, bag = report["majority"], report["scratch"], report.get("bag_of_words")
            if majority is not None and outcome["ci95"][0] <= majority:
                result.append(f"{where} is not clearly above the majority class ({percent(majority)}).")
            if bag is not None and outcome["ci95"][0] <= bag["accuracy"]:
                result.append(f"{where} is not clearly above a bag of words ({percent(bag['accuracy'])}).")
            if scratch is not None and _overlap(outcome["ci95"], scratch["ci95"]):
                result.append(f"{where} is not clearly different from training without pre-training.")
    return result


def _overlap(first: list[float], second: list[float]) -> bool:
    return first[0] <= second[1] and second[0] <= first[1]
