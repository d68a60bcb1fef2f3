"""Samples, prompts, answers and batches: everything between files on disk and tensors.

A *sample* is one referring expression: an aerial image, one or more phrases that all mean the same
object, and that object's mask. This file reads samples from disk in five layouts (REFER's, for
RRSIS-D, RIS-LAD and any set of that shape; those of EarthReason, RefSegRS, RISBench and RISORS),
writes the prompt that a model gets, reads the answer that it gives, and pads prompts into batches.
The demo set that every script uses by default (synthetic scenes, drawn by assets/make_demo.py) lies
on disk in REFER's layout and takes the same path.

    python data.py                                                # check the demo set
    python data.py --option RRSISD --data_root /path/to/RRSIS-D   # check a real one
    python data.py --option RRSISD,earthreason --data_root /path/above/both

A check prints counts per split and class, what is missing or of the wrong size, phrase lengths and
object scales, and draws a contact sheet. The demo set is made on first use, in half a minute.

Conventions: boxes are (x1, y1, x2, y2), half-open (x2 = last column + 1). Points are (x, y). Masks
are bool (H, W). A suffix names the frame: `_px` is native pixels; `rescale` is the only way out.
"""

import argparse
import codecs
import io
import json
import math
import os
import pickle
import pickletools
import re
import reprlib
import struct
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from sampler import (
    UNPICKLING_ERRORS,
    InputError,
    check_sides,
    grid_points,
    jitter_box,
    label_points,
    run_script,
)

# ------------------------------------------------------------------------- boxes, masks, frames


def rescale(coords, source, target):
    """Carry points (..., 2) or boxes (..., 4) from one frame to another.

    A frame is a (width, height): (W, H) for native pixels, (1000, 1000) or (1, 1) for relative
    coordinates, the resized size for models that speak pixels of the resized image. The one place
    that converts.
    """
    coords = np.asarray(coords, dtype=np.float64)
    factor = np.array([target[0] / source[0], target[1] / source[1]])
    return coords * np.tile(factor, coords.shape[-1] // 2)


def box_iou(a, b):
    """Pairwise IoU of boxes (N, 4) and (M, 4) in one frame: (N, M). Empty boxes give 0."""
    a = np.asarray(a, dtype=np.float64).reshape(-1, 1, 4)
    b = np.asarray(b, dtype=np.float64).reshape(1, -1, 4)
    side = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])  # (N, M, 2)
    inter = np.clip(side, 0, None).prod(-1)
    area = lambda box: np.clip(box[..., 2:] - box[..., :2], 0, None).prod(-1)
    union = area(a) + area(b) - inter
    return np.where(union > 0, inter / np.where(union > 0, union, 1), 0.0)


def assign(scores):
    """Column for every row of scores (N, M), N <= M, each used once, with the largest total: (N,).

    The Hungarian method, O(N^2 M): rows join one by one along the cheapest alternating path; the
    potentials `u` and `v` keep every reduced cost at 0 or above.
    """
    cost = -np.asarray(scores, dtype=np.float64)
    rows, cols = cost.shape
    u, v = np.zeros(rows), np.zeros(cols + 1)
    row_of = np.full(cols + 1, -1)  # the last column is where a new row enters
    for row in range(rows):
        row_of[cols], col = row, cols
        least, came, visited = np.full(cols, np.inf), np.full(cols, cols), np.zeros(cols + 1, bool)
        while row_of[col] >= 0:
            visited[col] = True
            free = ~visited[:cols]
            reduced = cost[row_of[col]] - u[row_of[col]] - v[:cols]
            better = free & (reduced < least)
            least[better], came[better] = reduced[better], col
            nearest = np.where(free, least, np.inf).argmin()
            step = least[nearest]
            u[row_of[visited]] += step
            v[visited] -= step
            least[free] -= step
            col = nearest
        while col != cols:  # turn the path round
            row_of[col], col = row_of[came[col]], came[col]
    columns = np.empty(rows, dtype=int)
    columns[row_of[:cols][row_of[:cols] >= 0]] = np.flatnonzero(row_of[:cols] >= 0)
    return columns


def matched_iou(pred, true):
    """IoU summed over the best matching of boxes (N, 4) with boxes (M, 4), divided by the larger
    count, so that extra and missing boxes cost; 0 if there are none."""
    iou = box_iou(pred, true)  # (N, M)
    iou = iou if len(iou) <= iou.shape[1] else iou.T
    if not len(iou):
        return 0.0
    return float(iou[np.arange(len(iou)), assign(iou)].sum() / iou.shape[1])


def mask_iou(pred, true):
    """Intersection, union and IoU of two bool masks (H, W). Both empty counts as IoU 1."""
    inter, union = int((pred & true).sum()), int((pred | true).sum())
    return inter, union, inter / union if union else 1.0


def mask_to_box(mask):
    """Tight half-open box (x1, y1, x2, y2) of a bool mask (H, W); zeros for an empty mask."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros(4)
    return np.array([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1], dtype=np.float64)


def components(mask, least=0.01):
    """The instances of a bool mask (H, W): its 8-connected parts, a list of masks in the order of
    their first pixels. Below the share `least` of the whole, all but the largest are crumbs.

    Runs of pixels join the runs above that they touch (union-find), so that the time depends on
    outlines, not on pixels.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))), axis=1)  # (H, W + 1)
    row, column = np.nonzero(edges)
    row, start, end = row[::2].tolist(), column[::2].tolist(), column[1::2].tolist()
    parent, above = list(range(len(row))), 0

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i in range(len(row)):
        while row[above] < row[i] - 1 or (row[above] == row[i] - 1 and end[above] < start[i]):
            above += 1
        j = above
        while row[j] == row[i] - 1 and start[j] <= end[i]:
            first, second = sorted((root(i), root(j)))
            parent[second] = first
            j += 1
    roots, part = np.unique([root(i) for i in range(len(row))], return_inverse=True)
    part = np.repeat(part, np.subtract(end, start).astype(int))  # of every pixel, row by row
    areas = np.bincount(part, minlength=len(roots))
    parts = []
    for k in np.flatnonzero(areas >= min(least * len(part), areas.max(initial=0))):
        parts.append(np.zeros_like(mask))
        parts[-1][mask] = part == k
    return parts


def inner_points(mask):
    """Two points (2, 2) well inside a bool mask (H, W) that is not empty: the pixel deepest in it,
    and the one farthest from there of those at least half as deep.

    Depth is counted in erosions, on every n-th pixel of a large mask.
    """
    x1, y1, x2, y2 = mask_to_box(mask).astype(int)
    step = math.ceil(max(x2 - x1, y2 - y1) / 64)
    step = step if mask[y1:y2:step, x1:x2:step].any() else 1  # too thin to be thinned out
    left = np.pad(mask[y1:y2:step, x1:x2:step], 1)
    depth = np.zeros(left.shape, dtype=int)
    while left.any():
        depth += left
        left[1:-1, 1:-1] &= left[:-2, 1:-1] & left[2:, 1:-1] & left[1:-1, :-2] & left[1:-1, 2:]
    rows, columns = np.nonzero(2 * depth >= depth.max())
    pixels = np.stack([columns, rows], -1)  # (N, 2)
    first = pixels[depth[rows, columns].argmax()]
    second = pixels[((pixels - first) ** 2).sum(1).argmax()]
    # NOTE: a hair before the centre, which rounding to whole pixels would carry into the next one
    return np.stack([first, second]) * step - step + np.array([x1, y1]) + 0.5 - 1e-6


# ------------------------------------------------------------------------- masks on disk: COCO RLE
# Column-major run lengths, zeros first. In the compressed string, run i > 2 is stored as its
# difference to run i - 2, in 5-bit groups, low first: char = 48 + group (+ 32 if more follow).

MOST_PIXELS = 2**28  # of a mask that we are willing to decode: 16,384 x 16,384


