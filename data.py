"""Samples, prompts, answers and batches: everything between files on disk and tensors.

A *sample* is one referring expression: an aerial image, phrases that all mean the same object, and
the mask of that object. This file reads samples in five layouts (REFER's, as RRSIS-D and RIS-LAD
have it, and those of EarthReason, RefSegRS, RISBench and RISORS), writes the prompt that a model
gets, reads the answer that it gives, and pads prompts into batches. The demo set, which all scripts
use by default, is in REFER's layout. assets/make_demo.py draws it on first use, in half a minute.

    python data.py                                                # check the demo set
    python data.py --option RRSISD --data_root /path/to/RRSIS-D   # check a real one
    python data.py --option RRSISD,earthreason --data_root /path/above/both

A check prints counts per split and class, bad records, phrase lengths and object scales, and draws
a contact sheet.

Conventions: boxes are (x1, y1, x2, y2), half-open (x2 = last column + 1). Points are (x, y). Masks
are bool (H, W). The suffix `_px` means native pixels. Only `rescale` converts between frames.
"""

import argparse
import io
import json
import math
import os
import pickle
import pickletools
import re
import subprocess
import sys
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

import sampler
from sampler import InputError, error_border, one_line

# ------------------------------------------------------------------------- boxes, masks, frames


def rescale(coords, source, target):
    """Convert points (..., 2) or boxes (..., 4) from one frame to another. A frame is a (width,
    height): the image's, in pixels, the resized image's, or (1000, 1000) or (1, 1)."""
    coords = np.asarray(coords, dtype=np.float64)
    return coords * np.tile(np.divide(target, source), coords.shape[-1] // 2)


def box_iou(a, b):
    """Pairwise IoU of boxes (N, 4) and (M, 4) in one frame: (N, M). Empty boxes give 0."""
    a = np.asarray(a, dtype=np.float64).reshape(-1, 1, 4)
    b = np.asarray(b, dtype=np.float64).reshape(1, -1, 4)
    side = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])  # (N, M, 2)
    inter = np.clip(side, 0, None).prod(-1)
    area = lambda box: np.clip(box[..., 2:] - box[..., :2], 0, None).prod(-1)
    union = area(a) + area(b) - inter
    return inter / np.where(union > 0, union, 1)


def mask_iou(pred, true):
    """Intersection, union and IoU of two bool masks (H, W). Both empty counts as IoU 1."""
    inter, union = int((pred & true).sum()), int((pred | true).sum())
    return inter, union, inter / union if union else 1.0


def mask_to_box(mask):
    """Tight half-open box (x1, y1, x2, y2) of a bool mask (H, W); zeros for an empty mask."""
    return np.array(Image.fromarray(mask).getbbox() or (0, 0, 0, 0), dtype=np.float64)


# ------------------------------------------------------------------------- masks on disk: COCO RLE
# Column-major run lengths, zeros first. In the compressed string, run i > 2 is stored as its
# difference to run i - 2, in 5-bit groups, low first: char = 48 + group (+ 32 if more follow).

MAX_PIXELS = 2**28  # of a mask: 16,384 x 16,384


def encode_rle(mask):
    """bool (H, W) -> {"size": [H, W], "counts": str}, byte-identical with pycocotools."""
    flat = np.asarray(mask, dtype=bool).T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))  # where the value changes
    runs = np.diff(edges, prepend=0, append=flat.size).tolist()
    chars = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            group = value & 31
            value >>= 5
            more = value != (-1 if group & 16 else 0)
            chars.append(48 + group + 32 * more)
    return {"size": [int(s) for s in np.shape(mask)], "counts": bytes(chars).decode()}


def uncompress(counts):
    """The compressed string -> run lengths (R,). Vectorised: every char belongs to one value."""
    group = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if group.min() < 0 or group.max() > 63 or group[-1] & 32:
        raise InputError("RLE counts: a character outside COCO's alphabet, or a cut string")
    ends = np.flatnonzero(group < 32)  # the last char of each value
    length = np.diff(ends, prepend=-1)
    starts = ends - length + 1
    shift = 5 * (np.arange(group.size) - np.repeat(starts, length))
    if shift.max() > 30:  # NOTE: int64 would overflow in silence
        raise InputError("RLE counts: a run longer than any image")
    value = np.add.reduceat((group & 31) << shift, starts)
    value -= (group[ends] & 16 > 0) * (1 << (5 * length))  # sign-extend
    runs = value.copy()  # undo the differences: odd and even runs are two running sums
    runs[1::2] = np.cumsum(value[1::2])
    runs[2::2] = np.cumsum(value[2::2])
    return runs


def check_size(height, width):
    """(H, W) of a mask as two ints; InputError unless they are whole and fit in memory."""
    is_whole = height % 1 == width % 1 == 0
    if not (is_whole and min(height, width) >= 0 and height * width <= MAX_PIXELS):
        raise InputError(f"a mask of {width} x {height}, expected at most {MAX_PIXELS:,} pixels")
    return int(height), int(width)


def decode_rle(rle):
    """{"size": [H, W], "counts": str | bytes | list} -> bool (H, W), or an error."""
    height, width = check_size(*rle["size"])
    counts = rle["counts"]
    counts = counts.encode() if isinstance(counts, str) else counts
    runs = uncompress(counts) if isinstance(counts, bytes) else np.array(counts)
    # NOTE: each run is checked, as their sum may overflow and look right
    in_range = runs.dtype.kind == "i" and ((runs >= 0) & (runs <= height * width)).all()
    if not in_range or runs.sum() != height * width:
        raise InputError(f"RLE runs do not add up to its size {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def fill_polygon(polygon, height, width):
    """[x, y, x, y, ...] -> bool (H, W): the pixels with their centre inside, by even-odd rule."""
    corners = np.reshape(polygon, (-1, 2)) * 1.0
    if np.ndim(polygon) > 2 or len(corners) < 3 or not (abs(corners) < 1e6).all():  # nor is nan
        raise InputError("a polygon, expected three or more corners as [x, y, x, y, x, y, ...]")
    crossed = np.zeros((height, width + 1), dtype=bool)  # an edge lies left of the pixel's centre
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0)):
        low, high = sorted((y1, y2))
        rows = np.arange(max(math.ceil(low - 0.5), 0), min(math.ceil(high - 0.5), height))
        if len(rows):
            x = x1 + (rows + 0.5 - y1) * (x2 - x1) / (y2 - y1)  # where it cuts each row
            crossed[rows, np.ceil(x - 0.5).clip(0, width).astype(int)] ^= True
    return np.logical_xor.accumulate(crossed, axis=1)[:, :width]


def decode_segmentation(segmentation, height, width):
    """COCO segmentation (one RLE, a list of RLEs, polygons) -> the union, bool (H, W). An RLE has
    its own size; `height` and `width` are for polygons. Errors: as decode_rle."""
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    if isinstance(parts[0], (int, float)):
        parts = [parts]  # one polygon
    is_rle = isinstance(parts[0], dict)
    height, width = check_size(*(parts[0]["size"] if is_rle else (height, width)))
    if len(parts) * height * width > 8 * MAX_PIXELS:  # a short file can hold many large masks
        raise InputError(f"{len(parts)} masks of {width} x {height} pixels for one object")
    union = np.zeros((height, width), dtype=bool)
    for part in parts:
        mask = decode_rle(part) if is_rle else fill_polygon(part, height, width)
        if mask.shape != union.shape:
            raise InputError(f"RLEs of sizes {union.shape} and {mask.shape}, expected one size")
        union |= mask  # NOTE: a sum compared with == 1 would drop overlaps
    return union


