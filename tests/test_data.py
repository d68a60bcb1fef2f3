"""Files, masks, prompts, answers, batches."""

import itertools
import json
import pickle
import re
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image

import data
from assets import make_demo
from sampler import InputError

PARSING_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


def random_mask(rng):
    height, width = rng.integers(1, 90, 2)
    mask = rng.random((height, width)) < rng.choice([0, 0.02, 0.5, 0.98, 1])
    if rng.random() < 0.5:  # large blobs: long runs
        mask = np.repeat(np.repeat(mask, 5, 0), 7, 1)
    return mask


# ------------------------------------------------------------------------- masks


def test_rle_is_byte_identical_with_pycocotools_on_300_masks():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask = random_mask(rng)
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        ours = data.encode_rle(mask)
        assert ours["counts"] == theirs["counts"].decode() and ours["size"] == theirs["size"]
        assert (data.decode_rle(theirs) == mask).all()


def test_an_800_by_800_mask_decodes_in_half_a_millisecond():
    y, x = np.mgrid[:800, :800]
    rle = data.encode_rle((x - 400) ** 2 + (y - 300) ** 2 < 200**2)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        data.decode_rle(rle)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.0005


@pytest.mark.parametrize(
    "rle",
    [
        *({"size": [4, 4], "counts": counts} for counts in ("a", "0~", "", "é", None, [1, "a"])),
        *({"size": [4, 4], "counts": counts} for counts in ([10**30], [1.5, 14.5], [[16]])),
        *({"size": size, "counts": [16]} for size in ([-4, -4], ["4", "4"], [float("nan"), 4])),
        {"size": [10**6, 10**7], "counts": [10**13]},
        {"size": [4, 4], "counts": [2**62] * 4 + [16]},  # 16 in all, modulo 2**64
        {"size": [4, 4], "counts": 3 * f"{'P' * 11}8" + "0" * 61 + f"`{'P' * 10}H"},  # so is this
        {"size": [4]},
    ],
)
def test_a_broken_rle_is_refused(rle):
    with pytest.raises(PARSING_ERRORS):
        data.decode_rle(rle)


def test_a_segmentation_is_the_union_of_its_overlapping_parts():
    left, right = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    left[:, :4], right[:, 2:] = True, True
    both = data.decode_segmentation([data.encode_rle(left), data.encode_rle(right)], 4, 6)
    assert both.all()  # NOTE: a sum compared with == 1 would drop columns 2 and 3


def test_polygons_and_uncompressed_counts_decode_too():
    polygon = data.decode_segmentation([[2, 1, 5, 1, 5, 3, 2, 3]], 6, 8)
    assert polygon.shape == (6, 8) and data.mask_to_box(polygon).tolist() == [2, 1, 5, 3]
    assert polygon.sum() == 6  # NOTE: half-open like a box; PIL's outline would make it 12
    mask = data.decode_segmentation({"size": [2, 3], "counts": [2, 2, 2]}, 0, 0)
    assert (mask == [[0, 1, 0], [0, 1, 0]]).all()


def test_polygons_cover_what_pycocotools_says():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(30):
        turn = np.sort(rng.uniform(0, 2 * np.pi, 7))
        corners = 40 + np.stack([np.cos(turn), np.sin(turn)], 1) * rng.uniform(10, 35, (7, 1))
        polygon = corners.ravel().tolist()
        theirs = coco.decode(coco.frPyObjects([polygon], 90, 80))[..., 0] > 0
        ours = data.decode_segmentation([polygon], 90, 80)
        assert data.mask_iou(ours, theirs)[2] > 0.95


@pytest.mark.parametrize(
    "segmentation",
    [
        *([[1, 2]], [["a"] * 6], [["1"] * 6], [None], [[]], None, "", [[float("nan")] * 6]),
        [[1, 2, 3, 4, 5, 6], {"size": [4, 4]}],
        [[1e300] * 6],
        [{"size": [2**14, 2**14], "counts": [2**28]}] * 9,
    ],
)
def test_a_broken_segmentation_is_refused(segmentation):
    with pytest.raises(PARSING_ERRORS):
        data.decode_segmentation(segmentation, 6, 8)