def encode_rle(mask):
    """bool (H, W) -> {"size": [H, W], "counts": str}, byte-identical with pycocotools."""
    flat = np.asarray(mask, dtype=bool).T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))  # where the value changes
    runs = np.diff(edges, prepend=0, append=flat.size).tolist()
    chars = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            group = value & 31
            value >>= 5
            more = value != (-1 if group & 16 else 0)
            chars.append(48 + group + 32 * more)
            if not more:
                break
    return {"size": [int(s) for s in np.shape(mask)], "counts": bytes(chars).decode()}


def _uncompress(counts):
    """The compressed string -> run lengths (R,). Vectorised: every char belongs to one value."""
    counts = counts.encode(errors="surrogatepass") if isinstance(counts, str) else counts
    group = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not group.size:
        return group
    if group.min() < 0 or group.max() > 63 or group[-1] & 32:
        raise InputError("RLE counts: a character outside COCO's alphabet, or a cut string")
    ends = np.flatnonzero(group < 32)  # the last char of each value
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    length = ends - starts + 1
    shift = 5 * (np.arange(group.size) - np.repeat(starts, length))
    # NOTE: or else sums in int64 may wrap round and look right, and np.repeat would then write far
    # outside of the mask
    if shift.max() > 30:
        raise InputError("RLE counts: a run longer than any image")
    value = np.add.reduceat((group & 31) << shift, starts)
    value -= (group[ends] & 16 > 0) * (1 << (5 * length))  # sign-extend
    runs = value.copy()  # undo the differences: odd and even runs are two running sums
    runs[1::2] = np.cumsum(value[1::2])
    runs[2::2] = np.cumsum(value[2::2])
    return runs


def _size(pair):
    """[H, W] of a mask as two ints; InputError if it is not one that we are willing to decode."""
    whole = lambda side: isinstance(side, (int, float, np.integer)) and side % 1 == 0
    if isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(whole, pair)):
        height, width = map(int, pair)
        if min(height, width) >= 0 and height * width <= MOST_PIXELS:
            return height, width
    raise InputError(
        f"a mask of size {reprlib.repr(pair)}, expected [height, width] in whole pixels, "
        f"{MOST_PIXELS:,} at most"
    )


def decode_rle(rle):
    """{"size": [H, W], "counts": str | bytes | list} -> bool (H, W). Else InputError."""
    if not isinstance(rle, dict):
        raise InputError(f"not an RLE: {reprlib.repr(rle)}, expected size [h, w] and counts")
    height, width = _size(rle.get("size"))
    counts, pixels = rle.get("counts"), height * width
    if isinstance(counts, (str, bytes)):
        runs = _uncompress(counts)
    elif isinstance(counts, list) and all(type(r) is int and 0 <= r <= pixels for r in counts):
        runs = np.array(counts, np.int64)
    else:
        raise InputError(f"RLE counts: expected a string, or a list of run lengths up to {pixels}")
    if (runs < 0).any() or runs.sum() != pixels:
        raise InputError(f"RLE runs do not add up to its size {height} x {width}")
    values = np.zeros(len(runs), dtype=bool)
    values[1::2] = True
    return np.repeat(values, runs).reshape(width, height).T


def _fill(corners, height, width):
    """Polygon (N, 2) -> bool (H, W): the pixels whose centre lies inside, by the even-odd rule."""
    crossed = np.zeros((height, width + 1), dtype=bool)  # an edge lies left of the pixel's centre
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0)):
        low, high = sorted((y1, y2))
        rows = np.arange(max(math.ceil(low - 0.5), 0), min(math.ceil(high - 0.5), height))
        if len(rows):
            x = x1 + (rows + 0.5 - y1) * (x2 - x1) / (y2 - y1)  # where it cuts each row
            crossed[rows, np.ceil(x - 0.5).clip(0, width).astype(int)] ^= True
    return np.logical_xor.accumulate(crossed, axis=1)[:, :width]


def _are_numbers(values):
    """Whether this is a list of numbers that can be coordinates."""
    return isinstance(values, list) and all(
        type(v) in (int, float) and abs(v) < 1e6 for v in values
    )


def decode_segmentation(segmentation, height, width):
    """COCO segmentation (one RLE, a list of RLEs, polygons) -> the union, bool (H, W).

    The size of the first RLE is canonical; `height` and `width` are used for polygons only.
    InputError if it is none of these.
    """
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    rles = bool(parts) and isinstance(parts[0], dict)
    if parts and not rles and not isinstance(parts[0], list):
        parts = [parts]  # one polygon
    height, width = _size(parts[0].get("size") if rles else (height, width))
    if len(parts) * height * width > 8 * MOST_PIXELS:
        raise InputError(
            f"{len(parts)} masks of {width} x {height} pixels for one object, expected "
            f"{8 * MOST_PIXELS:,} pixels at most in all"
        )
    union = np.zeros((height, width), dtype=bool)
    for part in parts:
        if rles:
            mask = decode_rle(part)
            if mask.shape != union.shape:
                raise InputError(f"RLEs of sizes {union.shape} and {mask.shape}, expected one size")
        else:
            if not _are_numbers(part):
                raise InputError(f"{reprlib.repr(part)}, expected an RLE or a list of numbers")
            if len(part) < 6 or len(part) % 2:
                raise InputError(f"a polygon of {len(part)} numbers, expected x, y, x, y, x, y")
            mask = _fill(np.reshape(part, (-1, 2)), height, width)
        union |= mask  # NOTE: a sum compared with == 1 would drop overlaps
    return union


# ------------------------------------------------------------------------- samples


@contextmanager
def naming(record, remedy=""):
    """Put the name of a record before the InputError that it causes, and what mends it behind."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{record}: {error}{remedy}") from None


LIST_THEM = "; python data.py, with this --option and --data_root, lists all bad records, "
LIST_THEM += "--skip_bad leaves them out"


@dataclass
class Sample:
    """One referring expression. The image is brought to the size of its mask.

    `segmentation` is COCO's (see decode_segmentation) and `size` the mask's (H, W); or it is the
    Path of an image file, and `size` None: to open 50,000 files for it would take too long.
    """

    image_path: Path
    phrases: list[str]
    class_name: str
    ref_id: int | str  # of no other sample in the same set and split
    split: str
    segmentation: object
    size: tuple[int, int] | None
    weak: bool = False  # the phrase is only the class name (weakly labelled RRSIS-D)
    reasons: list[str] = field(default_factory=list)  # texts that say why it is this object
    option: str = ""  # the set that it is from

    @property
    def name(self):
        return f"ref {self.ref_id} ({self.image_path.name})"

    @property
    def mask(self):
        """bool (H, W), decoded at each use: 17,000 decoded masks would not fit in memory."""
        with naming(self.name, LIST_THEM):
            return decode_mask(self.segmentation, self.size)

    def image(self):
        """RGB image of the mask's size. Some RRSIS-D images are off by a few pixels."""
        with naming(self.name, LIST_THEM):
            image = open_image(self.image_path)
            height, width = self.size or mask_file_size(self.segmentation)
        return image if image.size == (width, height) else image.resize((width, height))


# Not all that Pillow can read: for some formats it starts another program on the file.
FORMATS = ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
# What it raises on damaged files, as tests/test_fuzz.py found.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError)
DECODING_ERRORS += (AssertionError, ArithmeticError, MemoryError, struct.error)


def _to_8_bits(image):
    """Its values stretched to 0-255: PIL would clip them to white. NaN (no data) becomes black."""
    values = np.asarray(image, dtype=np.float64)
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0, 0)
    values = np.where(np.isfinite(values), values - low, 0) / max(high - low, 1e-9) * 255
    return Image.fromarray(values.astype(np.uint8))


