"""Metrics against independent formulas, and the command as a user runs it."""

import json
import os
import pickle
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import eval as evaluation
import grpo
import sampler
import sft


def test_metrics_equal_a_few_lines_of_numpy_with_failures_empty_masks_and_any_shape():
    rng = np.random.default_rng(0)
    rows, masks = [], []
    for i in range(60):
        height, width = rng.integers(3, 40, 2)
        truth = rng.random((height, width)) < rng.choice([0, 0.3, 0.7])
        guess = truth ^ (rng.random((height, width)) < 0.2 * (i % 3))
        failed = i % 7 == 0
        if failed:
            guess = np.zeros_like(truth)
        inter, union, iou = data.mask_iou(guess, truth)
        box, points = rng.random(2)
        row = {"inter": inter, "union": union, "iou": iou, "failed": failed}
        row["no_target"] = not truth.any()
        rows.append({**row, "box_iou": box, "point_acc": points})
        masks.append((guess, truth))
    ious = []
    total_inter = total_union = 0
    for guess, truth in masks:
        both = np.count_nonzero(np.logical_and(guess, truth))
        any_ = np.count_nonzero(guess) + np.count_nonzero(truth) - both
        ious.append(both / any_ if any_ else 1.0)
        total_inter, total_union = total_inter + both, total_union + any_
    metrics = evaluation.summarize(rows)
    assert metrics["miou"] == pytest.approx(sum(ious) / 60)
    assert metrics["oiou"] == pytest.approx(total_inter / total_union)
    for t in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert metrics[f"pr@{t}"] == pytest.approx(sum(iou >= t for iou in ious) / 60)
    assert metrics["n_failed"] == sum(i % 7 == 0 for i in range(60))
    assert metrics["box_iou"] == pytest.approx(np.mean([row["box_iou"] for row in rows]))


def test_extra_boxes_and_a_wrong_number_of_labels_cost():
    true = np.array([0, 0, 10, 10])
    assert evaluation.box_score(np.array([[0, 0, 10, 10]]), true) == 1
    assert evaluation.box_score(np.array([[0, 0, 10, 10], [0, 0, 5, 10]]), true) == 0.5
    assert evaluation.box_score(np.zeros((0, 4)), true) == 0
    assert evaluation.box_score(np.zeros((0, 4)), np.zeros(4)) == 1
    assert evaluation.box_score(true[None], np.zeros(4)) == 0
    mask = np.ones((4, 4), bool)
    points = np.array([[1, 1], [2, 2]])
    assert evaluation.point_score([1, 0], points, mask) == 0.5
    assert evaluation.point_score([1], points, mask) == 0
    assert evaluation.point_score([1, 1, 1], points, mask) == 0
    assert evaluation.point_score(None, points, mask) == 0


def test_flags_of_the_published_scripts_work_bare_and_with_a_value():
    assert evaluation.get_args(["--use_think"]).use_think
    assert evaluation.get_args(["--use_think", "True", "--save_img", "False"]).use_think
    assert not evaluation.get_args(["--use_think", "False"]).use_think
    paper = evaluation.get_args(["--paper"])
    assert paper.k_min == 1 and paper.multimask


def test_the_next_command_evaluates_what_was_trained_on_what_it_was_trained_on():
    assert evaluation.next_command(Path("runs/sft"), sft.get_args([])) == (
        "python eval.py --eval_model_path runs/sft"
    )
    options = ["--option", "a:2,b", "--prompts", "sam", "--data_root", "my data"]
    command = evaluation.next_command(Path("runs/x"), grpo.get_args(options), "--use_think")
    args = evaluation.get_args(shlex.split(command)[2:])
    assert (args.option, args.prompts, args.data_root) == ("a,b", "sam", "my data")
    assert args.use_think and args.eval_model_path == "runs/x"


def test_the_best_of_n_does_not_look_at_the_truth():
    sure = {"sam_score": 0.9, "confidence": [0.9], "iou": 0.2}
    lucky = {"sam_score": 0.3, "confidence": [0.9], "iou": 0.95}
    chosen = evaluation.best([lucky, sure])
    assert chosen["iou"] == 0.2 and chosen["oracle_iou"] == 0.95