# ------------------------------------------------------------------------- samples

LIST_BAD = "; python data.py lists all bad records, --skip_bad leaves them out"
MAX_CHARS = 2000  # of a phrase: some 500 tokens
REF_ID = re.compile(r"[\w.+ -]{1,200}")  # eval.py names pictures after it
# Not all that Pillow can read: for EPS it starts another program, Ghostscript; of JPEG 2000 it does
# not say how many bits there were; of BMP it misreads some palettes.
MASK_FORMATS = ["PNG", "TIFF"]  # without loss
FORMATS = [*MASK_FORMATS, "GIF", "JPEG", "WEBP"]
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
COLOURS, PALETTE = 262, 320
# What a TIFF may say, by tag. Pillow would read other values, but not always as they are stored.
TIFF_TAGS = {
    "bits": (258, {1, 8}),
    "colours": (COLOURS, {1, 2, 3, 6}),  # 0 is black, RGB, palette, YCbCr
    "planes": (284, {1}),
    "bands": (338, {2}),  # beside grey or RGB: alpha
    "signs": (339, {1}),
}
COMPRESSION, LOSSLESS = 259, {1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 50000}
ORIENTATION, NODATA = 274, 42113  # EXIF's; GDAL's, the number that stands for a missing pixel
SUFFIX = re.compile(r"\.(gif|jpe?g|json|png|tiff?|webp)$", re.IGNORECASE)


@contextmanager
def record_border(name, problems=None):
    """Turn what a bad record raises into one line that names the record. The line is an InputError
    or, with a list `problems`, goes there. Inside, records are taken apart without checks."""
    try:
        yield
    except Exception as error:  # whatever a damaged record makes the parser raise
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        line = one_line(f"{name}: {kind}{str(error).removesuffix(LIST_BAD)}")
        if problems is None:
            raise InputError(line + LIST_BAD) from None
        problems.append(line)


@dataclass
class Sample:
    """One referring expression. `segmentation` is COCO's (see decode_segmentation), `size` its
    (H, W). Or it is the Path of a mask file, which is opened at each use."""

    image_path: Path
    phrases: list[str]
    class_name: str
    ref_id: int | str  # unique in its set and split
    split: str
    segmentation: object
    size: tuple[int, int] | None = None
    reasons: list[str] = field(default_factory=list)  # texts that say why it is this object
    option: str = ""  # the set that it is from

    @property
    def name(self):
        return f"ref {self.ref_id} ({self.image_path.name})"

    @property
    def is_weak(self):
        """Whether a phrase is only the class name, as in weakly labelled RRSIS-D."""
        letters = lambda text: re.sub(r"[\W_]", "", text.lower())
        return any(letters(phrase) == letters(self.class_name) for phrase in self.phrases)

    @property
    def mask(self):
        """bool (H, W), decoded at each use: 17,000 decoded masks would not fit in memory."""
        with record_border(self.name):
            if isinstance(self.segmentation, Path):
                return open_mask(self.segmentation)
            return decode_segmentation(self.segmentation, *self.size)

    def image(self):
        """RGB image, resized to the mask: some RRSIS-D images are off by a few pixels."""
        with record_border(self.name):
            image = open_image(self.image_path)
            height, width = self.size or mask_size(self.segmentation)
            if image.size == (height, width) != (width, height):
                raise InputError(f"its mask is {width} x {height}, its image {height} x {width}")
            return image if image.size == (width, height) else image.resize((width, height))


@contextmanager
def image_border(path, formats=FORMATS):
    """An image file, opened. What goes wrong with it becomes one line."""
    if not Path(path).is_file():
        raise InputError(f"cannot read {path}: no such file")
    remedy = "expected a PNG or a TIFF without loss: JPEG blurs the edges of a mask"
    if formats is FORMATS:
        remedy = f"expected {', '.join(formats)} of at most 4 bands: "
        remedy += f"gdal_translate -b 1 -b 2 -b 3 -ot Byte -scale '{path}' new.png"
    with warnings.catch_warnings(), error_border(f"cannot read {path}", remedy):
        warnings.simplefilter("ignore")  # odd metadata; 89 to 179 million pixels
        try:
            with Image.open(path, formats=formats) as image:
                yield image
        except Image.DecompressionBombError:
            limit = 2 * Image.MAX_IMAGE_PIXELS
            raise InputError(f"{path} has over {limit:,} pixels: cut it into tiles") from None


def check_header(image, path, upright=False):
    """InputError unless the header says 8-bit grey, palette or RGB(A), stored in the usual way."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    as_set = lambda value: set(value) if isinstance(value, tuple) else {value}
    odd = [name for name, (tag, usual) in TIFF_TAGS.items() if as_set(tags.get(tag, ())) - usual]
    has_16_bits = re.search(";1[56]", str(image.tile))  # such as RGB;16B
    is_deep = has_16_bits or image.mode[0] in "IF" or {"bits", "signs"} & set(odd)
    if image.mode not in MODES or has_16_bits:
        odd.append(f"pixels ({image.mode})")
    if tags and (COLOURS not in tags or max(tags.get(PALETTE, [256])) < 256):
        odd.append("colours")  # readers of TIFF part on what these mean
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photo with its preview
        odd.append("number of pictures")
    if not upright and image.getexif().get(ORIENTATION, 1) != 1:
        odd.append("orientation")
    if odd:
        found = f"{path} has unusual {', '.join(odd)}"
        remedy = f"convert -auto-orient '{path}[0]' new.png"
        if is_deep:
            remedy = f"gdal_translate -ot Byte -scale '{path}' new.png"
        raise InputError(f"{found}, expected 8-bit grey or RGB: {remedy}")


def open_image(path, upright=False):
    """Image file -> RGB PIL image, without alpha. upright: follow the EXIF orientation, as for a
    photo. A data set with such a tag is refused, as its masks may or may not follow it."""
    with image_border(path) as image:
        check_header(image, path, upright)
        if max(image.size) >= 200 * min(image.size):  # Qwen's processors refuse it
            raise InputError(f"{path} has {image.size} pixels, expected sides of 1 : 200 at most")
        return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")


def open_mask(path):
    """Mask file -> bool (H, W): False where the first channel, or the index of the palette, is 0,
    True where it has the one other value that a mask may have. In RefSegRS it is the red one."""
    with image_border(path, MASK_FORMATS) as image:
        check_header(image, path)
        tags, colours = getattr(image, "tag_v2", {}), image.getcolors(2) or ()
        values = [int(np.ravel(colour)[0]) for _, colour in colours]
        missing = float(str(tags.get(NODATA, 0)).strip("\0 "))
        drawn = np.asarray(image.convert("RGBA"))  # (H, W, 4)
        mask = np.asarray(image.split()[0]) > 0
        is_drawn_otherwise = image.mode == "P" and (drawn[..., :3].any(2) != mask).any()
        for is_wrong, found in (
            (tags.get(COMPRESSION, 1) not in LOSSLESS, "compressed with loss"),
            (not colours, "more than two values"),
            (len(values) == 2 and all(values) == any(values), f"values {values}"),
            (missing and missing in values, f"{missing:g} means that the value is missing"),
            (is_drawn_otherwise, "a palette in which 0 is not black, or another colour is"),
            ((mask & (drawn[..., 3] == 0)).any(), "a target that is transparent"),
        ):
            if is_wrong:
                raise InputError(f"{path}: {found}, expected a PNG of 0 and one other value")
        return mask


def mask_size(path):
    """(H, W) of a mask file, by its header."""
    with image_border(path, MASK_FORMATS) as image:
        return image.size[::-1]


def add_sample(samples, path, phrases, class_name, ref_id, split, segmentation, **more):
    """Clean the texts of a record and append its Sample. more: size (H, W) of polygons, reasons."""
    to_list = lambda texts: [texts] if isinstance(texts, str) else list(texts or [])
    phrases, reasons = to_list(phrases), to_list(more.get("reasons"))
    if not 0 < len(phrases) <= 100 or not REF_ID.fullmatch(str(ref_id)):
        raise InputError(f"{len(phrases)} phrases, id {ref_id!r}: expected 1 to 100, a short name")
    phrases = [clean_phrase(phrase) for phrase in phrases]
    reasons = [reason for reason in map(plain_text, reasons) if reason]
    class_name = plain_text(class_name)[:100].replace("_", " ") or "object"
    size = None
    if not isinstance(segmentation, Path):  # a mask file says its size when it is opened
        first = segmentation[0] if isinstance(segmentation, list) else segmentation
        size = check_size(*(first["size"] if isinstance(first, dict) else more["size"]))
    samples.append(Sample(path, phrases, class_name, ref_id, split, segmentation, size, reasons))


# ------------------------------------------------------------------------- readers
# One for each layout: (split, problems, *paths) -> samples; LAYOUTS says which paths. The record
# border around each record catches what is wrong with it.


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers only: a pickle from the web must never run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_refs(path):
    """`refs(unc).p` -> list of dicts. No class that the pickle names is ever imported."""
    with error_border(f"{path} is refused", "expected a whole pickle of lists and dicts"):
        content = path.read_bytes()
        # NOTE: look before it runs. A tuple as a dict's key can take for ever to hash; an index
        # into the memo decides how much memory the unpickler takes.
        for opcode, value, place in pickletools.genops(content):
            if "TUPLE" in opcode.name or ("PUT" in opcode.name and value > len(content)):
                raise pickle.UnpicklingError(f"{opcode.name} at byte {place}")
        # Python 2 wrote texts as bytes
        return [dict(ref) for ref in PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()]


def same_unicode(name):
    """A file name in one of the forms that Unicode has for it: macOS stores another than others."""
    return unicodedata.normalize("NFC", name)


def in_one_unicode(files, folder):
    """{name: path} with same_unicode's names; InputError for two that are then alike."""
    alike = {same_unicode(name): path for name, path in files.items()}
    if len(alike) < len(files):
        raise InputError(f"{folder} holds two names that differ in their form of Unicode alone")
    return alike