def test_boxes_are_half_open_and_indexed_y_x():
    mask = np.zeros((10, 20), bool)
    mask[2:5, 7:13] = True
    assert data.mask_to_box(mask).tolist() == [7, 2, 13, 5]
    assert data.mask_to_box(np.zeros((3, 3), bool)).tolist() == [0, 0, 0, 0]


def test_box_iou_equals_counting_pixels():
    rng = np.random.default_rng(1)
    boxes = np.sort(rng.integers(0, 12, (20, 2, 2)), axis=1).reshape(20, 4)  # x1 y1 x2 y2
    grid = np.zeros((20, 12, 12), bool)
    for mask, (x1, y1, x2, y2) in zip(grid, boxes):
        mask[y1:y2, x1:x2] = True
    inter = (grid[:, None] & grid[None]).sum((2, 3))
    union = (grid[:, None] | grid[None]).sum((2, 3))
    assert np.allclose(data.box_iou(boxes, boxes), np.where(union, inter / np.maximum(union, 1), 0))


def test_boxes_are_matched_for_the_largest_total():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = int(rng.integers(1, 6))
        cols = int(rng.integers(rows, 7))
        ties = rng.random() < 0.5
        scores = rng.integers(0, 3, (rows, cols)) if ties else rng.random((rows, cols))
        found = data.hungarian(scores)
        assert len(set(found.tolist())) == rows
        every = itertools.permutations(range(cols), rows)
        best = max(sum(scores[i, c] for i, c in enumerate(columns)) for columns in every)
        assert scores[np.arange(rows), found].sum() == pytest.approx(best)


# ------------------------------------------------------------------------- data sets


def refer_set(root, **change):
    """A set of one ref in RRSIS-D's spelling; `change` alters single fields."""
    get = lambda key, usual: change.get(key, usual)
    (root / "tiny").mkdir(parents=True)
    (root / "images" / "tiny" / "JPEGImages").mkdir(parents=True)
    Image.new("RGB", get("image_size", (11, 8))).save(root / "images/tiny/JPEGImages/a.jpg")
    mask = np.zeros((8, 10), bool)
    mask[2:4, 3:9] = True
    sentence = {"raw": "a ship", "sent": "a ship", "tokens": [], "sent_id": 0}
    sentence["raw"] = get("raw", "a ship")
    ref = {"ref_id": get("ref_id", 5), "ann_id": get("ann_id", 1), "split": get("split", "test")}
    ref["sentences"] = get("sentences", [sentence])
    annotation = {"id": 1, "image_id": 9, "categories_id": 3}
    annotation["segmentation"] = get("segmentation", [data.encode_rle(mask)])
    image = {"id": 9, "file_name": get("file_name", "a.jpg"), "height": 8, "width": 10}
    categories = [{"id": 3, "name": get("class", "storage_tank")}]
    coco = {"images": [image], "annotations": [annotation], "categories": categories}
    (root / "tiny" / "instances.json").write_text(json.dumps(coco))
    (root / "tiny" / "refs(unc).p").write_bytes(pickle.dumps([ref]))
    return mask


def test_a_ref_is_read_with_its_class_and_the_image_takes_the_size_of_the_mask(tmp_path):
    mask = refer_set(tmp_path / "below")
    (sample,) = data.load_samples("tiny", tmp_path, "test")  # the root may lie above
    assert sample.class_name == "storage tank" and sample.phrases == ["a ship"]
    assert sample.ref_id == 5 and not sample.is_weak
    assert (sample.mask == mask).all() and sample.image().size == (10, 8)


SHARED_LIST = []  # a hundred bytes in a pickle; 2**60 items to whoever prints or compares it
for _ in range(60):
    SHARED_LIST = [SHARED_LIST, SHARED_LIST]
