"""Draw the demo sets: aerial scenes of polygons, so that everything runs offline and in minutes.

    python assets/make_demo.py demo --data_root demo_data     # data.py does this on first use

`plain` scenes (flat ground, nothing else) are what make_tiny.py asks the tiny base model about. The
demo set is the harder domain that SFT has to learn and GRPO to sharpen: textured ground, shadows,
clutter, and words of its own. It is written to disk in the REFER layout and read back by the same
reader as real data.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (  # noqa: E402
    box_scale,
    connected_components,
    encode_rle,
    mask_to_box,
    place_of,
    place_words,
    size_word,
)
from sampler import InputError, run_script  # noqa: E402

SIZE = 128  # pixels, both sides
IMAGES = {"train": 3000, "val": 120, "test": 460}
COLORS = {
    "white": (238, 238, 232),
    "gray": (132, 134, 138),
    "red": (190, 62, 52),
    "blue": (58, 92, 186),
    "yellow": (226, 190, 70),
    "purple": (140, 76, 160),
}
GROUNDS = [(86, 116, 66), (186, 166, 128), (104, 96, 84), (62, 92, 104), (150, 150, 120)]
# Outlines as (across, along), the long side from -0.5 to 0.5.
# fmt: off
OUTLINES = {
    "ship": [(0, -.5), (.16, -.22), (.16, .4), (.08, .5), (-.08, .5), (-.16, .4), (-.16, -.22)],
    "airplane": [(0, -.5), (.09, -.36), (.09, -.14), (.48, .1), (.48, .24), (.09, .14), (.07, .32),
                 (.22, .42), (.22, .5), (-.22, .5), (-.22, .42), (-.07, .32), (-.09, .14),
                 (-.48, .24), (-.48, .1), (-.09, -.14), (-.09, -.36)],
    "building": [(-.36, -.5), (.36, -.5), (.36, .5), (.02, .5), (.02, .16), (-.36, .16)],
    "tennis court": [(-.28, -.5), (.28, -.5), (.28, .5), (-.28, .5)],
    "storage tank": [(np.sin(a) / 2, np.cos(a) / 2) for a in np.linspace(0, 2 * np.pi, 25)[:-1]],
}
# fmt: on
# Every data set has words of its own. The demo calls three of the five classes by names that the
# tiny base model, pretrained on phrases as `describe` writes them, has never heard.
OTHER_NAMES = {
    "airplane": "aircraft",
    "building": "house",
    "storage tank": "silo",
}


@dataclass
class SceneObject:
    class_name: str
    color: str
    center: np.ndarray  # (x, y) pixels
    length: float  # of the long side, pixels
    angle: float  # radians
    mask: np.ndarray = None  # bool (H, W)

    def polygon(self, scale=1.0, shift=(0, 0), zoom=2):
        """Corners in a canvas `zoom` times the image, the outline shrunk by `scale`."""
        turn = np.array(
            [[np.cos(self.angle), -np.sin(self.angle)], [np.sin(self.angle), np.cos(self.angle)]]
        )
        corners = np.array(OUTLINES[self.class_name]) * self.length * scale @ turn.T
        return [tuple(corner) for corner in ((corners + self.center + shift) * zoom).tolist()]


def place_objects(rng, count, size=SIZE, names=tuple(OUTLINES)):
    """Up to `count` objects of these classes that do not touch, each wholly inside the image."""
    objects = []
    for _ in range(20 * count):
        length = float(np.exp(rng.uniform(np.log(20), np.log(56))))
        center = rng.uniform(length / 2 + 2, size - length / 2 - 2, 2)
        turn = rng.uniform(0, 2 * np.pi)
        clear = all(np.hypot(*(center - o.center)) > 0.55 * (length + o.length) for o in objects)
        if clear and len(objects) < count:
            name, color = rng.choice(list(names)), rng.choice(list(COLORS))
            objects.append(SceneObject(str(name), str(color), center, length, float(turn)))
    return objects


def draw_ground(rng, plain, size=SIZE):
    """uint8 (H, W, 3): one colour, or fields, relief, grain, a road and some trees on it."""
    ground = np.ones((size, size, 3)) * GROUNDS[rng.integers(len(GROUNDS))] + rng.normal(0, 8, 3)
    if plain:
        ground += rng.normal(0, rng.uniform(0, 4), (size, size, 1))
        return ground.clip(0, 255).astype(np.uint8)
    relief = Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).resize(
        (size, size), Image.BICUBIC
    )
    ground += (np.asarray(relief, dtype=np.float64)[..., None] - 128) * rng.uniform(0.1, 0.35)
    if rng.random() < 0.4:  # ploughed field
        direction, wave = rng.uniform(0, np.pi), rng.uniform(0.4, 1.2)
        y, x = np.mgrid[:size, :size]
        stripes = np.sin((x * np.cos(direction) + y * np.sin(direction)) * wave)
        ground += stripes[..., None] * rng.uniform(4, 14)
    ground += rng.normal(0, rng.uniform(2, 9), (size, size, 1))
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.4:  # road
        ends = rng.uniform(0, size, 2)
        line = (
            [(0, ends[0]), (size, ends[1])]
            if rng.random() < 0.5
            else [(ends[0], 0), (ends[1], size)]
        )
        draw.line(
            line,
            fill=tuple(int(v) for v in rng.integers(90, 130) + np.zeros(3)),
            width=int(rng.integers(3, 7)),
        )
    for _ in range(rng.integers(0, 14)):  # trees
        (x, y), r = rng.uniform(0, size, 2), rng.uniform(1.5, 4)
        green = (int(rng.integers(30, 70)), int(rng.integers(70, 110)), int(rng.integers(30, 60)))
        draw.ellipse([x - r, y - r, x + r, y + r], fill=green)
    return np.asarray(image)


def draw_scene(rng, count, plain=False, size=SIZE, names=tuple(OUTLINES)):
    """A scene of up to `count` objects -> (PIL image, list of SceneObject with masks)."""
    objects = place_objects(rng, count, size, names)
    image = Image.fromarray(draw_ground(rng, plain, size)).resize((2 * size, 2 * size))
    sun = rng.uniform(-0.12, 0.12, 2)
    for o in objects:
        draw = ImageDraw.Draw(image)
        if not plain:
            shadow = tuple(
                int(v * 0.5) for v in image.getpixel(tuple((o.center * 2).astype(int).tolist()))
            )
            draw.polygon(o.polygon(shift=sun * min(o.length, 30)), fill=shadow)
        shade = np.array(COLORS[o.color]) * (1 if plain else rng.uniform(0.75, 1.08)) + rng.normal(
            0, 6, 3
        )
        paint = lambda gain: tuple(int(v) for v in (shade * gain).clip(0, 255))
        draw.polygon(o.polygon(), fill=paint(1.0))
        if o.class_name == "tennis court":  # a lighter line inside
            draw.polygon(o.polygon(0.75), outline=(245, 245, 245))
        else:  # a darker roof ridge, deck, fuselage or tank top
            draw.polygon(o.polygon(0.5), fill=paint(0.82))
        canvas = Image.new("L", (2 * size, 2 * size))
        ImageDraw.Draw(canvas).polygon(o.polygon(), fill=255)
        o.mask = np.asarray(canvas.resize((size, size), Image.BOX)) > 127
    return image.resize((size, size), Image.BOX), objects


def describe(rng, objects, target, size=SIZE):
    """A phrase in RRSIS-D's style that fits `target` and no other object, or None if there is none.

    Places near a border between thirds and sizes near a limit are never used to tell objects apart.
    """

    def attributes(o):
        box = mask_to_box(o.mask)
        at = (box[:2] + box[2:]) / 2 / size * 3
        sure = np.abs(at - np.rint(at)).min() > 0.12 or not (0.5 < at).all() or not (at < 2.5).all()
        place = place_of(box, size, size) if sure else None
        scale = box_scale(box, size, size)
        word = (
            size_word(scale)
            if min(abs(scale - 0.01) / 0.01, abs(scale - 0.05) / 0.05) > 0.15
            else None
        )
        return {"size": word if word != "medium" else None, "color": o.color, "place": place}

    mine = attributes(target)
    rivals = [
        attributes(o) for o in objects if o is not target and o.class_name == target.class_name
    ]
    choices = []
    for pick in range(8):
        used = [key for i, key in enumerate(mine) if pick >> i & 1]
        if any(mine[key] is None for key in used):
            continue
        # a rival fits if no used attribute surely differs; one without a sure value may fit
        if not any(all(r[key] in (None, mine[key]) for key in used) for r in rivals):
            choices.append(used)
    if not choices:
        return None
    used = choices[rng.integers(len(choices))]
    words = (
        [str(rng.choice(["A", "The"]))]
        + [mine[key] for key in used if key != "place"]
        + [target.class_name]
    )
    return " ".join(words + ([place_words(*mine["place"])] if "place" in used else []))


def reword(phrase, name):
    """A phrase of `describe` in the demo's words."""
    return re.sub("^A (?=[aeiou])", "An ", phrase.replace(name, OTHER_NAMES.get(name, name)))