def test_sam_gets_every_box_with_its_own_points_less_those_in_doubt():
    class Recorder:
        def set_image(self, image, key):
            pass

        def segment_union(self, prompts):
            self.prompts = prompts
            return None, 0.0

    segmenter, image = Recorder(), Image.new("RGB", (20, 20))
    grids = [np.array([[1, 1], [2, 2]]), np.array([[11, 11], [12, 12]])]
    row = {"box_px": np.array([[0, 0, 4, 4], [10, 10, 14, 14]]), "grids": grids}
    row |= {"labels": [1, 0, 0, 1], "confidence": [0.95, 0.89, 0.91, 0.99]}
    evaluation.segment(segmenter, image, "key", row, evaluation.get_args([]))
    (_, first, kept), (_, second, both) = segmenter.prompts
    assert first.tolist() == [[1, 1]] and kept.tolist() == [1]
    assert second.tolist() == grids[1].tolist() and both.tolist() == [0, 1]
    evaluation.segment(segmenter, image, "key", row | {"labels": None}, evaluation.get_args([]))
    assert [len(points) for _, points, _ in segmenter.prompts] == [0, 0]  # the boxes alone


@pytest.fixture(scope="module")
def evaluated(small_set, tmp_path_factory):
    """metrics and rows of one whole evaluation of the base model."""
    folder = tmp_path_factory.mktemp("eval")
    args = ["--data_root", str(small_set), "--log_dir", str(folder), "--save_img", "--use_think"]
    evaluation.main(evaluation.get_args(args))
    rows = [json.loads(line) for line in open(folder / "eval/predictions.jsonl")]
    return folder, json.loads((folder / "eval/metrics.json").read_text()), rows


def test_the_outputs_hold_what_the_contract_names(evaluated, small_set):
    folder, metrics, rows = evaluated
    keys = "n n_failed n_skipped miou oiou pr@0.5 pr@0.9 box_iou point_acc by_scale by_class"
    assert {*keys.split(), "seconds", "protocol"} <= set(metrics)
    protocol = "option split model sam size prompts use_think points decoding metrics"
    assert set(protocol.split()) == set(metrics["protocol"])
    keys = "ref_id image phrase answer_box answer_points box_px points_px labels confidence"
    keys += " rle inter union iou"
    assert all(set(keys.split()) <= set(row) for row in rows)
    assert len(rows) == metrics["n"] == len(data.load_samples("demo", small_set, "test"))
    assert sum(m["n"] for m in metrics["by_scale"].values()) == metrics["n"]
    assert len(list((folder / "eval/images").glob("*.png"))) == len(rows)
    assert any("<think>" in row["answer_box"] for row in rows)


def test_the_ious_follow_from_the_written_masks(evaluated, small_set):
    """Through pycocotools where it is there, through the truth of the data set in any case."""
    _, _, rows = evaluated
    truths = {s.ref_id: s.mask for s in data.load_samples("demo", small_set, "test")}
    for row in rows:
        guess, truth = data.decode_rle(row["rle"]), truths[row["ref_id"]]
        inter, union = (guess & truth).sum(), (guess | truth).sum()
        assert (row["inter"], row["union"]) == (inter, union)
        assert row["iou"] == pytest.approx(inter / union)
    coco = pytest.importorskip("pycocotools.mask")
    for row in rows:
        truth = coco.encode(np.asfortranarray(truths[row["ref_id"]].astype(np.uint8)))
        theirs = coco.iou([row["rle"]], [truth], [0])[0, 0]
        assert theirs == pytest.approx(row["iou"])


def rerun(folder, small_set, *options):
    args = ["--data_root", str(small_set), "--log_dir", str(folder), "--use_think", *options]
    evaluation.main(evaluation.get_args(args))
    return json.loads((folder / "eval/metrics.json").read_text())


