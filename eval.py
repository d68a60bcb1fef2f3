"""Evaluate: phrase + image -> box -> points -> SAM's mask, and the metrics over a whole split.

For every phrase of the split:
1. **Stage I.** The model answers with a box (`--oracle box` takes the true one).
2. **Stage II.** It judges a grid of points inside that box. Labels that it doubts (p < theta) are
   dropped (`--oracle points` takes true box and labels: what SAM makes of them, without a model).
3. **Stage III.** SAM turns box and points into a mask, at the truth's native size.
4. One line goes to predictions.jsonl. A run that was cut off continues from there.

    IoU = I / U    mIoU = mean IoU    oIoU = sum I / sum U    Pr@t = share of samples with IoU >= t

All metrics run over *all* samples. An answer without a readable box counts as an empty mask with
IoU 0. Where there is nothing to find, an empty mask has IoU 1, and any other has IoU 0. If only the
labels cannot be read, SAM gets the box alone and the point accuracy is 0.

With `--prompts sam` one answer takes the place of stages I and II: a list of all instances, each
with a box and two points. The list may be empty.

    python eval.py                                   # runs/grpo, else runs/sft, else the base model
    python eval.py --use_think --save_img            # reason first; write overlays
    python eval.py --oracle points --points none     # SAM with true boxes only
    python eval.py --image photo.jpg --query "the ship on the left"
    python eval.py --option refsegrs,risbench --data_root …          # several sets, one table
    torchrun --nproc_per_node 4 eval.py --eval_model_path … --data_root … --option RRSISD \\
        --sam_ckpt sam_vit_h_4b8939.pth
"""