def describe_all(rng, objects, image_id, split, refs, annotations):
    """Append a ref and an annotation for every object that a phrase can single out."""
    for target in objects:
        tries = 2 if split == "train" else 1  # training sees two ways to say it where there are two
        phrases = [describe(rng, objects, target) for _ in range(tries)]
        phrases = [reword(p, target.class_name) for p in dict.fromkeys(filter(None, phrases))]
        if not phrases:
            continue
        ann_id, parts = len(annotations), [target.mask]
        if ann_id % 50 == 0:  # in two parts that overlap: it must be read as their union
            columns = np.arange(SIZE)
            left, right = columns < target.center[0] + 1, columns > target.center[0] - 2
            parts = [target.mask & left, target.mask & right]
        x1, y1, x2, y2 = mask_to_box(target.mask).tolist()
        ids = {"image_id": image_id, "category_id": list(OUTLINES).index(target.class_name)}
        annotations.append({"id": ann_id, **ids, "bbox": [x1, y1, x2 - x1, y2 - y1]})
        annotations[-1]["segmentation"] = [encode_rle(part) for part in parts]
        sentences = [
            {"raw": p, "sent": p.lower(), "tokens": p.lower().split(), "sent_id": 2 * ann_id + k}
            for k, p in enumerate(phrases)
        ]
        ref = {"ref_id": ann_id, "ann_id": ann_id, **ids, "split": split, "sentences": sentences}
        ref["file_name"], ref["sent_ids"] = f"{image_id:05d}.jpg", [s["sent_id"] for s in sentences]
        refs.append(ref)