def rows_by_id(name, rows):
    """{id: row}; InputError for two rows that differ under one id."""
    table = {row["id"]: row for row in rows}
    for row in rows:
        if table[row["id"]] != row:
            raise InputError(f"{name} of instances.json: id {row['id']!r} stands for two of them")
    return table


def read_refer(split, problems, path):
    """refs(unc).p says who is meant, instances.json where. Phrases are `raw`: in weakly labelled
    sets `sent` still has the accurate one. `bbox` is xywh in some sets and xyxy in others, so boxes
    come from masks."""
    folder, refs, samples = path.parent, read_refs(path), []
    images = folder.parent / "images" / folder.name / "JPEGImages"
    with error_border(f"{folder} cannot be read", "expected instances.json and JPEGImages"):
        coco = json.loads((folder / "instances.json").read_bytes())
        names = ("annotations", "images", "categories")
        annotations, rows, categories = (rows_by_id(name, coco[name]) for name in names)
        files = in_one_unicode({name: images / name for name in os.listdir(images)}, images)
    for number, ref in enumerate(refs):
        with record_border(f"{folder.name} record {number}", problems):
            # NOTE: a hundred bytes of pickle can hold a list that takes for ever to print
            if not isinstance(ref["split"], str) or not isinstance(ref["ref_id"], (int, str)):
                raise TypeError("expected texts or numbers as split and ref_id")
            if split not in (None, ref["split"]):
                continue
            annotation = annotations[ref["ann_id"]]
            row = rows[annotation["image_id"]]
            name = row["file_name"]
            path = files.get(same_unicode(name))
            if path is None:  # nor is anything outside of the folder
                raise InputError(f"image {name!r} is missing in {images}")
            with record_border(f"ref {ref['ref_id']} ({name})"):
                # RRSIS-D writes categories_id
                kind = annotation.get("category_id", annotation.get("categories_id"))
                phrases = [sentence["raw"] for sentence in ref["sentences"]]
                record = path, phrases, categories[kind]["name"], ref["ref_id"]
                size = row.get("height"), row.get("width")
                add_sample(samples, *record, ref["split"], annotation["segmentation"], size=size)
    return samples


def files_in(folder):
    """{name without suffix: path}. One listing is faster than to ask for 50,000 names, and with it
    no name in a record can point outside of the folder."""
    names = sorted(os.listdir(folder), reverse=True)  # of 1.jpg and 1.png the first is kept
    names = [name for name in names if name[0] != "."]  # macOS writes ._1.jpg
    return in_one_unicode({SUFFIX.sub("", name): folder / name for name in names}, folder)


def find_file(files, name, folder):
    """The file `name`, which may have another suffix or none."""
    path = files.get(SUFFIX.sub("", same_unicode(name)))
    if path is None:
        raise InputError(f"{name[:99]!r} is missing in {folder}")
    return path


def read_earthreason(split, problems, texts, images, masks):
    """<split>/QAs/<id>.json asks questions about one mask, and gives reasons for it (`answer`)."""
    image_files, mask_files, samples = files_in(images), files_in(masks), []
    for ref_id, path in sorted(files_in(texts).items()):
        with record_border(path, problems):
            content = json.loads(path.read_bytes())
            names = [content.get(key) for key in ("class_name", "class", "category")]
            name = next((name for name in names if isinstance(name, str)), "object")
            image = find_file(image_files, ref_id, images)
            record = image, content["questions"], name, ref_id, split
            reasons = content.get("answers") or content.get("answer")
            add_sample(samples, *record, find_file(mask_files, ref_id, masks), reasons=reasons)
    return samples


def read_phrases(split, problems, listing, images, masks):
    """Each line of output_phrase_<split>.txt is the name of an image and a phrase. ref_id is
    <name>_<line number>, which does not depend on the other lines."""
    image_files, mask_files, samples = files_in(images), files_in(masks), []
    for number, line in enumerate(listing.read_bytes().splitlines(), 1):
        with record_border(f"line {number} of {listing}", problems):
            name, phrase = [*line.decode("utf-8-sig").split(None, 1), "", ""][:2]
            if not name:
                continue
            image = find_file(image_files, name, images)
            ref_id = f"{same_unicode(image.stem)}_{number}"
            mask = find_file(mask_files, name, masks)
            add_sample(samples, image, phrase, "object", ref_id, split, mask)
    return samples


def read_risors(split, problems, listing, images, annotations):
    """Each line of RISORS_<split>.txt is the name of an image. Annotations/<name>.json has its
    objects (and some of area 0, which are none). ref_id is <name>_<place in that list>."""
    image_files, tables, samples = files_in(images), files_in(annotations), []
    for number, line in enumerate(listing.read_bytes().splitlines(), 1):
        with record_border(f"line {number} of {listing}", problems):
            name = line.decode("utf-8-sig").strip()
            if not name:
                continue
            image = find_file(image_files, name, images)
            table = json.loads(find_file(tables, name, annotations).read_bytes())
            for place, item in enumerate(table["annotations"]):
                with record_border(f"annotation {place} of {name}", problems):
                    if item.get("area") == 0:
                        continue
                    phrase = re.sub(r"<(\w+)>", r"\1", item["description"])  # "the <ship> on the"
                    class_name, ref_id = item.get("name"), f"{same_unicode(image.stem)}_{place}"
                    record = image, phrase, class_name or "object", ref_id, split
                    add_sample(samples, *record, item["segmentation"])
    return samples