import argparse
import json
import math
import os
import shutil
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import sampler
from sampler import InputError, number

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
SCALES = {"small": "< 1 %", "medium": "1-5 %", "large": "> 5 %"}
METRICS = (
    "mIoU, also gIoU: mean IoU of all phrases, 1 for nothing found where there is nothing; "
    "oIoU, also cIoU: sum I / sum U of all phrases"
)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, on_off = sampler.flag_adder(parser), argparse.BooleanOptionalAction
    count, natural = number(int, 1), number(int, 0)
    positive, share = number(float, 0, 1e6), number(float, 0, 1)
    # --use_think, --use_think True and --use_think False all work, as in the published scripts
    flag = lambda text: {"true": True, "false": False}.get(text.lower(), text)
    bare = {"type": flag, "choices": [True, False], "nargs": "?", "const": True, "default": False}
    # what to evaluate
    add("--eval_model_path", help="model folder or hub name (default: runs/grpo, runs/sft or base)")
    add("--option", default="demo", help="set: demo, RRSISD, refsegrs ...; several: a,b")
    add("--data_root", default="demo_data", help="folder that holds the data set")
    add("--split", default="test", help="split to evaluate")
    add("--skip_bad", action=on_off, default=False, help="leave bad records out, and list them")
    add("--size", type=int, choices=[480, 840, 1000], help="compare at this size, not the native")
    add("--image", help="segment this image file instead of a split; needs --query")
    add("--query", help="phrase for --image")
    # the model
    add("--prompts", choices=["points", "sam"], default="points", help=data.PROMPTS_HELP)
    add("--use_think", **bare, help="reason before answering")
    add("--temperature", type=positive, default=0.0, help="0: greedy")
    add("--best_of", type=count, default=1, help="answers per phrase; SAM and confidence pick one")
    add("--max_new_tokens", type=count, help="limit of one answer (256; 1024 with --prompts sam)")
    add("--batch_size", type=count, default=64, help="phrases per batch")
    # points and SAM
    add("--points", choices=["grid", "fixed", "random", "none"], default="grid", help="placement")
    add("--alpha", type=positive, default=16, help="cells per side: alpha * side / image side")
    add("--k_min", type=count, default=3, help="fewest cells per side; also k of --points fixed")
    add("--k_max", type=count, default=6, help="most cells per side")
    add("--theta", type=share, default=0.9, help="drop labels less probable, at --temperature")
    add(
        "--sam_ckpt",
        default=str(sampler.TINY_SAM),
        help="file of SAM or MobileSAM; folder or hub name of SAM, SAM-HQ, SAM 2 or 3",
    )
    add("--multimask", action=on_off, default=False, help="best of SAM's three masks")
    add("--paper", action=on_off, default=False, help="as published: --k_min 1 --multimask")
    add("--oracle", choices=["box", "points"], help="use the true box, or the true box and labels")
    # output
    add("--log_dir", default="runs", help="results go to <log_dir>/<version_name>")
    add("--version_name", default="eval", help="name of this run")
    add("--save_img", **bare, help="write overlay pictures")
    add("--max_img", type=natural, default=100, help="how many overlays at most")
    add("--resume", action=on_off, default=True, help="continue a run that was cut off")
    add("--seed", type=number(int, 0, 2**32), default=0, help="for sampling and --points random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args(argv)
    if args.paper:
        args.k_min, args.multimask = 1, True
    is_sam, is_many = args.prompts == "sam", args.best_of > 1
    args.use_think = args.use_think or is_sam
    args.max_new_tokens = args.max_new_tokens or (1024 if is_sam else 256)
    for is_wrong, line in (
        (bool(args.image) != bool(args.query), "--image and --query go together"),
        (args.image and (args.oracle or is_many), "--oracle and --best_of need a set, not --image"),
        (args.k_min > args.k_max and args.points in ("grid", "random"), "--k_max is below --k_min"),
        (is_many and not args.temperature, "--best_of needs a --temperature, such as 0.9"),
        (is_many and is_sam, "--best_of cannot compare the lists of --prompts sam"),
        (is_sam and args.oracle == "box" and args.points != "none", "--oracle box: --points none"),
        (":" in args.option, "--option: weights are for training, give names alone"),
    ):
        if is_wrong:
            parser.error(line)
    return args


# ------------------------------------------------------------------------- the three stages


@dataclass
class Prediction:
    """What the model answers to one phrase, in pixels."""

    answer_box: str | None  # the texts; None if the truth took their place
    boxes: np.ndarray  # (N, 4)
    points: list  # N arrays (K, 2), the points of each box
    is_readable: bool = True
    is_repaired: bool = False  # whether the JSON of --prompts sam was not valid
    answer_points: str | None = None
    labels: list | None = None  # of all points; None if they cannot be read
    confidence: list = field(default_factory=list)  # of all points

    @property
    def all_points(self):
        return np.concatenate([np.zeros((0, 2)), *self.points])  # (sum of all K, 2)


class ImagePrefix(NamedTuple):
    """Images (B), and their KV cache where prompts can continue from it."""

    images: list
    cache: object = None  # sampler.PrefixCache of the distinct images
    rows: list = None  # (B,), the row of each image in it


def prefill_images(model, processor, images):
    """The ImagePrefix of images (B). An object that is there several times is computed once."""
    if model is None or not sampler.shares_prefix(model):
        return ImagePrefix(images)
    distinct = {id(image): image for image in images}
    rows = [list(distinct).index(id(image)) for image in images]
    batch = data.collate_images(processor, list(distinct.values()))
    return ImagePrefix(images, sampler.prefill(model, batch), rows)


def generate_answers(model, processor, prefix, asked, prompts, max_new_tokens, args):
    """Prompts about images number `asked` -> [(text, probability of each character)]."""
    if prefix.cache:
        rows = [prefix.rows[i] for i in asked]
        cache = sampler.extend(model, prefix.cache, rows, data.collate_text(processor, prompts))
    else:
        images = [prefix.images[i] for i in asked]
        cache = sampler.prefill(model, data.collate(processor, images, prompts))
    answers = sampler.generate(model, processor, cache, max_new_tokens, args.temperature)
    opening = data.think_opening(processor)
    return [(opening + text, np.pad(probs, (len(opening), 0))) for text, probs in answers]


def predict_boxes(model, processor, prefix, phrases, args):
    """Stage I: a Prediction with boxes for each phrase (B), with --prompts sam also with points."""
    images, everyone = prefix.images, range(len(phrases))
    frames = [sampler.answer_frame(model, processor, *image.size) for image in images]
    task = "sam" if args.prompts == "sam" else "box"
    if task == "sam":
        prompts = [data.sam_prompt(*pair) for pair in zip(phrases, frames)]
    else:
        prompts = [data.box_prompt(*pair, args.use_think) for pair in zip(phrases, frames)]
    limit = args.max_new_tokens
    answers = generate_answers(model, processor, prefix, everyone, prompts, limit, args)
    predictions = []
    for (text, _), image, frame in zip(answers, images, frames):
        answer = data.read_answer(text, task).to_pixels(frame, image.size)
        flags = answer.is_readable, answer.is_repaired
        predictions.append(Prediction(text, answer.boxes, answer.points, *flags))
    return predictions


def place_points(prediction, size, phrase, args):
    """Put points into each box of a Prediction, as --points says. size: (W, H) of the image."""
    if args.prompts == "points":  # else the answer has points
        k_max = args.k_min if args.points == "fixed" else args.k_max
        # random points are drawn by phrase, whatever the batch, the process or resuming
        rng = np.random.default_rng([args.seed, zlib.crc32(phrase.encode())])
        prediction.points = []
        for box in prediction.boxes:
            points = sampler.grid_points(box, *size, args.alpha, args.k_min, k_max)
            if args.points == "random":
                points = sampler.random_points(box, len(points), rng)
            prediction.points.append(points)
    if args.points == "none":
        prediction.points = [points[:0] for points in prediction.points]


def predict_labels(model, processor, prefix, phrases, predictions, args):
    """Stage II: label the points of the Predictions (B), in place."""
    counts = [len(prediction.all_points) for prediction in predictions]
    asked = [i for i, count in enumerate(counts) if count]
    if not asked:
        return
    prompts = []
    for i in asked:
        size = prefix.images[i].size
        frame = sampler.answer_frame(model, processor, *size)
        points = data.rescale(predictions[i].all_points, size, frame)
        prompts.append(data.point_prompt(phrases[i], points, frame, args.use_think))
    limit = max(args.max_new_tokens, 2 * max(counts) + 32)  # a label and a comma each
    answers = generate_answers(model, processor, prefix, asked, prompts, limit, args)
    for i, (text, char_probs) in zip(asked, answers):
        predictions[i].answer_points, found = text, data.find_labels(text)
        if found and len(found[1]) == counts[i]:  # never a partial match of labels to points
            places, predictions[i].labels = found
            predictions[i].confidence = char_probs[places].tolist()


def segment(segmenter, image, key, prediction, args):
    """Stage III: boxes and the points that the model is sure of -> (mask (H, W), SAM's score)."""
    if not len(prediction.boxes):
        return np.zeros(image.size[::-1], dtype=bool), 0.0
    prompts, start = [], 0
    for box, points in zip(prediction.boxes, prediction.points):  # each box with its own points
        part = slice(start, start + len(points))
        keep, labels = np.zeros(len(points), dtype=bool), np.zeros(len(points))
        if prediction.labels is not None:  # else SAM gets the box alone
            labels = np.array(prediction.labels[part])
            keep = sampler.is_confident(prediction.confidence[part], args.theta)
        prompts.append((box, points[keep], labels[keep]))
        start = part.stop
    segmenter.set_image(image, (key, image.size))
    return segmenter.segment_all([prompts])[0]


def target_instances(truth, prompts):
    """[(box (4,), its points)] of a mask (H, W): one box, or with --prompts sam all instances."""
    if prompts == "sam":
        return data.true_instances(truth)
    return [(data.mask_to_box(truth), np.zeros((0, 2)))] if truth.any() else []


def predict(model, processor, images, phrases, truths, args):
    """Stages I and II: images and phrases (B) -> B Predictions. truths: masks (B), for --oracle."""
    prefix = prefill_images(model, processor, images)
    # Stage I
    if args.oracle:
        predictions = []
        for truth in truths:
            found = target_instances(truth, args.prompts)
            boxes = np.reshape([box for box, _ in found], (-1, 4))
            predictions.append(Prediction(None, boxes, [points for _, points in found]))
    else:
        predictions = predict_boxes(model, processor, prefix, phrases, args)
    # Stage II
    for prediction, image, phrase in zip(predictions, images, phrases):
        place_points(prediction, image.size, phrase, args)
    if args.prompts == "points" and args.oracle != "points":
        predict_labels(model, processor, prefix, phrases, predictions, args)
    else:  # nobody has to be asked
        for prediction, truth in zip(predictions, truths):
            points = prediction.all_points
            is_true = args.prompts == "points"  # else the model has placed them on the target
            labels = sampler.label_points(points, truth) if is_true else np.ones(len(points), int)
            prediction.labels, prediction.confidence = labels.tolist(), [1.0] * len(points)
    return predictions


# ------------------------------------------------------------------------- metrics


def box_score(boxes, mask, prompts):
    """IoU of predicted boxes (N, 4) with the true ones under the best matching, divided by the
    larger number: extra and missing boxes cost. Where there is nothing to find, 1 for no box."""
    true = [box for box, _ in data.merge_duplicates(target_instances(mask, prompts))]
    return data.matched_iou(boxes, true) if true else float(not len(boxes))


def point_score(labels, points_px, mask):
    """Share of points (N, 2) labelled right; 0 without as many labels as points. Where there is
    nothing to find, 1 for no points."""
    if labels is None or len(labels) != len(points_px) or not len(labels):
        return float(not len(points_px) and not mask.any())
    return float((np.array(labels) == sampler.label_points(points_px, mask)).mean())


def answer_scores(prediction, truth, prompts):
    """(box IoU, point accuracy) of a Prediction; 0 if unreadable, even with nothing to find."""
    if not prediction.is_readable:
        return 0.0, 0.0
    points = point_score(prediction.labels, prediction.all_points, truth)
    return box_score(prediction.boxes, truth, prompts), points


def compare_masks(mask, truth, size):
    """data.mask_iou at native size, or (--size) resized to size x size, as some papers do."""
    if not size:
        return data.mask_iou(mask, truth)
    resize = lambda m: np.asarray(Image.fromarray(m).resize((size, size), Image.NEAREST))
    inter, union, iou = data.mask_iou(resize(mask), resize(truth))
    # NOTE: a small target can vanish at that size, and finding nothing is still a miss
    return inter, union, iou if union or not truth.any() else 0.0


def score(prediction, sample, sentence, truth, mask, sam_score, args):
    """The line of predictions.jsonl for one phrase."""
    inter, union, iou = compare_masks(mask, truth, args.size)
    box_iou, point_acc = answer_scores(prediction, truth, args.prompts)
    share = data.box_scale(data.mask_to_box(truth), *truth.shape[::-1])
    return {
        "ref_id": sample.ref_id,
        "sentence": sentence,
        "image": sample.image_path.name,
        "phrase": sample.phrases[sentence],
        "class_name": sample.class_name,
        "scale": data.size_word(share) if share else None,
        "no_target": not truth.any(),
        "answer_box": prediction.answer_box,
        "answer_points": prediction.answer_points,
        "box_px": prediction.boxes.round(2).tolist(),
        "points_px": prediction.all_points.round(2).tolist(),
        "labels": prediction.labels,
        "confidence": [round(p, 4) for p in prediction.confidence],
        "sam_score": round(sam_score, 4),
        "rle": data.encode_rle(mask),
        "inter": inter,
        "union": union,
        "iou": iou if prediction.is_readable else 0.0,
        "box_iou": box_iou,
        "point_acc": None if args.points == "none" else point_acc,
        "failed": not prediction.is_readable,
        "repaired": prediction.is_repaired,
    }


def pick_best(candidates):
    """Of several answers to one phrase, the one that SAM and the model trust most. The truth is not
    looked at; the IoU of a pick that peeks is kept apart as `oracle_iou`."""
    trust = lambda row: row["sam_score"] * np.mean(row["confidence"] or [0.5])
    return {**max(candidates, key=trust), "oracle_iou": max(row["iou"] for row in candidates)}


def summarize(rows):
    """Metrics of lines of predictions.jsonl; {} for none."""
    if not rows:
        return {}
    iou = np.array([row["iou"] for row in rows])
    no_target = np.array([row["no_target"] for row in rows])
    points = [row["point_acc"] for row in rows if row["point_acc"] is not None]
    union = sum(row["union"] for row in rows)
    oiou = sum(row["inter"] for row in rows) / union if union else 1.0
    return {
        "n": len(rows),
        "n_failed": sum(row["failed"] for row in rows),
        "n_repaired": sum(row.get("repaired", False) for row in rows),
        "n_no_target": int(no_target.sum()),
        "miou": iou.mean(),
        "oiou": oiou,
        "giou": iou.mean(),  # the names in papers on questions without a target
        "ciou": oiou,
        "miou_target": iou[~no_target].mean() if not no_target.all() else None,
        "no_target_acc": (iou[no_target] == 1).mean() if no_target.any() else None,
        **{f"pr@{t}": (iou >= t).mean() for t in THRESHOLDS},
        "box_iou": np.mean([row["box_iou"] for row in rows]),
        "point_acc": np.mean(points) if points else None,  # None: no points were asked for
    }


def summarize_groups(rows):
    """`summarize` of all rows, of those of each scale and of each class."""
    group = lambda key, name: summarize([row for row in rows if row[key] == name])
    metrics = summarize(rows)
    metrics["by_scale"] = {name: m for name in SCALES if (m := group("scale", name))}
    classes = sorted({row["class_name"] for row in rows})
    metrics["by_class"] = {name: group("class_name", name) for name in classes}
    if "oracle_iou" in rows[0]:
        metrics["oracle_miou"] = np.mean([row["oracle_iou"] for row in rows])
    return metrics


# ------------------------------------------------------------------------- batches and sets


def open_images(samples):
    """Their images, resized to their masks. Samples of one image share one object."""
    keys = [(sample.image_path, sample.size or sample.segmentation) for sample in samples]
    images = {key: sample.image() for key, sample in dict(zip(keys, samples)).items()}
    return [images[key] for key in keys]


def evaluate(model, processor, segmenter, batch, args):
    """All three stages for a batch of (sample, index of its phrase), each phrase --best_of times ->
    lines of predictions.jsonl."""
    n, samples = args.best_of, [sample for sample, _ in batch]
    images, truths = open_images(samples), [sample.mask for sample in samples]
    repeat = lambda values: [value for value in values for _ in range(n)]
    phrases = repeat(sample.phrases[i] for sample, i in batch)
    predictions = predict(model, processor, repeat(images), phrases, repeat(truths), args)
    lines = []
    for k, (sample, i) in enumerate(batch):
        candidates = []
        for prediction in predictions[k * n : k * n + n]:
            mask, sam_score = segment(segmenter, images[k], sample.image_path, prediction, args)
            candidates.append(score(prediction, sample, i, truths[k], mask, sam_score, args))
        lines.append(pick_best(candidates) if n > 1 else candidates[0])
    return lines


def validate(model, processor, samples, prompts="points", batch_size=64, limit=200):
    """Greedy box IoU and point accuracy, of `limit` samples spread evenly, without SAM:
    {"no think" and "think": {"box_iou", "point_acc"}}; --prompts sam always thinks. Every process
    takes its share, and all get the result. {} without samples."""
    if not samples:
        return {}
    args, (rank, world) = get_args(["--prompts", prompts]), sampler.rank_and_world()
    picks = np.linspace(0, len(samples) - 1, min(limit, len(samples))).astype(int)
    own, scores = [samples[i] for i in picks[rank::world]], {}
    for think in [True] if prompts == "sam" else [False, True]:
        args.use_think = think
        totals = torch.zeros(3, dtype=torch.float64, device=model.device)  # IoU, accuracy, number
        starts = range(0, len(own), batch_size)
        for start in tqdm(starts, "validating", disable=rank > 0, leave=False):
            batch = own[start : start + batch_size]
            truths, phrases = [s.mask for s in batch], [s.phrases[0] for s in batch]
            predictions = predict(model, processor, open_images(batch), phrases, truths, args)
            for prediction, truth in zip(predictions, truths):
                both = answer_scores(prediction, truth, prompts)
                totals += torch.tensor([*both, 1], device=model.device)
        if world > 1:
            dist.all_reduce(totals)
        box_iou, point_acc = (totals[:2] / totals[2]).tolist()
        scores["think" if think else "no think"] = {"box_iou": box_iou, "point_acc": point_acc}
    return scores


def describe_run(args, path):
    """The protocol: what was run, for metrics.json and the head of the table."""
    scaled = f"alpha={args.alpha:g} k={args.k_min}-{args.k_max}"
    cells = f"k={args.k_min}" if args.points == "fixed" else scaled
    grid = f"{args.points} {cells} theta={args.theta:g}"
    points = "two per instance" if args.prompts == "sam" else grid
    sampling = f"tau={args.temperature:g} best of {args.best_of}"
    sam = Path(args.sam_ckpt).name if Path(args.sam_ckpt).exists() else args.sam_ckpt
    return {
        "option": args.option,
        "split": args.split,
        "model": f"oracle {args.oracle}" if args.oracle else path,
        "sam": "tiny_sam" if args.sam_ckpt == str(sampler.TINY_SAM) else sam,
        "size": f"{args.size} x {args.size}, as some papers" if args.size else "native",
        "prompts": args.prompts,
        "use_think": args.use_think,
        "points": ("none" if args.points == "none" else points) + " multimask" * args.multimask,
        "decoding": sampling if args.temperature else "greedy",
        "metrics": METRICS,
    }


def gather_predictions(folder):
    """Merge the files of all processes into predictions.jsonl: {(ref_id, sentence): row}."""
    path = folder / "predictions.jsonl"
    parts = [path, *sorted(folder.glob("predictions.jsonl.rank*"))]
    rows = [row for part in parts for row in data.read_jsonl(part)]
    rows = {(row["ref_id"], row["sentence"]): row for row in rows}
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    os.replace(new, path)
    for part in parts[1:]:
        part.unlink()
    return rows


def start_or_resume(folder, args, samples, protocol):
    """(ref_id, sentence) of the answers in `folder`, if settings and files of the data, the model
    and SAM are as they were. Else they are moved aside."""
    files = {*sampler.weight_files(args.sam_ckpt), *sampler.weight_files(args.eval_model_path)}
    files |= {sample.image_path for sample in samples}
    files |= {s.segmentation for s in samples if isinstance(s.segmentation, Path)}
    versions = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(files)]
    state = [protocol, versions, data.checksum(samples), args.seed, args.max_new_tokens]
    state = zlib.crc32(repr(state).encode())
    folder.mkdir(parents=True, exist_ok=True)
    done, settings = set(gather_predictions(folder)), folder / "args.json"
    is_same = [row.get("state") for row in data.read_jsonl(settings)] == [state]
    if done and args.resume and is_same:
        print(f"{len(done)} answers are in {folder}/predictions.jsonl (--no-resume starts over)")
    elif done:
        os.replace(folder / "predictions.jsonl", folder / "predictions.old.jsonl")
        (folder / "metrics.json").unlink(missing_ok=True)
        print(f"{len(done)} answers of another run are now in {folder}/predictions.old.jsonl")
        done = set()
    settings.write_text(json.dumps({**vars(args), "state": state}))
    return done