def make_root(root):
    if root.exists() and not root.is_dir():
        raise InputError(f"--data_root {root} is a file: name a folder to draw the demo set into")
    root.mkdir(parents=True, exist_ok=True)


def make_demo(data_root, seed=0, counts=IMAGES):
    """Write the demo set under `data_root` in the REFER layout, unless it is there already.

    Seeded: the same pictures on every machine, up to the JPEG encoder. Like the real sets it holds
    images with several refs, a few images one pixel off their mask's size, and masks in two RLEs.
    """
    root = Path(data_root)
    if (root / "demo" / "refs(unc).p").is_file():
        return
    make_root(root)
    rng = np.random.default_rng(seed)
    refs, images, annotations = [], [], []
    splits = [split for split, count in counts.items() for _ in range(count)]
    with tempfile.TemporaryDirectory(dir=root) as new:
        folder = Path(new) / "JPEGImages"
        folder.mkdir()
        for image_id, split in enumerate(tqdm(splits, desc=f"drawing the demo set into {root}")):
            image, objects = draw_scene(rng, int(rng.integers(1, 5)))
            describe_all(rng, objects, image_id, split, refs, annotations)
            off = image_id % 500 == 1
            name = f"{image_id:05d}.jpg"
            image.resize((SIZE + off, SIZE)).save(folder / name, quality=92)
            images.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE})
        categories = [{"id": i, "name": name} for i, name in enumerate(OUTLINES)]
        coco = {"images": images, "annotations": annotations, "categories": categories}
        (root / "demo").mkdir(exist_ok=True)
        (root / "demo" / "instances.json").write_text(json.dumps(coco))
        shutil.rmtree(root / "images" / "demo", ignore_errors=True)
        (root / "images" / "demo").mkdir(parents=True)
        os.replace(folder, root / "images" / "demo" / "JPEGImages")
        (Path(new) / "refs").write_bytes(pickle.dumps(refs))
        os.replace(Path(new) / "refs", root / "demo" / "refs(unc).p")  # last: the set is complete