@contextmanager
def opening(path, kind="image"):
    """An image file (FORMATS), not decoded yet. What goes wrong with it is one clear line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; 89 to 179 million pixels
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except FileNotFoundError:
        raise InputError(f"no {kind} at {path}: check --data_root or --image") from None
    except Image.DecompressionBombError:  # before it is decoded; well below MOST_PIXELS
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise InputError(f"{kind} {path} has over {most:,} pixels: cut it into tiles") from None
    except DECODING_ERRORS as error:
        why = str(error) or type(error).__name__
        raise InputError(
            f"cannot decode {kind} {path} ({why}): fetch it again or save it as PNG"
        ) from None


def open_image(path, upright=False):
    """Image file (FORMATS) -> RGB PIL image; one clear line if it is missing or does not decode.

    16-bit and float images are stretched to 8 bits; an alpha channel is dropped. `upright` follows
    the EXIF orientation: right for a photo, wrong where a mask was drawn on the stored pixels.
    """
    with opening(path) as image:
        image = ImageOps.exif_transpose(image) if upright else image
        return (_to_8_bits(image) if image.mode[0] in "IF" else image).convert("RGB")


def open_mask(path):
    """Mask file (FORMATS, any mode) -> bool (H, W): the pixels whose first channel, or index into a
    palette, is above 0. InputError as `opening` has it."""
    with opening(path, "mask") as image:
        image.load()  # NOTE: np.asarray would take some errors of decoding for an object's array
        values = np.asarray(image)  # (H, W) or (H, W, channels)
    check_sides(*values.shape[1::-1])
    return (values[..., 0] if values.ndim == 3 else values) > 0


def mask_file_size(path):
    """(H, W) of a mask file, from its header alone."""
    with opening(path, "mask") as image:
        width, height = image.size
    check_sides(width, height)
    return height, width


def decode_mask(segmentation, size):
    """What a Sample has of its mask -> bool (H, W)."""
    if isinstance(segmentation, Path):
        return open_mask(segmentation)
    return decode_segmentation(segmentation, *size)


# ------------------------------------------------------------------------- records


@contextmanager
def noting(problems):
    """What is wrong with a record ends the reading; with a list `problems`, it is noted there."""
    try:
        yield
    except InputError as error:
        if problems is None:
            raise InputError(f"{error}{LIST_THEM}") from None
        problems.append(str(error))


def _is_key(value):
    return isinstance(value, (int, float, str))


def class_text(name):
    """The name of a class on one line; "" if it is not a name of up to 100 characters."""
    text = plain_text(str(name)).replace("_", " ") if _is_key(name) else ""
    return text if len(text) <= 100 else ""


def size_of(segmentation, height=None, width=None):
    """(H, W) that a COCO segmentation says; polygons have that of their image. InputError if it is
    none that models read."""
    first = segmentation[0] if isinstance(segmentation, list) and segmentation else segmentation
    size = _size(first.get("size") if isinstance(first, dict) else [height, width])
    if 0 in size:
        raise InputError(f"a mask of size {size[1]} x {size[0]}, expected at least a pixel")
    check_sides(size[1], size[0])
    return size


def make_sample(path, raw, name, ref_id, split, segmentation, size=None, reasons=()):
    """A Sample with its texts cleaned: `raw` phrases, the `name` of the class, `reasons`.

    InputError for an empty phrase, or one that is too long, and for an id unfit as a file's name.
    """
    # a number, or the stem of a file, which can hold whatever a file system lets through
    if isinstance(ref_id, str) and not (ref_id.isprintable() and 0 < len(ref_id) <= 200):
        raise InputError(
            f"its id is {reprlib.repr(ref_id)}, expected 1 to 200 printable characters"
        )
    phrases, class_name = list(map(clean_phrase, raw)), class_text(name)
    letters = lambda text: re.sub("[^a-z]", "", text.lower())
    weak = any(letters(phrase) == letters(class_name) for phrase in phrases)
    reasons = [text for text in map(plain_text, reasons) if text]
    return Sample(path, phrases, class_name, ref_id, split, segmentation, size, weak, reasons)


# ------------------------------------------------------------------------- the REFER layout


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers only: a pickle from the web must never run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_refs(path):
    """`refs(unc).p` -> list of dicts, without ever importing a class that the pickle names."""
    try:
        content = path.read_bytes()
        # NOTE: look before it runs. A tuple as a dict's key may take for ever to hash, or overflow
        # the stack; an index into the memo decides how much memory the unpickler takes.
        for opcode, value, place in pickletools.genops(content):
            if "TUPLE" in opcode.name or ("PUT" in opcode.name and value > len(content)):
                raise pickle.UnpicklingError(f"{opcode.name} at byte {place}")
        refs = _PlainUnpickler(io.BytesIO(content)).load()
    except (OSError, *UNPICKLING_ERRORS) as error:
        why = plain_text(str(error))[:200]
        expected = "a whole pickle of lists and dicts, without tuples and classes"
        raise InputError(f"{path} is refused ({why}): expected {expected}") from None
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise InputError(f"{path} is refused: expected a list of dicts, one per ref")
    return refs


def read_instances(path):
    """instances.json -> its annotations, images and categories, each as a dict from id to row.

    A row without an id that can be looked up is left out: what refers to it will say so.
    """
    try:
        coco = json.loads(path.read_bytes())
        return [
            {
                row["id"]: row
                for row in coco[key]
                if isinstance(row, dict) and _is_key(row.get("id"))
            }
            for key in ("annotations", "images", "categories")
        ]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        expected = "an object with the lists annotations, images and categories"
        raise InputError(f"{path} cannot be read: expected {expected} ({error})") from None


def _check_ids(ref):
    """InputError unless ids and split are whole numbers or short names, fit for a file name.

    NOTE: nothing of the pickle is printed, hashed or compared before its type is known: with shared
    objects, a hundred bytes can stand for a list of 2**60 items.
    """
    for key in ("ref_id", "ann_id", "split"):
        value = ref.get(key)
        if isinstance(value, str) and re.fullmatch(r"[\w.+ -]{1,64}", value):
            continue
        if type(value) is not int or abs(value) >= 2**63:
            what = reprlib.repr(value) if isinstance(value, str) else type(value).__name__
            expected = "a whole number below 2**63, or up to 64 letters, digits, _ . + -"
            raise InputError(f"its {key} is {what}, expected {expected}")


def _row(table, key, kind):
    if not _is_key(key) or key not in table:
        raise InputError(f"no {kind} with id {reprlib.repr(key)} in instances.json")
    return table[key]


def _from_ref(ref, annotations, images, classes, folder, present):
    """Join a ref with its annotation, image and class, and check what can be checked cheaply."""
    with naming(f"ref {ref['ref_id']}"):
        annotation = _row(annotations, ref["ann_id"], "annotation")
        image = _row(images, annotation.get("image_id"), "image")
        file_name = image.get("file_name")
        if not isinstance(file_name, str) or not file_name.isprintable():
            raise InputError("its image has no readable file_name in instances.json")
        if file_name not in present:  # nor is anything outside of the folder
            raise InputError(f"image {file_name:.100} is missing in {folder}")
    with naming(f"ref {ref['ref_id']} ({file_name})"):
        # RRSIS-D spells it categories_id
        category = annotation.get("category_id", annotation.get("categories_id"))
        name = classes.get(category, {}).get("name", category) if _is_key(category) else None
        if not class_text(name):
            raise InputError("its class has no name of up to 100 characters in instances.json")
        sentences = ref.get("sentences")
        if not isinstance(sentences, list) or not 0 < len(sentences) <= MOST_PHRASES:
            raise InputError(f"its sentences are not a list of 1 to {MOST_PHRASES} dicts")
        raw = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
        if len(raw) < len(sentences) or not all(isinstance(phrase, str) for phrase in raw):
            raise InputError("a sentence has no text as raw, where its phrase is expected")
        segmentation = annotation.get("segmentation")
        size = size_of(segmentation, image.get("height"), image.get("width"))
        path = folder / file_name
        return make_sample(path, raw, name, ref["ref_id"], ref["split"], segmentation, size)


def read_refer(root, name, split, problems):
    """(samples of one split or, with None, of all; the names of all splits) of ROOT/<name>."""
    refs = read_refs(root / name / "refs(unc).p")
    tables = read_instances(root / name / "instances.json")
    folder = root / "images" / name / "JPEGImages"
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    samples, splits = [], set()
    for number, ref in enumerate(refs):
        with noting(problems):
            with naming(f"record {number}"):
                _check_ids(ref)  # also of another split: who knows which it belongs to?
            splits.add(str(ref["split"]))
            if split in (None, ref["split"]):
                samples.append(_from_ref(ref, *tables, folder, present))
    return samples, splits


# ------------------------------------------------------------------------- other layouts
# Names are looked up in the listing of a folder: it costs one call, where 50,000 would be slow on a
# network disk, and what lies outside of the folder is not in it.

IMAGE_SUFFIX = re.compile(r"\.(bmp|gif|jp2|jpe?g|png|p[bgp]m|tiff?|webp)$", re.IGNORECASE)
JSON_SUFFIX = re.compile(r"\.json$", re.IGNORECASE)


def files_in(folder, suffix=IMAGE_SUFFIX):
    """{name with suffix, and without: path} of the files of a kind in `folder`. Of 1.jpg and 1.png
    the name 1 means the first."""
    listed = sorted(os.listdir(folder), reverse=True) if folder.is_dir() else []  # the last stays
    names = [n for n in listed if suffix.search(n) and n[0] != "."]  # ._1.json: macOS's notes
    return {cut: folder / n for n in names for cut in (suffix.sub("", n), n)}


def find_file(files, name, kind, folder):
    """Path of the file `name`, whose suffix may be another or none; InputError if there is none."""
    path = files.get(name) or files.get(IMAGE_SUFFIX.sub("", name))
    if path is None:
        raise InputError(f"{kind} {reprlib.repr(name)} is missing in {folder}")
    return path


def read_lines(path):
    """[(number, bytes)] of the lines of a text file that are not blank."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def utf_8(line):
    """bytes -> str; line by line, so that one in another encoding spoils itself alone."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{error.reason} at byte {error.start}, expected UTF-8") from None


def read_object(path):
    """The dict that a JSON file holds."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name!r} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path.name!r} holds a {type(content).__name__}, expected an object")
    return content


