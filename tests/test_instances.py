"""--prompts sam: several instances or none, and SAM in the loop of the mask reward."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, fastest
from PIL import Image

import data
import eval as evaluation
import grpo
import sampler
import sft
from assets import make_demo

ONE = '{"bbox_2d":[100,200,300,400],"positive_points":[[150,250],[200,300]]}'
TWO = '{"bbox_2d":[500,500,700,800],"positive_points":[[600,600],[650,700]]}'
BOTH = f"<think>Two.</think><answer>[{ONE},{TWO}]</answer>"

# ------------------------------------------------------------------------- masks


def flood(mask):
    """The 8-connected parts of a mask by walking from pixel to pixel."""
    left, parts = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        todo, part = [min(left)], np.zeros_like(mask)
        left.remove(todo[0])
        while todo:
            y, x = todo.pop()
            part[y, x] = True
            around = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= around
            todo += around
        parts.append(part)
    return parts


def test_instances_are_what_a_flood_fill_finds_in_reading_order():
    rng, several = np.random.default_rng(0), 0
    for _ in range(200):
        mask = rng.random(rng.integers(1, 30, 2)) < rng.random()
        parts = data.components(mask, least=0)
        assert [p.tobytes() for p in parts] == [p.tobytes() for p in flood(mask)]
        several += len(parts) > 3
    assert several > 50


def test_crumbs_are_left_out_but_never_everything():
    mask = np.zeros((100, 100), dtype=bool)
    mask[:40, :40] = mask[60:70, 60:70] = mask[90, 90] = True
    assert [part.sum() for part in data.components(mask)] == [1600, 100]
    mask[:40, 50:90], mask[60:63, 60:70] = True, False  # 70: under 1 % of the whole, not of a part
    mask[75:77, :14] = True  # 28
    assert [part.sum() for part in data.components(mask)] == [1600, 1600, 70]
    mask[80:84, :8] = True  # 32
    assert len(data.components(mask)) == 3 and len(data.components(mask, least=0.02)) == 3
    dots = np.zeros((100, 100), dtype=bool)
    dots[::4, ::4] = True  # each is 0.16 % of the whole
    assert len(data.components(dots)) == 625 and not data.components(np.zeros((3, 3), dtype=bool))


def test_the_points_of_an_instance_lie_deep_in_it_and_apart():
    rng = np.random.default_rng(1)
    for _ in range(100):
        mask = rng.random(rng.integers(1, 200, 2)) < rng.random() * 0.5
        if mask.any():
            assert sampler.label_points(data.inner_points(mask), mask).all()
    bar = np.zeros((60, 300), dtype=bool)
    bar[20:41, 50:251] = True
    (x1, y1), (x2, y2) = data.inner_points(bar)
    assert abs(x1 - x2) > 150 and 24 < min(y1, y2) <= max(y1, y2) < 37
    bar[5:56, 80:131] = True  # a bulge: the deepest pixel is its centre
    assert (np.abs(data.inner_points(bar)[0] - (105, 30)) < (15, 3)).all()
    # every fifth column and row of a large mask would miss this
    thin = np.roll(np.eye(300, dtype=bool), 1, axis=1)
    assert sampler.label_points(data.inner_points(thin), thin).all()


def test_points_written_in_the_images_own_frame_stay_on_the_target():
    """Qwen2.5-VL speaks of pixels: NOTE in inner_points."""
    rng = np.random.default_rng(2)
    for _ in range(100):
        mask = np.zeros((140, 196), dtype=bool)
        (y, x), (height, width) = rng.integers(0, 130, 2), rng.integers(1, 5, 2)
        mask[y : y + height, x : x + width] = True
        frame = mask.shape[::-1]
        (instance,) = data.parse_instances(data.sam_answer(data.true_instances(mask), "", frame))
        assert sampler.label_points(instance.points, mask).all()


def test_each_true_instance_has_its_own_points_and_an_answer_holds_the_largest():
    mask = np.zeros((90, 90), dtype=bool)
    mask[10:30, 10:30] = mask[50:80, 50:80] = True
    for (box, points), corner in zip(data.true_instances(mask), (10, 50)):
        assert box[0] == box[1] == corner and (points > box[:2]).all() and (points < box[2:]).all()
    grid = np.zeros((90, 90), dtype=bool)
    for i in range(81):
        y, x = np.multiply(divmod(i, 9), 10)
        grid[y : y + 5 + i % 3, x : x + 5] = True
    found = data.true_instances(grid)
    assert len(found) == data.MOST_INSTANCES == 64
    heights = [box[3] - box[1] for box, _ in found]
    assert heights.count(7) == heights.count(6) == 27  # and ten of 5
    text = data.sam_answer(found, "Many.")
    assert len(data.parse_instances(text)) == 64


# ------------------------------------------------------------------------- answers


def test_what_training_teaches_is_read_back():
    instances = [((1, 2, 30, 40), [(5, 6), (7, 8)]), ((50.4, 60, 70, 80), [(51, 61), (52, 62)])]
    text = data.sam_answer(instances, "Two ships.")
    first, second = data.parse_instances(text)
    assert first == ((1, 2, 30, 40), [(5, 6), (7, 8)]) and second.box == (50, 60, 70, 80)
    assert data.parse_instances(data.sam_answer([], "None.")) == []


BROKEN = {  # text -> boxes and numbers of points that can still be made out, or None
    BOTH.replace("<answer>", "").replace("</answer>", ""): [2, 2],
    BOTH[:-20]: [2, 1],  # cut off in the middle of a point
    BOTH[:-70]: [2],
    f"```json\n[{ONE}]\n```": [2],
    f"<answer>{ONE}</answer>": [2],  # not a list
    f"<answer>[{ONE},]</answer>": [2],
    f"<answer>[{ONE.replace(',[200,300]', '')}]</answer>": [1],
    f"<answer>[{ONE.replace(',[200,300]', ',[200,300],[1,1]')}]</answer>": [3],
    f"<answer>[{ONE.replace(chr(34), chr(39))}]</answer>": [2],
    f"<answer>[{ONE.replace('100,200,300,400', '300,400,100,200')}]</answer>": [2],  # corners
    "<answer>[[100,200,300,400]]</answer>": None,
    f'<answer>[{ONE[:-1]},"label":"ship"}}]</answer>': [2],  # a further key
    f"<answer>[{','.join([ONE] * 65)}]</answer>": [2] * 64,
    f"<think>So.</think>[{ONE}]": [2],
    f"<think>Not {TWO}, that is a road.</think>[{ONE}]": [2],
    f"<think>Not {TWO}, that is a road.</think>[]": [],
    f"<think>Not {TWO}, that is": None,  # never came to an answer
    "<answer>[]": [],
    "```json\n[]\n```": [],
    "There is none.": None,
    "": None,
    "<answer>[1,0,1]</answer>": None,
    '<answer>[{"bbox_2d":[1,2,3],"positive_points":[[1,2],[3,4]]}]</answer>': None,
    '<answer>[{"bbox_2d":[nan,2,3,4],"positive_points":[[1,2],[3,4]]}]</answer>': None,
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_repair_is_told_from_an_answer_that_stands_and_is_no_valid_json(text):
    found, repaired = data.find_instances(text)
    assert data.parse_instances(text) is None and grpo.json_reward(text) == 0
    assert repaired == (found is not None)
    assert (found and [len(one.points) for one in found]) == BROKEN[text]
    if found:
        assert found[0].box == (100, 200, 300, 400)


def test_an_answer_that_stands_is_not_repaired():
    spaced = f"<answer> [ {ONE} ] </answer>"
    for text, count in ((BOTH, 2), ("<answer>[]</answer>", 0), (spaced, 1)):
        found, repaired = data.find_instances(text)
        assert len(found) == count and not repaired and grpo.json_reward(text) == 1


def test_a_repair_gives_each_box_its_own_points_in_either_order():
    turned = [
        f'{{"positive_points":[[{i},1],[{i},2]],"bbox_2d":[{i},0,{i + 9},9]}}' for i in (10, 20, 30)
    ]
    for text in (f"<answer>[{','.join(turned)},]</answer>", f"<answer>{''.join(turned)}"):
        found, repaired = data.find_instances(text)
        assert repaired and [box[0] for box, _ in found] == [10, 20, 30]
        assert all(points == [(box[0], 1), (box[0], 2)] for box, points in found)
    (first, second), repaired = data.find_instances(f"<answer>[{ONE[:-1]},{TWO}]</answer>")
    assert repaired and first.points == [(150, 250), (200, 300)] and len(second.points) == 2


def test_mutated_answers_never_raise_and_give_sound_boxes():
    rng, read = random.Random(3), 0
    pieces = ["[", "]", "{", '"', ",", "9e9", "-", "bbox_2d", "null", "<answer>"]
    for _ in range(5000):
        text = BOTH
        for _ in range(rng.randint(1, 5)):
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice(pieces) + text[at + rng.choice([0, 1, 20]) :]
        found, repaired = data.find_instances(text)
        for (x1, y1, x2, y2), points in found or ():
            assert x1 < x2 and y1 < y2 and np.isfinite(points).all()
        assert repaired == (found is not None and data.parse_instances(text) is None)
        read += found is not None
    assert read > 1000


@pytest.mark.parametrize(
    "text",
    [
        "<answer>[" + f"{ONE}," * 14_000 + f"{ONE}]</answer>",
        "bbox_2d" * 140_000,
        "bbox_2d[" * 125_000,
        f"{ONE[:20]}" + "[1,1]" * 200_000,
        "<answer>[" + "[" * 10**6,
        "bbox_2d" + "-" * 10**6 + "[1,2,3,4]",
        "[" + " " * 10**6 + "]",
    ],
)
def test_a_megabyte_is_read_in_50_milliseconds(text):
    assert fastest(data.find_instances, text) < 0.05


def test_an_instance_said_twice_counts_once():
    near = data.Instance((105, 200, 300, 400), [])
    one, two = data.parse_instances(BOTH)
    assert data.merge_duplicates([one, near, two, one]) == [one, two]
    assert data.merge_duplicates([]) == []
    beside = lambda x: data.Instance((x, 0, x + 100, 100), [])  # IoU (100 - x) / (100 + x) with 0
    assert data.merge_duplicates([beside(0), beside(30)]) == [beside(0)]  # 0.54
    assert len(data.merge_duplicates([beside(0), beside(40)])) == 2  # 0.43
    # the second is like the third, but is not there any more
    assert data.merge_duplicates([beside(0), beside(30), beside(60)]) == [beside(0), beside(60)]


def test_what_reward_and_evaluation_see_is_in_the_image_and_said_once():
    over = ONE.replace("100,200,300,400", "-50,200,300,1200")
    outside = TWO.replace("500,500,700,800", "1000,500,1200,800")
    text = f"<answer>[{over},{outside},{over}]</answer>"
    found, repaired = data.instances_px(text, (1000, 1000), (200, 100))
    assert not repaired and [box.tolist() for box, _ in found] == [[0, 20, 60, 100]]
    assert found[0][1].tolist() == [[30, 25], [40, 30]]
    read = lambda text: data.instances_px(text, (1000, 1000), (200, 100))
    assert read("?") == (None, False) and read("<answer>[]</answer>") == ([], False)
    # something that lies outside is not to say that there is nothing
    assert read(f"<answer>[{outside}]</answer>") == (None, False)


# ------------------------------------------------------------------------- rewards


def question_of(scene, objects, task="sam", **more):
    """The question whose answer is these objects of the scene."""
    image, _ = scene
    mask = np.any([np.zeros((128, 128), bool), *(o.mask for o in objects)], axis=0)
    frame = (1280, 1280)
    to_frame = lambda coords: data.rescale(coords, image.size, frame)
    found = [(to_frame(box), to_frame(points)) for box, points in data.true_instances(mask)]
    answer = data.sam_answer(found, "So.")
    return data.Question(image, "", answer, task, mask, frame, **more)


def test_the_mask_reward_is_the_iou_of_what_sam_makes_of_the_answer(scene, segmenter):
    image, objects = scene
    question = question_of(scene, objects[:2])
    texts = [question.answer, data.sam_answer([], "None."), "I see.", question.answer[:-12]]
    right, nothing, unreadable, cut = grpo.mask_reward(texts, question, segmenter)
    segmenter.set_image(image)
    masks = [
        segmenter.segment([(box, points, np.ones(2))])[0][0]
        for box, points in data.true_instances(question.mask)
    ]
    assert right == pytest.approx(data.mask_iou(masks[0] | masks[1], question.mask)[2], abs=1e-3)
    assert right > 0.6 and nothing == unreadable == 0 < cut
    twice = question.answer.replace("[{", "[" + question.answer.partition("[")[2][:-10] + ",{", 1)
    assert len(data.parse_instances(twice)) == 4  # each is said twice, and merged
    assert grpo.mask_reward([twice], question, segmenter) == [pytest.approx(right, abs=1e-3)]


def test_where_there_is_nothing_to_find_only_an_empty_list_is_right(scene):
    question = question_of(scene, [])
    ship = question_of(scene, scene[1][:1]).answer
    texts = [question.answer, ship, "I see nothing.", "```json\n[]\n```"]
    # SAM is not asked: it makes empty masks of some boxes
    assert grpo.mask_reward(texts, question, None) == [1, 0, 0, 1]
    assert [grpo.instance_reward(text, question) for text in texts] == [1, 0, 0, 1]
    assert [grpo.on_target_reward(text, question) for text in texts] == [1, 0, 0, 1]


def test_box_and_point_rewards_of_instances(scene):
    question = question_of(scene, scene[1][:2])
    first, second = data.parse_instances(question.answer)
    assert grpo.instance_reward(question.answer, question) == 1
    assert grpo.instance_reward(data.sam_answer([first], ""), question) == 0.5
    assert grpo.instance_reward(data.sam_answer([first, first, second, second], ""), question) == 1
    assert grpo.instance_reward("", question) == grpo.on_target_reward("", question) == 0
    assert grpo.on_target_reward(question.answer, question) == 1
    off = data.sam_answer([(first.box, [first.points[0], (1, 1)]), second], "")
    assert grpo.on_target_reward(off, question) == 0.75
    assert grpo.on_target_reward("<answer>[]</answer>", question) == 0
    # neither leaving one out nor saying the sure one again pays
    assert grpo.on_target_reward(data.sam_answer([first], ""), question) == 0.5
    wrong = second._replace(points=[(1, 1), (1, 1)])
    assert grpo.on_target_reward(data.sam_answer([first] * 9 + [wrong], ""), question) == 0.5
    more = first._replace(box=(0, 0, 9, 9), points=[(1, 1), (1, 1)])
    assert grpo.on_target_reward(data.sam_answer([first, second, more], ""), question) == 4 / 6


def test_rewards_know_width_from_height():
    mask = np.zeros((60, 200), dtype=bool)
    mask[10:30, 120:180] = True
    image = Image.new("RGB", (200, 60))
    answer = data.sam_answer([((1200, 100, 1800, 300), [(1300, 150), (1600, 240)])], "")
    question = data.Question(image, "", answer, "sam", mask, (2000, 600))
    assert grpo.on_target_reward(answer, question) == grpo.instance_reward(answer, question) == 1
    ((box, points, _),) = grpo.sam_prompts(answer, question)
    assert box.tolist() == [120, 10, 180, 30] and points.tolist() == [[130, 15], [160, 24]]


def test_the_truth_is_right_where_its_boxes_overlap():
    """Two bars side by side along the diagonal, whose boxes have an IoU of 0.66."""
    rows, columns = np.mgrid[:128, :128]
    mask = (abs(rows - columns) < 5) | (abs(rows - columns + 16) < 5)
    mask &= (rows + columns > 40) & (rows + columns < 216)
    (one, _), (two, _) = data.true_instances(mask)
    assert data.box_iou(one, two) > 0.5
    question = question_of((Image.new("RGB", (128, 128)), []), [SimpleNamespace(mask=mask)])
    assert grpo.instance_reward(question.answer, question) == 1
    assert grpo.on_target_reward(question.answer, question) == 1
    found, _ = data.instances_px(question.answer, question.frame, (128, 128))
    boxes = np.array([box for box, _ in found])
    assert evaluation.box_score(boxes, evaluation.true_boxes(mask, "sam")) > 0.98


def test_boxes_and_labels_are_rewarded_by_their_masks_too(scene, segmenter):
    target = scene[1][0]
    box = data.mask_to_box(target.mask)
    points = sampler.grid_points(box, 128, 128)
    labels = sampler.label_points(points, target.mask)
    by_box = question_of(scene, [target], "box")
    by_points = question_of(scene, [target], "point", box_px=box, points_px=points)
    reward = lambda text, question: grpo.mask_reward([text], question, segmenter)[0]
    assert reward(data.box_answer(10 * box), by_box) > 0.6
    assert reward(data.box_answer([0, 0, 30, 30]), by_box) < 0.1 and reward("", by_box) == 0
    # of several boxes, SAM's masks are united
    both = question_of(scene, scene[1][:2], "box")
    boxes = [(10 * data.mask_to_box(o.mask)).tolist() for o in scene[1][:2]]
    united = reward(f"<answer>{boxes}</answer>", both)
    assert united > max(reward(data.box_answer(box), both) for box in boxes) + 0.1
    for given in (labels, 1 - labels):
        segmenter.set_image(scene[0])
        mask = segmenter.segment([(box, points, given)])[0][0]
        expected = data.mask_iou(mask, target.mask)[2]
        assert reward(data.point_answer(given), by_points) == pytest.approx(expected)
    assert reward(data.point_answer(labels[1:]), by_points) == 0


def test_sam_runs_once_for_a_group(scene, monkeypatch):
    segmenter, calls = sampler.Segmenter(), []
    model = segmenter.predictor.model
    for part in ("image_encoder", "mask_decoder"):
        getattr(model, part).register_forward_hook(lambda module, *_: calls.append(type(module)))
    question = question_of(scene, scene[1][:3])
    grpo.mask_reward([question.answer] * 8, question, segmenter)
    assert len(calls) == 2 and len(set(calls)) == 2


@pytest.mark.parametrize("part", ["transformer", "output_upscaling", "output_hypernetworks_mlps"])
def test_a_sam_that_fails_is_an_error_and_not_a_zero(scene, part):
    segmenter, question = sampler.Segmenter(), question_of(scene, scene[1][:1])
    with torch.no_grad():
        for weight in getattr(segmenter.predictor.model.mask_decoder, part).parameters():
            weight.fill_(float("nan"))
    with pytest.raises(sampler.InputError, match="nan"):
        grpo.mask_reward([question.answer], question, segmenter)


def test_each_image_is_judged_by_its_own_embedding(scene, segmenter):
    questions = [question_of(scene, scene[1][:1])]
    turned = scene[0].transpose(Image.FLIP_LEFT_RIGHT), scene[1]
    mirror = lambda mask: mask[:, ::-1]
    questions.append(question_of(turned, [replace(o, mask=mirror(o.mask)) for o in scene[1][:1]]))
    alone = [grpo.mask_reward([q.answer], q, sampler.Segmenter()) for q in questions]
    assert [grpo.mask_reward([q.answer], q, segmenter) for q in questions] == alone
    assert min(alone)[0] > 0.6


def test_what_sam_is_asked_are_points_on_the_target(scene):
    question = question_of(scene, scene[1][:2])
    for box, points, labels in grpo.sam_prompts(question.answer, question):
        assert labels.tolist() == [1, 1] and (points > box[:2]).all()


def test_more_prompts_than_fit_in_one_call_are_answered_in_their_order(scene, segmenter):
    rng, prompts = np.random.default_rng(0), []
    for i in range(70):  # 64 are decoded at once
        x, y = rng.integers(0, 90, 2)
        points = rng.uniform([x, y], [x + 30, y + 30], (int(i % 30 == 7), 2))
        prompts.append(([x, y, x + 30, y + 30], points, np.ones(len(points))))
    segmenter.set_image(scene[0])
    together = segmenter.segment(prompts)
    for prompt, (mask, score) in zip(prompts, together):
        ((alone, its_score),) = segmenter.segment([prompt])
        assert (mask != alone).mean() < 1e-3 and score == pytest.approx(its_score, abs=1e-4)
    union, score = segmenter.segment_union(prompts[:3])
    assert score == pytest.approx(np.mean([score for _, score in together[:3]]), abs=1e-4)
    assert (union != np.any([mask for mask, _ in together[:3]], axis=0)).mean() < 1e-3


def test_a_roll_out_counts_repairs_and_weighs_the_rewards(tiny, scene, segmenter, monkeypatch):
    model, processor = tiny
    question = question_of(scene, scene[1][:1])._replace(prompt=data.sam_prompt("the ship"))
    texts = [question.answer, question.answer.replace("]}]", "]}"), "I see none."]
    end = processor.tokenizer.eos_token_id
    rows = [processor.tokenizer(text)["input_ids"] + [end] for text in texts]
    ids = torch.tensor([row + [end] * (max(map(len, rows)) - len(row)) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(ids.shape[1])] for row in rows])
    monkeypatch.setattr(sampler, "sample_group", lambda *_: (ids, mask, torch.zeros(ids.shape)))
    args = grpo.get_args("--prompts sam --reward mask --group 3".split())
    sums = dict.fromkeys(grpo.SUMS, 0.0)
    grpo.roll_out(model, processor, segmenter, [question], args, sums)
    right = grpo.mask_reward(texts, question, segmenter)
    assert right[0] == pytest.approx(right[1]) and right[0] > 0.6 and right[2] == 0
    assert (sums["repaired"], sums["json"], sums["format"], sums["json_completions"]) == (
        1,
        1,
        2,
        3,
    )
    assert sums["reward"] == pytest.approx(2 * sum(right) + 1 + 2)


def test_each_reward_weighs_as_told_and_counts_only_where_it_applies(scene, segmenter):
    question = question_of(scene, scene[1][:1])
    args = SimpleNamespace(reward=["mask"])
    rewards = grpo.reward_group([question.answer, "no"], question, args, segmenter)
    assert list(rewards) == ["mask", "json", "format"]
    assert rewards["json"].tolist() == rewards["format"].tolist() == [1, 0]
    args.reward = ["box", "point"]
    assert list(grpo.reward_group([""], question, args, None)) == ["box", "point", "json", "format"]
    boxes = question._replace(task="box", answer="<answer>[1,2,3,4]</answer>")
    assert list(grpo.reward_group([""], boxes, args, None)) == ["box", "format"]


@pytest.mark.parametrize(
    "script, options, message",
    [
        (grpo, "--reward box,area", "expected some of box,point,mask"),
        (grpo, "--mask_weight nan", "--mask_weight nan: expected 0 to 1e+06"),
        (grpo, "--json_weight -1", "--json_weight -1.0: expected 0"),
        (grpo, "--reward mask --mask_weight 0", "--reward mask: all of its weights are 0"),
        (evaluation, "--prompts sam --temperature 1 --best_of 2", "an empty list"),
        (evaluation, "--theta 1.5", "--theta 1.5: expected a probability"),
    ],
)
def test_settings_that_make_no_sense_end_in_one_line(script, options, message, capsys):
    with pytest.raises(SystemExit):
        script.get_args(options.split())
    assert message in capsys.readouterr().err


def test_only_tasks_that_have_a_reward_are_asked():
    ratio = lambda options: grpo.get_args(options.split()).point_ratio
    assert ratio("") == ratio("--reward mask") == ratio("--reward mask,box") == 0.2
    assert ratio("--reward box") == 0 and ratio("--reward point") == 1
    assert ratio("--reward box --point_ratio 0.5") == 0.5  # who says so gets it
    order = lambda reward: grpo.get_args(["--reward", reward]).reward
    assert order("point, box") == order("box,point,box") == ["box", "point"]


def test_lists_of_real_sets_have_room_for_many_instances():
    room = lambda script, options: script.get_args(options.split()).max_new_tokens
    assert room(grpo, "--option RRSISD") == room(evaluation, "") == 256
    assert room(grpo, "--option RRSISD --prompts sam") == room(evaluation, "--prompts sam") == 1024
    assert room(grpo, "--prompts sam") == 112 and room(grpo, "--max_new_tokens 9") == 9


def test_a_run_goes_on_with_the_same_sam_wherever_it_lies(tiny, tmp_path):
    there = tmp_path / "sam.pth"
    there.write_bytes(Path(sampler.TINY_SAM).read_bytes())
    settings = lambda path, reward: sft.settings_of(
        grpo.get_args(["--reward", reward, "--sam_ckpt", str(path)]), *tiny, []
    )
    moved = {reward: settings(there, reward) for reward in ("mask", "box")}
    assert all(moved[reward] == settings(sampler.TINY_SAM, reward) for reward in moved)
    there.write_bytes(there.read_bytes()[:-1])
    assert settings(there, "box") == moved["box"] and settings(there, "mask") != moved["mask"]


# ------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def reason_set(tmp_path_factory):
    """--data_root of a demo_reason with a handful of images."""
    from assets.make_demo import make_demo_reason

    root = tmp_path_factory.mktemp("reason")
    make_demo_reason(root, counts={"train": 12, "val": 4, "test": 12})
    return root


def test_only_instances_can_be_asked_for_what_is_not_there(reason_set):
    args = SimpleNamespace(option="demo_reason", data_root=reason_set, split="train", val_limit=0)
    args.skip_bad, args.prompts = False, "sam"
    everything, _ = data.load_for_training(args, 0)
    args.prompts = "points"
    there, _ = data.load_for_training(args, 0)
    assert len(everything) == 12 and there == [s for s in everything if s.mask.any()] != everything


def test_a_question_and_its_reason_are_drawn_anew_in_every_pass(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rle = data.encode_rle(np.eye(8, dtype=bool))
    words = (["first?", "second?"], "object", "1", "train", rle, (8, 8))
    sample = data.Sample(tmp_path / "a.png", *words, reasons=["one", "two"])
    args = SimpleNamespace(prompts="sam", seed=0, jitter=0, think_ratio=0, miss_ratio=0)
    questions, seen = data.Questions([sample], lambda *_: (1000, 1000), args), set()
    for passes in range(20):
        question = questions[passes, 0, "box"]
        assert data.THINK in question.prompt
        seen.add((question.prompt.split()[1], question.answer[7:10]))
    assert seen == {("first?", "one"), ("second?", "two")}
    sample.phrases.append("third?")  # of more questions than reasons, those come again
    assert data.reasoning(sample, 2, sample.mask) == "one"
    other = replace(sample, reasons=["three"])
    assert evaluation.digest([other]) != evaluation.digest([sample])
    assert (
        data.reasoning(replace(sample, reasons=[]), 0, np.zeros((8, 8), bool)) == "There is none."
    )


def an_object(name, x, y, color="red"):
    return make_demo.SceneObject(name, color, np.array([x, y]), 20, 0)


def test_a_service_is_the_one_that_is_clearly_next_to_what_it_serves():
    rng, pair = np.random.default_rng(0), ("ship", "building")
    near, far = an_object("building", 40, 20), an_object("building", 100, 100)
    ship = an_object("ship", 20, 20)
    for objects in ([near, far, ship], [far, ship, near]):
        questions, reason, targets = make_demo.ask_service(objects, pair)
        assert targets == [near] and reason == "building next to the ship: 1."
    beside = an_object("building", 20, 42)
    assert make_demo.ask_service([near, beside, ship], pair) is None
    assert make_demo.ask_service([near, far], pair) is None  # no ship
    assert make_demo.ask_service([ship], pair)[1:] == ("building next to the ship: 0.", [])
    colours = {"red": 0, "blue": 0}
    for _ in range(200):
        ships = [an_object("ship", 20, 20, "red"), an_object("ship", 90, 90, "blue")]
        questions, reason, targets = make_demo.ask_use(rng, ships)
        if reason.endswith(" ship: 1."):
            (target,) = targets
            colours[target.color] += 1
            assert (
                reason == f"{target.color} ship: 1." and f"The {target.color} ones." in questions[0]
            )
        else:
            assert targets in ([], ships)
    assert min(colours.values()) > 5


def test_training_shows_the_data_sets_own_reasoning(reason_set):
    samples = data.load_samples("demo_reason", reason_set, "train")
    args = SimpleNamespace(prompts="sam", seed=0, think_ratio=0, miss_ratio=0, jitter=0)
    questions = data.Questions(samples, lambda w, h: (1000, 1000), args)
    for index, sample in enumerate(samples):
        question = questions[0, index, "box"]
        assert question.answer.startswith(f"<think>{sample.reasons[0]}</think>")
        assert question.prompt.splitlines()[0][8:] in sample.phrases
        truth, found = data.true_instances(sample.mask), data.parse_instances(question.answer)
        assert len(truth) == len(found) == int(sample.reasons[0][-2])
        for (box, points), instance in zip(truth, found):
            near = lambda a, b: np.abs(np.array(a) - np.multiply(b, 0.128)).max() < 0.1
            assert near(box, instance.box) and near(points, instance.points)


def test_both_stages_and_the_evaluation_run_on_it(reason_set, run, tmp_path):
    common = f"--data_root {reason_set} --option demo_reason --prompts sam"
    short = "--lora_rank 4 --accumulate 1 --batch_size 4 --lr 1e-3"
    printed = run(f"sft.py {common} {short} --max_step 2 --val_limit 2")
    assert "val, think" in printed and "val, no think" not in printed
    train = f"grpo.py {common} {short} --max_step 1 --max_new_tokens 60 --group 4 --val_limit 0"
    run(f"{train} --reward mask,box --mask_weight 3")
    (line,) = map(json.loads, open(tmp_path / "runs/grpo/train.jsonl"))
    parts = {name: line[f"reward_{name}"] for name in ("mask", "box", "json", "format")}
    weights = {"mask": 3, "box": 1, "json": 1, "format": 1}
    assert line["reward"] == pytest.approx(sum(weights[k] * v for k, v in parts.items()), abs=1e-5)
    assert line["reward_point"] is None and line["repaired"] is not None
    printed = run(f"eval.py {common} --oracle points --save_img")
    metrics = json.loads((tmp_path / "runs/eval/metrics.json").read_text())
    rows = lambda: evaluation.read_rows(tmp_path / "runs/eval/predictions.jsonl")
    empty = sum(not s.mask.any() for s in data.load_samples("demo_reason", reason_set, "test")) * 2
    assert metrics["n_no_target"] == empty > 0 and metrics["no_target_acc"] == 1
    assert sum(m["n"] for m in metrics["by_scale"].values()) == metrics["n"] - empty
    assert metrics["giou"] == metrics["miou"] > 0.7 and metrics["box_iou"] == 1
    assert f"{empty} phrases without a target, 1.000 of them left unmarked" in printed
    assert printed.count("    none\n") == 1 and not any(row["repaired"] for row in rows())
    assert all(len(row["points_px"]) == 2 * len(row["box_px"]) for row in rows())
    areas = [row["union"] for row in rows()]
    run(f"eval.py {common} --oracle points --points none --version_name boxes")
    boxes = evaluation.read_rows(tmp_path / "runs/boxes/predictions.jsonl")
    assert not any(row["points_px"] for row in boxes)
    assert [row["box_px"] for row in boxes] == [row["box_px"] for row in rows()]
    printed = run(f"eval.py {common} --oracle points --size 480")
    assert "size 480 x 480" in printed and "answers of another run" in printed
    for area, row in zip(areas, rows()):
        assert row["union"] == pytest.approx(area * (480 / 128) ** 2, rel=0.05)
    # cut off before an answer: unreadable, also where there is nothing to find
    run(f"eval.py {common} --eval_model_path {ROOT / 'assets' / 'tiny_vlm'} --max_new_tokens 4")
    metrics = json.loads((tmp_path / "runs/eval/metrics.json").read_text())
    assert metrics["n_failed"] == metrics["n"] and metrics["n_no_target"] > 0
    assert metrics["n_repaired"] == 0
    names = ("no_target_acc", "miou", "box_iou", "point_acc")
    assert [metrics[name] for name in names] == [0, 0, 0, 0]


def test_validation_asks_and_scores_as_training_does(reason_set, tiny, monkeypatch):
    samples = data.load_samples("demo_reason", reason_set, "train")
    seen = []

    def right(model, processor, images, phrases, truths, args):
        seen.append((args.prompts, args.use_think))
        return evaluation.predict_instances(None, None, images, phrases, truths, oracle)

    oracle = evaluation.get_args("--prompts sam --oracle points".split())
    monkeypatch.setattr(evaluation, "predict", right)
    args = SimpleNamespace(val_batch_size=5, val_limit=99, prompts="sam")
    scores = evaluation.validate_both(*tiny, samples, args)
    assert set(seen) == {("sam", True)} and len(seen) == 3
    assert scores == {"think": {"box_iou": 1, "point_acc": 1}}


def test_a_model_that_was_trained_on_other_prompts_is_named(tmp_path, capsys):
    said = lambda prompts: evaluation.note_prompts(tmp_path, prompts) or capsys.readouterr().out
    assert said("sam") == ""  # nothing is known of it
    for content in ("{", "[]", "{}"):
        (tmp_path / "args.json").write_text(content)
        assert said("sam") == ""
    (tmp_path / "args.json").write_text(json.dumps({"prompts": "points"}))
    assert said("points") == ""
    assert said("sam") == f"NOTE: {tmp_path} was trained with --prompts points, not sam\n"


def test_answers_to_other_prompts_are_told_apart():
    state = lambda *options: evaluation.protocol_of(evaluation.get_args(list(options)), "model")
    without = "--use_think", "--points", "none"
    assert state(*without) != state(*without, "--prompts", "sam")


def test_a_target_that_is_not_there_is_judged_by_its_iou():
    row = dict(inter=0, failed=False, box_iou=0, point_acc=None)
    rows = [
        {**row, "no_target": True, "union": 0, "iou": 1.0, "repaired": True},
        {**row, "no_target": True, "union": 30, "iou": 0.0},  # something where there is nothing
        {**row, "no_target": False, "inter": 20, "union": 40, "iou": 0.5},
    ]
    metrics = evaluation.summarize(rows)
    assert metrics["giou"] == 0.5 and metrics["ciou"] == 20 / 70
    assert metrics["no_target_acc"] == 0.5 and metrics["miou_target"] == 0.5
    assert evaluation.summarize(rows[2:])["no_target_acc"] is None
    assert metrics["n_repaired"] == 1


def test_other_papers_sizes_resize_both_masks():
    truth, guess = np.zeros((40, 80), dtype=bool), np.zeros((40, 80), dtype=bool)
    truth[:20], guess[:, :40] = True, True
    assert evaluation.compare(guess, truth, None) == (800, 2400, 1 / 3)
    inter, union, iou = evaluation.compare(guess, truth, 480)
    assert (inter, union) == (240 * 240, 480 * 480 * 3 // 4) and iou == pytest.approx(1 / 3)
    speck = np.zeros((4000, 4000), dtype=bool)
    nothing, speck[2, 2] = speck.copy(), True  # it is gone at that size
    assert evaluation.compare(nothing, speck, 480) == (0, 0, 0.0)
    assert evaluation.compare(nothing, nothing, 480) == (0, 0, 1.0)