# ------------------------------------------------------------------------- demo_reason
# Questions that do not name what they ask for, in EarthReason's layout. The answer may be several
# instances, or none.

USES = {
    "ship": ["What can carry goods over the sea?", "Which of these float?"],
    "airplane": ["What can carry people through the air?", "Which of these fly?"],
    "building": ["Where could a family live?", "Where is it dry when it rains?"],
    "tennis court": ["Where can two people play a match?", "Where would a ball be hit over a net?"],
    "storage tank": ["Where could oil be kept?", "What holds liquids?"],
}
# what is done to all of one class, at the one of another class that is next to them
SERVICES = {
    ("ship", "building"): ["Where could the ships be loaded?", "Where do goods leave the ships?"],
    ("airplane", "storage tank"): ["Where could the airplanes get fuel?", "Who fuels the planes?"],
}


def ask_use(rng, objects):
    """(questions, reason, targets): all objects that serve a purpose, perhaps of one colour."""
    name = str(rng.choice(list(USES)))
    if objects and rng.random() < 0.75:  # else it may well be that there is none
        name = objects[rng.integers(len(objects))].class_name
    targets, color = [o for o in objects if o.class_name == name], None
    if rng.random() < 0.25:
        color = str(rng.choice([o.color for o in targets] or list(COLORS)))
        targets = [o for o in targets if o.color == color]
    what = f"{color} {name}" if color else name
    asked = [f"{q} The {color} ones." if color else q for q in USES[name]]
    return asked, f"{what}: {len(targets)}.", targets


def ask_service(objects, pair):
    """Likewise: the object of one class that is next to those of another. None if the scene does
    not say which."""
    served, found = ([o for o in objects if o.class_name == name] for name in pair)
    if not served:
        return None
    distance = lambda o: min(np.hypot(*(o.center - other.center)) for other in served)
    found.sort(key=distance)
    if len(found) > 1 and distance(found[1]) < 1.25 * distance(found[0]):
        return None
    return SERVICES[pair], f"{pair[1]} next to the {pair[0]}: {len(found[:1])}.", found[:1]


def draw_question(rng):
    """(image, mask, questions, reason) of one entry of demo_reason."""
    names, pair = rng.choice(list(USES), 2, replace=False).tolist(), None
    if rng.random() < 0.3:
        names = pair = list(SERVICES)[rng.integers(len(SERVICES))]
    while True:
        image, objects = draw_scene(rng, int(rng.integers(1, 5)), names=names)
        asked = ask_service(objects, pair) if pair else ask_use(rng, objects)
        if asked is None:
            continue
        questions, reason, targets = asked
        mask = np.any([np.zeros((SIZE, SIZE), bool), *(o.mask for o in targets)], axis=0)
        if len(connected_components(mask)) == len(targets):  # two that touch would be read as one
            return image, mask, questions, reason


def make_demo_reason(data_root, seed=1, counts=IMAGES):
    """Write demo_reason under `data_root` in EarthReason's layout, unless it is there already."""
    root = Path(data_root) / "demo_reason"
    if root.is_dir():
        return
    make_root(root.parent)
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(dir=data_root) as new:
        for split, count in counts.items():
            folders = [Path(new) / "set" / split / kind for kind in ("images", "labels", "QAs")]
            for folder in folders:
                folder.mkdir(parents=True)
            for number in tqdm(range(count), desc=f"drawing {split} of demo_reason into {root}"):
                image, mask, questions, reason = draw_question(rng)
                images, labels, texts = (folder / f"{number:05d}" for folder in folders)
                image.save(f"{images}.jpg", quality=92)
                Image.fromarray(mask.astype(np.uint8) * 255).save(f"{labels}.png")
                qa = {"questions": questions, "answers": [reason] * len(questions)}
                Path(f"{texts}.json").write_text(json.dumps(qa))
        os.replace(Path(new) / "set", root)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["demo", "demo_reason"], help="which set to draw")
    parser.add_argument("--data_root", default="demo_data", help="folder to draw it into")
    return parser.parse_args(argv)


def main(args):
    {"demo": make_demo, "demo_reason": make_demo_reason}[args.name](args.data_root)


if __name__ == "__main__":
    run_script(main, get_args)