def texts_of(value, what):
    """A text, or a list of at most MOST_PHRASES, as a list; what is absent is []."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if len(texts) > MOST_PHRASES or not all(isinstance(text, str) for text in texts):
        raise InputError(f"its {what} are not a list of up to {MOST_PHRASES} texts")
    if (longest := max(map(len, texts), default=0)) > MOST_CHARS:
        raise InputError(f"{what} of {longest} characters, expected {MOST_CHARS} at most")
    return texts


def read_earthreason(folder, split, problems):
    """<split>/QAs/<id>.json asks questions about one mask, and gives reasons for it (`answer`)."""
    folder, samples = folder / split, []
    images, labels = files_in(folder / "images"), files_in(folder / "labels")
    asked = sorted(set(files_in(folder / "QAs", JSON_SUFFIX).values()))
    for path in asked:
        with noting(problems), naming(f"{path.name!r} of {split}/QAs"):
            ref_id, content = path.name[: -len(".json")], read_object(path)
            questions = texts_of(content.get("questions"), "questions")
            if not questions:
                raise InputError("it has no questions, expected a list of texts")
            reasons = texts_of(content.get("answers") or content.get("answer"), "answers")
            named = [content.get(key) for key in ("class_name", "class", "category")]
            name = next(filter(class_text, named), "object")
            image = find_file(images, ref_id, "image", folder / "images")
            mask = find_file(labels, ref_id, "mask", folder / "labels")
            sample = make_sample(image, questions, name, ref_id, split, mask, reasons=reasons)
            samples.append(sample)
    return samples


def read_phrases(folder, split, problems, images, masks):
    """A line of output_phrase_<split>.txt is the name of an image and a phrase; `images`, `masks`:
    the names of the folders where they lie.

    An image may have several lines, so ref_id is <name>_<number of the line>: no other line has it,
    it does not depend on what else is read, and says where to look.
    """
    path, samples = folder / f"output_phrase_{split}.txt", []
    images, masks = folder / images, folder / masks
    image_files, mask_files = files_in(images), files_in(masks)
    for number, line in read_lines(path):
        with noting(problems), naming(f"line {number} of {path.name}"):
            name, phrase = [*utf_8(line).split(None, 1), "", ""][:2]
            image = find_file(image_files, name, "image", images)
            mask = find_file(mask_files, name, "mask", masks)
            ref_id = f"{image.stem}_{number}"
            samples.append(make_sample(image, [phrase], "object", ref_id, split, mask))
    return samples


def read_risors(folder, split, problems, images, tables):
    """A line of RISORS_<split>.txt is the name of an image; Annotations/<name>.json has its objects
    (and some of area 0, which are none). ref_id is <name>_<place in that list>."""
    path, samples = folder / f"RISORS_{split}.txt", []
    images, tables = folder / images, folder / tables
    image_files, table_files = files_in(images), files_in(tables, JSON_SUFFIX)
    for number, line in read_lines(path):
        annotations = []
        with noting(problems), naming(f"line {number} of {path.name}"):
            name = JSON_SUFFIX.sub("", utf_8(line).strip())
            image = find_file(image_files, name, "image", images)
            table = find_file(table_files, name, "annotation", tables)
            listed = read_object(table).get("annotations")
            if not isinstance(listed, list):
                raise InputError(f"{table.name!r} has no list annotations")
            annotations = listed
        for place, annotation in enumerate(annotations):
            with noting(problems), naming(f"annotation {place} of {table.name!r}"):
                if not isinstance(annotation, dict):
                    raise InputError(f"a {type(annotation).__name__}, expected an object")
                if annotation.get("area") == 0:
                    continue
                raw = texts_of(annotation.get("description"), "description") or [""]
                raw = [re.sub(r"<(\w+)>", r"\1", text) for text in raw]  # "the <ship> on the left"
                kind = annotation.get("name") if class_text(annotation.get("name")) else "object"
                segmentation, ref_id = annotation.get("segmentation"), f"{image.stem}_{place}"
                size = size_of(segmentation)
                samples.append(make_sample(image, raw, kind, ref_id, split, segmentation, size))
    return samples


SPLITS = ("train", "val", "test")


class Layout(NamedTuple):
    """How a set lies on disk, by which it is known, and what reads it."""

    split: str  # what every split has, with {} for its name
    folders: tuple  # what lies beside
    read: object  # (folder, split, problems, *folders) -> samples

    def splits(self, folder):
        """The splits that are there; none if `folder` is of another layout."""
        here = all((folder / name).is_dir() for name in self.folders)
        return [s for s in SPLITS if here and (folder / self.split.format(s)).exists()]

    def __str__(self):
        return ", ".join([*self.folders, self.split.format("{train,val,test}")])


LAYOUTS = {
    "earthreason": Layout("{}/QAs", (), read_earthreason),
    "refsegrs": Layout("output_phrase_{}.txt", ("images", "masks"), read_phrases),
    "risbench": Layout("output_phrase_{}.txt", ("img_rgb", "mask"), read_phrases),
    "risors": Layout("RISORS_{}.txt", ("JPEGImages", "Annotations"), read_risors),
}


# ------------------------------------------------------------------------- finding and loading sets

ALIASES = {"rrsisd": ["rrsisd"], "rislad": ["ris_lad", "res_lad"]}  # REFER's folders


def _plain(name):
    """RIS-LAD, ris_lad and rislad are one name."""
    return re.sub("[-_]", "", name.lower())


def _name(folder):
    """Also that of `.`; a link is called by its own."""
    return os.path.basename(os.path.abspath(folder))


def _folders(root):
    """`root` and the folders in it."""
    return [root, *sorted(p for p in root.iterdir() if p.is_dir())] if root.is_dir() else []


def sets_under(root):
    """Names of the sets in the folder `root` and, in REFER's layout, in the folders inside it."""
    refer = {p.parent.name for depth in ("*", "*/*") for p in root.glob(f"{depth}/refs(unc).p")}
    fits = lambda folder: any(layout.splits(folder) for layout in LAYOUTS.values())
    return refer | {_name(folder) for folder in _folders(root) if fits(folder)}


