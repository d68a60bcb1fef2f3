"""The README's figures: the curve of a GRPO run, and two evaluations compared phrase by phrase.

    python assets/make_figures.py curve runs/grpo/train.jsonl --out curve.png
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
from sampler import InputError  # noqa: E402

COLOURS = ["#2a6fdb", "#d1495b", "#2e933c", "#8d5a97"]


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    curve = kinds.add_parser("curve", help="rewards over the updates of one or more runs")
    curve.add_argument("runs", nargs="+", help="train.jsonl of each run")
    compare = kinds.add_parser("compare", help="two evaluations of the same split")
    compare.add_argument("runs", nargs=2, help="folders that eval.py wrote: before, after")
    compare.add_argument("--data_root", default="demo_data", help="folder that holds the data set")
    compare.add_argument("--names", nargs=2, default=["before", "after"], help="in the picture")
    curve.add_argument("--out", default="curve.png", help="the picture")
    compare.add_argument("--out", help="a picture of what changed most; without it there is none")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------- curve


def smooth(values, width):
    """Mean of each value with up to `width` before it; None is left out."""
    windows = [values[max(0, i - width) : i + 1] for i in range(len(values))]
    kept = [[value for value in window if value is not None] for window in windows]
    return [float(np.mean(window)) if window else None for window in kept]


def panel(draw, corner, size, title, curves):
    """One chart: each run's values, smoothed, over its updates."""
    (left, top), (width, height) = corner, size
    font = ImageFont.load_default(15)
    curves = [smooth(curve, max(1, len(curve) // 12)) for curve in curves]
    known = [value for curve in curves for value in curve if value is not None]
    low, high = min(known, default=0), max(known, default=0) + 1e-9
    draw.rectangle([left, top, left + width, top + height], outline="#999999")
    draw.text((left, top - 22), title, fill="black", font=font)
    draw.text((left - 48, top - 4), f"{high:.3f}", fill="black", font=font)
    draw.text((left - 48, top + height - 14), f"{low:.3f}", fill="black", font=font)
    longest = max(map(len, curves))
    draw.text((left + width - 70, top + height + 4), f"update {longest}", fill="black", font=font)
    for curve, colour in zip(curves, COLOURS * len(curves)):
        x = lambda i: left + width * i / max(1, longest - 1)
        y = lambda value: top + height * (1 - (value - low) / (high - low))
        points = [(x(i), y(value)) for i, value in enumerate(curve) if value is not None]
        draw.line(points, fill=colour, width=2)


def draw_curve(paths):
    """The rewards that there were, KL and length of answers; one colour per run."""
    runs = [evaluation.read_rows(Path(path)) for path in paths]
    if not all(runs):
        raise InputError(f"no lines in one of {', '.join(paths)}")
    titles = {
        "reward_box": "box reward (IoU)",
        "reward_point": "point reward (accuracy)",
        "reward_mask": "mask reward (IoU)",
        "kl": "KL to the reference, per token",
        "length": "tokens per completion",
    }
    given = lambda key: any(line.get(key) is not None for run in runs for line in run)
    titles = {key: title for key, title in titles.items() if given(key)}
    picture = Image.new("RGB", (1000, 260 * math.ceil(len(titles) / 2)), "white")
    for i, (key, title) in enumerate(titles.items()):
        corner = (60 + 490 * (i % 2), 40 + 260 * (i // 2))
        curves = [[line.get(key) for line in run] for run in runs]
        panel(ImageDraw.Draw(picture), corner, (420, 180), title, curves)
    return picture


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
            picture = evaluation.overlay(sample.image(), row, caption, 0.9, mask, sample.mask, 256)
            tiles.append(picture)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (2 * width + 12, count * height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % 2 * (width + 12), i // 2 * height))
    return sheet


def main(args):
    if args.kind == "curve":
        draw_curve(args.runs).save(args.out)
        return print(f"written: {args.out}")
    for run in args.runs:
        if not (Path(run) / "predictions.jsonl").is_file():
            raise InputError(f"no {run}/predictions.jsonl: eval.py --version_name … writes it")
    before, after = (
        {(row["ref_id"], row["sentence"]): row for row in evaluation.read_rows(path)}
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
