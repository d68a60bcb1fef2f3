"""The README's figures: curves of a run, grids of points, and two evaluations phrase by phrase.

    python assets/make_figures.py curve runs/grpo/train.jsonl    # draws runs/grpo/curve.png
    python assets/make_figures.py grid --out grid.png
    python assets/make_figures.py compare runs/eval_sft runs/eval_grpo --out before_after.png
    python assets/make_figures.py compare runs/eval_a runs/eval_b --names "reward a" "reward b"

`compare` prints the mean differences of the second evaluation to the first, each with its 95 %
interval: paired by phrase, and bootstrapped over images, as phrases on one image are not
independent. The picture shows the phrases whose mask IoU rose most: what changed, not how often.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import sampler  # noqa: E402
from sampler import InputError  # noqa: E402

COLOURS = ["#2a6fdb", "#d1495b", "#2e933c", "#8d5a97"]


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    curve = kinds.add_parser("curve", help="rewards over the updates of one or more runs")
    curve.add_argument("runs", nargs="+", help="train.jsonl of each run")
    grid = kinds.add_parser("grid", help="the grid of points in boxes of three sizes")
    compare = kinds.add_parser("compare", help="two evaluations of the same split")
    compare.add_argument("runs", nargs=2, help="folders that eval.py wrote: before, after")
    compare.add_argument("--data_root", default="demo_data", help="folder that holds the data set")
    compare.add_argument("--names", nargs=2, default=["before", "after"], help="in the picture")
    curve.add_argument("--out", help="the picture (default: curve.png beside the first run's log)")
    grid.add_argument("--out", default="grid.png", help="the picture")
    compare.add_argument("--out", help="a picture of what changed most; without it there is none")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------- curve


def smooth(values, width):
    """Mean of each value with up to `width` before it."""
    return [float(np.mean(values[max(0, i - width) : i + 1])) for i in range(len(values))]


def ticks(low, high):
    """Three to eight round numbers between the ends of an axis."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if factor * step <= (high - low) / 3)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def panel(draw, corner, size, title, curves):
    """One chart: each run's values over its updates as dots, their running mean as a line. Updates
    without a value (None) are left out."""
    (left, top), (width, height), font = corner, size, ImageFont.load_default(15)
    curves = [[(i, v) for i, v in enumerate(curve, 1) if v is not None] for curve in curves]
    known = [value for curve in curves for _, value in curve]
    low, high = min(known, default=0), max(known, default=0)
    low, high = (low, high) if high > low else (low - 1, high + 1)
    longest = max([i for curve in curves for i, _ in curve], default=1)
    x = lambda i: left + width * i / longest
    y = lambda value: top + height * (1 - (value - low) / (high - low))
    draw.text((left, top - 8), title, fill="black", font=font, anchor="ls")
    for value in ticks(low, high):
        draw.line([left, y(value), left + width, y(value)], fill="#dddddd")
        draw.text((left - 6, y(value)), f"{value:.4g}", fill="black", font=font, anchor="rm")
    for i in ticks(0, longest):
        draw.line([x(i), top + height, x(i), top + height + 4], fill="#777777")
        draw.text((x(i), top + height + 6), f"{i:.4g}", fill="black", font=font, anchor="mt")
    draw.text((left + width / 2, top + height + 22), "update", fill="black", font=font, anchor="mt")
    draw.rectangle([left, top, left + width, top + height], outline="#777777")
    for curve, colour in zip(curves, COLOURS * len(curves)):
        for i, value in curve:
            draw.ellipse([x(i) - 1, y(value) - 1, x(i) + 1, y(value) + 1], fill=colour)
        means = smooth([value for _, value in curve], max(1, len(curve) // 12))
        draw.line([(x(i), y(m)) for (i, _), m in zip(curve, means)], fill=colour, width=2)


def draw_curve(paths):
    """The rewards that there were, KL and length of answers, or (sft.py) loss and gradient norm;
    one colour per run."""
    runs = [data.read_jsonl(Path(path)) for path in paths]
    if not all(runs):
        raise InputError(f"no lines in one of {', '.join(paths)}")
    titles = {
        "reward_box": "box reward (IoU)",
        "reward_point": "point reward (accuracy)",
        "reward_mask": "mask reward (IoU)",
        "kl": "KL to the reference, per token",
        "length": "tokens per completion",
    }
    if "loss" in runs[0][0]:
        titles = {"loss": "loss per answer token", "grad_norm": "gradient norm, before clipping"}
    given = lambda key: any(line.get(key) is not None for run in runs for line in run)
    titles = {key: title for key, title in titles.items() if given(key)}
    picture = Image.new("RGB", (1000, 260 * math.ceil(len(titles) / 2)), "white")
    for i, (key, title) in enumerate(titles.items()):
        corner = (60 + 490 * (i % 2), 40 + 260 * (i // 2))
        curves = [[line.get(key) for line in run] for run in runs]
        panel(ImageDraw.Draw(picture), corner, (420, 180), title, curves)
    return picture


def draw_grids():
    """The grid in a small, a medium and a large true box of an airplane, with the true labels."""
    samples = data.load_samples("demo", "demo_data", "test")
    samples = [sample for sample in samples if sample.class_name == "airplane"]
    samples.sort(key=lambda sample: sample.mask.sum())
    sheet = Image.new("RGB", (1160, 412), "white")
    for i, sample in enumerate((samples[12], samples[-50], samples[-1])):
        image, box = sample.image(), data.mask_to_box(sample.mask)
        points = sampler.grid_points(box, *image.size)
        row = {"box_px": [box], "points_px": points, "confidence": [1] * len(points)}
        row["labels"] = sampler.label_points(points, sample.mask).tolist()
        w, h = box[2:] - box[:2]
        caption = f"box {w:.0f} x {h:.0f} of {image.width} x {image.height}: {len(points)} points"
        picture = evaluation.draw_overlay(image, row, caption, 0.9, ~sample.mask & False, None, 384)
        sheet.paste(picture.crop((388, 0, 772, 384)), (388 * i, 0))
        sheet.paste(picture.crop((0, 384, 384, 412)), (388 * i, 384))
    return sheet


# ------------------------------------------------------------------------- compare


def paired(before, after, key, draws=10_000):
    """(mean before, mean after, low, high) of a key over pairs of rows; the 95 % interval of the
    difference by drawing images with replacement."""
    images = sorted({row["image"] for row in before})
    place = {image: i for i, image in enumerate(images)}
    total, count = np.zeros(len(images)), np.zeros(len(images))
    for old, new in zip(before, after):
        total[place[old["image"]]] += new[key] - old[key]
        count[place[old["image"]]] += 1
    picks = np.random.default_rng(0).integers(0, len(images), (draws, len(images)))
    low, high = np.quantile(total[picks].sum(1) / count[picks].sum(1), [0.025, 0.975])
    return np.mean([r[key] for r in before]), np.mean([r[key] for r in after]), low, high


def draw_pairs(before, after, samples, names, count=3):
    """Overlays of the phrases whose mask IoU rose most, one of an image: before on the left, after
    on the right, by their names."""
    most = {}
    for pair in sorted(zip(before, after), key=lambda pair: pair[0]["iou"] - pair[1]["iou"]):
        most.setdefault(pair[0]["image"], pair)
    samples, tiles = {sample.ref_id: sample for sample in samples}, []
    for pair in list(most.values())[:count]:
        sample = samples[pair[0]["ref_id"]]
        for row, name in zip(pair, names):
            caption = f"{name}: {row['phrase']} (IoU {row['iou']:.2f})"
            mask = data.decode_rle(row["rle"])
            picture = evaluation.draw_overlay(
                sample.image(), row, caption, 0.9, mask, sample.mask, 256
            )
            tiles.append(picture)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (2 * width + 12, count * height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % 2 * (width + 12), i // 2 * height))
    return sheet


def main(args):
    if args.kind != "compare":
        picture = draw_curve(args.runs) if args.kind == "curve" else draw_grids()
        path = args.out or Path(args.runs[0]).with_name("curve.png")
        picture.save(path)
        return print(f"written: {path}")
    for run in args.runs:
        if not (Path(run) / "predictions.jsonl").is_file():
            raise InputError(f"no {run}/predictions.jsonl: eval.py --version_name … writes it")
    before, after = (
        {(row["ref_id"], row["sentence"]): row for row in data.read_jsonl(path)}
        for path in (Path(run) / "predictions.jsonl" for run in args.runs)
    )
    if not before or before.keys() != after.keys():
        raise InputError(f"{' and '.join(args.runs)} hold no answers to the same phrases")
    before, after = list(before.values()), [after[key] for key in before]
    print(f"{len(before)} phrases on {len({row['image'] for row in before})} images")
    keys = [key for key in ("box_iou", "point_acc", "iou") if before[0][key] is not None]
    for key in keys:  # point_acc: not with --points none
        old, new, low, high = paired(before, after, key)
        print(f"{key:<10} {old:.3f} -> {new:.3f}  {new - old:+.4f} (95 % {low:+.4f} … {high:+.4f})")
    if args.out:
        protocol = json.loads((Path(args.runs[0]) / "metrics.json").read_text())["protocol"]
        samples = data.load_samples(protocol["option"], args.data_root, protocol["split"])
        draw_pairs(before, after, samples, args.names).save(args.out)
        print(f"written: {args.out}")


if __name__ == "__main__":
    try:
        main(get_args())
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