def find_layout(option, data_root):
    """(folder, its Layout) of `--option`, or None if it is not of LAYOUTS.

    The folder is `data_root`, or one in it with the option's name. A set of one's own is known by
    its name and read by the layout that it has.
    """
    root, known = Path(data_root), LAYOUTS.get(_plain(option))
    if known and known.splits(root):
        return root, known
    for folder in _folders(root):
        if _plain(_name(folder)) == _plain(option):
            for layout in LAYOUTS.values():
                if layout.splits(folder):
                    return folder, layout
    return None


def find_dataset(option, data_root):
    """(ROOT, <ds>) of `--option`, where ROOT/<ds>/refs(unc).p exists; `data_root` may lie above."""
    names = [*ALIASES.get(_plain(option), []), option, option.lower()]
    expected, root = f"{names[0]}/refs(unc).p", Path(data_root)
    if _plain(option) in LAYOUTS:
        expected = f"{LAYOUTS[_plain(option)]}, or folder {option} with them,"
    if not root.is_dir():
        raise InputError(f"--data_root {root} is not a folder (expected {expected} inside)")
    for folder in _folders(root):
        for name in names:
            if (folder / name / "refs(unc).p").is_file():
                return folder, name
    known = sorted(sets_under(root))
    found = f"found there: {', '.join(known)}" if known else "no data set found there"
    raise InputError(f"--option {option}: no {expected} under {root} ({found})")


def parse_option(option):
    """`--option` name[:weight][,…] -> [(name, weight, or None where there is none)]."""
    sets = []
    for part in option.split(","):
        name, colon, number = (text.strip() for text in part.partition(":"))
        try:
            weight = float(number) if colon else None
        except ValueError:
            weight = math.nan
        if not name or not (weight is None or 0 < weight < math.inf):
            expected = "the name of a set, or name:weight with a number above 0"
            raise InputError(f"--option {option}: {part!r}, expected {expected}")
        sets.append((name, weight))
    folder = lambda name: next((key for key, s in ALIASES.items() if name in s), _plain(name))
    if len({folder(name) for name, _ in sets}) < len(sets):
        raise InputError(f"--option {option} names a set twice, expected each once")
    return sets


def read_set(option, data_root, split, problems):
    """Samples of one set, see load_samples."""
    found = find_layout(option, data_root)
    if found:
        folder, layout = found
        splits = set(layout.splits(folder))
        wanted = [name for name in SPLITS if name in splits and split in (None, name)]
        samples = []
        for name in wanted:
            samples += layout.read(folder, name, problems, *layout.folders)
    else:
        root, name = find_dataset(option, data_root)
        folder = root / name
        samples, splits = read_refer(root, name, split, problems)
    if not samples and not problems:
        others = ", ".join(sorted(splits - {split})[:10])
        lacks = "nothing in" if split in splits else "no"
        raise InputError(f"{folder} has {lacks} split {split!r} (found: {others or 'no refs'})")
    unique = {}
    for sample in samples:
        with noting(problems):
            if (sample.split, sample.ref_id) in unique:
                raise InputError(f"{sample.name}: its ref_id is used twice")
            sample.option = option
            unique[sample.split, sample.ref_id] = sample
    return list(unique.values())


DEMOS = ("demo", "demo_reason")


def is_demo(option):
    """Whether --option names demo sets alone, for which training has defaults of its own."""
    return all(name in DEMOS for name, _ in parse_option(option))


def draw_demos(names, data_root):
    """Make the demo sets among the named ones where they are missing; `demo`, the default, not
    beside another set unless that is named too."""
    if not set(names) & set(DEMOS):  # a large folder is not searched for nothing
        return
    from assets.make_demo import make_demo, make_demo_reason

    known = sets_under(Path(data_root))
    if "demo" in names and "demo" not in known:
        others = known - {"demo_reason"}
        if others and len(names) == 1:
            listed = ", ".join(sorted(others))
            raise InputError(f"{data_root} holds {listed}: name the set with --option")
        make_demo(data_root)
    if "demo_reason" in names and "demo_reason" not in known:
        make_demo_reason(data_root)


def draw_demos_first(names, data_root, rank):
    """draw_demos by process 0, before the others look for what it draws. All processes call it."""
    if rank == 0:
        draw_demos(names, data_root)
    if dist.is_initialized():
        dist.barrier()


def load_samples(option, data_root, split=None, problems=None):
    """All samples of `split` (None: of every split), in the order of sets and files.

    `option`: demo, demo_reason (made on first use), RRSISD, ris_lad, a name in LAYOUTS, or the name
    of the folder of any set in one of these layouts; several with commas between, under one
    `data_root` (weights behind a colon mean nothing here). Raises InputError for a missing root,
    file, image or annotation and for an empty phrase; with a list `problems`, a bad record is noted
    there and left out instead.
    """
    names, samples = [name for name, _ in parse_option(option)], []
    draw_demos(names, data_root)
    mixed = len(names) > 1
    for name in names:
        bad = None if problems is None else []
        with naming(name) if mixed else nullcontext():
            samples += read_set(name, data_root, split, bad)
        if bad:
            problems += [f"{name}: {line}" if mixed else line for line in bad]
    return samples


def decoded(samples, problems):
    """(sample, mask, stored (W, H) of its image) of each that decodes, a line in `problems` of each
    that does not."""
    sizes, rank = {}, dist.get_rank() if dist.is_initialized() else 0
    for sample in tqdm(samples, desc="reading masks and images", disable=rank > 0):
        try:
            with naming(sample.name):
                mask = decode_mask(sample.segmentation, sample.size)
                if sample.image_path not in sizes:
                    sizes[sample.image_path] = open_image(sample.image_path).size
        except InputError as error:
            problems.append(str(error))
        else:
            yield sample, mask, sizes[sample.image_path]


def load_sound(option, data_root, split, skip_bad):
    """(samples, problems). With `skip_bad`, samples without the bad records and those whose mask or
    image does not decode, and a line in problems for each; else load_samples, and none."""
    if not skip_bad:
        return load_samples(option, data_root, split), []
    problems = []
    samples = load_samples(option, data_root, split, problems)
    sound = [sample for sample, _, _ in decoded(samples, problems)]
    for name, _ in parse_option(option):
        if not any(sample.option == name for sample in sound):
            count = f"{len(problems)} bad ones, the first: {problems[0]}"
            raise InputError(f"--option {name}: no sound record in split {split!r} ({count})")
    return sound, problems


def list_skipped(problems, samples, split):
    """Print what load_sound left out of a split, and how many that is of how many."""
    if problems:
        of = f"{len(samples) + len(problems)} records of {split}"
        print("\n".join([f"skipped {len(problems)} of {of}:", *problems]))


def load_for_training(args, rank):
    """(samples of args.split, those of val or [] with --val_limit 0). Only --prompts sam has an
    answer for an empty mask: else those are left out of the first."""
    names = [name for name, _ in parse_option(args.option)]
    draw_demos_first(names, args.data_root, rank)

    def load(split):
        samples, problems = load_sound(args.option, args.data_root, split, args.skip_bad)
        if rank == 0:
            list_skipped(problems, samples, split)
        return samples

    samples = load(args.split)
    trainable = samples
    if args.prompts != "sam":
        trainable = [sample for sample in samples if sample.mask.any()]
    for name in names:
        if not any(sample.option == name for sample in trainable):
            empty = f"all {sum(s.option == name for s in samples)} masks of {name} are empty"
            raise InputError(f"--split {args.split}: {empty}, expected an object to learn from")
    if rank == 0 and len(trainable) < len(samples):
        print(f"left out: {len(samples) - len(trainable)} refs whose mask is empty")
    with naming("validation", "; --val_limit 0 does without"):
        return trainable, load("val") if args.val_limit else []


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
    "points: a box, then the labels of a grid in it; sam: all instances at once, always with "
    "reasoning (flags about grids and shares of tasks say nothing then)"
)
MOST_CHARS = 2000  # of a phrase: some 500 tokens
MOST_PHRASES = 100  # of a sample
CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], " ")  # Unicode's category Cc