# ------------------------------------------------------------------------- finding and loading sets

SPLITS = ("train", "val", "test")
# name: (reader, the paths that it reads, in the set's folder, with {} for a split)
LAYOUTS = {
    "refer": (read_refer, ["refs(unc).p"]),
    "earthreason": (read_earthreason, ["{}/QAs", "{}/images", "{}/labels"]),
    "refsegrs": (read_phrases, ["output_phrase_{}.txt", "images", "masks"]),
    "risbench": (read_phrases, ["output_phrase_{}.txt", "img_rgb", "mask"]),
    "risors": (read_risors, ["RISORS_{}.txt", "JPEGImages", "Annotations"]),
}
DEMOS = ("demo", "demo_reason")


def set_key(name):
    """The key of a set's name in all its spellings: RIS-LAD is ris_lad, and also res_lad."""
    return re.sub("[-_]", "", name.lower()).replace("reslad", "rislad")


def find_sets(data_root):
    """{key of a set's name: (folder, layout, splits)} in `data_root` and two folders deep.
    `data_root` itself is also known by the name of its layout."""
    root, sets = Path(data_root), {}
    for folder in [*sorted(root.glob("*/*/")), *sorted(root.glob("*/")), root]:
        for layout, (_, parts) in LAYOUTS.items():
            has_split = lambda split: all((folder / part.format(split)).exists() for part in parts)
            if splits := list(filter(has_split, SPLITS)):
                names = [layout] * (folder == root) + [os.path.basename(os.path.abspath(folder))]
                sets |= {set_key(name): (folder, layout, splits) for name in names}
    return sets


def parse_option(option):
    """`--option` name[:weight][,…] -> {name: weight, or None where there is none}."""
    sets = {}
    for part in option.split(","):
        name, colon, weight = (text.strip() for text in part.partition(":"))
        is_weight = re.fullmatch(r"\d*\.?\d+", weight) and float(weight) > 0
        if not name or (colon and not is_weight):
            raise InputError(f"--option {option}: {part!r}, expected the name of a set, or name:2")
        if set_key(name) in map(set_key, sets):
            raise InputError(f"--option {option} names a set twice, expected each once")
        sets[name] = float(weight) if colon else None
    return sets


def is_demo(option):
    """Whether --option names demo sets alone, for which training has defaults of its own."""
    return all(name in DEMOS for name in parse_option(option))


def draw_demo(name, data_root):
    """Run assets/make_demo.py. A process of its own, as that script imports this file."""
    script = str(sampler.ASSETS / "make_demo.py")
    command = [sys.executable, script, name, "--data_root", str(data_root)]
    if subprocess.run(command).returncode:
        raise InputError(f"the demo set could not be drawn: {' '.join(command)}")


def draw_missing_demos(names, data_root):
    """Draw the demo sets among `names` that are missing: process 0, while the others wait."""
    demos = [name for name in names if name in DEMOS]
    if sampler.rank_and_world()[0] == 0:
        for name in demos:
            sets = find_sets(data_root)
            others = ", ".join(sorted(set(sets) - set(map(set_key, DEMOS))))
            if set_key(name) not in sets:
                if others and names == ["demo"]:  # it is the default of --option
                    raise InputError(f"{data_root} holds {others}: name the set with --option")
                draw_demo(name, data_root)
    if demos and dist.is_initialized():
        dist.barrier()


def load_samples(option, data_root, split=None, problems=None):
    """All samples of `split` (None: of every split), in the order of sets and files.

    option: the name of a set's folder, of a layout, or several with commas between. InputError for
    a set or split that is not there, and for a bad record; with a list `problems`, these go there.
    """
    names, samples = list(parse_option(option)), []
    draw_missing_demos(names, data_root)
    sets = find_sets(data_root)
    for name in names:
        if set_key(name) not in sets:
            found = ", ".join(sorted(sets)) or "no set"
            found += f" in one of the layouts {', '.join(LAYOUTS)}"
            found = found if Path(data_root).is_dir() else "no such folder"
            raise InputError(f"--option {name}: no such set in --data_root {data_root} ({found})")
        folder, layout, splits = sets[set_key(name)]
        read, parts = LAYOUTS[layout]
        unique, before = {}, len(problems or [])
        wanted = [split] if layout == "refer" else [s for s in splits if split in (None, s)]
        for one in wanted:
            for sample in read(one, problems, *(folder / part.format(one) for part in parts)):
                with record_border(sample.name, problems):
                    if unique.setdefault((sample.split, sample.ref_id), sample) is not sample:
                        raise InputError("its ref_id is used twice")
                    sample.option = name
        if not unique and len(problems or []) == before:
            if layout == "refer":
                splits = sorted({sample.split for sample in read(None, [], folder / parts[0])})
            raise InputError(f"{folder} has no split {split!r} (it has {', '.join(splits)})")
        samples += unique.values()
    return samples


def decode_all(samples, problems):
    """(sample, mask) of every sample that can be decoded; a line in `problems` for the others."""
    is_silent = sampler.rank_and_world()[0] > 0
    for sample in tqdm(samples, "decoding masks and images", disable=is_silent):
        try:
            mask, _ = sample.mask, sample.image()
        except InputError as error:
            problems.append(str(error).removesuffix(LIST_BAD))
        else:
            yield sample, mask


def load_valid(option, data_root, split, skip_bad):
    """(samples, number of bad records). With `skip_bad`, bad records and those that cannot be
    decoded are listed and left out; without, the first one is an InputError."""
    if not skip_bad:
        return load_samples(option, data_root, split), 0
    problems = []
    samples = load_samples(option, data_root, split, problems)
    samples = [sample for sample, _ in decode_all(samples, problems)]
    if problems and sampler.rank_and_world()[0] == 0:
        print("\n".join([f"skipped {len(problems)} records of {split}:", *problems]))
    return samples, len(problems)


def load_for_training(args):
    """(samples of args.split that can be learned from, those of val or [] with --val_limit 0)."""
    samples, _ = load_valid(args.option, args.data_root, args.split, args.skip_bad)
    # only the prompts "sam" have an answer for an empty mask
    trainable = [sample for sample in samples if args.prompts == "sam" or sample.mask.any()]
    for name in parse_option(args.option):
        if not any(sample.option == name for sample in trainable):
            raise InputError(f"--option {name}: nothing to learn from in split {args.split!r}")
    if sampler.rank_and_world()[0] == 0 and len(trainable) < len(samples):
        print(f"left out: {len(samples) - len(trainable)} refs whose mask is empty")
    if not args.val_limit:
        return trainable, []
    try:
        return trainable, load_valid(args.option, args.data_root, "val", args.skip_bad)[0]
    except InputError as error:
        raise InputError(f"validation: {error}; --val_limit 0 trains without") from None


# ------------------------------------------------------------------------- prompts
# The same templates train and test. `frame` is (1000, 1000), (1, 1) or a size in pixels: see
# `rescale`. Coordinates are written as whole numbers, in the frame (1, 1) with three decimals.