def share_out(samples, done, rank, world):
    """What this process has to do: (sample, index of its phrase), less what is `done`. The phrases
    of an image stay together, so it is encoded once."""
    by_path = lambda sample: str(sample.image_path)
    own = set(sorted(set(map(by_path, samples)))[rank::world])  # paths of images
    samples = sorted((s for s in samples if by_path(s) in own), key=by_path)
    todo = [(sample, i) for sample in samples for i in range(len(sample.phrases))]
    return [(sample, i) for sample, i in todo if (sample.ref_id, i) not in done]


def evaluate_set(args, folder, samples, n_skipped, model, processor, segmenter):
    """The three stages over one set, and its metrics ({} but for process 0)."""
    (rank, world), start = sampler.rank_and_world(), time.time()
    protocol = describe_run(args, args.eval_model_path)

    # 1. What an earlier run has not done.
    shared = [start_or_resume(folder, args, samples, protocol) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(shared)
    done = shared[0]
    todo = share_out(samples, done, rank, world)

    # 2. The three stages, batch by batch.
    ious, step = [], max(1, args.batch_size // args.best_of)
    batches = [todo[i : i + step] for i in range(0, len(todo), step)]
    suffix = f".rank{rank}" if rank else ""
    with open(folder / f"predictions.jsonl{suffix}", "a") as file:
        for batch in (bar := tqdm(batches, "evaluating", disable=rank > 0)):
            lines = evaluate(model, processor, segmenter, batch, args)
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            ious += [line["iou"] for line in lines]
            bar.set_postfix(miou=f"{np.mean(ious):.3f}")
    if world > 1:
        dist.barrier()
    if rank > 0:
        return {}

    # 3. Metrics, of what was written.
    rows = list(gather_predictions(folder).values())
    expected = sum(len(sample.phrases) for sample in samples)
    if len(rows) != expected:
        hint = "does another process write there, or do the machines not share it?"
        raise InputError(f"{len(rows)} of {expected} answers are in {folder}: {hint}")
    metrics = {**summarize_groups(rows), "n_skipped": n_skipped, "protocol": protocol}
    metrics["seconds"] = None if done else round(time.time() - start, 1)  # of a part: no measure
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, default=float))
    report(metrics)
    took = "continued" if done else f"{metrics['seconds']} s"
    print(f"{took}; written to {folder}: metrics.json, predictions.jsonl")
    if args.save_img:
        save_pictures(folder / "images", rows, samples, args)
    return metrics


