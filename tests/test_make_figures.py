"""The comparison that the README's intervals come from, and the curve."""

import json
from dataclasses import replace

import numpy as np
import pytest

import data
from assets import make_figures
from sampler import InputError


def rows(values, images):
    return [{"image": image, "iou": value} for image, value in zip(images, values)]


def test_a_constant_gain_has_an_interval_without_width():
    before, after = rows([0.1, 0.4, 0.3], "aab"), rows([0.2, 0.5, 0.4], "aab")
    found = make_figures.paired(before, after, "iou", draws=200)
    assert found == pytest.approx((0.8 / 3, 1.1 / 3, 0.1, 0.1))


def test_phrases_on_one_image_are_drawn_together():
    """Ten equal phrases on each image tell no more than one: the interval is that of the images."""
    gains = np.random.default_rng(1).normal(0.05, 0.1, 40)
    widths = []
    for copies in (1, 10):
        images = [image for image in range(40) for _ in range(copies)]
        before, after = rows([0.0] * len(images), images), rows(np.repeat(gains, copies), images)
        _, _, low, high = make_figures.paired(before, after, "iou")
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1], rel=0.05)
    assert widths[0] == pytest.approx(2 * 1.96 * gains.std() / 40**0.5, rel=0.1)


def test_the_curve_has_a_panel_for_each_reward_that_there_was(tmp_path):
    lines, paths = [{"reward_box": None, "kl": i / 9, "length": 20.0} for i in range(9)], []
    for reward in ("reward_point", "reward_mask", "kl"):  # the last has none
        paths.append(tmp_path / f"{reward}.jsonl")
        paths[-1].write_text("".join(json.dumps({reward: 0.5} | line) + "\n" for line in lines))
    assert make_figures.draw_curve(paths[2:]).size == (1000, 260)
    assert make_figures.draw_curve(paths).size == (1000, 520)
    with pytest.raises(InputError, match="no lines"):
        make_figures.draw_curve(["none.jsonl"])


def test_both_pictures_of_answers_are_drawn(small_set, monkeypatch):
    samples = data.load_samples("demo", small_set)
    rows = [
        {"ref_id": s.ref_id, "image": s.image_path.name, "phrase": s.phrases[0], "iou": 1.0}
        | {"box_px": [data.mask_to_box(s.mask)], "points_px": [[9, 9]], "labels": [1]}
        | {"confidence": [1.0], "rle": data.encode_rle(s.mask)}
        for s in samples
    ]
    sheet = make_figures.draw_pairs(rows, rows, samples, ["a", "b"], count=2)
    assert sheet.size == (2 * 516 + 12, 2 * 284)
    airplanes = [replace(sample, class_name="airplane") for sample in samples] * 10
    monkeypatch.setattr(data, "load_samples", lambda *_: airplanes)
    assert make_figures.draw_grids().size == (1160, 412)