def plain_text(text):
    """One line without control characters. NOTE: markup in it (`<answer>`, `<|image_pad|>`) is
    broken up, or it would be read as a special token or as the answer."""
    text = text.encode(errors="replace").decode()  # a lone surrogate, from a damaged argument
    return " ".join(text.translate(CONTROLS).replace("<", "< ").split())


def clean_phrase(phrase):
    """The phrase as a model may read it; cleaning it again changes nothing."""
    phrase = plain_text(phrase) if len(phrase) <= MOST_CHARS else phrase
    if not phrase:
        raise InputError("the phrase is empty, expected what to look for, such as 'a ship'")
    if len(phrase) > MOST_CHARS:
        raise InputError(f"a phrase of {len(phrase)} characters, expected {MOST_CHARS} at most")
    return phrase


def _units(coords, frame):
    """(the smallest steps in which the frame is written, as int array; a step -> its text)."""
    places = 3 if tuple(frame) == (1, 1) else 0
    steps = np.rint(np.multiply(coords, 10**places)).astype(int)
    return steps, lambda step: f"{step / 10**places:.{places}f}"


def _instructions(task, frame, think):
    relative = {(1000, 1000): RELATIVE, (1, 1): DECIMAL}
    frame_text = relative.get(tuple(frame)) or ABSOLUTE.format(*frame)
    return f"{task}\n{frame_text}\n{THINK if think else NO_THINK}"


def box_prompt(phrase, frame=(1000, 1000), think=False):
    """Stage I: phrase -> box."""
    return f"Phrase: {clean_phrase(phrase)}\n{_instructions(BOX_TASK, frame, think)}"


def _box_text(box, frame):
    """[x1,y1,x2,y2], at least one unit (1, or 0.001 in the frame (1, 1)) wide and high."""
    (x1, y1, x2, y2), text = _units(box, frame)
    return f"[{','.join(map(text, [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]))}]"


def _points_text(points, frame):
    """[[x,y],[x,y],…]"""
    steps, text = _units(points, frame)
    return f"[{','.join(f'[{text(x)},{text(y)}]' for x, y in steps)}]"


def point_prompt(phrase, points, frame=(1000, 1000), think=False):
    """Stage II: phrase and points (N, 2), already in `frame` -> N labels."""
    return (
        f"Phrase: {clean_phrase(phrase)}\n{len(points)} points: {_points_text(points, frame)}\n"
        f"{_instructions(POINT_TASK, frame, think)}"
    )


def sam_prompt(phrase, frame=(1000, 1000)):
    """All in one question: phrase -> box and two points of each instance, which SAM takes as they
    are. Source: Think2Seg-RS."""
    return f"Phrase: {clean_phrase(phrase)}\n{_instructions(SAM_TASK, frame, think=True)}"


def box_answer(box, rationale=None, frame=(1000, 1000)):
    """Target text for a box (4,) in the model's frame."""
    return _answer(_box_text(box, frame), rationale)


def point_answer(labels, rationale=None):
    """Target text for labels (N,)."""
    return _answer(f"[{','.join(str(int(label)) for label in labels)}]", rationale)


def sam_answer(instances, rationale, frame=(1000, 1000)):
    """Target text for [(box (4,), points (2, 2))] in the model's frame."""
    items = [
        f'{{"bbox_2d":{_box_text(box, frame)},"positive_points":{_points_text(points, frame)}}}'
        for box, points in instances
    ]
    return _answer(f"[{','.join(items)}]", rationale)


def _answer(text, rationale):
    think = f"<think>{rationale}</think>" if rationale else ""
    return f"{think}<answer>{text}</answer>"


PLACES = [
    ["upper left", "top", "upper right"],
    ["left", "middle", "right"],
    ["lower left", "bottom", "lower right"],
]


def place_of(box, width, height):
    """Row and column (0-2) of the box's centre in a 3 x 3 division of the image."""
    x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
    return min(int(y * 3), 2), min(int(x * 3), 2)


def place_words(row, col):
    word = PLACES[row][col]
    return f"{'at' if word in ('top', 'bottom') else 'in' if word == 'middle' else 'on'} the {word}"


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


MOST_INSTANCES = 64  # of one answer: each is a mask that SAM decodes


def true_instances(mask):
    """[(box (4,), two points in it (2, 2))] in pixels, for every instance of the truth; for the
    largest, where they are more than an answer may have."""
    parts = components(mask)
    largest = np.argsort([-part.sum() for part in parts], kind="stable")[:MOST_INSTANCES]
    chosen = [parts[i] for i in sorted(largest)]
    return [(mask_to_box(part), inner_points(part)) for part in chosen]


# ------------------------------------------------------------------------- answers

_FENCE = re.compile("```([^`]*)```")
MOST_BOXES = 1000  # of one answer


def _answer_span(text):
    """(start, end) of the last <answer>…</answer>'s content, or None."""
    start = text.rfind("<answer>")
    end = text.find("</answer>", start)
    return (start + len("<answer>"), end) if start >= 0 and end >= 0 else None


def parse_boxes(text):
    """A model's text -> list of boxes (x1, y1, x2, y2) in its frame, or None. No text raises.

    Accepts <answer>[…]</answer> around one box, a list of boxes, or Qwen's
    [{"bbox_2d": […]}], the last two also in a ```json fence, with or without <answer>. More than
    1,000 boxes are None.
    """
    span = _answer_span(text)
    body = text[slice(*span)] if span else text
    fence = _FENCE.search(body)
    body = fence[1].removeprefix("json").lstrip() if fence else body
    # json takes half a second for a megabyte of lists; boxes hold some 8 of these characters each
    if sum(map(body.count, "[{,")) > 20 * MOST_BOXES:
        return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) or (
        isinstance(value, list) and len(value) == 4 and not isinstance(value[0], (list, dict))
    ):
        value = [value]
    if not isinstance(value, list) or not 0 < len(value) <= MOST_BOXES:
        return None
    boxes = [item.get("bbox_2d") if isinstance(item, dict) else item for item in value]
    return [tuple(map(float, box)) for box in boxes] if all(map(_is_box, boxes)) else None


def _is_box(box):
    return _are_numbers(box) and len(box) == 4 and box[0] < box[2] and box[1] < box[3]


def find_labels(text):
    """Positions in `text` and values (N,) of the labels in its last <answer>[0,1,…]</answer>, or
    None. No text raises. Arrays, as an answer can be a megabyte long."""
    span = _answer_span(text)
    if span is None:
        return None
    body = text[slice(*span)]
    bare = "".join(body.split())  # [ label , label , … label ]
    chars = np.frombuffer(bare.encode(errors="replace"), np.uint8)
    if len(chars) < 3 or len(chars) % 2 == 0 or bare[0] + bare[-1] != "[]":
        return None
    values = chars[1::2] - ord("0")  # unsigned: what is below 0 is large
    if (values > 1).any() or (chars[2:-1:2] != ord(",")).any():
        return None
    digits = np.frombuffer(body.encode("utf-32-le"), np.uint32) - ord("0")
    return np.flatnonzero(digits <= 1) + span[0], values


def parse_labels(text):
    """A model's text -> list of labels 0/1, or None if it is not a list of them. No text raises."""
    labels = find_labels(text)
    return None if labels is None else labels[1].tolist()


class Instance(NamedTuple):
    """One object of an answer to sam_prompt, in the model's frame."""

    box: tuple  # (4,)
    points: list  # of (x, y)