# ------------------------------------------------------------------------- pictures and tables


def draw_overlay(image, row, caption, theta, mask, truth=None, side=512):
    """The image, enlarged to about `side` pixels, and beside it the answer: mask in cyan, truth
    outlined in yellow, box in white, points green for 1 and red for 0, small where the model's
    doubt dropped them. An image of over 1024 pixels is shrunk."""
    longest = max(image.size)
    zoom = max(1, round(side / longest)) if longest <= 1024 else 1024 / longest
    size = tuple(math.ceil(length * zoom) for length in image.size)
    resize = lambda m: np.asarray(Image.fromarray(m).resize(size, Image.NEAREST))
    pixels = np.array(data.paint_mask(image.resize(size), resize(mask), 2))
    if truth is not None:
        pixels[data.outline(resize(truth), 2)] = (255, 220, 0)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for box in row["box_px"]:
        draw.rectangle((np.array(box) * zoom).tolist(), outline="white", width=2)
    points = np.array(row["points_px"]) * zoom
    for (x, y), label, confidence in zip(points, row["labels"] or (), row["confidence"]):
        r = 5 if confidence >= theta else 2
        draw.ellipse([x - r, y - r, x + r, y + r], fill="lime" if label else "red", outline="black")
    sheet = Image.new("RGB", (2 * size[0] + 4, size[1] + 28), "white")
    sheet.paste(image.resize(size), (0, 0))
    sheet.paste(picture, (size[0] + 4, 0))
    font = ImageFont.load_default(18)
    ImageDraw.Draw(sheet).text((4, size[1] + 3), caption, fill="black", font=font)
    return sheet


