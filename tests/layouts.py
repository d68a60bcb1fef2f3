"""Tiny data sets for the tests, one writer for each layout that data.py reads.

A writer draws into `folder`, the set's own, and returns what it drew: {(split, ref_id): (phrases,
mask)}. Frames are not square, so that a mix-up of x and y shows.
"""

import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

import data

WIDTH, HEIGHT = 120, 80
COLOURS = {"red": (200, 40, 40), "white": (240, 240, 240), "blue": (40, 60, 200)}
SPLITS = ("train", "val", "test")


def draw_scene(rng):
    """(image, {phrase: mask}) of a coloured box in the left half and one in the right."""
    pixels = rng.integers(90, 130, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    masks = {}
    for left, side in enumerate(("right", "left")):
        colour = str(rng.choice(list(COLOURS)))
        width, height = rng.integers(16, 40, 2)
        x = int(rng.integers(0, 60 - width)) + 60 * (1 - left)
        y = int(rng.integers(0, HEIGHT - height))
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[y : y + height, x : x + width] = True
        pixels[mask] = COLOURS[colour]
        masks[f"the {colour} building on the {side}"] = mask
    return Image.fromarray(pixels), masks


def write_refer(folder):
    """RIS-LAD as it is spelt on disk: res_lad. Two refs to an image."""
    rng, truth = np.random.default_rng(0), {}
    images = folder / "images/res_lad/JPEGImages"
    images.mkdir(parents=True)
    (folder / "res_lad").mkdir()
    refs, rows, annotations = [], [], []
    for number, split in enumerate([*SPLITS, "train"]):
        image, masks = draw_scene(rng)
        image.save(images / f"{number}.jpg")
        rows.append({"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH})
        for phrase, mask in masks.items():
            key = len(refs) + 1
            ids = {"ref_id": key, "ann_id": key, "image_id": number, "split": split}
            refs.append({**ids, "sentences": [{"raw": phrase}]})
            annotation = {"id": key, "image_id": number, "category_id": 1}
            annotations.append({**annotation, "segmentation": data.encode_rle(mask)})
            truth[split, key] = [phrase], mask
    coco = {"images": rows, "annotations": annotations, "categories": [{"id": 1, "name": "car"}]}
    (folder / "res_lad/instances.json").write_text(json.dumps(coco))
    (folder / "res_lad/refs(unc).p").write_bytes(pickle.dumps(refs))
    return truth


def write_earthreason(folder):
    """Images of three formats, two questions to a mask, and one that is empty in train."""
    rng, truth = np.random.default_rng(1), {}
    for split in SPLITS:
        for name in ("images", "labels", "QAs"):
            (folder / split / name).mkdir(parents=True)
        for number, suffix in enumerate(("jpg", "png", "tif")):
            image, masks = draw_scene(rng)
            phrase, mask = next(iter(masks.items()))
            questions = [phrase, f"Where is {phrase}?"]
            content = {"questions": questions, "answer": [f"It is {phrase}.", "It has a roof."]}
            if (split, suffix) == ("train", "tif"):
                mask, content["answer"] = np.zeros_like(mask), []
            image.save(folder / split / f"images/{number}.{suffix}")
            Image.fromarray(mask.astype(np.uint8)).save(folder / split / f"labels/{number}.png")
            (folder / split / f"QAs/{number}.json").write_text(json.dumps(content))
            truth[split, str(number)] = questions, mask
    return truth


def write_refsegrs(folder):
    """Two images of every split, with two lines for the one mask of each."""
    rng, truth = np.random.default_rng(2), {}
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for start, split in enumerate(SPLITS):
        lines = []
        for number in (2 * start, 2 * start + 1):
            image, masks = draw_scene(rng)
            phrase, mask = next(iter(masks.items()))
            image.save(folder / f"images/{number}.tif")
            bands = np.stack([mask * 255, ~mask * 255, mask * 0], -1).astype(np.uint8)
            Image.fromarray(bands).save(folder / f"masks/{number}.tif")
            for text in (phrase, f"{phrase}, again"):
                lines.append(f"{number} {text}")
                truth[split, f"{number}_{len(lines)}"] = [text], mask
        (folder / f"output_phrase_{split}.txt").write_text("\n".join(lines) + "\n")
    return truth


def write_risbench(folder):
    """Images and masks of unlike formats; the line names the image with its suffix."""
    rng, truth = np.random.default_rng(3), {}
    (folder / "img_rgb").mkdir(parents=True)
    (folder / "mask").mkdir()
    for start, split in enumerate(SPLITS):
        lines = []
        for number in (2 * start, 2 * start + 1):
            image, masks = draw_scene(rng)
            phrase, mask = next(iter(masks.items()))
            image.save(folder / f"img_rgb/{number}.jpg")
            Image.fromarray(mask).save(folder / f"mask/{number}.png")
            lines.append(f"{number}.jpg {phrase}")
            truth[split, f"{number}_{len(lines)}"] = [phrase], mask
        (folder / f"output_phrase_{split}.txt").write_text("\n".join(lines) + "\n")
    return truth


def write_risors(folder):
    """Two objects to an image, between them one of area 0; names with a suffix and without."""
    rng, truth = np.random.default_rng(4), {}
    (folder / "JPEGImages").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    for start, split in enumerate(SPLITS):
        lines = []
        for number in (2 * start, 2 * start + 1):
            image, masks = draw_scene(rng)
            image.save(folder / f"JPEGImages/{number}.jpg")
            nothing = {"area": 0, "description": "", "name": "", "segmentation": {}}
            annotations = [nothing]
            for place, (phrase, mask) in zip((0, 2), masks.items()):
                row = {"area": int(mask.sum()), "description": phrase, "name": "small_car"}
                annotations.insert(place, {**row, "segmentation": data.encode_rle(mask)})
                truth[split, f"{number}_{place}"] = [phrase], mask
            content = json.dumps({"annotations": annotations})
            (folder / f"Annotations/{number}.json").write_text(content)
            lines.append(f"{number}.jpg" if number % 2 else f"{number}")
        (folder / f"RISORS_{split}.txt").write_text("\n".join(lines) + "\n")
    return truth


WRITERS = {
    "ris_lad": write_refer,
    "earthreason": write_earthreason,
    "refsegrs": write_refsegrs,
    "risbench": write_risbench,
    "risors": write_risors,
}
# as the folders of real downloads are spelt
FOLDERS = dict(zip(WRITERS, ("RIS-LAD", "EarthReason", "RefSegRS", "RIS_Bench", "RISORS")))


def write_all(root):
    """{option: truth} of one set of each layout, side by side in `root`."""
    return {option: write(Path(root) / FOLDERS[option]) for option, write in WRITERS.items()}