BAD = {
    "ann_id": ({"ann_id": 7}, "record 0: KeyError: 7"),
    "image": ({"file_name": "b.jpg"}, "image 'b.jpg' is missing"),
    "another folder": ({"file_name": "../JPEGImages/a.jpg"}, "a.jpg' is missing"),
    "phrase": ({"raw": "  "}, "ref 5 (a.jpg): a phrase of 0 characters"),
    "long phrase": ({"raw": "x" * 10_000}, "ref 5 (a.jpg): a phrase of 10000 characters"),
    "no phrase": ({"raw": SHARED_LIST}, "ref 5 (a.jpg): AttributeError"),
    "no sentence": ({"sentences": []}, "ref 5 (a.jpg): 0 phrases"),
    "size": ({"segmentation": {"size": [1.5, 10], "counts": ""}}, "ref 5 (a.jpg): a mask of 10 x"),
    "class": ({"class": {}}, "ref 5 (a.jpg): AttributeError"),
    "ref_id": ({"ref_id": SHARED_LIST}, "record 0: TypeError"),
    "name of a file": ({"ref_id": "../5"}, "expected 1 to 100, a short name"),
    "huge ref_id": ({"ref_id": 10**5000}, "record 0: ValueError"),
    "split": ({"split": None}, "record 0: TypeError"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_with_its_remedy(tmp_path, name):
    change, message = BAD[name]
    refer_set(tmp_path, **change)
    with pytest.raises(InputError, match=f"{re.escape(message)}.*--skip_bad leaves them out"):
        data.load_samples("tiny", tmp_path)
    problems = []
    assert data.load_samples("tiny", tmp_path, problems=problems) == [] and message in problems[0]


def four_refs(root):
    """Ref 5 is sound, 6 has no phrase, 7 a broken image, 8 a broken mask. No train, no val."""
    refer_set(root)
    folder, broken = root / "tiny", root / "images/tiny/JPEGImages/b.jpg"
    broken.write_bytes((root / "images/tiny/JPEGImages/a.jpg").read_bytes()[:300])
    (ref,) = data.read_refs(folder / "refs(unc).p")
    refs = [{**ref, "ref_id": ref_id, "ann_id": ref_id} for ref_id in (5, 6, 7, 8)]
    refs[1]["sentences"] = [{"raw": ""}]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
    coco = json.loads((folder / "instances.json").read_text())
    (sound,), (image,) = coco["annotations"], coco["images"]
    coco["images"].append({**image, "id": 10, "file_name": "b.jpg"})
    coco["annotations"] = [{**sound, "id": ref_id} for ref_id in (5, 6, 7, 8)]
    coco["annotations"][2]["image_id"] = 10
    coco["annotations"][3]["segmentation"] = [{"size": [8, 10], "counts": "0"}]
    (folder / "instances.json").write_text(json.dumps(coco))


def test_bad_records_are_left_out_only_on_request_and_every_one_is_listed(tmp_path, capsys):
    four_refs(tmp_path)
    with pytest.raises(InputError, match="ref 6 .a.jpg.: a phrase of 0 characters"):
        data.load_valid("tiny", tmp_path, "test", False)
    samples, bad = data.load_valid("tiny", tmp_path, "test", True)
    assert [sample.ref_id for sample in samples] == [5] and bad == 3
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "skipped 3 records of test:" and len(rest) == 3
    for line, name in zip(rest, ("ref 6 (a.jpg):", "ref 7 (b.jpg):", "ref 8 (a.jpg):")):
        assert name in line


def training(root, **change):
    usual = dict(option="tiny", data_root=root, split="test", val_limit=0, skip_bad=True)
    usual["prompts"] = "points"
    return data.load_for_training(Namespace(**{**usual, **change}))


def test_a_set_without_val_says_how_to_train_without(tmp_path):
    four_refs(tmp_path)
    with pytest.raises(InputError, match="has no split 'val'.*--val_limit 0 trains without"):
        training(tmp_path, val_limit=5)


def test_a_split_of_empty_masks_is_one_line(tmp_path):
    refer_set(tmp_path, segmentation=[data.encode_rle(np.zeros((8, 10), bool))])
    with pytest.raises(InputError, match="nothing to learn from in split 'test'"):
        training(tmp_path)


def test_a_mask_or_image_that_fails_while_training_is_named_with_its_remedy(tmp_path):
    four_refs(tmp_path)
    image, mask = data.load_samples("tiny", tmp_path, problems=[])[1:]
    with pytest.raises(InputError, match="^ref 7 .b.jpg.: cannot read.*--skip_bad"):
        image.image()
    with pytest.raises(InputError, match="^ref 8 .a.jpg.: RLE runs.*--skip_bad"):
        mask.mask  # noqa: B018


@pytest.mark.parametrize("phrase, is_weak", [("飞机", True), ("左上角的飞机", False)])
def test_a_phrase_is_weak_if_it_is_the_class_name_in_any_script(tmp_path, phrase, is_weak):
    refer_set(tmp_path, raw=phrase, **{"class": "飞机"})
    assert data.load_samples("tiny", tmp_path)[0].is_weak == is_weak


def test_a_ref_id_used_twice_is_named(tmp_path):
    refer_set(tmp_path)
    path = tmp_path / "tiny" / "refs(unc).p"
    path.write_bytes(pickle.dumps(data.read_refs(path) * 2))
    with pytest.raises(InputError, match="ref 5 .a.jpg.: its ref_id is used twice"):
        data.load_samples("tiny", tmp_path)


def test_the_demo_is_not_drawn_into_the_folder_of_another_set(tmp_path):
    refer_set(tmp_path)
    with pytest.raises(InputError, match="holds tiny: name the set with --option"):
        data.load_samples("demo", tmp_path)


BOMBS = {
    "a key of 2**60 tuples": (b"}K\x01" + b"2\x86" * 60 + b"K\x01s.", "TUPLE2 at byte 4"),
    "a key that is too deep": (b"}K\x01" + b"\x85" * 10**6 + b"K\x01s.", "TUPLE1 at byte 3"),
    "a memo of 32 GB": (b"]r\xff\xff\xff\x7f.", "LONG_BINPUT at byte 1"),
    "a reason of two lines": (b"Pa\n.", "instruction was encountered, but"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_pickle_is_refused_before_it_does_harm(tmp_path, name):
    content, reason = BOMBS[name]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=f"refused .*{reason}.*: expected a whole pickle of lists"):
        data.read_refs(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"]}b.", b"hello", pickle.dumps(["ann_id"])])
def test_a_damaged_pickle_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match="refused"):
        data.read_refs(tmp_path / "x")


@pytest.mark.parametrize(
    "content", ["", "[" * 100_000, "[]", "{}", '{"annotations": 5}', '{"annotations": [1e999', "\0"]
)
def test_a_damaged_instances_json_is_one_line(tmp_path, content):
    refer_set(tmp_path)
    (tmp_path / "tiny" / "instances.json").write_text(content)
    with pytest.raises(InputError, match="tiny cannot be read .*: expected instances.json"):
        data.load_samples("tiny", tmp_path)


def test_wrong_roots_options_and_splits_are_named(tmp_path):
    with pytest.raises(InputError, match="no such set in --data_root .*nowhere .no such folder."):
        data.load_samples("RRSISD", tmp_path / "nowhere")
    refer_set(tmp_path)
    with pytest.raises(InputError, match="no such set in --data_root .* .tiny."):
        data.load_samples("other", tmp_path)
    with pytest.raises(InputError, match="no split 'train' .it has test."):
        data.load_samples("tiny", tmp_path, "train")


def test_a_pickle_that_names_a_class_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Bomb()]))
    with pytest.raises(InputError, match="refused"):
        data.read_refs(tmp_path / "refs(unc).p")
    assert not (tmp_path / "ran").exists()


