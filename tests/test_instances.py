"""--prompts sam: several instances or none, and SAM in the loop of the mask reward."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, fastest
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
        parts = data.connected_components(mask, min_share=0)
        assert [p.tobytes() for p in parts] == [p.tobytes() for p in flood(mask)]
        several += len(parts) > 3
    assert several > 50


def test_crumbs_are_left_out_but_never_everything():
    areas = lambda *args: [part.sum() for part in data.connected_components(*args)]
    mask = np.zeros((100, 100), dtype=bool)
    mask[:40, :40] = mask[60:70, 60:70] = mask[90, 90] = True
    assert areas(mask) == [1600, 100]
    mask[:40, 50:90], mask[60:63, 60:70] = True, False  # 70: under 1 % of the whole, not of a part
    mask[75:77, :14] = True  # 28
    assert areas(mask) == [1600, 1600, 70]
    mask[80:84, :8] = True  # 32
    assert len(areas(mask)) == len(areas(mask, 0.02)) == 3
    dots = np.zeros((100, 100), dtype=bool)
    dots[::4, ::4] = True  # each is 0.16 % of the whole
    assert len(areas(dots)) == 625 and not areas(np.zeros((3, 3), dtype=bool))


def test_the_points_of_an_instance_lie_deep_in_it_and_apart():
    rng = np.random.default_rng(1)
    for _ in range(100):
        mask = rng.random(rng.integers(1, 200, 2)) < rng.random() * 0.5
        if mask.any():
            points = data.interior_points(mask)
            # Qwen2.5-VL writes pixels: NOTE in interior_points
            written = json.loads(data.coords_text(points, (1000, 1000)))
            assert sampler.label_points([*points, *written], mask).all()
    bar = np.zeros((60, 300), dtype=bool)
    bar[20:41, 50:251] = True
    (x1, y1), (x2, y2) = data.interior_points(bar)
    assert abs(x1 - x2) > 150 and 24 < min(y1, y2) <= max(y1, y2) < 37
    bar[5:56, 80:131] = True  # a bulge: the deepest pixel is its centre
    assert (np.abs(data.interior_points(bar)[0] - (105, 30)) < (15, 3)).all()
    # every fifth column and row of a large mask would miss this
    thin = np.roll(np.eye(300, dtype=bool), 1, axis=1)
    assert sampler.label_points(data.interior_points(thin), thin).all()


def test_an_answer_holds_the_largest_instances():
    grid = np.zeros((90, 90), dtype=bool)
    for i in range(81):
        y, x = np.multiply(divmod(i, 9), 10)
        grid[y : y + 5 + i % 3, x : x + 5] = True
    found = data.true_instances(grid)
    assert len(found) == len(data.parse_instances(data.sam_answer(found, "Many."))) == 64
    heights = [box[3] - box[1] for box, _ in found]
    assert heights.count(7) == heights.count(6) == 27  # and ten of 5


# ------------------------------------------------------------------------- answers


def test_what_training_teaches_is_read_back():
    text = data.sam_answer([((1, 2, 50.4, 40), [(5, 6), (7, 8)])], "A ship.")
    assert data.parse_instances(text) == [((1, 2, 50, 40), [(5, 6), (7, 8)])]
    for text, count in (BOTH, 2), ("<answer>[]</answer>", 0), (f"<answer> [ {ONE}]</answer>", 1):
        answer = data.read_answer(text, "sam")
        assert answer.is_readable and not answer.is_repaired and len(answer.boxes) == count


BROKEN = {  # text -> numbers of points of the boxes that can still be made out, or None
    BOTH.replace("<answer>", "").replace("</answer>", ""): [2, 2],
    BOTH[:-20]: [2, 1],  # cut off in the middle of a point
    f"```json\n[{ONE}]\n```": [2],
    f"<answer>{ONE}</answer>": [2],  # not a list
    f"<answer>[{ONE},]</answer>": [2],
    f"<answer>[{ONE[:-1]},{TWO}]</answer>": [2, 2],
    f"<answer>[{ONE.replace(',[200,300]', '')}]</answer>": [1],
    f"<answer>[{ONE.replace(',[200,300]', ',[200,300],[1,1]')}]</answer>": [3],
    f'<answer>[{ONE[:-1]},"label":"ship"}}]</answer>': [2],  # a further key
    f"<answer>[{','.join([ONE] * 65)}]</answer>": [2] * 64,
    f"<think>Not {TWO}, that is a road.</think>[{ONE}]": [2],
    f"<think>Not {TWO}, that is a road.</think>[]": [],
    f"<think>Not {TWO}, that is": None,  # never came to an answer
    "<answer>[]": [],
    "There is none.": None,
    "<answer>[[100,200,300,400]]</answer>": None,
    f"<answer>[{ONE.replace('100,200,300,400', '300,400,100,200')}]</answer>": None,  # corners
    '<answer>[{"bbox_2d":[nan,2,3,4],"positive_points":[[1,2],[3,4]]}]</answer>': None,
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_repair_is_told_from_an_answer_that_stands(text):
    found, answer = data.repair_instances(text), data.read_answer(text, "sam")
    assert data.parse_instances(text) is None
    assert answer.is_readable == answer.is_repaired == (found is not None)
    assert (found and [len(one.points) for one in found]) == BROKEN[text]
    if found:
        assert found[0].box == (100, 200, 300, 400)


def test_a_repair_gives_no_box_the_points_of_another():
    turned = '{{"positive_points":[[{0},1],[{0},2]],"bbox_2d":[{0},0,{1},9]}}'
    text = ",".join(turned.format(i, i + 9) for i in (10, 20, 30))
    assert data.repair_instances(text) == [((i, 0, i + 9, 9), []) for i in (10, 20, 30)]


def test_mutated_answers_never_raise_and_give_sound_boxes():
    rng, read = random.Random(3), 0
    pieces = ["[", "]", "{", '"', ",", "9e9", "-", "bbox_2d", "null", "<answer>"]
    for _ in range(5000):
        text = BOTH
        for _ in range(rng.randint(1, 5)):
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice(pieces) + text[at + rng.choice([0, 1, 20]) :]
        answer, stands = data.read_answer(text, "sam"), data.parse_instances(text) is not None
        assert answer.is_readable == (stands + answer.is_repaired)
        assert all(x1 < x2 and y1 < y2 for x1, y1, x2, y2 in answer.boxes)
        assert all(np.isfinite(points).all() for points in answer.points)
        read += answer.is_readable
    assert read > 1000


def test_a_megabyte_is_read_in_50_milliseconds():
    texts = ["<answer>[" + f"{ONE}," * 14_000 + f"{ONE}]</answer>", "<answer>[" + "[" * 10**6]
    texts += [f"{ONE[:20]}" + "[1,1]" * 200_000, "bbox_2d" + "-" * 10**6, "bbox_2d[" * 125_000]
    for text in texts:
        assert fastest(data.read_answer, text, "sam") < 0.05


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
    read = lambda body: data.read_answer(f"<answer>[{body}]</answer>", "sam")
    to_pixels = lambda body: read(body).to_pixels((1000, 1000), (200, 100))
    over = ONE.replace("100,200,300,400", "-50,200,300,1200")
    outside = TWO.replace("500,500,700,800", "1000,500,1200,800")
    answer = to_pixels(f"{over},{outside},{over}")
    assert answer.boxes.tolist() == [[0, 20, 60, 100]] and not answer.is_repaired
    assert [points.tolist() for points in answer.points] == [[[30, 25], [40, 30]]]
    assert to_pixels("").is_readable and not to_pixels("?").is_readable
    # something that lies outside is not to say that there is nothing
    assert not to_pixels(outside).is_readable and not len(to_pixels(outside).boxes)


# ------------------------------------------------------------------------- rewards


def prompt_of(image, masks, task="sam", **more):
    """The prompt whose answer is what these masks show."""
    mask, frame = np.any([np.zeros((128, 128), bool), *masks], axis=0), (1280, 1280)
    found = [(box * 10, points * 10) for box, points in data.true_instances(mask)]
    return data.Prompt(image, "", data.sam_answer(found, "So."), task, mask, frame, **more)


def rewards_of(text, prompt):
    rewards = grpo.reward_group([text], prompt, SimpleNamespace(reward=["box", "point"]), None)
    return rewards["box"].item(), pytest.approx(rewards["point"].item())


@pytest.fixture
def masks(scene):
    return [o.mask for o in scene[1]]


def test_the_mask_reward_is_the_iou_of_what_sam_makes_of_the_answer(scene, masks, segmenter):
    prompt = prompt_of(scene[0], masks[:2])
    texts = [prompt.answer, data.sam_answer([], "None."), "I see.", prompt.answer[:-12]]
    answers = [data.read_answer(text, "sam") for text in texts]
    right, nothing, unreadable, cut = grpo.mask_reward(answers, prompt, segmenter)
    segmenter.set_image(scene[0])
    prompts = [(box, points, np.ones(2)) for box, points in data.true_instances(prompt.mask)]
    one, two = (segmenter.segment([p])[0][0] for p in prompts)
    assert right == pytest.approx(data.mask_iou(one | two, prompt.mask)[2], abs=1e-3)
    assert right > 0.6 and nothing == unreadable == 0 < cut


def test_where_there_is_nothing_to_find_only_an_empty_list_is_right(scene, masks):
    prompt, ship = prompt_of(scene[0], []), prompt_of(scene[0], masks[:1]).answer
    for text, reward in (prompt.answer, 1), (ship, 0), ("None.", 0), ("```json\n[]\n```", 1):
        assert rewards_of(text, prompt) == (reward, reward)
        # SAM is not asked: it makes empty masks of some boxes
        assert grpo.mask_reward([data.read_answer(text, "sam")], prompt, None) == [reward]


def test_box_and_point_rewards_of_instances(scene, masks):
    prompt = prompt_of(scene[0], masks[:2])
    first, second = data.parse_instances(prompt.answer)
    wrong = second._replace(points=[(1, 1), (1, 1)])
    more = first._replace(box=(0, 0, 9, 9), points=[(1, 1), (1, 1)])
    for instances, box, point in (
        ([first, second], 1, 1),
        ([first], 0.5, 0.5),
        ([first, first, second, second], 1, 1),
        ([(first.box, [first.points[0], (1, 1)]), second], 1, 0.75),
        ([], 0, 0),
        # neither leaving one out nor saying the sure one again pays
        ([first] * 9 + [wrong], 1, 0.5),
        ([first, second, more], pytest.approx(2 / 3), 4 / 6),
    ):
        assert rewards_of(data.sam_answer(instances, ""), prompt) == (box, point)
    assert rewards_of("", prompt) == (0, 0)


def test_rewards_know_width_from_height():
    mask = np.zeros((60, 200), dtype=bool)
    mask[10:30, 120:180] = True
    text = data.sam_answer([((1200, 100, 1800, 300), [(1300, 150), (1600, 240)])], "")
    prompt = data.Prompt(Image.new("RGB", (200, 60)), "", text, "sam", mask, (2000, 600))
    assert rewards_of(text, prompt) == (1, 1)
    ((box, points, labels),) = grpo.sam_prompts(data.read_answer(text, "sam"), prompt)
    found = [box.tolist(), points.tolist(), labels.tolist()]
    assert found == [[120, 10, 180, 30], [[130, 15], [160, 24]], [1, 1]]


def test_the_truth_is_right_where_its_boxes_overlap():
    """Two bars side by side along the diagonal, whose boxes have an IoU of 0.66."""
    rows, columns = np.mgrid[:128, :128]
    mask = (abs(rows - columns) < 5) | (abs(rows - columns + 16) < 5)
    mask &= (rows + columns > 40) & (rows + columns < 216)
    (one, _), (two, _) = data.true_instances(mask)
    assert data.box_iou(one, two) > 0.5
    prompt = prompt_of(Image.new("RGB", (128, 128)), [mask])
    assert rewards_of(prompt.answer, prompt) == (1, 1)
    answer = data.read_answer(prompt.answer, "sam").to_pixels(prompt.frame, (128, 128))
    assert evaluation.box_score(answer.boxes, mask, "sam") > 0.98


def test_boxes_and_labels_are_rewarded_by_their_masks_too(scene, masks, segmenter):
    box, mask = data.mask_to_box(masks[0]), masks[0]
    points = sampler.grid_points(box, 128, 128)
    labels = sampler.label_points(points, mask)
    by_box = prompt_of(scene[0], [mask], "box")
    by_points = prompt_of(scene[0], [mask], "point", box_px=box, points_px=points)
    read = lambda text, prompt: data.read_answer(text, prompt.task)
    reward = lambda text, prompt: grpo.mask_reward([read(text, prompt)], prompt, segmenter)[0]
    assert reward(data.box_answer(10 * box), by_box) > 0.6
    assert reward(data.box_answer([0, 0, 30, 30]), by_box) < 0.1 and reward("", by_box) == 0
    for given in (labels, 1 - labels):
        segmenter.set_image(scene[0])
        ((found, _),) = segmenter.segment([(box, points, given)])
        iou = pytest.approx(data.mask_iou(found, mask)[2])
        assert reward(data.point_answer(given), by_points) == iou
    assert reward(data.point_answer(labels[1:]), by_points) == 0


def test_sam_runs_once_for_a_group_and_for_each_image_anew(scene, masks):
    segmenter, calls = sampler.Segmenter(), []
    for part in ("image_encoder", "mask_decoder"):
        model = getattr(segmenter.predictor.model, part)
        model.register_forward_hook(lambda module, *_: calls.append(type(module)))
    reward = lambda p, n, by: grpo.mask_reward([data.read_answer(p.answer, "sam")] * n, p, by)
    reward(prompt_of(scene[0], masks[:3]), 8, segmenter)
    assert len(calls) == 2 and len(set(calls)) == 2
    mirrored = scene[0].transpose(Image.FLIP_LEFT_RIGHT)
    prompts = prompt_of(scene[0], masks[:1]), prompt_of(mirrored, [masks[0][:, ::-1]])
    alone = [reward(prompt, 1, sampler.Segmenter()) for prompt in prompts]
    assert [reward(prompt, 1, segmenter) for prompt in prompts] == alone and min(alone)[0] > 0.6


@pytest.mark.parametrize("part", ["transformer", "output_upscaling"])
def test_a_sam_that_fails_is_an_error_and_not_a_zero(scene, masks, part):
    segmenter, prompt = sampler.Segmenter(), prompt_of(scene[0], masks[:1])
    for weight in getattr(segmenter.predictor.model.mask_decoder, part).parameters():
        weight.data.fill_(float("nan"))
    with pytest.raises(sampler.InputError, match="nan"):
        grpo.mask_reward([data.read_answer(prompt.answer, "sam")], prompt, segmenter)


def test_more_prompts_than_fit_in_one_call_are_answered_in_their_order(scene, segmenter):
    rng, prompts = np.random.default_rng(0), []
    for i in range(70):  # 64 are decoded at once
        x, y = rng.integers(0, 90, 2)
        points = rng.uniform([x, y], [x + 30, y + 30], (int(i % 30 == 7), 2))
        prompts.append(([x, y, x + 30, y + 30], points, np.ones(len(points))))
    segmenter.set_image(scene[0])
    for prompt, (mask, score) in zip(prompts, segmenter.segment(prompts), strict=True):
        ((alone, its_score),) = segmenter.segment([prompt])
        assert (mask != alone).mean() < 1e-3 and score == pytest.approx(its_score, abs=1e-4)


def test_rewards_are_weighed_and_averaged_and_repairs_are_counted(scene, masks, segmenter):
    prompt, averages = prompt_of(scene[0], masks[:1]), grpo.Averages()
    args = grpo.get_args("--prompts sam --reward mask --group 3".split())
    texts = [prompt.answer, prompt.answer.replace("]}]", "]}"), "I see none."]
    rollout = SimpleNamespace(texts=texts)
    total = grpo.reward_all(rollout, [prompt], args, segmenter, averages)[0].tolist()
    right = 3 / 2 * averages.mean("reward_mask")  # as the third has none
    assert right > 0.6 and total == pytest.approx([2 * right + 2, 2 * right + 1, 0], abs=1e-5)
    means = {"reward_json": 1 / 3, "reward_format": 2 / 3, "repaired": 1 / 3, "reward_box": None}
    means["reward"] = sum(total) / 3
    assert {name: averages.mean(name) for name in means} == pytest.approx(means)


# ------------------------------------------------------------------------- demo_reason


@pytest.fixture(scope="module")
def reason_set(tmp_path_factory):
    """--data_root of a demo_reason with a handful of images."""
    root = tmp_path_factory.mktemp("reason")
    make_demo.make_demo_reason(root, counts={"train": 12, "val": 4, "test": 12})
    return root


def sam_prompts_of(samples):
    args = SimpleNamespace(prompts="sam", seed=0, jitter=0, think_ratio=0, miss_ratio=0)
    return data.PromptDataset(samples, lambda *_: (1000, 1000), args)


def test_only_instances_can_be_asked_for_what_is_not_there(reason_set):
    args = SimpleNamespace(option="demo_reason", data_root=reason_set, split="train", val_limit=0)
    args.skip_bad, args.prompts = False, "sam"
    everything, _ = data.load_for_training(args)
    args.prompts = "points"
    there, _ = data.load_for_training(args)
    assert len(everything) == 12 and there == [s for s in everything if s.mask.any()] != everything


def test_a_question_and_its_reason_are_drawn_anew_in_every_pass(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    phrases, rle = ["first?", "second?"], data.encode_rle(np.eye(8, dtype=bool))
    fields = tmp_path / "a.png", phrases, "object", "1", "train", rle, (8, 8), ["one", "two"]
    sample = data.Sample(*fields)
    prompts = [sam_prompts_of([sample])[passes, 0, "box"] for passes in range(20)]
    seen = {(prompt.text.split()[1], prompt.answer[7:10]) for prompt in prompts}
    assert seen == {("first?", "one"), ("second?", "two")}
    assert all(data.THINK in prompt.text for prompt in prompts)
    sample.phrases.append("third?")  # of more questions than reasons, those come again
    assert data.reasoning(sample, 2, sample.mask) == "one"
    assert data.checksum([replace(sample, reasons=["three"])]) != data.checksum([sample])
    empty = np.zeros((8, 8), bool)
    assert data.reasoning(replace(sample, reasons=[]), 0, empty) == "There is none."


def test_training_shows_the_data_sets_own_reasoning(reason_set):
    samples = data.load_samples("demo_reason", reason_set, "train")
    for index, sample in enumerate(samples):
        prompt = sam_prompts_of(samples)[0, index, "box"]
        assert prompt.answer.startswith(f"<think>{sample.reasons[0]}</think>")
        assert prompt.text.splitlines()[0][8:] in sample.phrases
        truth, found = data.true_instances(sample.mask), data.parse_instances(prompt.answer)
        assert len(truth) == len(found) == int(sample.reasons[0][-2])
        for (box, points), instance in zip(truth, found):
            near = lambda a, b: np.abs(np.array(a) - np.multiply(b, 0.128)).max() < 0.1
            assert near(box, instance.box) and near(points, instance.points)


def test_both_stages_and_the_evaluation_run_on_it(reason_set, tmp_path, capsys):
    def call(script, options):
        """(what was printed, the rows of predictions.jsonl and the metrics, if any)"""
        common = f"--data_root {reason_set} --log_dir {tmp_path} --option demo_reason --prompts sam"
        script.main(script.get_args(f"{common} {options}".split()))
        rows = data.read_jsonl(tmp_path / "eval/predictions.jsonl")
        metrics = json.loads((tmp_path / "eval/metrics.json").read_text()) if rows else {}
        return capsys.readouterr().out, rows, metrics

    short = "--lora_rank 4 --accumulate 1 --batch_size 4 --lr 1e-3"
    printed, *_ = call(sft, f"{short} --max_step 2 --val_limit 2")
    assert "val, think" in printed and "val, no think" not in printed
    data.warn_about_prompts(tmp_path / "sft", "points")
    assert "was trained with --prompts sam, not points" in capsys.readouterr().out
    short += " --max_step 1 --max_new_tokens 60 --group 4 --val_limit 0 --beta 0"
    call(grpo, f"{short} --reward mask,box --mask_weight 3")
    (line,) = data.read_jsonl(tmp_path / "grpo/train.jsonl")
    weights = {"mask": 3, "box": 1, "json": 1, "format": 1}
    parts = sum(weight * line[f"reward_{name}"] for name, weight in weights.items())
    assert line["reward"] == pytest.approx(parts, abs=1e-5)
    assert line["reward_point"] is None and line["repaired"] is not None

    _, rows, metrics = call(evaluation, "--oracle points --save_img")
    empty = sum(not s.mask.any() for s in data.load_samples("demo_reason", reason_set, "test")) * 2
    assert metrics["n_no_target"] == empty > 0 and metrics["no_target_acc"] == 1
    assert sum(m["n"] for m in metrics["by_scale"].values()) == metrics["n"] - empty
    assert metrics["giou"] == metrics["miou"] > 0.7 and metrics["box_iou"] == 1
    assert all(len(row["points_px"]) == 2 * len(row["box_px"]) for row in rows)
    _, boxes, _ = call(evaluation, "--oracle points --points none")
    assert [(row["box_px"], []) for row in rows] == [(r["box_px"], r["points_px"]) for r in boxes]
    # cut off before an answer: unreadable, also where there is nothing to find
    *_, metrics = call(evaluation, f"--eval_model_path {TINY} --max_new_tokens 4")
    assert metrics["n_failed"] == metrics["n"] and metrics["n_no_target"] > 0
    for name in ("n_repaired", "no_target_acc", "miou", "box_iou", "point_acc"):
        assert metrics[name] == 0


def test_validation_asks_and_scores_as_training_does(reason_set, tiny, monkeypatch):
    samples = data.load_samples("demo_reason", reason_set, "train")
    oracle = evaluation.get_args("--prompts sam --oracle points".split())
    predict = evaluation.predict
    right = lambda *inputs: predict(None, None, *inputs[2:-1], oracle)
    monkeypatch.setattr(evaluation, "predict", right)
    scores = evaluation.validate(*tiny, samples, "sam", batch_size=5, limit=99)
    assert scores == {"think": {"box_iou": 1, "point_acc": 1}}


def test_a_target_that_is_not_there_is_judged_by_its_iou():
    row = dict(inter=0, failed=False, box_iou=0, point_acc=None)
    rows = [
        {**row, "no_target": True, "union": 0, "iou": 1.0, "repaired": True},
        {**row, "no_target": True, "union": 30, "iou": 0.0},  # something where there is nothing
        {**row, "no_target": False, "inter": 20, "union": 40, "iou": 0.5},
    ]
    right = dict(giou=0.5, ciou=20 / 70, no_target_acc=0.5, miou_target=0.5, n_repaired=1)
    assert right.items() <= evaluation.summarize(rows).items()
    assert evaluation.summarize(rows[2:])["no_target_acc"] is None


def test_other_papers_sizes_resize_both_masks():
    truth, guess = np.zeros((40, 80), dtype=bool), np.zeros((40, 80), dtype=bool)
    truth[:20], guess[:, :40] = True, True
    assert evaluation.compare_masks(guess, truth, None) == (800, 2400, 1 / 3)
    inter, union, iou = evaluation.compare_masks(guess, truth, 480)
    assert (inter, union) == (240 * 240, 480 * 480 * 3 // 4) and iou == pytest.approx(1 / 3)
    speck = np.zeros((4000, 4000), dtype=bool)
    nothing, speck[2, 2] = speck.copy(), True  # it is gone at that size
    assert evaluation.compare_masks(nothing, speck, 480) == (0, 0, 0.0)
    assert evaluation.compare_masks(nothing, nothing, 480) == (0, 0, 1.0)