BOX_TASK = "Find the object that the phrase describes and give its box as [x1,y1,x2,y2]."
POINT_TASK = (
    "Judge each point in order: 1 if it lies on the object that the phrase describes, 0 if not."
)
SAM_TASK = (
    "List every object that the phrase asks for, as JSON: its bbox_2d [x1,y1,x2,y2] and two "
    "positive_points [x,y] on it. [] if there is none."
)
RELATIVE = "Coordinates are integers from 0 to 1000."
DECIMAL = "Coordinates are decimals from 0 to 1."
ABSOLUTE = "Coordinates are pixels of the {}x{} image."
THINK = "Reason between <think> and </think> first, then answer between <answer> and </answer>."
NO_THINK = "Answer between <answer> and </answer>, without any reasoning."
PROMPTS_HELP = (
    "points: a box, then the labels of a grid in it; sam: a list of all instances, each with a box "
    "and two points, always after reasoning (flags about grids and tasks have no effect then)"
)


def plain_text(text):
    """One line without control characters. NOTE: markup in it (`<answer>`, `<|image_pad|>`) is
    broken up, or it would be read as a special token or as the answer."""
    text = text.encode(errors="replace").decode()  # a lone surrogate, from a damaged argument
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text)
    return " ".join(text.replace("<", "< ").split())


def clean_phrase(phrase):
    """The phrase as a model may read it. Cleaning it again changes nothing."""
    phrase = plain_text(phrase)
    if not 0 < len(phrase) <= MAX_CHARS:
        raise InputError(f"a phrase of {len(phrase)} characters, expected 1 to {MAX_CHARS}")
    return phrase


def coords_text(coords, frame):
    """A box (4,), a point (2,) or points (N, 2) as text. A box gets at least one unit per side."""
    is_decimal = tuple(frame) == (1, 1)
    steps = np.rint(np.multiply(coords, 1000 if is_decimal else 1)).astype(int)
    if steps.ndim > 1:
        return f"[{','.join(coords_text(point, frame) for point in coords)}]"
    if len(steps) == 4:
        steps[2:] = np.maximum(steps[2:], steps[:2] + 1)
    return f"[{','.join(f'{step / 1000:.3f}' if is_decimal else str(step) for step in steps)}]"


def prompt_text(phrase, task, frame, think):
    """The prompt of any task, its phrase cleaned."""
    relative = {(1000, 1000): RELATIVE, (1, 1): DECIMAL}
    frame_line = relative.get(tuple(frame)) or ABSOLUTE.format(*frame)
    return f"Phrase: {clean_phrase(phrase)}\n{task}\n{frame_line}\n{THINK if think else NO_THINK}"


def box_prompt(phrase, frame=(1000, 1000), think=False):
    """Stage I: phrase -> box."""
    return prompt_text(phrase, BOX_TASK, frame, think)


def point_prompt(phrase, points, frame=(1000, 1000), think=False):
    """Stage II: phrase and points (N, 2), already in `frame` -> N labels."""
    listed = f"{len(points)} points: {coords_text(points, frame)}"
    return prompt_text(phrase, f"{listed}\n{POINT_TASK}", frame, think)


def sam_prompt(phrase, frame=(1000, 1000)):
    """Both stages in one: phrase -> box and two points of each instance. Source: Think2Seg-RS."""
    return prompt_text(phrase, SAM_TASK, frame, think=True)


def answer_text(text, rationale):
    think = f"<think>{rationale}</think>" if rationale else ""
    return f"{think}<answer>{text}</answer>"


def box_answer(box, rationale=None, frame=(1000, 1000)):
    """Target text for a box (4,) in the model's frame."""
    return answer_text(coords_text(box, frame), rationale)


def point_answer(labels, rationale=None):
    """Target text for labels (N,)."""
    return answer_text(f"[{','.join(str(int(label)) for label in labels)}]", rationale)


def sam_answer(instances, rationale, frame=(1000, 1000)):
    """Target text for [(box (4,), points (2, 2))] in the model's frame."""
    items = [
        f'{{"bbox_2d":{coords_text(box, frame)},"positive_points":{coords_text(points, frame)}}}'
        for box, points in instances
    ]
    return answer_text(f"[{','.join(items)}]", rationale)


def place_of(box, width, height):
    """Row and column (0-2) of the box's centre in a 3 x 3 division of the image."""
    x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
    return min(int(y * 3), 2), min(int(x * 3), 2)


def place_words(row, col):
    places = [
        ["on the upper left", "at the top", "on the upper right"],
        ["on the left", "in the middle", "on the right"],
        ["on the lower left", "at the bottom", "on the lower right"],
    ]
    return places[row][col]


def box_scale(box, width, height):
    """Share of the image that the box covers."""
    return (box[2] - box[0]) * (box[3] - box[1]) / (width * height)


def size_word(scale):
    """RRSIS-D's three scales: below 1 %, 1-5 %, above 5 % of the image."""
    return "small" if scale < 0.01 else "large" if scale > 0.05 else "medium"


def rationale(class_name, box_px, width, height):
    """The reasoning that a think-format target shows, made from the sample: class, size, place."""
    size = size_word(box_scale(box_px, width, height))
    return f"The {size} {plain_text(class_name)} {place_words(*place_of(box_px, width, height))}."


def reasoning(sample, index, mask):
    """Why phrase `index` of a sample has this answer: in the data set's own words if it has any."""
    if sample.reasons:
        return sample.reasons[index % len(sample.reasons)]
    if not mask.any():
        return "There is none."
    return rationale(sample.class_name, mask_to_box(mask), *mask.shape[::-1])


def connected_components(mask, min_share=0.01):
    """The 8-connected parts of a bool mask (H, W): a list of masks, in the order of their first
    pixels. Parts below `min_share` of the mask are noise and left out, but never the largest.

    Every pixel starts with its own number as label. In each round it takes the lowest label around
    it, and passes that on to the pixel whose number its old label was. So labels travel fast: the
    number of rounds grows with the logarithm of a part's size.
    """
    count, (height, width) = int(mask.sum()), mask.shape
    index = np.full((height + 2, width + 2), count)  # `count` stands for the background
    index[1:-1, 1:-1][mask] = np.arange(count)  # in reading order
    shifts = [(y, x) for y in range(3) for x in range(3)]
    neighbours = np.stack([index[y : y + height, x : x + width][mask] for y, x in shifts])  # (9, N)
    label, before = np.arange(count + 1), None
    while before is None or (label != before).any():
        before = label.copy()
        np.minimum.at(label, before[:count], before[neighbours].min(0))
        label = label[label]
    _, part, areas = np.unique(label[:count], return_inverse=True, return_counts=True)
    parts = []
    for k in np.flatnonzero(areas >= min(min_share * count, areas.max(initial=0))):
        parts.append(np.zeros_like(mask))
        parts[-1][mask] = part == k
    return parts


def interior_points(mask):
    """Two points (2, 2) well inside a bool mask (H, W) that is not empty: the pixel deepest in it,
    counted in erosions, and the one farthest from there of those at least half as deep. Of a large
    mask only every n-th pixel counts."""
    x1, y1, x2, y2 = mask_to_box(mask).astype(int)
    step = math.ceil(max(x2 - x1, y2 - y1) / 64)
    step = step if mask[y1:y2:step, x1:x2:step].any() else 1  # a thin mask may be missed
    left = np.pad(mask[y1:y2:step, x1:x2:step], 1)
    depth = np.zeros(left.shape, dtype=int)
    while left.any():
        depth += left
        left[1:-1, 1:-1] &= left[:-2, 1:-1] & left[2:, 1:-1] & left[1:-1, :-2] & left[1:-1, 2:]
    rows, columns = np.nonzero(2 * depth >= depth.max())
    pixels = np.stack([columns, rows], -1)  # (N, 2)
    first = pixels[depth[rows, columns].argmax()]
    second = pixels[((pixels - first) ** 2).sum(1).argmax()]
    # NOTE: a little less than the pixel's centre, which would round up to the next pixel
    return np.stack([first, second]) * step - step + np.array([x1, y1]) + 0.5 - 1e-6


