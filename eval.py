"""Evaluate: phrase + image -> box -> points -> SAM's mask, and the metrics over a whole split.

For every phrase of the split:
1. **Stage I.** The model answers with a box (`--oracle box` takes the true one).
2. **Stage II.** It judges a grid of points inside that box; points it doubts (p < theta) are
   dropped (`--oracle points` takes true box and labels and needs no model: SAM's upper bound).
3. **Stage III.** SAM turns box and points into a mask, at the truth's native size.
4. One line goes to predictions.jsonl; a run that was cut off continues from there.

    IoU = I / U    mIoU = mean IoU    oIoU = sum I / sum U    Pr@t = share of samples with IoU >= t

All metrics run over *all* samples. An answer without a readable box is an empty mask: I = 0, U =
the truth's area, and IoU = 0 also where there is nothing to find; whoever finds nothing there has
an IoU of 1. One without readable labels leaves SAM the box alone; its point accuracy is 0.

With `--prompts sam` one answer takes the place of stages I and II: a list of all instances, each
with a box and two points, which may be empty.

    python eval.py                                   # runs/grpo, else runs/sft, else the base model
    python eval.py --use_think --save_img            # reason first; write overlays
    python eval.py --oracle points --points none     # SAM with true boxes only
    python eval.py --image photo.jpg --query "the ship on the left"
    python eval.py --option refsegrs,risbench --data_root …          # several sets, one table
    torchrun --nproc_per_node 4 eval.py --eval_model_path … --data_root … --option RRSISD \\
        --sam_ckpt sam_vit_h_4b8939.pth
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import time
import zlib
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import sampler
from sampler import InputError

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
SCALES = {"small": "< 1 %", "medium": "1-5 %", "large": "> 5 %"}


def flag(text):
    """--use_think, --use_think True and --use_think False all work, as in the published scripts."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return text.lower() == "true"


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    bare = {"type": flag, "nargs": "?", "const": True, "default": False}
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
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--best_of", type=int, default=1, help="answers per phrase; SAM and confidence pick one")
    add("--max_new_tokens", type=int, help="limit of one answer (256; 1024 with --prompts sam)")
    add("--batch_size", type=int, default=64, help="phrases per batch")
    # points and SAM
    add("--points", choices=["grid", "fixed", "random", "none"], default="grid", help="placement")
    add("--alpha", type=float, default=16, help="cells per side: alpha * side / image side")
    add("--k_min", type=int, default=3, help="fewest cells per side; also k of --points fixed")
    add("--k_max", type=int, default=6, help="most cells per side")
    add("--theta", type=float, default=0.9, help="drop labels less probable, at --temperature")
    add("--sam_ckpt", default=str(sampler.TINY_SAM), help="weights: SAM, MobileSAM, tiny SAM")
    add("--multimask", action=on_off, default=False, help="best of SAM's three masks")
    add("--paper", action=on_off, default=False, help="as published: --k_min 1 --multimask")
    add("--oracle", choices=["box", "points"], help="use the true box, or the true box and labels")
    # output
    add("--log_dir", default="runs", help="results go to <log_dir>/<version_name>")
    add("--version_name", default="eval", help="name of this run")
    add("--save_img", **bare, help="write overlay pictures")
    add("--max_img", type=int, default=100, help="how many overlays at most")
    add("--resume", action=on_off, default=True, help="continue a cut-off run")
    add("--seed", type=int, default=0, help="for sampling and --points random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args(argv)
    if args.max_new_tokens is None:  # an instance is some 40 tokens to Qwen's tokenizer
        args.max_new_tokens = 1024 if args.prompts == "sam" else 256
    if args.prompts == "sam":
        args.use_think = True
    check_args(parser, args)
    if args.paper:
        args.k_min, args.multimask = 1, True
    return args


def check_args(parser, args):
    """End with a line for settings that make no sense."""
    if bool(args.image) != bool(args.query and args.query.strip()):
        parser.error("--image and a non-empty --query go together")
    if args.image and (args.oracle or args.best_of > 1):
        parser.error("--oracle and --best_of need a data set, not --image")
    if min(args.best_of, args.batch_size, args.k_min) < 1 or args.k_min > args.k_max:
        parser.error("--best_of, --batch_size and --k_min start at 1; --k_max is at least --k_min")
    if args.temperature < 0 or args.max_new_tokens < 1 or args.seed < 0:
        parser.error("--temperature and --seed start at 0, --max_new_tokens at 1")
    if not 0 <= args.theta <= 1:
        parser.error(f"--theta {args.theta:g}: expected a probability, 0 to 1")
    if args.best_of > 1 and args.temperature == 0:
        parser.error("--best_of needs answers that differ: set --temperature, for example 0.9")
    if args.prompts == "sam":
        if args.best_of > 1:
            parser.error("--best_of: an empty list of --prompts sam has no score to be chosen by")
        if args.oracle == "box" and args.points != "none":
            parser.error(
                "--prompts sam: --oracle points has the true points, --points none has none"
            )
    if ":" in args.option:
        parser.error(f"--option {args.option}: weights are for training, give names alone")


# ------------------------------------------------------------------------- metrics


def summarize(rows):
    """Metrics of prediction rows (inter, union, iou, box_iou, point_acc, failed); {} for none."""
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
        "giou": iou.mean(),  # what papers on questions without a target call the two
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


def true_boxes(mask, prompts):
    """The boxes (M, 4) to answer with: one around all of the truth or, with --prompts sam, one
    around each instance."""
    boxes = [data.mask_to_box(mask)] * int(mask.any())
    if prompts == "sam":
        boxes = [box for box, _ in data.merge_duplicates(data.true_instances(mask))]
    return np.reshape(boxes, (-1, 4))


def box_score(boxes, truth):
    """IoU of predicted boxes (N, 4) with the true ones (M, 4) under the best matching, divided by
    the larger number: extra and missing boxes cost.

    Where there is nothing to find (no box, or one of zeros), 1 for no box and 0 for any.
    """
    if not np.any(truth):
        return float(not len(boxes))
    return data.matched_iou(boxes, truth)


def point_score(labels, points_px, mask):
    """Share of points (N, 2) labelled right; 0 without as many labels as points. Where there is
    nothing to find, 1 for no points."""
    if labels is None or len(labels) != len(points_px) or not len(labels):
        return float(not len(points_px) and not mask.any())
    return float((np.array(labels) == sampler.label_points(points_px, mask)).mean())


def answer_scores(row, truth, prompts):
    """(box IoU, point accuracy) of an answer. What cannot be read is never right, not even where
    there is nothing to find."""
    if row["failed"]:
        return 0.0, 0.0
    boxes = true_boxes(truth, prompts)
    points = point_score(row["labels"], row["points_px"], truth)
    return box_score(row["box_px"], boxes), points


# ------------------------------------------------------------------------- the three stages


def place_points(box_px, width, height, args, rng):
    """Points (N, 2) of one box as --points says."""
    if args.points == "none":
        return np.zeros((0, 2))
    k_max = args.k_min if args.points == "fixed" else args.k_max
    points = sampler.grid_points(box_px, width, height, args.alpha, args.k_min, k_max)
    return sampler.random_points(box_px, len(points), rng) if args.points == "random" else points


def open_images(samples):
    """Their images; samples of one image get one object, by which `look` knows it."""
    # brought to the size of the mask, which a mask file knows
    keys = [(sample.image_path, sample.size or sample.segmentation) for sample in samples]
    images = {key: sample.image() for key, sample in dict(zip(keys, samples)).items()}
    return [images[key] for key in keys]


class Views(NamedTuple):
    """What a model has read of images, with an image for each of B prompts."""

    context: sampler.Context  # of each distinct image
    rows: list  # B, which of them
    images: list  # B, PIL
    frames: list  # B, see sampler.answer_frame

    def take(self, picked):
        return Views(self.context, *([column[i] for i in picked] for column in self[1:]))


def look(model, processor, images):
    """Read images (B), one that occurs several times (the same object) once."""
    frames = [sampler.answer_frame(model, processor, *image.size) for image in images]
    distinct = {id(image): image for image in images}
    context = sampler.read(model, data.collate_images(processor, list(distinct.values())))
    return Views(context, [list(distinct).index(id(image)) for image in images], images, frames)


def ask(model, processor, views, prompts, room, args):
    """Prompts (B) behind their images -> [(text, probability of each character)], at most `room`
    tokens each."""
    text = data.collate_text(processor, prompts)
    context = sampler.read_on(model, views.context, views.rows, text)
    return sampler.generate(model, processor, context, room, args.temperature)


def ask_boxes(model, processor, views, phrases, args):
    """Stage I: images and phrases (B) -> [(text, boxes (N, 4) in pixels; (0, 4) if unreadable)]."""
    prompts = [data.box_prompt(*pair, args.use_think) for pair in zip(phrases, views.frames)]
    answers = ask(model, processor, views, prompts, args.max_new_tokens, args)
    found = []
    for (text, _), image, frame in zip(answers, views.images, views.frames):
        boxes, inside = data.boxes_px(data.parse_boxes(text) or [], frame, image.size)
        found.append((text, boxes[inside]))
    return found


def ask_labels(model, processor, views, phrases, points, args):
    """Stage II: and points (B of (N, 2) in pixels) -> [(text, labels or None, confidence)]."""
    prompts = [
        data.point_prompt(phrase, data.rescale(p, image.size, frame), frame, args.use_think)
        for phrase, p, image, frame in zip(phrases, points, views.images, views.frames)
    ]
    room = max(args.max_new_tokens, 2 * max(map(len, points)) + 32)  # a label and a comma each
    answers = ask(model, processor, views, prompts, room, args)
    judged = []
    for (text, char_probs), p in zip(answers, points):
        found, labels, confidence = data.find_labels(text), None, []
        if found and len(found[1]) == len(p):  # never a partial match of labels to points
            where, labels = found[0], found[1].tolist()
            confidence = char_probs[where].round(4).tolist()
        judged.append((text, labels, confidence))
    return judged


def ask_instances(model, processor, views, phrases, args):
    """--prompts sam: images and phrases (B) -> [(text, [(box (4,), points (N, 2))] in pixels, or
    None if nothing can be read, whether the text had to be repaired)]."""
    prompts = [data.sam_prompt(*pair) for pair in zip(phrases, views.frames)]
    answers = ask(model, processor, views, prompts, args.max_new_tokens, args)
    return [
        (text, *data.instances_px(text, frame, image.size))
        for (text, _), image, frame in zip(answers, views.images, views.frames)
    ]


def predict_instances(model, processor, images, phrases, truths, args):
    """`predict` with --prompts sam: one answer holds the boxes and points of all instances."""
    if args.oracle:
        found = [(None, data.true_instances(truth), False) for truth in truths]
    else:
        found = ask_instances(model, processor, look(model, processor, images), phrases, args)
    rows = []
    for text, instances, repaired in found:
        boxes = np.reshape([box for box, _ in instances or []], (-1, 4))
        grids = [points for _, points in instances or []]
        if args.points == "none":
            grids = [points[:0] for points in grids]
        points = np.concatenate([np.zeros((0, 2)), *grids])
        row = {"answer_box": text, "answer_points": None, "grids": grids, "points_px": points}
        row |= {"box_px": boxes, "labels": [1] * len(points), "confidence": [1.0] * len(points)}
        rows.append({**row, "failed": instances is None, "repaired": repaired})
    return rows


def predict(model, processor, images, phrases, truths, args):
    """Stages I and II for a batch of images and phrases (B) -> rows with boxes, points, labels.

    `truths`: masks (B), looked at with --oracle only. Random points are drawn by phrase, so that
    they do not depend on batches, processes or resuming.
    """
    if args.prompts == "sam":
        return predict_instances(model, processor, images, phrases, truths, args)
    views = look(model, processor, images) if model is not None else None
    nothing = {"answer_box": None, "answer_points": None, "labels": None, "confidence": []}
    rows = [dict(nothing) for _ in images]
    if args.oracle:
        boxes = [data.mask_to_box(truth)[None][: int(truth.any())] for truth in truths]
    else:
        answers, boxes = zip(*ask_boxes(model, processor, views, phrases, args))
        for row, text in zip(rows, answers):
            row["answer_box"] = text
    for row, found, image, phrase in zip(rows, boxes, images, phrases):
        rng = np.random.default_rng([args.seed, zlib.crc32(phrase.encode())])
        grids = [place_points(box, *image.size, args, rng) for box in found]
        points = np.concatenate([np.zeros((0, 2)), *grids])
        row.update(box_px=found, points_px=points, grids=grids)
        row["failed"] = not len(found) and not args.oracle  # there may be nothing to find
    if args.oracle == "points":
        for row, truth in zip(rows, truths):
            row["labels"] = sampler.label_points(row["points_px"], truth).tolist()
            row["confidence"] = [1.0] * len(row["labels"])
        return rows
    asked = [i for i, row in enumerate(rows) if len(row["points_px"])]
    if asked:
        points = [rows[i]["points_px"] for i in asked]
        some = [phrases[i] for i in asked]
        answers = ask_labels(model, processor, views.take(asked), some, points, args)
        for i, (text, labels, confidence) in zip(asked, answers):
            rows[i].update(answer_points=text, labels=labels, confidence=confidence)
    return rows


def segment(segmenter, image, key, row, args):
    """Stage III: a row's boxes and the points it is sure of -> (mask bool (H, W), SAM's score)."""
    if not len(row["box_px"]):
        return np.zeros(image.size[::-1], dtype=bool), 0.0
    prompts, start = [], 0
    for box, grid in zip(row["box_px"], row["grids"]):  # every box with its own points
        part = slice(start, start + len(grid))
        keep = np.zeros(len(grid), dtype=bool)  # no readable labels: SAM gets the box alone
        labels = np.zeros(len(grid))
        if row["labels"] is not None:
            labels = np.array(row["labels"][part])
            keep = sampler.confident(row["confidence"][part], args.theta)
        prompts.append((box, grid[keep], labels[keep]))
        start = part.stop
    segmenter.set_image(image, (key, image.size))
    return segmenter.segment_union(prompts)


def compare(mask, truth, size):
    """data.mask_iou at native size, or (--size) as papers have it that compare at size x size."""
    if not size:
        return data.mask_iou(mask, truth)
    fit = lambda m: np.asarray(Image.fromarray(m).resize((size, size), Image.NEAREST))
    inter, union, iou = data.mask_iou(fit(mask), fit(truth))
    # NOTE: a small target may be gone at that size, and finding nothing is still a miss
    return inter, union, iou if union or not truth.any() else 0.0


def score(row, sample, sentence, truth, mask, sam_score, args):
    """The line of predictions.jsonl for one phrase."""
    inter, union, iou = compare(mask, truth, args.size)
    box, points = answer_scores(row, truth, args.prompts)
    share = data.box_scale(data.mask_to_box(truth), truth.shape[1], truth.shape[0])
    judged = args.points != "none"
    return {
        "ref_id": sample.ref_id,
        "sentence": sentence,
        "image": sample.image_path.name,
        "phrase": sample.phrases[sentence],
        "class_name": sample.class_name,
        "scale": data.size_word(share) if share else None,
        "no_target": not truth.any(),
        "answer_box": row["answer_box"],
        "answer_points": row["answer_points"],
        "box_px": row["box_px"].round(2).tolist(),
        "points_px": row["points_px"].round(2).tolist(),
        "labels": row["labels"],
        "confidence": row["confidence"],
        "sam_score": round(sam_score, 4),
        "rle": data.encode_rle(mask),
        "inter": inter,
        "union": union,
        "iou": iou * (not row["failed"]),
        "box_iou": box,
        "point_acc": points if judged else None,
        **{key: row[key] for key in ("failed", "repaired") if key in row},
    }


def best(candidates):
    """Of several answers to one phrase, the one that SAM and the model trust most. The truth is not
    looked at; what a pick that peeks would reach is kept apart as `oracle_iou`."""
    trust = lambda row: (
        row["sam_score"] * (np.mean(row["confidence"]) if row["confidence"] else 0.5)
    )
    return {**max(candidates, key=trust), "oracle_iou": max(row["iou"] for row in candidates)}


def evaluate(model, processor, segmenter, batch, args):
    """All three stages for a batch of (sample, index of its phrase) -> lines of predictions.jsonl.

    With --best_of n every phrase is answered n times; its image and truth are read once.
    """
    n = args.best_of
    images, truths = open_images([s for s, _ in batch]), [s.mask for s, _ in batch]
    repeat = lambda values: [value for value in values for _ in range(n)]
    phrases = repeat(sample.phrases[i] for sample, i in batch)
    rows = predict(model, processor, repeat(images), phrases, repeat(truths), args)
    lines = []
    for k, (sample, i) in enumerate(batch):
        candidates = []
        for row in rows[k * n : k * n + n]:
            mask, sam_score = segment(segmenter, images[k], sample.image_path, row, args)
            candidates.append(score(row, sample, i, truths[k], mask, sam_score, args))
        lines.append(best(candidates) if n > 1 else candidates[0])
    return lines


def validate(
    model, processor, samples, use_think=False, batch_size=64, limit=200, prompts="points"
):
    """Greedy box IoU and point accuracy of `limit` samples spread evenly: for training, no SAM.

    Every process takes its share; all get the result.
    """
    args = get_args(["--use_think", str(use_think), "--prompts", prompts])
    picks = np.linspace(0, len(samples) - 1, min(limit, len(samples))).astype(int)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    samples = [samples[i] for i in picks[rank::world]]
    totals = torch.zeros(3, dtype=torch.float64, device=model.device)  # box IoU, accuracy, number
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        truths, phrases = [s.mask for s in batch], [s.phrases[0] for s in batch]
        images = open_images(batch)
        rows = predict(model, processor, images, phrases, truths, args)
        for row, truth in zip(rows, truths):
            totals += torch.tensor([*answer_scores(row, truth, prompts), 1], device=model.device)
    if world > 1:
        dist.all_reduce(totals)
    return {"box_iou": (totals[0] / totals[2]).item(), "point_acc": (totals[1] / totals[2]).item()}


def validate_both(model, processor, samples, args):
    """{name: `validate`} without and with reasoning, which --prompts sam always has; {} without
    samples. args: val_batch_size, val_limit, prompts."""
    options = args.val_batch_size, args.val_limit, args.prompts
    thinks = {"think": True} if args.prompts == "sam" else {"no think": False, "think": True}
    return {
        name: validate(model, processor, samples, think, *options)
        for name, think in thinks.items()
        if samples
    }


def print_gain(before, after):
    """What a stage of training brought, by two results of `validate_both`."""
    for name, old in before.items():
        new = after[name]
        print(
            f"val, {name:<8}: box IoU {old['box_iou']:.3f} -> {new['box_iou']:.3f}, "
            f"point accuracy {old['point_acc']:.3f} -> {new['point_acc']:.3f}"
        )


def next_command(folder, trained, *flags):
    """How to evaluate what a run, with the arguments `trained`, has written to `folder`."""
    sets = [name for name, _ in data.parse_option(trained.option)]  # less their weights
    theirs, mine = {**vars(trained), "option": ",".join(sets)}, vars(get_args([]))
    for key in ("option", "data_root", "prompts", "log_dir"):
        if theirs[key] != mine[key]:
            flags += f"--{key}", shlex.quote(theirs[key])
    return " ".join(["python eval.py", *flags, "--eval_model_path", shlex.quote(str(folder))])


# ------------------------------------------------------------------------- files and pictures


def fingerprint(path):
    """Changes when the weights at `path` do: a retrained model must not resume old predictions."""
    files = sorted(Path(path).glob("**/*.safetensors")) if Path(path).is_dir() else [Path(path)]
    states = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def digest(samples):
    """Changes when the samples do: phrases, reasons, masks (those in files by their names and
    sizes in bytes), the names of the images. Where they lie does not matter."""

    def mask(segmentation):
        if isinstance(segmentation, Path):
            return segmentation.name, segmentation.stat().st_size
        return segmentation

    truth = lambda s: (s.ref_id, s.phrases, s.class_name, mask(s.segmentation), s.size, *s.reasons)
    return zlib.crc32(repr([(truth(s), s.image_path.name) for s in samples]).encode())


def read_rows(path):
    """The lines of a predictions file, less one that was cut short when its process was killed."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def gather_predictions(folder):
    """Fold the ranks' parts into predictions.jsonl; all rows by (ref, sentence)."""
    path = folder / "predictions.jsonl"
    parts = [path, *sorted(folder.glob("predictions.jsonl.rank*"))]
    rows = {(row["ref_id"], row["sentence"]): row for part in parts for row in read_rows(part)}
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    os.replace(new, path)
    for part in parts[1:]:
        part.unlink()
    return rows


def overlay(image, row, caption, theta, mask, truth=None, side=512):
    """The image, and beside it what was made of it: mask in blue, truth outlined in yellow, box in
    white, points green for 1 and red for 0, small where the model's doubt dropped them."""
    zoom = max(1, round(side / max(image.size)))
    size = (image.width * zoom, image.height * zoom)
    enlarge = lambda m: np.asarray(Image.fromarray(m).resize(size, Image.NEAREST))
    pixels = np.array(image.resize(size), dtype=np.float64)
    pixels[enlarge(mask)] = pixels[enlarge(mask)] * 0.5 + np.array([40, 110, 255]) * 0.5
    if truth is not None:
        truth = enlarge(truth)
        shifted = [np.roll(truth, step, axis) for axis in (0, 1) for step in (-2, 2)]
        pixels[truth & ~np.logical_and.reduce(shifted)] = (255, 220, 0)
    picture = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for box in row["box_px"]:
        draw.rectangle((np.array(box) * zoom).tolist(), outline="white", width=2)
    points = np.array(row["points_px"]) * zoom
    for (x, y), label, sure in zip(points, row["labels"] or (), row["confidence"]):
        r = 5 if sure >= theta else 2
        draw.ellipse([x - r, y - r, x + r, y + r], fill="lime" if label else "red", outline="black")
    sheet = Image.new("RGB", (2 * size[0] + 4, size[1] + 28), "white")
    sheet.paste(image.resize(size), (0, 0))
    sheet.paste(picture, (size[0] + 4, 0))
    font = ImageFont.load_default(18)
    ImageDraw.Draw(sheet).text((4, size[1] + 3), caption, fill="black", font=font)
    return sheet


def save_pictures(folder, rows, samples, args):
    """Overlays of the first --max_img rows; returns how many."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    samples = {sample.ref_id: sample for sample in samples}
    for row in rows[: args.max_img]:
        sample, mask = samples[row["ref_id"]], data.decode_rle(row["rle"])
        caption = f"{row['phrase']} (IoU {row['iou']:.2f})"
        picture = overlay(sample.image(), row, caption, args.theta, mask, sample.mask)
        picture.save(folder / f"{row['ref_id']}_{row['sentence']}.png")
    return len(rows[: args.max_img])


def table(groups):
    """Lines of a table of metrics, one for each name in `groups`."""
    names = ["n", "mIoU", "oIoU", *(f"Pr@{t}" for t in THRESHOLDS), "box IoU", "points"]
    keys = ["n", "miou", "oiou", *(f"pr@{t}" for t in THRESHOLDS), "box_iou", "point_acc"]
    if any(m["n_no_target"] for m in groups.values()):
        names, keys = [*names, "none"], [*keys, "no_target_acc"]
    lines = [f"{'':<24}" + "".join(f"{name:>8}" for name in names)]
    for name, m in groups.items():
        cells = ["-" if m[k] is None else m[k] if k == "n" else f"{m[k]:.3f}" for k in keys]
        lines.append(f"{name[:23]:<24}" + "".join(f"{cell:>8}" for cell in cells))
    return lines


def protocol_line(protocol, *less):
    less = {"metrics", *less}
    return " · ".join(f"{key} {value}" for key, value in protocol.items() if key not in less)


def report(metrics):
    """What is printed of one set: how it was run, the table, what the metrics mean."""
    protocol = metrics["protocol"]
    lines = [protocol_line(protocol), ""]
    groups = {"all": metrics}
    groups |= {f"{name} ({SCALES[name]})": m for name, m in metrics["by_scale"].items()}
    lines += table(groups | (metrics["by_class"] if len(metrics["by_class"]) > 1 else {}))
    what = "list" if protocol["prompts"] == "sam" else "box"
    lines.append(f"\n{metrics['n_failed']} of {metrics['n']} answers without a readable {what}")
    if metrics["n_repaired"]:
        lines.append(f"{metrics['n_repaired']} answers whose JSON had to be repaired")
    lines.append(protocol["metrics"])
    if metrics["n_no_target"]:
        found = f"{metrics['no_target_acc']:.3f} of them left unmarked (none)"
        lines.append(f"{metrics['n_no_target']} phrases without a target, {found}")
    if "oracle_miou" in metrics:
        peek = "best of n chosen by the truth (an oracle, not a result): mIoU"
        lines.append(f"{peek} {metrics['oracle_miou']:.3f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------- main


def default_model(log_dir):
    """runs/grpo if it is there, else runs/sft, else the base model."""
    for name in ("grpo", "sft"):
        folder = Path(log_dir) / name
        if (folder / "config.json").is_file() or (folder / "adapter").is_dir():
            return str(folder)
    return str(sampler.TINY_VLM)


def note_prompts(path, prompts):
    """Say it where the run that wrote a model asked it in the other form: it may have no answer."""
    try:
        trained = json.loads((Path(path) / "args.json").read_text())["prompts"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # of another program
    if trained != prompts:
        print(f"NOTE: {path} was trained with --prompts {trained}, not {prompts}")


def segment_one(image, args, model, processor, segmenter, folder):
    """--image and --query: print box, points, reasoning and scores; write mask and overlay."""
    (row,) = predict(model, processor, [image], [args.query], [None], args)
    mask, sam_score = segment(segmenter, image, args.image, row, args)
    name = folder / Path(args.image).stem
    Image.fromarray(mask).save(f"{name}_mask.png")
    overlay(image, row, args.query, args.theta, mask).save(f"{name}_overlay.png")
    if args.prompts == "sam":
        repaired = " (its JSON had to be repaired)" if row["repaired"] else ""
        print(f"answer        {row['answer_box']}{repaired}")
    else:
        print(f"box answer    {row['answer_box']}")
        print(f"point answer  {row['answer_points']}")
    none = "none is readable" if row["failed"] else "none: there is nothing to find"
    print(f"box (pixels)  {row['box_px'].round(1).tolist() or none}")
    points = row["points_px"].round(1).tolist()
    for point, label, sure in zip(points, row["labels"] or (), row["confidence"]):
        kept = "" if sure >= args.theta else ", dropped"
        judged = f": {label} (p = {sure:.2f}{kept})" if args.prompts == "points" else ""
        print(f"  point {point}{judged}")
    print(f"SAM's own score {sam_score:.2f}, mask of {mask.sum()} pixels")
    print(f"written: {name}_mask.png and {name}_overlay.png")


METRICS = (
    "mIoU, also gIoU: mean IoU of all phrases, 1 for nothing found where there is nothing; "
    "oIoU, also cIoU: sum I / sum U of all phrases"
)


def protocol_of(args, path):
    """What was run, for metrics.json and the head of the table."""
    scaled = f"alpha={args.alpha:g} k={args.k_min}-{args.k_max}"
    sides = f"k={args.k_min}" if args.points == "fixed" else scaled
    grid = f"{args.points} {sides} theta={args.theta:g}"
    grid = "two per instance" if args.prompts == "sam" else grid
    return {
        "option": args.option,
        "split": args.split,
        "model": f"oracle {args.oracle}" if args.oracle else path,
        "sam": "tiny_sam" if args.sam_ckpt == str(sampler.TINY_SAM) else Path(args.sam_ckpt).name,
        "size": f"{args.size} x {args.size}, as some papers" if args.size else "native",
        "prompts": args.prompts,
        "use_think": args.use_think,
        "points": ("none" if args.points == "none" else grid) + " multimask" * args.multimask,
        "decoding": f"tau={args.temperature:g} best of {args.best_of}"
        if args.temperature
        else "greedy",
        "metrics": METRICS,
    }


def state_of(samples, protocol, path, args):
    """What answers depend on: they are kept only if a later run has the same."""
    files = [(str(s.image_path.resolve()), s.image_path.stat().st_size) for s in samples]
    # a mask without compression has as many bytes after a change
    masks = [s.segmentation for s in samples if isinstance(s.segmentation, Path)]
    files += [(str(mask.resolve()), mask.stat().st_mtime_ns) for mask in masks]
    return {
        **protocol,
        "weights": [fingerprint(path), fingerprint(args.sam_ckpt)],
        "refs": digest(samples),
        "files": zlib.crc32(repr(files).encode()),
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
    }


def start_or_resume(folder, args, state):
    """Keep the answers of a cut-off run of the same protocol and data; set others aside."""
    known, path = folder / "args.json", folder / "predictions.jsonl"
    settings = (read_rows(known) or [{}])[0]
    done = gather_predictions(folder)
    if done and not (args.resume and settings.get("state") == state):
        os.replace(path, folder / "predictions.old.jsonl")
        print(f"{len(done)} answers of another run are now in {folder}/predictions.old.jsonl")
        done = {}
    known.write_text(json.dumps({**vars(args), "state": state}))
    if done:
        print(f"{len(done)} answers are in {folder}/predictions.jsonl (--no-resume starts over)")


def share_out(samples, done, rank, world):
    """What this process has to do: (sample, index of its phrase), less what is `done`, with an
    image's phrases side by side, so that SAM embeds it once."""
    by_path = lambda sample: str(sample.image_path)
    images = [list(group) for _, group in groupby(sorted(samples, key=by_path), key=by_path)]
    mine = [sample for group in images[rank::world] for sample in group]
    todo = [(sample, i) for sample in mine for i in range(len(sample.phrases))]
    return [(sample, i) for sample, i in todo if (sample.ref_id, i) not in done]


def evaluate_set(args, folder, loaded, path, model, processor, segmenter):
    """The three stages over one set; its metrics, which process 0 writes and prints ({} in others).
    loaded: what data.load_sound gave; path: where the model came from."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start, wait = time.time(), dist.barrier if world > 1 else lambda: None
    (samples, bad), protocol = loaded, protocol_of(args, path)
    folder.mkdir(parents=True, exist_ok=True)

    # 1. What is to be done, less what an earlier run has done.
    if rank > 0:
        wait()  # for rank 0 to gather what is there
    if rank == 0:
        data.list_skipped(bad, samples, args.split)
        start_or_resume(folder, args, state_of(samples, protocol, path, args))
        wait()
    done = {(row["ref_id"], row["sentence"]) for row in read_rows(folder / "predictions.jsonl")}
    wait()  # nobody writes before all have read
    todo = share_out(samples, done, rank, world)

    # 2. The three stages, batch by batch.
    ious, step = [], max(1, args.batch_size // args.best_of)
    part = folder / ("predictions.jsonl" if world == 1 else f"predictions.jsonl.rank{rank}")
    bar = tqdm(total=len(todo), desc="evaluating", disable=rank > 0)
    with open(part, "a") as file:
        for batch in (todo[i : i + step] for i in range(0, len(todo), step)):
            lines = evaluate(model, processor, segmenter, batch, args)
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            ious += [line["iou"] for line in lines]
            bar.update(len(batch))
            bar.set_postfix(miou=f"{np.mean(ious):.3f}")
    bar.close()
    wait()

    # 3. Metrics, over the file: what is reported is what was written.
    metrics = {}
    if rank == 0:
        rows = list(gather_predictions(folder).values())
        expected = sum(len(sample.phrases) for sample in samples)
        if len(rows) != expected:
            raise InputError(
                f"{len(rows)} of {expected} answers are in {folder}: another process writes there, "
                "or the machines do not share it (--version_name, --log_dir)"
            )
        metrics = {**summarize_groups(rows), "n_skipped": len(bad)}
        seconds = None if done else round(time.time() - start, 1)  # a part would be no measure
        metrics |= {"seconds": seconds, "protocol": protocol}
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, default=float))
        print(report(metrics))
        took = "continued" if done else f"{seconds} s"
        print(f"{took}; written to {folder}: metrics.json, predictions.jsonl")
        if args.save_img:
            print(
                f"and {save_pictures(folder / 'images', rows, samples, args)} pictures in images/"
            )
    return metrics


def main(args):
    # 1. Model, SAM, folder. Under torchrun every process takes its share of the images.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")  # only to wait for one another
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.manual_seed(args.seed + rank)
    if args.image:  # before models are loaded for nothing
        image, args.query = data.open_image(args.image, upright=True), data.clean_phrase(args.query)
    path = args.eval_model_path or default_model(args.log_dir)
    needs_model = args.oracle != "points" and not (args.oracle == "box" and args.points == "none")
    model, processor = sampler.load_policy(path, args.device) if needs_model else (None, None)
    segmenter = sampler.Segmenter(args.sam_ckpt, args.device, args.multimask)
    folder = Path(args.log_dir) / args.version_name
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        print(f"model: {path if needs_model else 'none (the truth)'}\nSAM: {args.sam_ckpt}")
        if needs_model:
            note_prompts(path, args.prompts)
    if args.image:
        return segment_one(image, args, model, processor, segmenter, folder)

    # 2. All sets, before any is evaluated: one that is not there is not to be noticed after hours.
    names, metrics = [name for name, _ in data.parse_option(args.option)], {}
    data.draw_demos_first(names, args.data_root, rank)
    sets = {n: data.load_sound(n, args.data_root, args.split, args.skip_bad) for n in names}

    # 3. Each set; several have a folder each.
    for option, loaded in sets.items():
        one = argparse.Namespace(**{**vars(args), "option": option})
        into = folder / option if len(sets) > 1 else folder
        metrics[option] = evaluate_set(one, into, loaded, path, model, processor, segmenter)
    if rank == 0 and len(sets) > 1:
        line = protocol_line(metrics[option]["protocol"], "option")
        print("\n".join(["", line, "", *table(metrics), "", METRICS]))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sampler.run_script(main, get_args)