def save_pictures(folder, rows, samples, args):
    """Overlays of the first --max_img rows."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    samples = {sample.ref_id: sample for sample in samples}
    for row in rows[: args.max_img]:
        sample, mask = samples[row["ref_id"]], data.decode_rle(row["rle"])
        caption = f"{row['phrase']} (IoU {row['iou']:.2f})"
        picture = draw_overlay(sample.image(), row, caption, args.theta, mask, sample.mask)
        picture.save(folder / f"{row['ref_id']}_{row['sentence']}.png")
    print(f"{len(rows[: args.max_img])} pictures in {folder}")


def table(groups):
    """The text of a table of metrics, with a line for each name in `groups`."""
    names = ["n", "mIoU", "oIoU", *(f"Pr@{t}" for t in THRESHOLDS), "box IoU", "points"]
    keys = ["n", "miou", "oiou", *(f"pr@{t}" for t in THRESHOLDS), "box_iou", "point_acc"]
    if any(m["n_no_target"] for m in groups.values()):
        names, keys = [*names, "none"], [*keys, "no_target_acc"]
    lines = [f"{'':<24}" + "".join(f"{name:>8}" for name in names)]
    for name, m in groups.items():
        cells = ["-" if m[k] is None else m[k] if k == "n" else f"{m[k]:.3f}" for k in keys]
        lines.append(f"{name[:23]:<24}" + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)


def report(metrics):
    """Print how a set was evaluated, the table, and what the metrics mean."""
    protocol = {key: value for key, value in metrics["protocol"].items() if key != "metrics"}
    print(" · ".join(f"{key} {value}" for key, value in protocol.items()) + "\n")
    groups = {"all": metrics}
    groups |= {f"{name} ({SCALES[name]})": m for name, m in metrics["by_scale"].items()}
    print(table(groups | (metrics["by_class"] if len(metrics["by_class"]) > 1 else {})))
    what = "list" if protocol["prompts"] == "sam" else "box"
    print(f"\n{metrics['n_failed']} of {metrics['n']} answers without a readable {what}")
    if metrics["n_repaired"]:
        print(f"{metrics['n_repaired']} answers whose JSON had to be repaired")
    if metrics["n_no_target"]:
        print(METRICS)
        found = f"{metrics['no_target_acc']:.3f} of them left unmarked (none)"
        print(f"{metrics['n_no_target']} phrases without a target, {found}")
    if "oracle_miou" in metrics:
        peek = "best of n chosen by the truth (an oracle, not a result): mIoU"
        print(f"{peek} {metrics['oracle_miou']:.3f}")


# ------------------------------------------------------------------------- main


def default_model(log_dir):
    """runs/grpo if it is there, else runs/sft, else the base model."""
    for folder in (Path(log_dir) / "grpo", Path(log_dir) / "sft"):
        if (folder / "config.json").is_file() or (folder / "adapter").is_dir():
            return str(folder)
    return str(sampler.TINY_VLM)


def segment_one(args, model, processor, segmenter, folder):
    """--image and --query: print the answers, the points and the score; write mask and overlay."""
    image = data.open_image(args.image, upright=True)
    (prediction,) = predict(model, processor, [image], [args.query], [None], args)
    mask, sam_score = segment(segmenter, image, args.image, prediction, args)
    row = {"box_px": prediction.boxes.round(1).tolist(), "confidence": prediction.confidence}
    row["points_px"] = prediction.all_points.round(1).tolist()
    row["labels"] = prediction.labels or []
    name = folder / Path(args.image).stem
    Image.fromarray(mask).save(f"{name}_mask.png")
    draw_overlay(image, row, args.query, args.theta, mask).save(f"{name}_overlay.png")
    print(f"box answer    {prediction.answer_box}\npoint answer  {prediction.answer_points}")
    none = "none: there is nothing to find" if prediction.is_readable else "none is readable"
    print(f"box (pixels)  {row['box_px'] or none}")
    for point, label, confidence in zip(row["points_px"], row["labels"], row["confidence"]):
        dropped = "" if confidence >= args.theta else ", dropped"
        print(f"  point {point}: {label} (p = {confidence:.2f}{dropped})")
    if row["labels"] and 1 not in row["labels"]:
        print("NOTE: the model finds no point on the target, so its box is doubtful")
    print(f"mask of {mask.sum()} pixels, whose IoU SAM itself puts at {sam_score:.2f}")
    print(f"written: {name}_mask.png and {name}_overlay.png")


def main(args):
    # 1. Model, SAM, folder. Under torchrun every process takes its share of the images.
    # gloo, as they only wait for one another
    rank, *_, args.device = sampler.join_processes(args.device, "gloo")
    torch.manual_seed(args.seed + rank)
    path = args.eval_model_path = args.eval_model_path or default_model(args.log_dir)
    needs_model = args.oracle != "points" and not (args.oracle == "box" and args.points == "none")
    model, processor = sampler.load_policy(path, args.device) if needs_model else (None, None)
    segmenter = sampler.Segmenter(args.sam_ckpt, args.device, args.multimask)
    folder = Path(args.log_dir) / args.version_name
    if rank == 0:
        main.lock = sampler.lock_folder(folder)  # as long as this process lives
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        print(f"model: {path if needs_model else 'none (the truth)'}\nSAM: {args.sam_ckpt}")
        data.warn_about_prompts(path, args.prompts)
    if args.image:
        return segment_one(args, model, processor, segmenter, folder)

    # 2. All sets, before any is evaluated: a missing one is noticed now, not after hours.
    names = list(data.parse_option(args.option))
    sets = {n: data.load_valid(n, args.data_root, args.split, args.skip_bad) for n in names}

    # 3. Each set. Several have a folder each, and a table together.
    metrics = {}
    for option, loaded in sets.items():
        args.option = option
        into = folder / option if len(sets) > 1 else folder
        metrics[option] = evaluate_set(args, into, *loaded, model, processor, segmenter)
    if rank == 0 and len(sets) > 1:
        print(f"\n{table(metrics)}\n\n{METRICS}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sampler.run_script(main, get_args)