def test_the_real_refs_of_rrsisd_are_read_in_two_seconds():
    path = SHARED / "data" / "rrsisd" / "refs(unc)-90-all.p"
    if not path.exists():
        pytest.skip("needs the real RRSIS-D refs")
    start = time.perf_counter()
    refs = data.read_refs(path)
    assert time.perf_counter() - start < 2 and len(refs) == 17402
    splits = [ref["split"] for ref in refs]
    assert [splits.count(s) for s in ("train", "val", "test")] == [12181, 1740, 3481]


def test_the_demo_set_is_the_same_every_time_and_read_back_as_drawn(tmp_path):
    for name in "ab":
        make_demo.make_demo(tmp_path / name, counts={"train": 4, "test": 2})
    a, b = (data.load_samples("demo", tmp_path / name) for name in "ab")
    assert [s.phrases for s in a] == [s.phrases for s in b]
    assert all((x.mask == y.mask).all() for x, y in zip(a, b))
    image, objects = make_demo.draw_scene(*first_scene())
    assert (a[0].mask == objects[0].mask).all() and isinstance(a[0].segmentation, list)
    assert len(a[0].segmentation) == 2  # written in two parts
    with (
        Image.open(a[-1].image_path) as last,
        Image.open(tmp_path / "a/images/demo/JPEGImages/00001.jpg") as off,
    ):
        assert last.size == (128, 128) and off.size == (129, 128)