_OBJECT = re.compile(r"bbox_2d\W{0,8}\[([^][]{0,80})\]")
_PAIR = re.compile(r"\[([^][,]{1,20},[^][,]{1,20})\]")


def parse_instances(text):
    """A model's text -> list of Instance, empty for [], or None. No text raises.

    Strict: the last <answer>…</answer> holds a JSON list of {"bbox_2d", "positive_points"}, with
    two points each, and nothing else; 64 instances and 12,800 characters at most.
    """
    span = _answer_span(text)
    if span is None or span[1] - span[0] > 200 * MOST_INSTANCES:
        return None
    try:
        items = json.loads(text[slice(*span)])
    except (ValueError, RecursionError):
        return None
    if not isinstance(items, list) or len(items) > MOST_INSTANCES:
        return None
    found = []
    for item in items:
        if not isinstance(item, dict) or set(item) != {"bbox_2d", "positive_points"}:
            return None
        box, points = item["bbox_2d"], item["positive_points"]
        if not _is_box(box) or not isinstance(points, list) or len(points) != 2:
            return None
        if not all(_are_numbers(point) and len(point) == 2 for point in points):
            return None
        found.append(Instance(tuple(map(float, box)), [tuple(map(float, p)) for p in points]))
    return found


def repair_instances(text):
    """What can be made out in an answer that parse_instances refuses: its legible boxes, with
    corners put in order, each with the points that stand by it, however many. An empty list only
    where one is written; None if nothing is legible. No text raises.

    SAM can use what was cut off in the middle or lacks a bracket; json_reward gives nothing for it.
    """
    span = _answer_span(text)
    *before, body = re.split("<answer>|</think>", text)
    if not span and not before and "<think>" in text:
        return None  # what is reasoned about is no answer
    body = text[slice(*span)] if span else body
    places = list(islice(_OBJECT.finditer(body), MOST_INSTANCES + 1))
    if not places:
        return [] if body.replace("json", "").strip("` \n") == "[]" else None
    found, last = [], 0
    ends = [place.start() for place in places[1:]] + [len(body)]
    for place, end in zip(places[:MOST_INSTANCES], ends):
        # its points stand between its brackets; where one is missing, as far as the next box
        opening = body.rfind("{", max(last, place.start() - 1000), place.start())
        start, last = opening if opening >= 0 else place.end(), place.end()
        end = min(end, last + 1000)
        closing = body.find("}", last, end)
        box = _numbers(place[1])
        if box is None or len(box) != 4:
            continue
        (x1, x2), (y1, y2) = sorted(box[::2]), sorted(box[1::2])
        pairs = map(_numbers, _PAIR.findall(body, start, closing if closing >= 0 else end))
        if x1 < x2 and y1 < y2:
            found.append(Instance((x1, y1, x2, y2), [pair for pair in pairs if pair]))
    return found or None


def _numbers(text):
    """Numbers with commas between them -> tuple of floats, or None."""
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        return None
    return numbers if all(abs(v) < 1e6 for v in numbers) else None  # nor nan


def find_instances(text):
    """(instances, whether they had to be repaired); (None, False) if there are none to be read."""
    strict = parse_instances(text)
    repaired = repair_instances(text) if strict is None else None
    return (strict, False) if repaired is None else (repaired, True)


def merge_duplicates(instances, most=0.5):
    """[(box (4,), points)] less those that were said before: whose box has an IoU above `most` with
    one that is kept. The truth goes through it too, where boxes are compared: ships moored side by
    side may have such boxes."""
    iou = box_iou(*[[box for box, _ in instances]] * 2)
    kept = []
    for i in range(len(instances)):
        if not (iou[i, kept] > most).any():
            kept.append(i)
    return [instances[i] for i in kept]


def boxes_px(boxes, frame, size):
    """Boxes (N, 4) in pixels of an image of `size` (W, H), clipped to it, and which of them, bool
    (N,), still have an area."""
    boxes = rescale(np.reshape(boxes, (-1, 4)), frame, size).clip(0, [*size, *size])
    return boxes, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def instances_px(text, frame, size):
    """find_instances in pixels of an image of `size` (W, H), each said once, less those outside it:
    ([(box (4,), points (N, 2))], whether they had to be repaired). None if all lie outside: that
    is not to say that there is nothing."""
    found, repaired = find_instances(text)
    if not found:
        return found, repaired
    found = merge_duplicates(found)
    boxes, inside = boxes_px([box for box, _ in found], frame, size)
    grids = [np.reshape(rescale(points, frame, size), (-1, 2)) for _, points in found]
    return [one for one, keep in zip(zip(boxes, grids), inside) if keep] or None, repaired


# ------------------------------------------------------------------------- questions


class Question(NamedTuple):
    image: Image.Image
    prompt: str
    answer: str  # that SFT teaches: the truth, in the model's frame
    task: str  # "box", "point" or "sam"
    mask: np.ndarray  # the truth, bool (H, W)
    frame: tuple  # see sampler.answer_frame
    box_px: np.ndarray = None  # of the point task: (4,), the box that the points lie in
    points_px: np.ndarray = None  # (N, 2)


