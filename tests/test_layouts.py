"""The layouts that sets have on disk, masks in files, and mixtures of sets."""

import io
import json
import random
import re
import shutil
import time
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
from conftest import TINY, write_header_bomb
from layouts import FOLDERS, HEIGHT, WIDTH, WRITERS, write_all
from PIL import Image

import data
import eval as evaluation
import grpo
import sft
from assets import make_demo
from sampler import InputError

MIXTURE = ",".join(WRITERS)
options = pytest.mark.parametrize("option", WRITERS)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(folder with a set of every layout, {option: what was drawn}). Not to be changed."""
    root = tmp_path_factory.mktemp("sets")
    return root, write_all(root)


def same(samples, truth):
    """Whether samples hold the phrases and masks that were drawn, under their ids."""
    read = {(s.split, s.ref_id): s for s in samples}
    assert len(read) == len(samples) and set(read) == set(truth)
    for key, (phrases, mask) in truth.items():
        assert read[key].phrases == phrases and (read[key].mask == mask).all()
    return True


# ------------------------------------------------------------------------- layouts


@options
def test_a_set_is_read_as_drawn_from_its_own_folder_and_from_the_one_above(sets, option):
    root, truth = sets
    for place in (root, root / FOLDERS[option]):
        samples = data.load_samples(option, place)
        assert same(samples, truth[option])
        assert all(s.image().size == (WIDTH, HEIGHT) and s.option == option for s in samples)
    for split in ("train", "val", "test"):
        part = {key: value for key, value in truth[option].items() if key[0] == split}
        assert part and same(data.load_samples(option, root, split), part)


@pytest.mark.parametrize("option", ["earthreason", "ris_lad"])
def test_the_check_counts_a_set_and_draws_its_sheet(sets, option, tmp_path, capsys):
    root, truth = sets
    places = f"--data_root {root} --log_dir {tmp_path}"
    data.main(data.get_args(f"--option {option} {places}".split()))
    printed = capsys.readouterr().out
    empty = sum(not mask.any() for _, mask in truth[option].values())
    assert f"{len(truth[option])} refs on " in printed and "0 bad records" in printed
    assert (f"empty: {empty}" in printed) == (empty > 0) and "resized): yes" in printed
    assert (tmp_path / "data/contact_sheet.png").is_file()


def test_no_image_is_opened_while_a_set_is_loaded(sets, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    assert len(data.load_samples(MIXTURE, sets[0])) == sum(map(len, sets[1].values()))


def test_answers_become_reasons_whatever_their_key_and_number(tmp_path):
    for name in ("images", "labels", "QAs"):
        (tmp_path / "test" / name).mkdir(parents=True)
    cases = {
        "a": ({"answer": ["It is\na ship.", " ", "<answer>"]}, ["It is a ship.", "< answer>"]),
        "b": ({"answers": "It is a ship."}, ["It is a ship."]),
        "c": ({"answers": None, "answer": ["A", "B"]}, ["A", "B"]),
        "d": ({}, []),
    }
    for ref_id, (answers, _) in cases.items():
        key = {"b": "class_name", "c": "category"}.get(ref_id, "class")
        content = {"questions": ["Ship"], key: "ship" if ref_id != "d" else ["?"], **answers}
        text = json.dumps(content).encode("utf-8-sig" if ref_id == "b" else "utf-8")
        (tmp_path / f"test/QAs/{ref_id}.json").write_bytes(text)
        Image.new("RGB", (4, 3)).save(tmp_path / f"test/images/{ref_id}.png")
        Image.new("L", (4, 3)).save(tmp_path / f"test/labels/{ref_id}.png")
    samples = data.load_samples("earthreason", tmp_path)
    assert {s.ref_id: s.reasons for s in samples} == {k: v for k, (_, v) in cases.items()}
    assert [s.class_name for s in samples] == ["ship", "ship", "ship", "object"]
    assert samples[0].is_weak and not samples[3].is_weak


def test_risors_keeps_what_has_no_area_and_takes_markup_off_names(tmp_path):
    shape = data.encode_rle(np.ones((3, 4), bool))
    rows = [
        {"description": "the <ship> on the left", "name": "small_ship", "segmentation": shape},
        {"description": "a < b", "area": 12, "segmentation": shape},
        {"description": "nothing", "area": 0, "segmentation": shape},
    ]
    for name in ("JPEGImages", "Annotations"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "JPEGImages/7.jpg")
    (tmp_path / "Annotations/7.json").write_text(json.dumps({"annotations": rows}))
    for listed in ("7", "7.jpg", "7.json"):
        (tmp_path / "RISORS_test.txt").write_text(listed)
        first, second = data.load_samples("risors", tmp_path)
        assert (first.phrases, first.class_name) == (["the ship on the left"], "small ship")
        assert (second.phrases, second.class_name) == (["a < b"], "object")


def test_a_list_may_have_a_byte_order_mark_windows_line_ends_and_blank_lines(sets, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(sets[0] / "RefSegRS", folder)
    lines = "\ufeff\r\n0 the château\r\n  \r\n1\ta road \r\n".encode()
    (folder / "output_phrase_test.txt").write_bytes(lines)
    samples = data.load_samples("refsegrs", folder, "test")
    assert {s.ref_id: s.phrases[0] for s in samples} == {"0_2": "the château", "1_4": "a road"}


def test_a_set_of_ones_own_is_known_by_its_folder_and_read_by_its_layout(sets, tmp_path):
    for option, folder in FOLDERS.items():
        if option != "ris_lad":  # REFER's has its name in it
            shutil.copytree(sets[0] / folder, tmp_path / f"My-{option}")
            for place in (tmp_path, tmp_path / f"My-{option}"):
                assert same(data.load_samples(f"my_{option}", place), sets[1][option])


def test_a_set_that_is_not_there_is_named_with_what_was_expected(sets, tmp_path):
    (tmp_path / "RefSegRS" / "images").mkdir(parents=True)
    with pytest.raises(InputError, match="--option refsegrs: no such set in .*no set"):
        data.load_samples("refsegrs", tmp_path)
    with pytest.raises(
        InputError, match="no such set in .*earthreason, refsegrs, risbench, rislad"
    ):
        data.load_samples("other", sets[0])
    with pytest.raises(InputError, match="RISORS has no split 'testA' .it has train, val, test"):
        data.load_samples("risors", sets[0], "testA")


def test_the_demos_are_drawn_once_wherever_the_root_points(tmp_path, monkeypatch):
    few, drawn = {"train": 2, "val": 1, "test": 1}, []
    makers = {"demo": make_demo.make_demo, "demo_reason": make_demo.make_demo_reason}
    draw = lambda name, root: drawn.append(name) or makers[name](root, counts=few)
    monkeypatch.setattr(data, "draw_demo", draw)
    root = tmp_path / "new"
    assert len(data.load_samples("demo_reason", root, "train")) == 2
    data.load_samples("demo", root)  # beside the other
    data.load_samples("demo,demo_reason", root)
    data.load_samples("demo", tmp_path)
    data.load_samples("demo_reason", root / "demo_reason")
    assert drawn == ["demo_reason", "demo"]


# ------------------------------------------------------------------------- bad records


def lines_to(name, *lines):
    return lambda folder: (folder / name).write_bytes(b"\n".join(lines))


def rename(name, new):
    return lambda folder: (folder / name).rename(folder / new)


def qa(content):
    return lambda folder: (folder / "test/QAs/0.json").write_bytes(content)


def annotation(**change):
    """Change the first annotation of RISORS' image 4."""

    def spoil(folder):
        path = folder / "Annotations/4.json"
        content = json.loads(path.read_text())
        content["annotations"][0].update(change)
        path.write_text(json.dumps(content))

    return spoil


