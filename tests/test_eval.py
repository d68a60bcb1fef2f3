"""Metrics against independent formulas, and the command as a user runs it."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import data
import eval as evaluation
import sampler
from sampler import InputError


def test_metrics_equal_a_few_lines_of_numpy_with_failures_empty_masks_and_any_shape():
    rng, rows, ious, total_inter, total_union = np.random.default_rng(0), [], [], 0, 0
    for i in range(60):
        height, width = rng.integers(3, 40, 2)
        truth = rng.random((height, width)) < rng.choice([0, 0.3, 0.7])
        guess = (truth ^ (rng.random((height, width)) < 0.2 * (i % 3))) & (i % 7 > 0)
        inter, union, iou = data.mask_iou(guess, truth)
        row = {"inter": inter, "union": union, "iou": iou, "failed": i % 7 == 0}
        rows.append({**row, "no_target": not truth.any(), "box_iou": i / 60, "point_acc": i % 2})
        both = np.count_nonzero(np.logical_and(guess, truth))
        any_ = np.count_nonzero(guess) + np.count_nonzero(truth) - both
        ious.append(both / any_ if any_ else 1.0)
        total_inter, total_union = total_inter + both, total_union + any_
    metrics = evaluation.summarize(rows)
    assert metrics["miou"] == pytest.approx(sum(ious) / 60)
    assert metrics["oiou"] == pytest.approx(total_inter / total_union)
    for t in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert metrics[f"pr@{t}"] == pytest.approx(sum(iou >= t for iou in ious) / 60)
    assert metrics["box_iou"] == pytest.approx(59 / 120)
    assert metrics["n_failed"] == 9 and metrics["point_acc"] == 0.5


def test_extra_boxes_and_a_wrong_number_of_labels_cost():
    mask, empty, none = np.ones((10, 10), bool), np.zeros((10, 10), bool), np.zeros((0, 4))
    score = lambda boxes, mask: evaluation.box_score(np.array(boxes), mask, "points")
    assert score([[0, 0, 10, 10]], mask) == 1
    assert score([[0, 0, 10, 10], [0, 0, 5, 10]], mask) == 0.5
    assert score(none, mask) == score([[0, 0, 10, 10]], empty) == 0
    assert score(none, empty) == 1
    points = np.array([[1, 1], [2, 2]])
    assert evaluation.point_score([1, 0], points, mask) == 0.5
    for labels in ([1], [1, 1, 1], None):
        assert evaluation.point_score(labels, points, mask) == 0


def test_flags_of_the_published_scripts_work_bare_and_with_a_value():
    use_think = lambda *given: evaluation.get_args(["--use_think", *given]).use_think
    assert use_think() and use_think("True") and not use_think("False")
    paper = evaluation.get_args(["--paper"])
    assert paper.k_min == 1 and paper.multimask


def test_the_best_of_n_does_not_look_at_the_truth():
    sure = {"sam_score": 0.9, "confidence": [0.9], "iou": 0.2}
    lucky = {"sam_score": 0.3, "confidence": [0.9], "iou": 0.95}
    chosen = evaluation.pick_best([lucky, sure])
    assert chosen["iou"] == 0.2 and chosen["oracle_iou"] == 0.95


def test_sam_gets_every_box_with_its_own_points_less_those_in_doubt():
    segmenter, image, args = Mock(), Image.new("RGB", (20, 20)), evaluation.get_args([])
    segmenter.segment_all = Mock(side_effect=lambda groups: groups)
    boxes = np.array([[0, 0, 4, 4], [10, 10, 14, 14]])
    grids = [np.array([[1, 1], [2, 2]]), np.array([[11, 11], [12, 12]])]
    answer = evaluation.Prediction("", boxes, grids, is_readable=True, labels=[1, 0, 0, 1])
    answer.confidence = [0.95, 0.89, 0.91, 0.99]
    (_, first, kept), (_, second, both) = evaluation.segment(segmenter, image, "", answer, args)
    assert first.tolist() == [[1, 1]] and kept.tolist() == [1]
    assert second.tolist() == grids[1].tolist() and both.tolist() == [0, 1]
    answer.labels, answer.confidence = None, []  # not readable: the boxes alone
    prompts = evaluation.segment(segmenter, image, "", answer, args)
    assert [len(points) for _, points, _ in prompts] == [0, 0]


def evaluate(folder, root, *options):
    """The metrics of a run in <folder>/eval."""
    options = [*options, "--data_root", str(root), "--log_dir", str(folder)]
    evaluation.main(evaluation.get_args(options))
    return json.loads((folder / "eval/metrics.json").read_text())


def same(a, b):
    return all(a[k] == pytest.approx(b[k]) for k in "n miou oiou box_iou point_acc".split())


@pytest.fixture(scope="module")
def evaluated(small_set, tmp_path_factory):
    """(folder, metrics, rows) of one whole evaluation of the base model."""
    folder = tmp_path_factory.mktemp("eval")
    metrics = evaluate(folder, small_set, "--use_think", "--save_img")
    return folder, metrics, data.read_jsonl(folder / "eval/predictions.jsonl")


def test_the_outputs_hold_what_the_contract_names(evaluated, small_set):
    folder, metrics, rows = evaluated
    keys = "n n_failed n_skipped miou oiou pr@0.5 pr@0.9 box_iou point_acc by_scale by_class"
    assert {*keys.split(), "seconds", "protocol"} <= metrics.keys()
    protocol = "option split model sam size prompts use_think points decoding metrics"
    assert set(protocol.split()) == metrics["protocol"].keys()
    keys = "ref_id image phrase answer_box answer_points box_px points_px labels confidence"
    assert all({*keys.split(), "rle", "inter", "union", "iou"} <= row.keys() for row in rows)
    assert len(rows) == metrics["n"] == len(data.load_samples("demo", small_set, "test"))
    assert sum(m["n"] for m in metrics["by_scale"].values()) == metrics["n"]
    assert len(list((folder / "eval/images").glob("*.png"))) == len(rows)
    assert any("<think>" in row["answer_box"] for row in rows)


def test_the_ious_follow_from_the_written_masks(evaluated, small_set):
    truths = {s.ref_id: s.mask for s in data.load_samples("demo", small_set, "test")}
    for row in evaluated[2]:
        guess, truth = data.decode_rle(row["rle"]), truths[row["ref_id"]]
        inter, union = (guess & truth).sum(), (guess | truth).sum()
        assert (row["inter"], row["union"]) == (inter, union)
        assert row["iou"] == pytest.approx(inter / union)


def test_a_cut_off_run_continues_to_the_same_metrics(evaluated, small_set, capsys):
    folder, metrics, _ = evaluated
    path = folder / "eval/predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:40])  # killed while it wrote the fourth
    again = evaluate(folder, small_set, "--use_think", "--save_img", "--max_img", "2")
    assert "3 answers are in" in capsys.readouterr().out
    assert same(again, metrics) and again["seconds"] is None
    assert len(list((folder / "eval/images").glob("*.png"))) == 2


def test_answers_of_other_settings_weights_or_truths_are_set_aside(small_set, tmp_path, capsys):
    sam, root = tmp_path / "sam.safetensors", tmp_path / "data"
    shutil.copy(sampler.TINY_SAM, sam)
    shutil.copytree(small_set, root)

    def printed(*options):
        evaluate(tmp_path, root, "--oracle", "points", "--sam_ckpt", str(sam), *options)
        return capsys.readouterr().out

    printed()
    assert "answers are in" in printed()
    for options in (["--points", "none"], ["--max_new_tokens", "3"], ["--split", "val"], []):
        assert "of another run" in printed(*options)
    assert (tmp_path / "eval/predictions.old.jsonl").exists()
    os.utime(sam, (0, 0))
    assert "of another run" in printed()
    path = root / "demo/instances.json"
    coco = json.loads(path.read_text())
    for annotation in coco["annotations"]:
        annotation["segmentation"] = data.encode_rle(np.eye(128) > 0)
    path.write_text(json.dumps(coco))
    assert "of another run" in printed()


def test_two_processes_give_the_metrics_of_one(evaluated, small_set, run, tmp_path):
    run(f"eval.py --data_root {small_set} --use_think", processes=2)
    metrics = json.loads((tmp_path / "runs/eval/metrics.json").read_text())
    assert same(metrics, evaluated[1])
    assert not list((tmp_path / "runs/eval").glob("*.rank*"))


def test_the_truth_as_oracle_scores_one_and_answers_cut_short_nothing(small_set, tmp_path):
    metrics = evaluate(tmp_path, small_set, "--oracle", "points")
    assert metrics["box_iou"] == metrics["point_acc"] == 1 and metrics["miou"] > 0.7
    metrics = evaluate(tmp_path, small_set, "--oracle", "box")
    assert metrics["box_iou"] == 1 and 0.5 < metrics["point_acc"] < 1
    assert evaluate(tmp_path, small_set, "--points", "none")["point_acc"] is None
    short = evaluate(tmp_path, small_set, "--max_new_tokens", "3")
    assert short["n_failed"] == short["n"] > 0 and short["miou"] == short["oiou"] == 0


def test_best_of_n_reports_its_oracle_apart(small_set, tmp_path, capsys):
    options = "--split val --best_of 3 --temperature 1"
    metrics = evaluate(tmp_path, small_set, *options.split())
    assert metrics["oracle_miou"] >= metrics["miou"]
    assert "not a result" in capsys.readouterr().out


def test_a_confidence_meets_theta_before_it_is_rounded():
    prediction = evaluation.Prediction("", np.array([[0, 0, 9, 9]]), [np.array([[4, 4]])])
    prediction.labels, prediction.confidence = [1], [0.89996]
    asked, segmenter = [], Mock(segment_all=lambda groups: asked.extend(groups) or [(None, 0)])
    args = evaluation.get_args(["--points", "fixed", "--k_min", "8"])  # --k_max has no effect
    evaluation.segment(segmenter, Image.new("RGB", (9, 9)), "", prediction, args)
    assert [len(points) for ((_, points, _),) in asked] == [0]


def test_one_image_of_the_user(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 170), "tan").save("photo.jpg")
    evaluation.main(evaluation.get_args("--image photo.jpg --query ship --use_think".split()))
    printed = capsys.readouterr().out
    assert "<think>" in printed and "whose IoU SAM itself puts at" in printed
    assert Image.open("runs/eval/photo_mask.png").size == (300, 170)
    assert Image.open("runs/eval/photo_overlay.png").width >= 300


@pytest.mark.parametrize(
    "options, message",
    [
        ("--image none.jpg --query ship", "error: cannot read none.jpg"),
        ("--image thin.png --query ship", "error: thin.png has (4, 1000) pixels"),
        ("--eval_model_path runs/nothing", "error: no model at runs/nothing"),
        ("--sam_ckpt nothing.pth", "error: --sam_ckpt nothing.pth cannot be loaded"),
        ("--option demo,RRSISD", "error: --option RRSISD: no such set in --data_root {root}"),
        ("--theta 2", "argument --theta: 2 is not from 0 to 1"),
        ("--best_of 3", "--best_of needs a --temperature"),
    ],
)
def test_bad_input_ends_in_one_line_that_names_it(
    small_set, options, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 1000)).save("thin.png")
    options = ["--data_root", str(small_set), "--version_name", "new", *options.split()]
    with pytest.raises(SystemExit) as stop:
        sampler.run_script(evaluation.main, lambda: evaluation.get_args(options))
    line = str(stop.value) if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message.format(root=small_set) in line.strip().splitlines()[-1]
    assert not list(Path("runs").glob("new/*"))  # a missing set is noticed before any is evaluated


def test_an_unforeseen_error_is_one_line_that_names_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        sampler.run_script(lambda args: {}["lost"], lambda: None)
    path = re.fullmatch(r"error: KeyError: 'lost' \(traceback: (.*)\)", str(stop.value))[1]
    assert f'File "{__file__}"' in Path(path).read_text()


def test_an_image_is_read_once_for_all_its_phrases_and_both_stages(tiny, small_set):
    samples = data.load_samples("demo", small_set, "test")
    todo = evaluation.share_out(samples, {}, 0, 1)
    paths, patches = {sample.image_path for sample, _ in todo}, []
    hook = lambda module, inputs, kwargs: patches.append(len(kwargs["grid_thw"]))
    handle = tiny[0].model.visual.register_forward_pre_hook(hook, with_kwargs=True)
    lines = evaluation.evaluate(*tiny, sampler.Segmenter(), todo, evaluation.get_args([]))
    handle.remove()
    assert len(lines) == len(todo) > len(paths) and any(line["answer_points"] for line in lines)
    assert patches == [len(paths)]


def test_several_sets_have_a_folder_each_and_one_table(small_set, tmp_path, capsys):
    for kind in ("demo", "images/demo"):
        for name in ("one", "two"):
            shutil.copytree(small_set / kind, tmp_path / "data" / kind.replace("demo", name))
    path = tmp_path / "data/two/refs(unc).p"
    path.write_bytes(pickle.dumps(data.read_refs(path)[:-2]))
    options = f"--data_root {tmp_path}/data --log_dir {tmp_path} --option one,two --oracle points"
    evaluation.main(evaluation.get_args(options.split()))
    *_, head, one, two, blank, definition = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["n", "mIoU"] and not blank and definition == evaluation.METRICS
    for name, row in (("one", one.split()), ("two", two.split())):
        metrics = json.loads((tmp_path / "eval" / name / "metrics.json").read_text())
        assert metrics["protocol"]["option"] == name
        assert row[:3] == [name, str(metrics["n"]), f"{metrics['miou']:.3f}"]


def test_a_second_evaluation_into_the_same_folder_is_refused(small_set, tmp_path):
    """It would move the answers that the first one is writing."""
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "eval.lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        options = ["--data_root", str(small_set), "--log_dir", str(tmp_path), "--oracle", "points"]
        with pytest.raises(InputError, match="another run is writing to .*eval"):
            evaluation.main(evaluation.get_args(options))
        other.stdin.close()