class Questions(Dataset):
    """(pass, index, task) -> Question, what both stages of training ask.

    task: "box", or "point" for the labels of a grid in the true box, jittered, or in any object's
    (share `miss_ratio`); with --prompts sam, one question takes the place of both. A share
    `think_ratio` of the answers reasons. frame_of(width, height): see sampler.answer_frame. args:
    prompts, seed, think_ratio, miss_ratio, jitter. The key alone seeds every draw, so that a
    question does not depend on the process or the worker that makes it.
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
            return Question(image, sam_prompt(phrase, frame), answer, "sam", mask, frame)
        box = mask_to_box(mask)
        think = bool(rng.random() < args.think_ratio)
        why = reasoning(sample, chosen, mask) if think else None
        if task == "box":
            prompt, answer = box_prompt(phrase, frame, think), box_answer(to_frame(box), why, frame)
            return Question(image, prompt, answer, "box", mask, frame)
        if rng.random() < args.miss_ratio:  # from true boxes alone one learns that 1 is always safe
            others = self.in_image[sample.image_path]
            box = mask_to_box(others[rng.integers(len(others))].mask)
        box = jitter_box(box, width, height, rng, args.jitter)
        points = grid_points(box, width, height)
        prompt = point_prompt(phrase, to_frame(points), frame, think)
        answer = point_answer(label_points(points, mask), why)
        return Question(image, prompt, answer, "point", mask, frame, box, points)


def share_draws(option, samples):
    """How an epoch is shared out among the sets of a weighted `--option`; None without weights.

    -> [(indices of a set's samples, how many of them are drawn)]. In all there are as many draws as
    samples. InputError if a set would get none.
    """
    sets = parse_option(option)
    if all(weight is None for _, weight in sets):
        return None
    weights = np.cumsum([1.0 if weight is None else weight for _, weight in sets])
    ends = np.rint(weights / weights[-1] * len(samples)).astype(int)
    shares = []
    for (name, _), draws in zip(sets, np.diff(ends, prepend=0)):
        if not draws:
            raise InputError(
                f"--option {option}: {name} has none of {len(samples)} draws, expected a weight "
                "that gives it some"
            )
        shares.append((np.flatnonzero([s.option == name for s in samples]), draws))
    return shares


class Order:
    """Endless keys of Questions: this process's next micro-batch, epoch after epoch.

    All processes walk the same shuffled epochs and take neighbouring slices of each global batch;
    an epoch's tail is filled from its own start. `epoch` and `cursor` say where the walk stands,
    and set_epoch takes it anywhere. args: seed, batch_size, point_ratio. shares: see share_draws.
    """

    def __init__(self, count, args, rank, world, shares=None):
        self.count, self.args, self.rank, self.world = count, args, rank, world
        self.shares = shares
        self.set_epoch(0)

    def _drawn(self, epoch):
        """What an epoch asks, before it is shuffled: (passes before this one, index) (count, 2).

        With weights each set is walked on where the last epoch left it, pass after pass, each in an
        order of its own: whatever a set's share, its samples come equally often, and a sample that
        comes twice in an epoch is asked another question.
        """
        if self.shares is None:
            return np.stack([np.full(self.count, epoch), np.arange(self.count)], axis=1)
        parts = []
        for number, (indices, draws) in enumerate(self.shares):
            passes, places = np.divmod(np.arange(epoch * draws, (epoch + 1) * draws), len(indices))
            for i in np.unique(passes):
                # the 1 keeps it apart from the generators of epochs and of questions
                rng = np.random.default_rng([self.args.seed, number, i, 1])
                mine = rng.permutation(indices)[places[passes == i]]
                parts.append(np.stack([np.full(len(mine), i), mine], axis=1))
        return np.concatenate(parts)

    def set_epoch(self, epoch, cursor=0):
        self.epoch, self.cursor = epoch, cursor
        rng = np.random.default_rng([self.args.seed, epoch])
        size = self.args.batch_size * self.world
        order = np.resize(rng.permutation(self.count), math.ceil(self.count / size) * size)
        drawn = self._drawn(epoch)[order]
        self.batches = drawn.reshape(-1, self.world, self.args.batch_size, 2)
        # one task per batch: point prompts are several times as long, and padding would cost it
        self.points = rng.random(len(self.batches)) < self.args.point_ratio

    def __iter__(self):
        return self

    def __next__(self):
        if self.cursor == len(self.batches):
            self.set_epoch(self.epoch + 1)
        task = "point" if self.points[self.cursor] else "box"
        mine = self.batches[self.cursor][self.rank].tolist()
        self.cursor += 1
        return [(passes, index, task) for passes, index in mine]


# ------------------------------------------------------------------------- batches


def _chats(processor, prompts):
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        for prompt in prompts
    ]
    return processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)


def collate(processor, images, prompts, answers=None):
    """Images (B), prompt texts (B) and, for training, answer texts (B) -> model inputs.

    Padding is on the left, so that generation starts at the same column in every row. With answers,
    `labels` is -100 everywhere but on the answer's tokens and its end-of-sequence token. The answer
    is tokenised on its own, behind the very prompt tokens that generation would start from.
    """
    texts = _chats(processor, prompts)
    batch = processor(
        images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"
    )
    batch.pop("batch_num_images", None)  # LLaVA-OneVision: 1 each, which is its default
    if "mm_token_type_ids" not in batch:  # Qwen-VL models come with it: 1 on image tokens
        batch["mm_token_type_ids"] = (batch["input_ids"] == processor.image_token_id).long()
    if answers is None:
        return dict(batch)
    tokenizer = processor.tokenizer
    rows = []
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], answers, strict=True):
        target = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        prompt, target = ids[mask.bool()], torch.tensor(target)
        rows.append(
            (torch.cat([prompt, target]), torch.cat([prompt.new_full(prompt.shape, -100), target]))
        )
    longest = max(len(ids) for ids, _ in rows)
    left_pad = lambda row, value: torch.nn.functional.pad(row, (longest - len(row), 0), value=value)
    batch["input_ids"] = torch.stack([left_pad(ids, tokenizer.pad_token_id) for ids, _ in rows])
    batch["labels"] = torch.stack([left_pad(labels, -100) for _, labels in rows])
    # NOTE: not `ids != pad`: where pad = eos, that would hide the end-of-sequence from the model
    batch["attention_mask"] = torch.stack([left_pad(torch.ones_like(ids), 0) for ids, _ in rows])
    batch["mm_token_type_ids"] = (batch["input_ids"] == processor.image_token_id).int()
    return dict(batch)


def collate_text(processor, prompts):
    """What follows the image in prompts (B): input_ids and attention_mask, left-padded (B, Q)."""
    token, tokenizer = processor.image_token, processor.tokenizer
    texts = [token + chat.partition(token)[2] for chat in _chats(processor, prompts)]
    # NOTE: behind an image token, as in the whole: Llama's tokenizer puts a space before what it
    # takes for the beginning of a text
    rows = [ids[1:] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return dict(tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt"))


def collate_images(processor, images):
    """What comes before: prompts up to the end of their images (U), as `collate` has it. Behind it,
    collate_text's tokens make it whole, so that one image serves several prompts."""
    batch = collate(processor, images, [""] * len(images))
    shape, behind = batch["input_ids"].shape, collate_text(processor, [""])["input_ids"].shape[1]
    return {k: v[:, :-behind] if v.shape == shape else v for k, v in batch.items()}


# ------------------------------------------------------------------------- check of a data set


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="Check a data set and draw a contact sheet.")
    add = parser.add_argument
    add("--option", default="demo", help="set: demo, RRSISD, refsegrs ...; several: a,b or a:2,b")
    add("--data_root", default="demo_data", help="folder that holds the data set")
    add("--log_dir", default="runs", help="the contact sheet goes to <log_dir>/<version_name>")
    add("--version_name", default="data", help="name of this run")
    return parser.parse_args(argv)


def contact_sheet(samples, columns=6, rows=4, tile=224):
    """Samples spread evenly over the set: mask in blue, its box in white, the phrase below."""
    sheet = Image.new("RGB", (columns * tile, rows * (tile + 16)), "white")
    draw = ImageDraw.Draw(sheet)
    picks = np.linspace(0, len(samples) - 1, min(len(samples), columns * rows)).astype(int)
    for place, sample in enumerate(samples[i] for i in picks):
        image, mask = sample.image(), sample.mask
        pixels = np.asarray(image, dtype=np.float64)
        pixels = np.where(mask[..., None], pixels * 0.5 + np.array([40, 110, 255]) * 0.5, pixels)
        x, y = place % columns * tile, place // columns * (tile + 16)
        sheet.paste(Image.fromarray(pixels.astype(np.uint8)).resize((tile - 4, tile - 4)), (x, y))
        corner = rescale(mask_to_box(mask), image.size, (tile - 4, tile - 4)) + [x, y, x, y]
        draw.rectangle(corner.tolist(), outline="white")
        draw.text((x + 2, y + tile - 4), sample.phrases[0][:36], fill="black")
    return sheet


def main(args):
    problems, off, empty, scales, sound = [], [], 0, [], []
    samples = load_samples(args.option, args.data_root, problems=problems)
    for sample, mask, size in decoded(samples, problems):
        box, (height, width) = mask_to_box(mask), mask.shape
        sound.append(sample)
        if size != (width, height):
            off.append(sample.image_path.name)
        empty += not box.any()
        if box.any():
            scales.append(size_word(box_scale(box, width, height)))
    images = {sample.image_path for sample in samples}
    print(f"{len(samples)} refs on {len(images)} images, {len(problems)} bad records")
    for problem in problems:
        print(f"  {problem}")
    for title, counts in {
        "set": Counter(s.option for s in samples),
        "split": Counter(str(s.split) for s in samples),
        "class": Counter(s.class_name for s in samples),
        "object scale (small < 1 %, large > 5 % of the image)": Counter(scales),
        "words per phrase": Counter(len(p.split()) for s in samples for p in s.phrases),
        "phrases per ref": Counter(len(s.phrases) for s in samples),
    }.items():
        print(f"{title}: " + ", ".join(f"{key} {count}" for key, count in sorted(counts.items())))
    print(
        f"weak phrases (the class name alone): {sum(s.weak for s in samples)}; "
        f"refs with reasons: {sum(bool(s.reasons) for s in samples)}; empty masks: {empty}"
    )
    print(
        "images whose size is not the mask's (they are resized): "
        f"{len(set(off))} {sorted(set(off))[:5]}"
    )
    folder = Path(args.log_dir) / args.version_name
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(sound).save(folder / "contact_sheet.png")
    print(f"written: {folder / 'contact_sheet.png'}")
    if problems:
        raise InputError(f"{len(problems)} bad records, see above: --skip_bad leaves them out")


if __name__ == "__main__":
    run_script(main, get_args)