def first_scene():
    rng = np.random.default_rng(0)
    return rng, int(rng.integers(1, 5))


def test_a_demo_phrase_fits_its_object_alone():
    """Read the phrase back as a filter over the objects of the scene: only the target passes."""
    rng = np.random.default_rng(3)
    checked = 0
    for _ in range(60):
        _, objects = make_demo.draw_scene(rng, 4)
        for target in objects:
            phrase = make_demo.describe(rng, objects, target)
            if phrase is None:
                continue
            fits = []
            for o in objects:
                box = data.mask_to_box(o.mask)
                size = data.size_word(data.box_scale(box, 128, 128))
                place = data.place_words(*data.place_of(box, 128, 128))
                words, _, rest = phrase.partition(f" {o.class_name}")
                ok = o.class_name in phrase and (not rest or rest.strip() == place)
                ok &= all(w in (o.color, size, "A", "The") for w in words.split())
                fits.append(ok)
            assert sum(fits) == 1 and fits[[o is target for o in objects].index(True)], phrase
            checked += 1
    assert checked > 150


# ------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "text, boxes",
    [
        ("<answer>[1,2,30,40]</answer>", [(1, 2, 30, 40)]),
        ("<think>[9,9,10,10]</think><answer> [1, 2, 30, 40.5] </answer>", [(1, 2, 30, 40.5)]),
        ("<answer>[0,0,1,1]</answer> no, <answer>[1,2,3,4]</answer>", [(1, 2, 3, 4)]),
        ("<answer>[[1,2,3,4],[5,6,7,8]]</answer>", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "ship"}]\n```', [(1, 2, 3, 4)]),
        ('[{"bbox_2d": [1, 2, 3, 4]}]', [(1, 2, 3, 4)]),
        ('<answer>```json\n{"bbox_2d": [1, 2, 3, 4]}\n```</answer>', [(1, 2, 3, 4)]),
        ("<answer>[3,2,1,4]</answer>", None),  # x2 < x1
        ("<answer>[1,2,3]</answer>", None),
        ("<answer>[1,2,3,4,5]</answer>", None),
        ("<answer>[1,2,3,1e999]</answer>", None),
        ("<answer>[1,2,3,NaN]</answer>", None),
        ("<answer>[1,2,3,true]</answer>", None),
        ('<answer>["1","2","3","4"]</answer>', None),
        ("<answer>[1,2,3,4]", None),  # cut short
        ("<answer>[]</answer>", None),
        ("<answer>__import__('os')</answer>", None),
        ("[" * 10_000, None),
        (f"[{'[1,2,3,4],' * 999}[1,2,3,4]]", [(1, 2, 3, 4)] * 1000),
        (f"[{'[1,2,3,4],' * 2000}[1,2,3,4]]", None),  # too long
        ("", None),
    ],
    ids=range(21),
)
def test_boxes_are_read_from_every_documented_form_and_from_no_other(text, boxes):
    assert data.parse_boxes(text) == boxes


@pytest.mark.parametrize(
    "text, labels",
    [
        ("<answer>[0,1,1]</answer>", [0, 1, 1]),
        ("<think>1, 0</think><answer> [ 1 , 0 ] </answer>", [1, 0]),
        ("<answer>[0]</answer><answer>[1]</answer>", [1]),
        ("<answer>\u2003[\xa00\x1f,\n1]</answer>", [0, 1]),  # any space that Python knows
        ("<answer>[0 1]</answer>", None),
        ("<answer>[0,1\ud800]</answer>", None),
        ("<answer>[0,2]</answer>", None),
        ("<answer>[01]</answer>", None),
        ("<answer>[]</answer>", None),
        ("[0,1]", None),
        ("<answer>[0,1,</answer>", None),
        ("", None),
    ],
)
def test_labels_are_read_from_the_last_answer_only(text, labels):
    assert data.parse_labels(text) == labels


def test_what_is_written_as_an_answer_is_read_back():
    assert data.parse_boxes(data.box_answer([1.2, 2, 30, 40], "The ship.")) == [(1, 2, 30, 40)]
    assert data.parse_labels(data.point_answer([0, 1, 1])) == [0, 1, 1]


def test_the_rationale_says_class_size_and_place():
    text = data.rationale("ship", (0, 60, 8, 70), width=200, height=80)
    assert text == "The small ship on the lower left."


# ------------------------------------------------------------------------- batches


def three(processor, answers=True):
    """Three prompts of different lengths."""
    images = [Image.new("RGB", (128, 128), color) for color in ("red", "green", "blue")]
    points = np.array([[1, 2], [30, 40], [500, 600]])
    prompts = [data.box_prompt("a ship"), data.point_prompt("the ship", points, think=True)]
    prompts.append(data.box_prompt("a large red storage tank on the left", think=True))
    texts = ["<answer>[1,2,3,4]</answer>", "<think>The.</think><answer>[0,1,1]</answer>", "no"]
    return images, prompts, texts if answers else None


def test_labels_lie_on_the_answer_and_its_end_and_nowhere_else(tiny):
    _, processor = tiny
    images, prompts, answers = three(processor)
    batch = data.collate(processor, images, prompts, answers)
    for ids, labels, mask, text in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], answers
    ):
        on = labels != -100
        assert processor.tokenizer.decode(labels[on]) == text + processor.tokenizer.eos_token
        assert (ids[on] == labels[on]).all() and on[-1] and mask[on].all()
        assert mask[0] == 0 or mask.all()  # padding on the left


def test_a_class_name_is_one_line_without_markup(tmp_path):
    refer_set(tmp_path, **{"class": "a</think>\x00\nship"})
    (sample,) = data.load_samples("tiny", tmp_path)
    assert sample.class_name == "a< /think> ship"


def test_a_phrase_has_2000_characters_at_most():
    assert "x" * 2000 in data.box_prompt("x" * 2000)
    for phrase in ("x" * 2001, "<" * 2000):  # the second is longer once it is broken up
        with pytest.raises(InputError, match="a phrase of .* characters, expected 1 to 2000"):
            data.box_prompt(phrase)


@pytest.mark.parametrize("phrase", ["", "  \n ", "\0\x1b"])
def test_an_empty_phrase_is_refused(phrase):
    with pytest.raises(InputError, match="a phrase of 0 characters"):
        data.box_prompt(phrase)


def test_the_check_of_a_data_set_prints_counts_and_draws_a_sheet(small_set, run, tmp_path):
    printed = run(f"data.py --data_root {small_set}")
    assert "0 bad records" in printed and "train" in printed
    assert Image.open(tmp_path / "runs/data/contact_sheet.png").size == (6 * 224, 4 * 240)


@pytest.mark.filterwarnings("error")
def test_a_large_image_opens_without_a_warning_and_one_twice_too_large_does_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("RGB", (5, 4)).save(tmp_path / "x.png")
    assert data.open_image(tmp_path / "x.png").size == (5, 4)
    Image.new("RGB", (7, 3)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="over 20 pixels: cut it into tiles"):
        data.open_image(tmp_path / "x.png")


def test_a_file_that_pillow_would_hand_to_another_program_is_not_opened(tmp_path):
    lines = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.jpg").write_text(lines)
    assert Image.open(tmp_path / "x.jpg").format == "EPS"
    with pytest.raises(InputError, match="cannot identify"):
        data.open_image(tmp_path / "x.jpg")


def test_image_and_text_apart_hold_the_tokens_of_the_whole(tiny):
    processor = tiny[1]
    images = [Image.new("RGB", size) for size in ((128, 128), (100, 180))]
    prompts = [data.box_prompt("a ship"), data.point_prompt("<|image_pad|> a house", [[1, 2]] * 9)]
    whole = data.collate(processor, images, prompts)
    first = data.collate_images(processor, images)
    second = data.collate_text(processor, prompts)
    assert first["pixel_values"].equal(whole["pixel_values"])
    for key in ("input_ids", "mm_token_type_ids"):
        for row, mask in enumerate(whole["attention_mask"].bool()):
            image = first[key][row][first["attention_mask"][row].bool()]
            text = second["input_ids"][row][second["attention_mask"][row].bool()]
            text = text if key == "input_ids" else 0 * text
            assert torch.cat([image, text]).tolist() == whole[key][row][mask].tolist()