def true_instances(mask):
    """[(box (4,), two points in it (2, 2))] of the MAX_INSTANCES largest parts of a mask."""
    parts = connected_components(mask)
    largest = np.argsort([-part.sum() for part in parts], kind="stable")[:MAX_INSTANCES]
    return [(mask_to_box(parts[i]), interior_points(parts[i])) for i in sorted(largest)]


# ------------------------------------------------------------------------- answers
# No parser raises, whatever the text. What cannot be read is None.

MAX_ANSWER = 20_000  # characters
MAX_INSTANCES = 64  # of one answer: each is a mask that SAM decodes
FENCE = re.compile("```(?:json)?([^`]*)```")
LABELS = re.compile(r"\s*\[\s*[01](?:\s*,\s*[01])*\s*\]\s*")


def answer_span(text):
    """(start, end) of the content of the last <answer>…</answer>, or None."""
    start = text.rfind("<answer>")
    end = text.find("</answer>", start)
    return (start + len("<answer>"), end) if start >= 0 and end >= 0 else None


def parse_json(text, max_length=MAX_ANSWER):
    """What a JSON text holds; None for anything else."""
    try:
        return json.loads(text) if len(text) <= max_length else None
    except (ValueError, RecursionError):
        return None


def is_numbers(values, count):
    """Whether this is a list of `count` numbers that can be coordinates."""
    is_number = lambda v: type(v) in (int, float) and abs(v) < 1e6
    return isinstance(values, list) and len(values) == count and all(map(is_number, values))


def is_box(box):
    return is_numbers(box, 4) and box[0] < box[2] and box[1] < box[3]


def parse_boxes(text):
    """A model's text -> list of boxes (x1, y1, x2, y2) in its frame, or None. The boxes are one
    list, a list of lists or Qwen's [{"bbox_2d": […]}], in <answer>…</answer> or in a ```json fence,
    or in both, or in none."""
    span = answer_span(text)
    body = text[slice(*span)] if span else text
    fence = FENCE.search(body)
    value = parse_json(fence[1] if fence else body)
    if isinstance(value, dict) or is_numbers(value, 4):
        value = [value]
    if not isinstance(value, list) or not value:
        return None
    boxes = [item.get("bbox_2d") if isinstance(item, dict) else item for item in value]
    return [tuple(map(float, box)) for box in boxes] if all(map(is_box, boxes)) else None


def find_labels(text):
    """(places in `text`, values (N,)) of the labels in its last <answer>[0,1,…]</answer>; None."""
    start, end = answer_span(text) or (0, 0)
    if end - start > MAX_ANSWER or not LABELS.fullmatch(text, start, end):
        return None
    places = [place for place in range(start, end) if text[place] in "01"]
    return places, [int(text[place]) for place in places]


def parse_labels(text):
    """A model's text -> list of labels 0/1, or None."""
    found = find_labels(text)
    return found[1] if found else None


class Instance(NamedTuple):
    """One object of an answer to sam_prompt, in the model's frame."""

    box: tuple  # (4,)
    points: list  # of (x, y)


def parse_instances(text):
    """A model's text -> list of Instance, empty for [], or None. Strict: the last <answer> holds a
    JSON list of at most MAX_INSTANCES objects {"bbox_2d", "positive_points"}, with two points each,
    and nothing else."""
    span = answer_span(text)
    items = parse_json(text[slice(*span)]) if span else None
    if not isinstance(items, list) or len(items) > MAX_INSTANCES:
        return None
    found = []
    for item in items:
        if not isinstance(item, dict) or set(item) != {"bbox_2d", "positive_points"}:
            return None
        box, points = item["bbox_2d"], item["positive_points"]
        are_two = isinstance(points, list) and len(points) == 2
        if not is_box(box) or not are_two or not all(is_numbers(point, 2) for point in points):
            return None
        found.append(Instance(tuple(map(float, box)), [tuple(map(float, p)) for p in points]))
    return found


def repair_instances(text):
    """What is legible in an answer that parse_instances refuses, for example one that was cut off:
    the boxes, each with the points that follow it. [] only where an empty list is written; None if
    nothing is legible. SAM can use it, but the reward for valid JSON is 0."""
    span = answer_span(text)
    before, tag, body = text.rpartition("</think>" if "</think>" in text else "<answer>")
    if not span and not tag and "<think>" in text:
        return None  # the reasoning is no answer
    body = (text[slice(*span)] if span else body.replace("<answer>", ""))[:MAX_ANSWER]
    _, *pieces = re.split(r"bbox_2d\W{0,8}(\[[^][]{0,80}\])", body, maxsplit=MAX_INSTANCES)
    if not pieces:
        return [] if body.replace("json", "").strip("` \n") == "[]" else None
    found = []
    for box, rest in zip(map(parse_json, pieces[::2]), pieces[1::2]):
        points = map(parse_json, re.findall(r"\[[^][]{1,40}\]", rest.partition("}")[0]))
        if is_box(box):
            found.append(Instance(tuple(box), [tuple(p) for p in points if is_numbers(p, 2)]))
    return found or None


def merge_duplicates(instances, max_iou=0.5):
    """The instances less those whose box has an IoU above `max_iou` with an earlier one that is
    kept. The truth goes through it too: ships moored side by side may have such boxes."""
    from torchvision.ops import nms

    boxes = np.reshape([box for box, _ in instances], (-1, 4)).astype(np.float64)
    scores = -torch.arange(len(boxes), dtype=torch.float64)  # the earlier one is the better one
    return [instances[i] for i in nms(torch.from_numpy(boxes), scores, max_iou)]


def hungarian(scores):
    """Column for every row of scores (N, M), N <= M, each used once, with the largest total: (N,).
    The Hungarian method: rows join one by one along the cheapest alternating path. The potentials
    `u` and `v` keep every reduced cost, cost - u - v, at 0 or above."""
    cost = -np.asarray(scores, dtype=np.float64)
    rows, cols = cost.shape
    u, v = np.zeros(rows), np.zeros(cols + 1)
    row_of = np.full(cols + 1, -1)  # the row of each column; a new row starts in an extra column
    for row in range(rows):
        row_of[cols], col = row, cols
        slack, previous = np.full(cols, np.inf), np.full(cols, cols)
        visited = np.zeros(cols + 1, bool)
        while row_of[col] >= 0:  # until the path reaches a column that no row has
            visited[col] = True
            free = ~visited[:cols]
            reduced = cost[row_of[col]] - u[row_of[col]] - v[:cols]
            better = free & (reduced < slack)
            slack[better], previous[better] = reduced[better], col
            nearest = np.where(free, slack, np.inf).argmin()
            step = slack[nearest]
            u[row_of[visited]] += step
            v[visited] -= step
            slack[free] -= step
            col = nearest
        while col != cols:  # shift every row on the path to the next column
            row_of[col], col = row_of[previous[col]], previous[col]
    return np.argsort(row_of[:cols])[cols - rows :]


def matched_iou(pred, true):
    """IoU summed over the best matching of boxes (N, 4) with boxes (M, 4), divided by the larger
    count, so that extra and missing boxes cost; 0 if there are none."""
    iou = box_iou(pred, true)  # (N, M)
    iou = iou if len(iou) <= iou.shape[1] else iou.T
    return float(iou[np.arange(len(iou)), hungarian(iou)].sum() / max(iou.shape[1], 1))


