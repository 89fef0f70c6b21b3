"""Metrics against scikit-learn's, on answers of every shape, and against figures worked out by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from pipeline.prepare.metrics import (
    BINS,
    SMALLEST,
    Predictions,
    agreement,
    measure,
    most_confused,
    reliability,
    top_k,
    worst_confusions,
)


def predictions(probabilities: np.ndarray, truth: np.ndarray) -> Predictions:
    """From the probabilities of all classes, [N, C]; of equal ones the lower class comes first."""
    ids = np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
    rows = np.arange(len(truth))
    return Predictions(ids, probabilities[rows, ids[:, 0]], truth, probabilities[rows, truth])


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, C] without ties, and the truth."""
    images, classes, seed = draw(st.integers(1, 60)), draw(st.integers(2, 12)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=draw(st.sampled_from([0.1, 1.0, 10.0])), size=(images, classes))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True), rng.integers(0, draw(st.integers(1, classes)), images)


@settings(max_examples=150, deadline=None)
@given(scored())
def test_as_scikit_learn_measures(case: tuple[np.ndarray, np.ndarray]):
    probabilities, truth = case
    classes = list(range(probabilities.shape[1]))
    answers = predictions(probabilities, truth)
    found = measure(answers, len(classes))
    said = probabilities.argmax(axis=1)
    assert found.top1 == pytest.approx(sk.accuracy_score(truth, said))
    np.testing.assert_array_equal(found.confusion, sk.confusion_matrix(truth, said, labels=classes))
    precision, recall, _, images = sk.precision_recall_fscore_support(truth, said, labels=classes, zero_division=np.nan)
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    np.testing.assert_array_equal(found.images, images)
    if len(classes) > 5:
        assert found.top5 == pytest.approx(sk.top_k_accuracy_score(truth, probabilities, k=5, labels=classes))
    else:
        assert found.top5 == 1
    if len(classes) > 2:
        assert top_k(answers, 2) == pytest.approx(sk.top_k_accuracy_score(truth, probabilities, k=2, labels=classes))
    if probabilities.min() > SMALLEST:
        assert found.nll == pytest.approx(sk.log_loss(truth, probabilities, labels=classes))


@settings(max_examples=150, deadline=None)
@given(scored())
def test_calibration_by_the_book(case: tuple[np.ndarray, np.ndarray]):
    answers = predictions(*case)
    bins = reliability(answers.score, answers.right)
    assert sum(part.images for part in bins) == len(answers)
    gap = 0.0
    for number, part in enumerate(bins):
        mine = (answers.score > number / BINS) & (answers.score <= (number + 1) / BINS)
        assert part.images == mine.sum()
        if part.images:
            gap += part.images / len(answers) * abs(answers.right[mine].mean() - answers.score[mine].mean())
    assert measure(answers, case[0].shape[1]).ece == pytest.approx(gap)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a truth that is all of one kind
        accuracy, confidence = calibration_curve(answers.right, answers.score, n_bins=BINS)
    filled = [part for part in bins if part.images]
    np.testing.assert_allclose([part.accuracy for part in filled], accuracy)
    np.testing.assert_allclose([part.confidence for part in filled], confidence)


def test_worked_out_by_hand():
    probabilities = np.array([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.7, 0.3, 0], [1.0, 0, 0]])
    answers = predictions(probabilities, np.array([0, 1, 1, 2]))
    found = measure(answers, 3)
    assert found.top1 == 0.5
    assert found.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0]]
    np.testing.assert_allclose(found.precision, [1 / 3, 1, np.nan])
    np.testing.assert_allclose(found.recall, [1, 0.5, 0])
    assert found.ece == pytest.approx((0.1 + 0.4 + 0.7 + 1.0) / 4)
    assert found.nll == pytest.approx(-(np.log(0.9) + np.log(0.6) + np.log(0.3) + np.log(2**-24)) / 4)
    assert worst_confusions(found.confusion, 9) == [(1, 0, 1), (2, 0, 1)]
    assert most_confused(found.confusion, 2) == [0, 1]
    other = predictions(probabilities[:, ::-1], answers.truth)
    assert agreement(answers, other) == pytest.approx(0.25)
    kept = answers.where(answers.right)
    assert (len(kept), kept.ids[:, 0].tolist(), kept.truth.tolist()) == (2, [0, 1], [0, 1])
    assert (kept.score.tolist(), kept.truth_score.tolist()) == ([0.9, 0.6], [0.9, 0.6])
    wrong = answers.where(~answers.right)
    assert (wrong.score.tolist(), wrong.truth_score.tolist()) == ([0.7, 1.0], [0.3, 0.0])


@given(st.integers(1, 6).flatmap(lambda size: arrays(int, (size, size), elements=st.integers(0, 3))), st.integers(0, 9))
def test_mistakes_are_ranked_by_how_many_there_are(confusion: np.ndarray, most: int):
    classes = range(len(confusion))
    cells = [(row, column, int(confusion[row, column])) for row in classes for column in classes if row != column]
    ranked = sorted((cell for cell in cells if cell[2]), key=lambda cell: -cell[2])
    assert worst_confusions(confusion, most) == ranked[:most]
    busy = {number: sum(images for row, column, images in cells if number in (row, column)) for number in classes}
    assert most_confused(confusion, most) == sorted(sorted(classes, key=lambda number: -busy[number])[:most])


def test_edges_belong_to_the_bin_below_and_a_score_just_over_one_counts():
    edges = np.linspace(0, 1, BINS + 1)
    bins = reliability(np.array([edges[1], edges[2], 1.0, 1.0000001, 0.0]), np.ones(5, bool))
    assert [part.images for part in bins] == [2, 1, *[0] * 12, 2]
    assert np.isnan(bins[2].accuracy)