def remove(name):
    return lambda folder: (folder / name).unlink()


LIST = "output_phrase_test.txt"
BAD = {
    "no image": ("earthreason", remove("test/images/0.jpg"), "0.json: '0' is missing in"),
    "no label": ("earthreason", remove("test/labels/0.png"), "0.json: '0' is missing in"),
    "not JSON": ("earthreason", qa(b"{"), "test/QAs/0.json: JSONDecodeError"),
    "a deep one": ("earthreason", qa(b"[" * 10**6), "test/QAs/0.json: RecursionError"),
    "UTF-16": ("earthreason", qa(b"\xff\xfe\x00"), "test/QAs/0.json: Unicode"),
    "a list": ("earthreason", qa(b"[]"), "test/QAs/0.json: AttributeError"),
    "no question": ("earthreason", qa(b"{}"), "test/QAs/0.json: KeyError: 'questions'"),
    "a blank question": ("earthreason", qa(b'{"questions": [" "]}'), "a phrase of 0 characters"),
    "numbers": ("earthreason", qa(b'{"questions": [1]}'), "test/QAs/0.json: AttributeError"),
    "a hidden sign": (
        "earthreason",
        rename("test/QAs/0.json", "test/QAs/0\u200b.json"),
        "'0\\u200b' is missing in",
    ),
    "many questions": (
        "earthreason",
        qa(b'{"questions": [%s"a"]}' % (b'"a", ' * 100)),
        "test/QAs/0.json: 101 phrases",
    ),
    "no phrase": ("refsegrs", lines_to(LIST, b"4 a", b"5"), f"{LIST}: a phrase of 0 characters"),
    "an id": ("refsegrs", lines_to(LIST, b"77 a"), f"{LIST}: '77' is missing in"),
    "no mask": ("refsegrs", remove("masks/4.tif"), f"{LIST}: '4' is missing in"),
    "above": ("refsegrs", lines_to(LIST, b"../images/4.tif a"), "'../images/4.tif' is missing"),
    "absolute": ("refsegrs", lines_to(LIST, b"/etc/4.tif a"), "'/etc/4.tif' is missing in"),
    "latin-1": ("risbench", lines_to(LIST, b"4.jpg caf\xe9"), f"{LIST}: UnicodeDecodeError"),
    "no table": ("risors", remove("Annotations/4.json"), "RISORS_test.txt: '4' is missing in"),
    "no picture": ("risors", remove("JPEGImages/4.jpg"), "RISORS_test.txt: '4' is missing in"),
    "twice": ("risors", lines_to("RISORS_test.txt", b"4", b"4.jpg"), "ref 4_0 (4.jpg): its ref_id"),
    "no text": ("risors", annotation(description=None), "annotation 0 of 4: TypeError"),
    "no RLE": ("risors", annotation(segmentation=None), "annotation 0 of 4: KeyError: 'size'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_and_the_others_are_read(sets, tmp_path, name):
    option, spoil, message = BAD[name]
    shutil.copytree(sets[0] / FOLDERS[option], tmp_path / option)
    spoil(tmp_path / option)
    with pytest.raises(InputError, match=f"{re.escape(message)}.*--skip_bad leaves them out"):
        data.load_samples(option, tmp_path, "test")
    problems = []
    samples = data.load_samples(option, tmp_path, None, problems)
    assert message in problems[0] and all(line.isprintable() for line in problems)
    sound = {key: value for key, value in sets[1][option].items() if key[0] != "test"}
    assert same([s for s in samples if s.split != "test"], sound)


def test_what_is_wrong_in_a_mixture_is_named_with_its_set(sets, tmp_path):
    shutil.copytree(sets[0], tmp_path / "sets")
    (tmp_path / "sets/RefSegRS/masks/4.tif").unlink()
    with pytest.raises(
        InputError, match="^line 1 of .*RefSegRS/output_phrase_test.txt: .4. is missing"
    ):
        data.load_samples(MIXTURE, tmp_path / "sets", "test")
    problems = []
    samples = data.load_samples(MIXTURE, tmp_path / "sets", "test", problems)
    assert len(problems) == 2 and all(
        "RefSegRS/output_phrase_test.txt" in line for line in problems
    )
    assert len(samples) == len(data.load_samples(MIXTURE, sets[0], "test")) - 2


def test_damaged_bytes_of_any_file_are_one_line_or_harmless(sets, tmp_path):
    """A few hundred of them, in lists, JSON and masks."""
    rng, refused = random.Random(0), 0
    for option in list(WRITERS)[1:]:
        root = tmp_path / option
        shutil.copytree(sets[0] / FOLDERS[option], root)
        files = [p for p in root.rglob("*") if p.is_file() and not p.match("*mages/*")]
        for _ in range(60):
            path = rng.choice(files)
            sound = path.read_bytes()
            content = bytearray(sound)
            at = rng.randrange(len(content))
            content[at : at + rng.choice([0, 1, 9])] = rng.randbytes(rng.choice([0, 1, 4]))
            path.write_bytes(content)
            problems = []
            samples = data.load_samples(option, root, None, problems)
            list(data.decode_all(samples, problems))
            assert all(line.isprintable() and len(line) < 600 for line in problems)
            refused += bool(problems)
            path.write_bytes(sound)
    assert refused > 40


# ------------------------------------------------------------------------- mask files


def test_a_mask_file_that_fails_is_named_with_its_record_and_its_remedy(sets, tmp_path):
    shutil.copytree(sets[0] / "RefSegRS", tmp_path / "refsegrs")
    path = tmp_path / "refsegrs/masks/4.tif"
    path.write_bytes(path.read_bytes()[:30])
    first, _, third, _ = data.load_samples("refsegrs", tmp_path, "test")
    for use in (lambda: first.mask, first.image):
        with pytest.raises(
            InputError, match="^ref 4_1 .4.tif.: cannot read .*masks/4.tif.*--skip_bad"
        ):
            use()
    assert third.mask.any()
    valid, bad = data.load_valid("refsegrs", tmp_path, "test", True)
    assert [s.ref_id for s in valid] == ["5_3", "5_4"] and bad == 2


def test_a_mask_whose_header_promises_400_million_pixels_is_refused_at_once(tmp_path):
    write_header_bomb(tmp_path / "x.png", 0)
    start = time.perf_counter()
    with pytest.raises(InputError, match="x.png has over .* pixels"):
        data.open_mask(tmp_path / "x.png")
    assert time.perf_counter() - start < 0.2


def test_a_mask_file_that_is_no_image_or_too_thin_is_refused(tmp_path):
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(InputError, match="cannot read"):
        data.open_mask(tmp_path / "x.png")
    Image.new("L", (1000, 4)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="expected sides of 1 : 200"):
        data.open_image(tmp_path / "x.png")


def test_the_checksum_of_the_samples_follows_a_mask_file_but_not_its_folder(sets, tmp_path):
    for name in "ab":
        shutil.copytree(sets[0] / "RIS_Bench", tmp_path / name)
    read = lambda name: data.checksum(data.load_samples("risbench", tmp_path / name))
    first = read("a")
    assert first == read("b")
    noise = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5
    Image.fromarray(noise).save(tmp_path / "b/mask/0.png")
    assert first != read("b")


# ------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("option", ["a,,b", "a:", "a:-1", "a:nan", "a:inf", "a:x", ":2", ""])
def test_a_malformed_option_is_one_line(option):
    with pytest.raises(InputError, match=f"--option {re.escape(option)}: .* expected the name of"):
        data.parse_option(option)


def test_names_and_weights_are_told_apart():
    assert data.parse_option("RRSISD") == {"RRSISD": None}
    assert data.parse_option("a:2, b,c:.5") == {"a": 2, "b": None, "c": 0.5}
    with pytest.raises(InputError, match="names a set twice"):
        data.parse_option("ris_lad,RIS-LAD")


def test_a_mixture_holds_all_sets_in_order_each_with_its_name(sets):
    root, truth = sets
    samples = data.load_samples("risors:2,ris_lad,earthreason:1", root)
    names = ("risors", "ris_lad", "earthreason")
    assert list(dict.fromkeys(s.option for s in samples)) == list(names)
    for name in names:
        assert same([s for s in samples if s.option == name], truth[name])


def test_the_demo_can_be_part_of_a_mixture_and_is_drawn_for_it(sets, monkeypatch, tmp_path):
    few = {"train": 1, "val": 1, "test": 1}
    draw = lambda name, root: make_demo.make_demo(root, counts=few)
    monkeypatch.setattr(data, "draw_demo", draw)
    shutil.copytree(sets[0] / "RISORS", tmp_path / "risors")
    mixed = data.load_samples("risors,demo", tmp_path, "train")
    assert [s.option for s in mixed[:4]] == ["risors"] * 4
    alone = data.load_samples("demo", tmp_path, "train")  # found again beside the other
    assert len(alone) > 0 and mixed[4:] == alone


def test_grids_stay_in_boxes_of_the_same_set_though_its_files_are_called_alike(sets):
    samples = data.load_samples(MIXTURE, sets[0])
    names = Counter(s.image_path.name for s in samples)
    assert names["0.jpg"] > 3  # in several sets
    groups = data.PromptDataset(samples, None, None).in_image.values()
    assert all(len({(s.option, s.split) for s in group}) == 1 for group in groups)


def order_of(counts, **change):
    """PromptSamplers, alone or in a group of processes."""
    args = Namespace(**{"seed": 5, "batch_size": 4, "point_ratio": 0.3, **change})
    return lambda rank=0, world=1: data.PromptSampler(counts, args, rank, world)


def keys_of(order, epoch):
    order.set_epoch(epoch)
    return [key for _ in range(len(order.batches)) for key in next(order)]


def test_without_weights_an_epoch_is_one_shuffled_pass_over_all():
    order = order_of([(np.arange(10), 10)])()
    for epoch in (0, 3):
        rng = np.random.default_rng([5, epoch])
        shuffled = rng.permutation(10).tolist()
        points = rng.random(3) < 0.3
        expected = [
            (epoch, index, "point" if points[i // 4] else "box")
            for i, index in enumerate(shuffled + shuffled[:2])
        ]
        assert keys_of(order, epoch) == expected


SETS = [*["small"] * 6, *["large"] * 34]
SOME = [Namespace(option=name) for name in SETS]


def test_an_epoch_is_shared_out_by_weight():
    ((indices, draws),) = data.mixture_counts("small,large", SOME)
    assert indices.tolist() == list(range(40)) and draws == 40
    for option, expected in {
        "small:1,large:1": 20,
        "small:3,large": 30,
        "small,large:9": 4,
    }.items():
        counts = data.mixture_counts(option, SOME)
        keys = keys_of(order_of(counts)(), epoch=2)
        assert len(keys) == 40
        assert Counter(SETS[index] for _, index, _ in keys)["small"] == expected


def test_a_weight_that_leaves_a_set_without_a_draw_is_refused():
    with pytest.raises(InputError, match="small gets none of 40 draws"):
        data.mixture_counts("small:1,large:1000", SOME)


def test_all_samples_of_a_weighted_set_come_equally_often_and_never_with_the_same_question():
    order = order_of(data.mixture_counts("small:1,large:1", SOME))()
    keys = [key for epoch in range(17) for key in keys_of(order, epoch)]  # 340 draws of each set
    assert len({key[:2] for key in keys}) == len(keys)
    counts = Counter(index for _, index, _ in keys)
    assert {counts[i] for i in range(6)} == {56, 57}  # 340 / 6
    assert {counts[i] for i in range(6, 40)} == {10}  # 340 / 34


def test_a_weighted_epoch_is_shuffled_and_the_next_one_is_another():
    order = order_of(data.mixture_counts("small:1,large:1", SOME))()
    first, second = ([SETS[i] for _, i, _ in keys_of(order, e)] for e in (0, 1))
    assert first != second and "small" in first[-10:] and "large" in first[:10]


def test_each_pass_over_a_weighted_set_has_an_order_of_its_own():
    order = order_of(data.mixture_counts("small:23,large:17", SOME))()
    half = lambda epoch: {index for _, index, _ in keys_of(order, epoch) if SETS[index] == "large"}
    assert half(0) | half(1) == half(2) | half(3) == set(range(6, 40))  # 17 of 34 at a time
    assert half(0) != half(2) and half(0) != set(range(6, 23)) != half(2)


def test_a_weighted_order_goes_on_from_a_cursor_and_is_the_same_in_every_process():
    counts = data.mixture_counts("small:2,large:1", SOME)
    one, again = order_of(counts)(), order_of(counts)()
    for _ in range(13):  # into the second epoch, of 10 batches each
        next(one)
    again.set_epoch(one.epoch, one.cursor)
    assert one.epoch == 1 and [next(one) for _ in range(20)] == [next(again) for _ in range(20)]
    whole, half = order_of(counts), order_of(counts, batch_size=2)
    both = [half(rank, 2) for rank in (0, 1)]
    alone = whole()
    for _ in range(25):
        assert next(alone) == next(both[0]) + next(both[1])


def test_a_set_with_nothing_to_learn_from_is_named(sets, tmp_path):
    shutil.copytree(sets[0], tmp_path / "sets")
    for path in (tmp_path / "sets/RIS_Bench/mask").iterdir():
        Image.new("L", (WIDTH, HEIGHT)).save(path)
    args = Namespace(option="risors,risbench", data_root=tmp_path / "sets", split="train")
    args.skip_bad, args.val_limit, args.prompts = False, 0, "points"
    message = "--option risbench: nothing to learn from in split 'train'"
    with pytest.raises(InputError, match=message):
        data.load_for_training(args)
    for path in (tmp_path / "sets/RIS_Bench/mask").iterdir():
        path.write_bytes(b"")
    args.skip_bad = True
    with pytest.raises(InputError, match=message):
        data.load_for_training(args)


# ------------------------------------------------------------------------- commands


def test_both_stages_train_on_a_mixture_of_all_layouts(sets, tmp_path, capsys, monkeypatch):
    orders, order = [], data.PromptSampler
    keep = lambda *args: orders.append(order(*args)) or orders[-1]
    monkeypatch.setattr(data, "PromptSampler", keep)
    weighted = MIXTURE.replace("refsegrs", "refsegrs:3")
    common = f"--model_path {TINY} --data_root {sets[0]} --option {weighted} --log_dir {tmp_path}"
    short = "--max_step 1 --accumulate 1 --batch_size 6 --lora_rank 4 --no-merge"
    sft.main(sft.get_args(f"{common} {short} --val_limit 1 --think_ratio 0.5".split()))
    group = "--val_limit 0 --group 4 --max_new_tokens 40 --beta 0 --lr 1e-3"
    grpo.main(grpo.get_args(f"{common} {short} {group}".split()))
    for stage in ("sft", "grpo"):
        (line,) = data.read_jsonl(tmp_path / stage / "train.jsonl")
        assert line["grad_norm"] > 0 and line["skipped"] == 0
    for order in orders:  # the 16 draws that samples are worth, shared out as 1 : 1 : 3 : 1 : 1
        assert [draws for _, draws in order.counts] == [2, 3, 6, 3, 2]
    assert len(orders) == 2 and "left out: 1 refs whose mask is empty" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["earthreason", "refsegrs"])
def test_eval_runs_on_mask_files_and_frames_that_are_not_square(sets, tmp_path, option):
    options = f"--option {option} --data_root {sets[0]} --log_dir {tmp_path} --save_img"
    evaluation.main(evaluation.get_args(f"{options} --eval_model_path {TINY}".split()))
    rows = data.read_jsonl(tmp_path / "eval/predictions.jsonl")
    truth = sets[1][option]
    assert len(rows) == sum(len(p) for (split, _), (p, _) in truth.items() if split == "test")
    assert len(list((tmp_path / "eval/images").iterdir())) == len(rows)
    for row in rows:
        guess, mask = data.decode_rle(row["rle"]), truth["test", row["ref_id"]][1]
        assert (row["inter"], row["union"]) == ((guess & mask).sum(), (guess | mask).sum())


def test_a_mask_that_is_drawn_anew_sets_old_answers_aside(sets, tmp_path, capsys):
    shutil.copytree(sets[0] / "RefSegRS", tmp_path / "refsegrs")
    options = f"--option refsegrs --data_root {tmp_path} --log_dir {tmp_path} --oracle points"
    path = tmp_path / "refsegrs/masks/4.tif"
    for answer in ("", "answers are in", "of another run"):
        evaluation.main(evaluation.get_args(options.split()))
        assert answer in capsys.readouterr().out
        if answer:  # as many bytes, but others
            content, stored = io.BytesIO(), path.stat().st_size
            Image.new("RGB", (WIDTH, HEIGHT), "red").save(content, "TIFF")
            path.write_bytes(content.getvalue())
            assert path.stat().st_size == stored


def test_phrases_of_one_mask_share_its_image_and_other_masks_have_their_own(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "image.png")
    samples = []
    for width, name in ((8, "a.png"), (8, "a.png"), (9, "b.png")):
        Image.new("L", (width, 6)).save(tmp_path / name)
        record = (tmp_path / "image.png", ["a"], "object", "1", "test", tmp_path / name)
        data.add_sample(samples, *record)
    first, second, third = evaluation.open_images(samples)
    assert first is second and first.size == (8, 6) and third.size == (9, 6)


def test_eval_refuses_weights(capsys):
    with pytest.raises(SystemExit):
        evaluation.get_args(["--option", "risors:2,demo"])
    assert "weights are for training" in capsys.readouterr().err
