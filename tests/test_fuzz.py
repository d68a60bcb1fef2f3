"""Hostile input, made from sound input: what comes out is right, or one line (InputError).

Plain `pytest` runs a few hundred cases of each kind, `pytest -m slow` a hundred times as many.
"""

import copy
import io
import json
import pickle
import random
import re
import struct
import zlib

import numpy as np
import pytest
from conftest import SHARED, fastest
from PIL import Image
from test_data import SHARED_LIST

import data

few_or_many = pytest.mark.parametrize(
    "count", [pytest.param(1, id="few"), pytest.param(100, id="many", marks=pytest.mark.slow)]
)


def one_line(call, *args):
    """(result, None), or (None, the line that a record border makes of what was raised)."""
    problems, result = [], None
    with data.record_border("record", problems):
        result = call(*args)
    for line in problems:
        assert line.isprintable() and 10 < len(line) < 600, line
    return result, (problems or [None])[0]


def mutate_bytes(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, few = rng.randrange(len(content) + 1), rng.randrange(1, 9)
        content[at : at + rng.choice([0, 1, few, len(content)])] = rng.choice(
            [
                b"",
                content[at : at + few],
                rng.randbytes(1),
                rng.choice([b"\0", b"\xff"]) * few,
                struct.pack(rng.choice("<>") + "I", rng.choice([1, 256, 20_000, 2**31, 2**32 - 1])),
            ]
        )
    return bytes(content)


RLE_BOMB = {"size": [2**31, 2**31], "counts": "1"}
WRAPS = {"size": [4, 4], "counts": [2**62] * 4 + [16]}  # the sum is 16, modulo 2**64
HOSTILE = [None, True, -1, 0, 0.5, 2**70, 10**4000, float("nan"), float("inf"), -1e308]
HOSTILE += ["", "\0", "\x1b[2J", "\ud800", "x" * 10_000, "../a.jpg", "/etc/passwd", "<|im_end|>"]
HOSTILE += [[], {}, [[]], [{}], [1, 2, 3], ["a"] * 6, {"id": []}, RLE_BOMB, [RLE_BOMB], WRAPS]


def paths_in(tree):
    """The keys that lead to each value inside of a tree of lists and dicts."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield (key,)
        if isinstance(tree[key], (dict, list)):
            yield from ((key, *path) for path in paths_in(tree[key]))


def mutate_value(rng, tree, hostile):
    """A copy with one value replaced or left out, and the path to it."""
    path, tree = rng.choice(list(paths_in(tree))), copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if rng.random() < 0.2:
        del parent[path[-1]]
    else:
        parent[path[-1]] = rng.choice(hostile)
    return tree, path


# ------------------------------------------------------------------------- data sets


@pytest.fixture
def parts(small_set, tmp_path):
    """(four refs, instances, the folder to write them to, with the images in place)."""
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "images/set").mkdir(parents=True)
    images = small_set / "images/demo/JPEGImages"
    (tmp_path / "images/set/JPEGImages").symlink_to(images, target_is_directory=True)
    refs = data.read_refs(small_set / "demo/refs(unc).p")[:4]
    coco = json.loads((small_set / "demo/instances.json").read_text())
    coco["annotations"], coco["images"] = coco["annotations"][:4], coco["images"][:3]
    return refs, coco, folder


def check_set(folder, refs, coco):
    """Write and read a set; (samples, problems), or None if a file of it is refused."""
    (folder / "refs(unc).p").write_bytes(refs)
    (folder / "instances.json").write_bytes(coco)
    problems = []
    samples, line = one_line(data.load_samples, "set", folder.parent, None, problems)
    assert all(text.isprintable() and len(text) < 600 for text in problems)
    assert all(text.startswith(("ref ", "set record ")) for text in problems)
    for sample in samples or ():
        mask, refused = one_line(lambda sample=sample: sample.mask)
        assert sample.name in refused if refused else mask.shape == sample.size
    return None if line else (samples, problems)


@few_or_many
def test_a_hostile_value_in_a_ref_spoils_that_ref_alone(parts, count):
    refs, coco, folder = parts
    rng, spoilt = random.Random(0), 0
    for _ in range(100 * count):
        bad, path = mutate_value(rng, refs, [*HOSTILE, SHARED_LIST, 10**5000])
        found = check_set(folder, pickle.dumps(bad), json.dumps(coco).encode())
        if len(path) == 1 and found is None:  # a ref that is no dict
            continue
        samples, problems = found
        assert len(samples) + len(problems) == len(bad) and len(problems) <= 1
        spoilt += len(problems)
    assert spoilt > 15 * count


@few_or_many
def test_a_hostile_value_in_instances_json_is_named_or_harmless(parts, count):
    refs, coco, folder = parts
    rng, content, spoilt = random.Random(1), pickle.dumps(refs), 0
    for _ in range(100 * count):
        bad, _ = mutate_value(rng, coco, HOSTILE)
        found = check_set(folder, content, json.dumps(bad).encode())
        assert found is None or len(found[0]) + len(found[1]) == len(refs)
        spoilt += found is None or bool(found[1])
    assert spoilt > 8 * count


@few_or_many
def test_damaged_bytes_of_either_file_are_one_line_or_harmless(parts, count):
    refs, coco, folder = parts
    rng, read = random.Random(2), 0
    for i in range(100 * count):
        files = [pickle.dumps(refs, protocol=i % 5), json.dumps(coco).encode()]
        damaged = i // 5 % 2
        files[damaged] = mutate_bytes(rng, files[damaged])
        read += check_set(folder, *files) is not None
    assert 6 * count < read < 98 * count


# ------------------------------------------------------------------------- masks


def slow_decode(counts):
    """Independent of data.decode_rle: one character, one run at a time. Pixels by columns."""
    runs, value, shift = [], 0, 0
    for char in counts.encode():
        value |= (char - 48 & 31) << shift
        shift += 5
        if char - 48 < 32:
            value -= (char - 48 & 16 > 0) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return [i % 2 for i, run in enumerate(runs) for _ in range(run)]


@few_or_many
def test_a_mutated_rle_decodes_as_the_format_says_or_is_refused(count):
    rng, decoded = random.Random(3), 0
    chars = [chr(code) for code in range(48, 112)]
    for seed in range(1000 * count):
        mask = np.random.default_rng(seed).random((rng.randint(1, 9), rng.randint(1, 9))) < 0.4
        rle = data.encode_rle(mask)
        text = list(rle["counts"])
        for _ in range(rng.randint(0, 2)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 2)] = rng.choices([*chars, "é", "~", "/"], k=1)
        rle["counts"] = "".join(text)
        if rng.random() < 0.3:
            rle, _ = mutate_value(rng, rle, [*HOSTILE, 3, [3, 3], [2, 7, 0], [1.0, 8]])
        found, _ = one_line(data.decode_rle, rle)
        if found is not None and isinstance(rle["counts"], str):
            assert found.T.ravel().tolist() == slow_decode(rle["counts"])
            decoded += 1
    assert decoded > 200 * count


@few_or_many
def test_a_mutated_segmentation_has_the_size_it_says_or_is_refused(count):
    rng, decoded = random.Random(4), 0
    part = {"size": [6, 8], "counts": data.encode_rle(np.eye(6, 8) > 0)["counts"]}
    sound = [part, [part, part], {"size": [6, 8], "counts": [10, 5, 33]}]
    sound += [[[1, 1, 7, 1, 7, 5]], [1, 1, 7, 1, 7, 5.5], [[0, 0, 9, 0, 9, 9], [1, 1, 2, 2, 3, 0]]]
    for _ in range(200 * count):
        bad, _ = mutate_value(rng, {"_": rng.choice(sound)}, HOSTILE)
        mask, _ = one_line(data.decode_segmentation, bad.get("_"), 6, 8)
        assert mask is None or mask.shape == (6, 8) and mask.dtype == bool
        decoded += mask is not None
    assert decoded > 4 * count


# ------------------------------------------------------------------------- images

MODES = {
    "PNG": ["RGB", "RGBA", "LA", "L", "P", "1"],
    "JPEG": ["RGB", "L"],
    "TIFF": ["RGB", "P", "1"],
    "GIF": ["P"],
    "WEBP": ["RGB", "RGBA"],
}


def images():
    """Sound files: (format, content)."""
    values = np.random.default_rng(0).integers(0, 255, (10, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for file_format, modes in MODES.items():
        options = {"exif": exif} if file_format in ("PNG", "JPEG", "TIFF", "WEBP") else {}
        for mode in modes:
            image = Image.fromarray(values).convert(mode)
            file = io.BytesIO()
            image.save(file, file_format, **options)
            yield file_format, file.getvalue()
    palette = Image.fromarray(values).convert("P")
    for transparency in (3, bytes(range(200))):
        file = io.BytesIO()
        palette.save(file, "PNG", transparency=transparency)
        yield "PNG", file.getvalue()
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "TIFF", compression=compression)
        yield "TIFF", file.getvalue()


def mend_checksums(content):
    """Of the chunks of a PNG: without them every change ends at the first check."""
    out, at = content[:8], 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        chunk = content[at + 4 : end]
        out, at = out + content[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk)), end + 4
    return out + content[at:]


@few_or_many
@pytest.mark.filterwarnings("error")
def test_a_damaged_image_is_rgb_or_one_line_without_a_warning(tmp_path, count):
    rng, sound, read = random.Random(5), list(images()), 0
    for _ in range(400 * count):
        file_format, content = rng.choice(sound)
        content = mutate_bytes(rng, content)
        if file_format == "PNG" and rng.random() < 0.8:
            content = mend_checksums(content)
        (tmp_path / "x").write_bytes(content)
        image, _ = one_line(data.open_image, tmp_path / "x", rng.random() < 0.5)
        assert image is None or image.mode == "RGB"
        read += image is not None
    assert read > 30 * count


def test_an_image_cut_short_is_never_read_as_another(tmp_path):
    for _, content in images():
        (tmp_path / "x").write_bytes(content)
        whole = data.open_image(tmp_path / "x", upright=True)
        for end in range(0, len(content), max(1, len(content) // 12)):
            (tmp_path / "x").write_bytes(content[:end])
            image, _ = one_line(data.open_image, tmp_path / "x", True)
            assert image is None or image == whole


# ------------------------------------------------------------------------- phrases


def markup(tokenizer):
    """Ids and texts of the tokens that a phrase must not bring in: special ones, and tags."""
    added = tokenizer.added_tokens_decoder.items()
    tokens = {id: token.content for id, token in added if token.special or "<" in token.content}
    assert len(tokens) > 8
    return tokens


def evil_phrases(tokens, rng):
    for token in tokens.values():
        half = rng.randrange(1, len(token))
        head, tail = token[:half], token[half:]
        yield from (token, f"ship{token}", f"<{token}>", f"{head}{token}{tail}", f"\ud800{token}")
        yield from (
            f"{head}\0{tail}",
            f"{head}\n{tail}",
            f"<\u200b{token[1:]}",
            f"\uff1c{token[1:]}",
        )


def test_no_phrase_brings_a_special_token_into_a_prompt(tiny):
    processor, image = tiny[1], Image.new("RGB", (32, 32))
    tokens = markup(processor.tokenizer)

    def special(phrase):
        ids = data.collate(processor, [image], [data.box_prompt(phrase)])["input_ids"][0].tolist()
        return [token for token in ids if token in tokens]

    harmless = special("a ship")
    for phrase in evil_phrases(tokens, random.Random(6)):
        assert special(phrase) == harmless, phrase


def test_no_class_name_brings_a_tag_into_the_answer_that_is_taught(tiny):
    tokenizer = tiny[1].tokenizer
    tokens = markup(tokenizer)
    for name in evil_phrases(tokens, random.Random(7)):
        text = data.box_answer([1, 2, 3, 4], data.rationale(name, (0, 0, 5, 5), 10, 10))
        found = [tokens[id] for id in tokenizer(text)["input_ids"] if id in tokens]
        assert found == ["<think>", "</think>", "<answer>", "</answer>"], name
        assert data.parse_boxes(text) == [(1, 2, 3, 4)]


def test_no_phrase_becomes_a_special_token_of_the_real_tokenizer():
    folder = SHARED / "tokenizers" / "qwen3"
    if not folder.exists():
        pytest.skip("needs the real Qwen3 tokenizer")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = markup(tokenizer)

    def special(phrase):
        chat = [{"role": "user", "content": data.box_prompt(phrase)}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        return [token for token in ids if token in tokens]

    harmless = special("a ship")
    for phrase in evil_phrases(tokens, random.Random(8)):
        assert special(phrase) == harmless, phrase


# ------------------------------------------------------------------------- answers

PIECES = ["<answer>", "</answer>", "[", "]", "{", "}", '"bbox_2d":', '"label":"x"', "```json\n"]
PIECES += ["```", "`", "0", "1", "30", ",", ", ", "[1,2,3,4]", "[0,1]", "-", ".5", "e9", "NaN"]
PIECES += [" ", "\n", "\xa0", "\x1c", "\u3000", "\ufeff", "\0", "é", "\ud800", "true", "null"]
ANSWERS = ["<answer>[1,2,30,40]</answer>", "<answer>[[1,2,3,4],[5,6,7,8.5]]</answer>"]
ANSWERS += ['```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "ship"}]\n```', ""]
ANSWERS += ['<answer>```json {"bbox_2d": [1, 2, 3, 4]} ```</answer>', '[{"bbox_2d": [1, 2, 3, 4]}]']
ANSWERS += ["<think>It.</think><answer>[0, 1,1]</answer>", "<answer> [ 1 ] </answer>"]


@few_or_many
def test_a_mutated_answer_is_read_as_its_grammar_says_or_is_none(count):
    rng, read, labels_read = random.Random(9), 0, 0
    grammar = re.compile(r"\s*\[\s*[01](?:\s*,\s*[01])*\s*\]\s*")
    for _ in range(5000 * count):
        text = rng.choice(ANSWERS)
        for _ in range(rng.randint(0, 4)):
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice(PIECES) + text[at + rng.choice([0, 0, 1, 3]) :]
        boxes, labels = data.parse_boxes(text), data.parse_labels(text)
        found = data.find_labels(text)
        for box in boxes or ():
            assert isinstance(box, tuple) and list(map(type, box)) == [float] * 4
            assert box[0] < box[2] and box[1] < box[3] and max(map(abs, box)) < 1e6
        body = text.rpartition("<answer>")[2].partition("</answer>")
        if "<answer>" in text and body[1] and grammar.fullmatch(body[0]):
            at_places = [int(text[i]) for i in found[0]]
            assert labels == at_places == [int(c) for c in body[0] if c in "01"]
            assert {type(label) for label in labels} == {int}
        else:
            assert labels is found is None
        read, labels_read = read + (boxes is not None), labels_read + (labels is not None)
    assert min(read, labels_read) > 300 * count


MEGABYTE = {
    "labels": "<answer>[" + "0,1," * 250_000 + "1]</answer>",
    "wide spaces": "<answer>[0" + "\xa0" * 10**6 + ",1]</answer>",
    "spaces in a fence": "```" + " " * 10**6 + "x",
    "fences": "```x`" * 200_000,
    "ticks": "`" * 10**6,
    "tags": "<answer>" * 125_000,
    "depth": "[" * 10**6,
    "boxes": "[" + "[1,2,3,4]," * 100_000 + "[1,2,3,4]]",
    "digits": "<answer>[" + "9" * 10**6 + "]</answer>",
}


@pytest.mark.parametrize("shape", MEGABYTE)
def test_a_megabyte_is_read_in_50_milliseconds(shape):
    text = MEGABYTE[shape]
    for parse in (data.parse_boxes, data.parse_labels, data.find_labels):
        assert fastest(parse, text) < 0.05, parse