def same(a, b):
    return all(
        a[key] == pytest.approx(b[key]) for key in ("n", "miou", "oiou", "box_iou", "point_acc")
    )


def test_a_cut_off_run_continues_to_the_same_metrics(evaluated, small_set, capsys):
    folder, metrics, rows = evaluated
    path = folder / "eval/predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:40])  # killed while it wrote the fourth
    again = rerun(folder, small_set)
    assert "3 answers are in" in capsys.readouterr().out
    assert same(again, metrics)


def test_pictures_of_a_finished_run_are_drawn_later(evaluated, small_set):
    folder, _, rows = evaluated
    rerun(folder, small_set)
    for picture in (folder / "eval/images").glob("*.png"):
        picture.unlink()
    rerun(folder, small_set, "--save_img", "--max_img", "2")
    assert len(list((folder / "eval/images").glob("*.png"))) == 2


def test_answers_to_other_data_or_limits_are_set_aside(evaluated, small_set, tmp_path):
    from assets.make_demo import make_demo

    folder, metrics, _ = evaluated
    make_demo(tmp_path, counts={"test": 2})
    other = rerun(folder, tmp_path)
    assert other["n"] == len(data.load_samples("demo", tmp_path, "test")) != metrics["n"]
    assert (folder / "eval/predictions.old.jsonl").exists()
    short = rerun(folder, small_set, "--max_new_tokens", "3")
    assert short["n_failed"] == short["n"] == metrics["n"] and short["miou"] == 0
    assert same(rerun(folder, small_set), metrics)


def test_answers_of_another_protocol_are_not_resumed(evaluated, small_set, capsys):
    folder, metrics, _ = evaluated
    other = rerun(folder, small_set, "--points", "none")
    assert "answers are in" not in capsys.readouterr().out
    assert other["point_acc"] is None and other["n"] == metrics["n"]
    assert same(rerun(folder, small_set), metrics)


def test_answers_of_other_weights_or_truths_are_not_resumed(small_set, tmp_path, capsys):
    sam, root = tmp_path / "sam.safetensors", tmp_path / "data"
    shutil.copy(sampler.TINY_SAM, sam)
    shutil.copytree(small_set, root)
    options = ["--oracle", "points", "--sam_ckpt", str(sam)]
    rerun(tmp_path, root, *options)
    assert rerun(tmp_path, root, *options)["miou"] > 0.7
    assert "answers are in" in capsys.readouterr().out
    os.utime(sam, (0, 0))
    rerun(tmp_path, root, *options)
    assert "of another run" in capsys.readouterr().out
    path = root / "demo/instances.json"
    coco = json.loads(path.read_text())
    corner = np.zeros((128, 128), bool)
    corner[:5, :5] = True
    for annotation in coco["annotations"]:
        annotation["segmentation"] = data.encode_rle(corner)
    path.write_text(json.dumps(coco))
    rerun(tmp_path, root, *options)
    assert "of another run" in capsys.readouterr().out


def test_two_processes_give_the_metrics_of_one(evaluated, small_set, run, tmp_path):
    _, metrics, _ = evaluated
    run(f"eval.py --data_root {small_set} --use_think", processes=2)
    assert same(json.loads((tmp_path / "runs/eval/metrics.json").read_text()), metrics)
    assert not list((tmp_path / "runs/eval").glob("*.rank*"))


def test_the_truth_as_oracle_scores_one(small_set, tmp_path):
    args = ["--data_root", str(small_set), "--log_dir", str(tmp_path), "--oracle"]
    evaluation.main(evaluation.get_args([*args, "points"]))
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert metrics["box_iou"] == metrics["point_acc"] == 1 and metrics["miou"] > 0.7
    evaluation.main(evaluation.get_args([*args, "box"]))
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert metrics["box_iou"] == 1 and 0.5 < metrics["point_acc"] < 1