class Answer(NamedTuple):
    """What a text says, read once and judged by every reward and metric, in the model's frame."""

    boxes: np.ndarray  # (N, 4)
    points: list  # N arrays (K, 2), the points of each box
    labels: list = None  # of the point task
    is_readable: bool = True
    is_repaired: bool = False

    def to_pixels(self, frame, size):
        """The same in pixels of an image of `size` (W, H), boxes clipped to it. Boxes without area
        are left out. If none is left, the answer is not readable: it did not say "nothing"."""
        boxes = rescale(self.boxes, frame, size).clip(0, [*size, *size])
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        points = [rescale(p, frame, size) for p, inside in zip(self.points, keep) if inside]
        is_readable = self.is_readable and (not len(keep) or keep.any())
        return self._replace(boxes=boxes[keep], points=points, is_readable=bool(is_readable))


def read_answer(text, task):
    """The Answer in a model's text. task: "box", "point" or "sam"."""
    if task == "point":
        labels = parse_labels(text)
        return Answer(np.zeros((0, 4)), [], labels, labels is not None)
    is_repaired = False
    if task == "box":
        boxes = parse_boxes(text)
        found = boxes and [Instance(box, []) for box in boxes]
    else:
        found = parse_instances(text)
        if found is None:
            found = repair_instances(text)
            is_repaired = found is not None
        found = found and merge_duplicates(found)
    boxes = np.reshape([box for box, _ in found or []], (-1, 4))
    points = [np.reshape(points, (-1, 2)) for _, points in found or []]
    return Answer(boxes, points, None, found is not None, is_repaired)


# ------------------------------------------------------------------------- prompts for training


class Prompt(NamedTuple):
    image: Image.Image
    text: str
    answer: str  # that SFT teaches: the truth, in the model's frame
    task: str  # "box", "point" or "sam"
    mask: np.ndarray  # the truth, bool (H, W)
    frame: tuple  # see sampler.answer_frame
    box_px: np.ndarray = None  # of the point task: (4,), the box that the points lie in
    points_px: np.ndarray = None  # (N, 2)


class PromptDataset(Dataset):
    """(pass through the samples, index, task) -> Prompt, for both stages of training.

    The task "box" asks for the box of a phrase. The task "point" asks for the labels of a grid. It
    lies in the true box, jittered; for a share `miss_ratio` of prompts it lies in the box of any
    object of the image, so that 0 is learned, too. With --prompts sam, one prompt takes the place
    of both. The key alone seeds every draw, so a prompt does not depend on the process or data
    worker that makes it. frame_of: (width, height) -> sampler.answer_frame.
    """

    def __init__(self, samples, frame_of, args):
        self.samples, self.frame_of, self.args = samples, frame_of, args
        self.in_image = defaultdict(list)
        for sample in samples:
            self.in_image[sample.image_path].append(sample)

    def __getitem__(self, key):
        passes, index, task = key
        args, sample = self.args, self.samples[index]
        rng = np.random.default_rng([args.seed, passes, index])
        image, mask = sample.image(), sample.mask
        width, height = image.size
        frame = self.frame_of(width, height)
        chosen = rng.integers(len(sample.phrases))
        phrase = sample.phrases[chosen]
        to_frame = lambda coords: rescale(coords, image.size, frame)
        if args.prompts == "sam":
            found = [(to_frame(box), to_frame(points)) for box, points in true_instances(mask)]
            answer = sam_answer(found, reasoning(sample, chosen, mask), frame)
            return Prompt(image, sam_prompt(phrase, frame), answer, "sam", mask, frame)
        box = mask_to_box(mask)
        think = bool(rng.random() < args.think_ratio)
        why = reasoning(sample, chosen, mask) if think else None
        if task == "box":
            text, answer = box_prompt(phrase, frame, think), box_answer(to_frame(box), why, frame)
            return Prompt(image, text, answer, "box", mask, frame)
        if rng.random() < args.miss_ratio:  # in true boxes alone, "1" would nearly always be right
            others = self.in_image[sample.image_path]
            box = mask_to_box(others[rng.integers(len(others))].mask)
        box = sampler.jitter_box(box, width, height, rng, args.jitter)
        points = sampler.grid_points(box, width, height)
        text = point_prompt(phrase, to_frame(points), frame, think)
        answer = point_answer(sampler.label_points(points, mask), why)
        return Prompt(image, text, answer, "point", mask, frame, box, points)


def mixture_counts(option, samples):
    """[(indices of a set's samples, how many of them an epoch draws)] for each set of `--option`.
    Without weights an epoch draws every sample once. With weights it draws as many in all, shared
    out by weight: of a:2,b:1 with 3 samples each, an epoch draws 4 from a and 2 from b."""
    sets = parse_option(option)
    if not any(sets.values()):
        return [(np.arange(len(samples)), len(samples))]
    weights = np.cumsum([1.0 if weight is None else weight for weight in sets.values()])
    ends = np.rint(weights / weights[-1] * len(samples)).astype(int)
    counts = []
    for name, draws in zip(sets, np.diff(ends, prepend=0)):
        if not draws:
            raise InputError(f"--option {option}: {name} gets none of {len(samples)} draws")
        counts.append((np.flatnonzero([s.option == name for s in samples]), int(draws)))
    return counts


class PromptSampler(Iterator):
    """Endless keys of a PromptDataset: this process's next micro-batch, epoch after epoch.

    All processes draw the same shuffled epochs and take neighbouring slices of each global batch.
    The last batch of an epoch is filled up from its start. A micro-batch of SFT has one task:
    point prompts are several times as long, and box prompts would be padded to their length.
    """

    def __init__(self, counts, args, rank=0, world=1):
        self.counts, self.args, self.rank, self.world = counts, args, rank, world
        self.set_epoch(0)

    def draw(self, epoch):
        """What an epoch asks, before it is shuffled: (pass, index) (N, 2). A pass goes once
        through the samples of one set. An epoch continues each set where the last epoch left it. So
        all its samples come equally often, and one that comes twice gets another prompt."""
        parts = []
        for number, (indices, draws) in enumerate(self.counts):
            passes, places = np.divmod(np.arange(epoch * draws, (epoch + 1) * draws), len(indices))
            for i in np.unique(passes):
                # the 1 keeps this generator apart from those of epochs and prompts
                rng = np.random.default_rng([self.args.seed, number, i, 1])
                order = indices if draws == len(indices) else rng.permutation(indices)
                drawn = order[places[passes == i]]
                parts.append(np.stack([np.full(len(drawn), i), drawn], axis=1))
        return np.concatenate(parts)

    def set_epoch(self, epoch, cursor=0):
        self.epoch, self.cursor = epoch, cursor
        drawn, rng = self.draw(epoch), np.random.default_rng([self.args.seed, epoch])
        size = self.args.batch_size * self.world
        order = np.resize(rng.permutation(len(drawn)), math.ceil(len(drawn) / size) * size)
        self.batches = drawn[order].reshape(-1, self.world, self.args.batch_size, 2)
        self.is_point = rng.random(len(self.batches)) < self.args.point_ratio

    def skip(self, batches):
        """Go on after so many micro-batches."""
        self.set_epoch(*divmod(batches, len(self.batches)))

    def __next__(self):
        if self.cursor == len(self.batches):
            self.set_epoch(self.epoch + 1)
        task = "point" if self.is_point[self.cursor] else "box"
        own = self.batches[self.cursor][self.rank].tolist()
        self.cursor += 1
        return [(passes, index, task) for passes, index in own]