def test_best_of_n_reports_its_oracle_apart(small_set, tmp_path, capsys):
    args = ["--data_root", str(small_set), "--log_dir", str(tmp_path), "--split", "val"]
    evaluation.main(evaluation.get_args([*args, "--best_of", "3", "--temperature", "1"]))
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert metrics["oracle_miou"] >= metrics["miou"]
    assert metrics["n"] == len(data.load_samples("demo", small_set, "val"))
    assert "not a result" in capsys.readouterr().out


def test_one_image_of_the_user(run, tmp_path):
    Image.new("RGB", (300, 170), "tan").save(tmp_path / "photo.jpg")
    printed = run("eval.py --image photo.jpg --query ship --use_think")
    assert "<think>" in printed and "SAM's own score" in printed
    assert Image.open(tmp_path / "runs/eval/photo_mask.png").size == (300, 170)
    assert Image.open(tmp_path / "runs/eval/photo_overlay.png").width >= 300


@pytest.mark.parametrize(
    "options, message",
    [
        ("--image none.jpg --query ship", "error: no image at none.jpg"),
        ("--eval_model_path runs/nothing", "error: no model at runs/nothing"),
        ("--sam_ckpt nothing.pth", "error: --sam_ckpt nothing.pth does not exist"),
        ("--data_root nowhere --option RRSISD", "error: --data_root nowhere is not a folder"),
        ("--image none.jpg", "--image and a non-empty --query go together"),
    ],
)
def test_bad_input_ends_in_one_line_that_names_it(run, options, message):
    assert message in run(f"eval.py {options}", fails=True).strip().splitlines()[-1]


def test_an_image_is_read_once_for_all_its_phrases_and_both_stages(tiny, small_set, monkeypatch):
    model, processor = tiny
    samples = data.load_samples("demo", small_set, "test")
    todo = evaluation.share_out(samples, {}, 0, 1)
    paths, read, patches = {s.image_path for s, _ in todo}, type(model.model), []
    encode = read.get_image_features

    def count(self, pixels, grid, **options):
        patches.append(len(grid))
        return encode(self, pixels, grid, **options)

    monkeypatch.setattr(read, "get_image_features", count)
    args = evaluation.get_args([])
    lines = evaluation.evaluate(model, processor, sampler.Segmenter(), todo, args)
    assert len(lines) == len(todo) > len(paths) and any(line["answer_points"] for line in lines)
    assert patches == [len(paths)]


def test_an_image_too_thin_to_read_is_one_line(run, tmp_path):
    Image.new("RGB", (4, 1000)).save(tmp_path / "thin.png")
    error = run(f"eval.py --image {tmp_path}/thin.png --query ship", fails=True)
    assert error.strip().splitlines()[-1].startswith("error: an image of 4 x 1000, expected sides")


def test_several_sets_have_a_folder_each_and_one_table(run, small_set, tmp_path):
    for kind in ("demo", "images/demo"):
        shutil.copytree(small_set / kind, tmp_path / "data" / kind.replace("demo", "one"))
        shutil.copytree(small_set / kind, tmp_path / "data" / kind.replace("demo", "two"))
    refs = data.read_refs(tmp_path / "data/two/refs(unc).p")
    (tmp_path / "data/two/refs(unc).p").write_bytes(pickle.dumps(refs[:-2]))
    printed = run("eval.py --data_root data --option one,two --oracle points")
    *_, head, one, two, blank, definition = printed.splitlines()
    assert head.split()[:2] == ["n", "mIoU"] and not blank and definition == evaluation.METRICS
    for name, row in (("one", one.split()), ("two", two.split())):
        metrics = json.loads((tmp_path / "runs/eval" / name / "metrics.json").read_text())
        assert metrics["protocol"]["option"] == name
        values = [f"{metrics[key]:.3f}" for key in ("miou", "oiou")]
        assert row[:4] == [name, str(metrics["n"]), *values]
    # what is not there is noticed before anything is evaluated
    call = "eval.py --data_root data --option one,twoo --oracle points --version_name new"
    assert "--option twoo: no twoo/refs(unc).p under data" in run(call, fails=True)
    assert not list((tmp_path / "runs/new").iterdir())