# ------------------------------------------------------------------------- batches


def think_opening(processor):
    """ "<think>" where the chat template opens it, for a model that always reasons; else nothing. A
    completion goes on from there, so its whole text is this and the completion."""
    chat = sampler.chat_texts(processor, [""])[0]
    return "<think>" if chat.count("<think>") > chat.count("</think>") else ""


def collate(processor, images, prompts, answers=None):
    """Images (B), prompt texts (B) and, for training, answer texts (B) -> model inputs. `labels` is
    -100 except on the answer's tokens and its end-of-sequence token. The answer is tokenised on its
    own, after the same prompt tokens that generation sees."""
    chats = sampler.chat_texts(processor, prompts)
    batch = sampler.encode(processor, images, chats)
    if answers is None:
        return batch
    if opening := think_opening(processor):
        answers = [a if a.startswith(opening) else f"{opening}</think>{a}" for a in answers]
        answers = [answer.removeprefix(opening) for answer in answers]
    tokenizer = processor.tokenizer
    rows, labels = [], []
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], answers, strict=True):
        target = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        prompt = ids[mask.bool()].tolist()
        rows.append(prompt + target)
        labels.append(torch.tensor([-100] * len(prompt) + target))
    # NOTE: an attention mask `ids != pad` would hide the end-of-sequence token where pad = eos
    batch |= tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    batch["labels"] = pad_sequence(labels, True, -100, padding_side="left")
    batch["mm_token_type_ids"] = (batch["input_ids"] == processor.image_token_id).int()
    return batch


def collate_images(processor, images):
    """The beginning of prompts, up to the end of their images (U): model inputs. With the tokens of
    collate_text behind it, it is the whole prompt, so one image serves several prompts."""
    head, token, _ = sampler.chat_texts(processor, [""])[0].partition(processor.image_token)
    return sampler.encode(processor, images, [head + token] * len(images))


def collate_text(processor, prompts):
    """What follows the image in prompts (B): input_ids and attention_mask, left-padded (B, Q)."""
    token, tokenizer = processor.image_token, processor.tokenizer
    texts = [token + chat.partition(token)[2] for chat in sampler.chat_texts(processor, prompts)]
    # NOTE: behind an image token, as in the whole: Llama's tokenizer puts a space before what it
    # takes for the beginning of a text
    rows = [ids[1:] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return dict(tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt"))


# ------------------------------------------------------------------------- files of a run


def read_jsonl(path):
    """The lines of a JSONL file, less one that was cut off when its process was killed."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    rows = [parse_json(line, math.inf) for line in lines]
    return [row for row in rows if row is not None]


def checksum(samples):
    """Changes when the samples do: phrases, reasons, masks (those in files by name and size in
    bytes), names of images. Where they lie does not matter."""
    rows = []
    for s in samples:
        mask = s.segmentation
        mask = (mask.name, mask.stat().st_size) if isinstance(mask, Path) else mask
        content = s.ref_id, s.phrases, s.class_name, mask, s.size, s.reasons
        rows.append((content, s.image_path.name))
    return zlib.crc32(repr(rows).encode())


def warn_about_prompts(path, prompts):
    """Print a note if a model was trained with the other --prompts: it may have no answer."""
    for row in read_jsonl(Path(path) / "args.json")[:1]:
        if isinstance(row, dict) and row.get("prompts", prompts) != prompts:
            print(f"NOTE: {path} was trained with --prompts {row['prompts']}, not {prompts}")


# ------------------------------------------------------------------------- check of a data set


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="Check a data set and draw a contact sheet.")
    add = sampler.flag_adder(parser)
    add("--option", default="demo", help="set: demo, RRSISD, refsegrs ...; several: a,b or a:2,b")
    add("--data_root", default="demo_data", help="folder that holds the data set")
    add("--log_dir", default="runs", help="the contact sheet goes to <log_dir>/<version_name>")
    add("--version_name", default="data", help="name of this run")
    return parser.parse_args(argv)


def outline(mask, width):
    """The pixels of a mask (H, W) that are at most `width` from its edge."""
    moved = [np.roll(mask, step, axis) for axis in (0, 1) for step in (-width, width)]
    return mask & ~np.logical_and.reduce(moved)


def paint_mask(image, mask, width):
    """The image with a mask (H, W) outlined in cyan, which no object has, and tinted a little."""
    pixels, cyan = np.asarray(image, dtype=np.float64), np.array([0, 255, 255])
    painted = np.where(mask[..., None], 0.9 * pixels + 0.1 * cyan, pixels)
    painted[outline(mask, width)] = cyan
    return Image.fromarray(painted.astype(np.uint8))


def contact_sheet(samples, columns=6, rows=4, tile=224):
    """Samples spread evenly over the set: mask in cyan, its box in white, the phrase below."""
    size = (tile - 4, tile - 4)
    sheet = Image.new("RGB", (columns * tile, rows * (tile + 16)), "white")
    draw = ImageDraw.Draw(sheet)
    picks = np.linspace(0, len(samples) - 1, min(len(samples), columns * rows)).astype(int)
    for place, sample in enumerate(samples[i] for i in picks):
        image, mask = sample.image(), sample.mask
        x, y = place % columns * tile, place // columns * (tile + 16)
        enlarged = np.asarray(Image.fromarray(mask).resize(size, Image.NEAREST))
        sheet.paste(paint_mask(image.resize(size), enlarged, 1), (x, y))
        corner = rescale(mask_to_box(mask), image.size, size) + [x, y, x, y]
        draw.rectangle(corner.tolist(), outline="white")
        draw.text((x + 2, y + tile - 4), sample.phrases[0][:36], fill="black")
    return sheet


def main(args):
    problems, counts, valid = [], defaultdict(Counter), []
    yes_or_no = lambda value: "yes" if value else "no"
    samples = load_samples(args.option, args.data_root, problems=problems)
    for sample, mask in decode_all(samples, problems):
        valid.append(sample)
        scale = size_word(box_scale(mask_to_box(mask), *mask.shape)) if mask.any() else "empty"
        with Image.open(sample.image_path) as image:
            is_same_size = image.size == mask.shape[::-1]
        for title, value in (
            ("set", sample.option),
            ("split", sample.split),
            ("class", sample.class_name),
            ("object scale (small < 1 %, large > 5 % of the image)", scale),
            ("words in the first phrase", len(sample.phrases[0].split())),
            ("phrases per ref", len(sample.phrases)),
            ("phrase is the class name alone", yes_or_no(sample.is_weak)),
            ("reasons given", yes_or_no(sample.reasons)),
            ("image has the size of its mask (else it is resized)", yes_or_no(is_same_size)),
        ):
            counts[title][value] += 1
    images = {sample.image_path for sample in valid}
    print(f"{len(valid)} refs on {len(images)} images, {len(problems)} bad records")
    for problem in problems:
        print(f"  {problem}")
    for title, counter in counts.items():
        listed = ", ".join(f"{key}: {count}" for key, count in sorted(counter.items()))
        print(f"{title}: {listed}")
    folder = Path(args.log_dir) / args.version_name
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(valid).save(folder / "contact_sheet.png")
    print(f"written: {folder / 'contact_sheet.png'}")
    if problems:
        remedy = "sft.py, grpo.py and eval.py leave them out with --skip_bad"
        raise InputError(f"{len(problems)} bad records, see above: {remedy}")


if __name__ == "__main__":
    sampler.run_script(main, get_args)
