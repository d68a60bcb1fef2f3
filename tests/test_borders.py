"""What comes from outside: it is read right, or refused in one line."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, python, serve
from families import small_policy
from PIL import Image
from safetensors.torch import load_file, save_file
from test_data import refer_set

import data
import grpo
import ref_server
import sampler
from sampler import InputError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)
MASK = PIXELS[..., :1] > 100


def write_tiff(path, pixels, **tags):
    """An uncompressed TIFF of pixels (H, W, C). tags: t<number>=[values] or bytes."""
    height, width, bands = pixels.shape
    body = pixels.tobytes()
    fields = {256: [width], 257: [height], 258: [8 * pixels.itemsize] * bands, 259: [1]}
    fields |= {262: [2 if bands > 2 else 1], 273: [8], 277: [bands], 278: [height]}
    fields |= {279: [len(body)], 338: [2]} if bands in (2, 4) else {279: [len(body)]}
    fields |= {int(name[1:]): value for name, value in tags.items()}
    fields = {tag: value for tag, value in fields.items() if value is not None}
    body += b"\0" * (len(body) % 2)
    start, table, rest = 8 + len(body), b"", b""
    for tag, value in sorted(fields.items()):
        raw = value if isinstance(value, bytes) else struct.pack(f"<{len(value)}H", *value)
        kind = 2 if isinstance(value, bytes) else 3
        field = raw.ljust(4, b"\0")
        if len(raw) > 4:
            field = struct.pack("<I", start + 6 + 12 * len(fields) + len(rest))
            rest += raw + b"\0" * (len(raw) % 2)
        table += struct.pack("<HHI", tag, kind, len(value)) + field
    head = b"II*\0" + struct.pack("<I", start) + body + struct.pack("<H", len(fields))
    path.write_bytes(head + table + struct.pack("<I", 0) + rest)


def write_png16(path, pixels):
    """A PNG of 16 bits per channel: grey, grey with alpha, RGB or RGBA."""
    height, width, bands = pixels.shape
    chunk = lambda kind, body: (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    head = struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[bands - 1], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


# ------------------------------------------------------------------------- image files


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PT", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_an_image_of_a_usual_mode_becomes_rgb_without_a_warning(tmp_path, mode, kind):
    options = {"transparency": bytes(range(256))} if (mode, kind) == ("PT", "PNG") else {}
    image = Image.fromarray(PIXELS).convert(mode.removesuffix("T"))
    image.save(tmp_path / "x", kind, **options)
    assert (np.asarray(data.open_image(tmp_path / "x")) == np.asarray(image.convert("RGB"))).all()


FOUR = RNG.integers(0, 256, (6, 9, 4)).astype(np.uint8)
ODD_TIFFS = {
    "16-bit RGB": (PIXELS.astype(np.uint16) * 7, {}),
    "16-bit grey": (PIXELS[..., :1].astype(np.uint16), {}),
    "planes": (PIXELS, {"t284": [2]}),
    "white is 0": (PIXELS[..., :1], {"t262": [0]}),
    "multiplied alpha": (FOUR, {"t338": [1]}),
    "an infrared band": (FOUR, {"t338": [0]}),
    "five bands": (np.concatenate([FOUR, FOUR[..., :1]], 2), {"t338": [0, 0]}),
    "inks": (FOUR, {"t262": [5], "t338": [2]}),
    "mirrored": (PIXELS, {"t274": [2]}),
    "upside down": (PIXELS, {"t274": [3]}),
    "signed": (PIXELS[..., :1], {"t339": [2]}),
    "colours that are not said": (PIXELS[..., :1], {"t262": None}),
    "a palette of 8 bits": (PIXELS[..., :1], {"t262": [3], "t320": [*range(256)] * 3}),
}
DEEP = ("16-bit RGB", "16-bit grey", "signed")  # need other numbers; the others another order


@pytest.mark.parametrize("name", ODD_TIFFS)
def test_a_tiff_that_might_be_misread_is_refused_with_a_remedy(tmp_path, name):
    pixels, tags = ODD_TIFFS[name]
    write_tiff(tmp_path / "x.tif", PIXELS)
    assert (np.asarray(data.open_image(tmp_path / "x.tif")) == PIXELS).all()
    write_tiff(tmp_path / "x.tif", pixels, **tags)
    remedy = "gdal_translate -ot Byte -scale" if name in DEEP else "convert -auto-orient"
    with pytest.raises(InputError, match=f"x.tif has unusual .*: {remedy}|cannot read"):
        data.open_image(tmp_path / "x.tif")


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_a_png_of_16_bits_is_refused(tmp_path, bands):
    write_png16(tmp_path / "x.png", RNG.integers(0, 2000, (6, 9, bands)))
    for read in (data.open_image, data.open_mask):
        with pytest.raises(InputError, match="has unusual pixels .*: gdal_translate -ot Byte"):
            read(tmp_path / "x.png")


@pytest.mark.parametrize(
    "mode, kind", [("I", "TIFF"), ("F", "TIFF"), ("CMYK", "JPEG"), ("LAB", "TIFF")]
)
def test_an_image_of_an_unusual_mode_is_refused(tmp_path, mode, kind):
    Image.new(mode, (4, 3)).save(tmp_path / "x", kind)
    remedy = "gdal_translate" if mode in "IF" else "convert"
    with pytest.raises(InputError, match=f"has unusual .*expected 8-bit grey or RGB: {remedy}"):
        data.open_image(tmp_path / "x")


def test_pages_are_refused_but_not_the_preview_of_a_photo(tmp_path):
    options = {"save_all": True, "append_images": [Image.fromarray(PIXELS)]}
    for kind in ("TIFF", "GIF", "PNG", "WEBP"):
        Image.fromarray(255 - PIXELS).save(tmp_path / "x", kind, **options)
        with pytest.raises(InputError, match="unusual number of pictures"):
            data.open_image(tmp_path / "x")
    Image.fromarray(PIXELS).save(tmp_path / "x", "MPO", **options)
    assert data.open_image(tmp_path / "x").size == (9, 6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_photo_is_turned_upright_but_a_data_set_with_that_tag_is_refused(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "x", kind, exif=exif)
    assert data.open_image(tmp_path / "x", upright=True).size == (20, 40)
    with pytest.raises(InputError, match="has unusual orientation.*: convert -auto-orient"):
        data.open_image(tmp_path / "x")


# ------------------------------------------------------------------------- mask files


def palette_image(index_0, index_1):
    image = Image.fromarray(MASK[..., 0].astype(np.uint8), "L").convert("P")
    image.putdata(MASK.astype(np.uint8).ravel().tolist())
    image.putpalette([*index_0, *index_1])
    return image


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_a_mask_is_what_is_not_0_in_the_first_channel_or_as_index(tmp_path):
    small, solid = MASK.astype(np.uint8), np.full_like(MASK, 255, np.uint8)
    images = [Image.fromarray(MASK[..., 0]), palette_image((0, 0, 0), (128, 0, 0))]
    images += [Image.fromarray(value * small[..., 0]) for value in (1, 7, 255)]
    for bands in ([small, solid], [small, solid, solid], [255 * small] * 4):
        images.append(Image.fromarray(np.concatenate(bands, -1)))
    for image in images:
        for kind in ("PNG", "TIFF"):
            image.save(tmp_path / "x", kind)
            assert (data.open_mask(tmp_path / "x") == MASK[..., 0]).all(), (image.mode, kind)
    Image.fromarray(MASK[..., 0]).save(tmp_path / "x", "TIFF", compression="group4")
    assert (data.open_mask(tmp_path / "x") == MASK[..., 0]).all()
    for value in (0, 255):
        Image.new("L", (9, 6), value).save(tmp_path / "x", "PNG")
        assert (data.open_mask(tmp_path / "x") == bool(value)).all()


BYTES = MASK.astype(np.uint8)
ODD_MASKS = {
    "classes": (BYTES + BYTES * (PIXELS[..., 1:2] > 100), {}, "more than two values"),
    "no 0": (BYTES + 1, {}, r"values \[1, 2\]"),
    "smooth edges": (PIXELS[..., :1], {}, "more than two values"),
    "green on black": (BYTES * np.array([0, 9, 0], np.uint8), {}, r"values \[0, 0\]"),
    "transparent": (np.concatenate([BYTES, 1 - BYTES], 2), {}, "target that is transparent"),
    "unknown pixels": (BYTES * 255, {"t42113": b"255\0"}, "255 means that the value is missing"),
    "unknown target": (BYTES, {"t42113": b"1 \0"}, "1 means that the value is missing"),
    "inverted": (BYTES * 255, {"t262": [0]}, "unusual colours"),
    "16 bits": (BYTES.astype(np.uint16) * 256, {}, "unusual bits"),
    "turned": (BYTES, {"t274": [8]}, "unusual orientation"),
}


@pytest.mark.parametrize("name", ODD_MASKS)
def test_a_mask_that_might_be_misread_is_refused(tmp_path, name):
    pixels, tags, reason = ODD_MASKS[name]
    write_tiff(tmp_path / "x.tif", pixels, **tags)
    with pytest.raises(InputError, match=reason):
        data.open_mask(tmp_path / "x.tif")


@pytest.mark.parametrize(
    "kind, options", [("JPEG", {}), ("WEBP", {}), ("BMP", {}), ("TIFF", {"compression": "jpeg"})]
)
def test_a_mask_with_loss_or_in_an_unsafe_format_is_refused(tmp_path, kind, options):
    Image.fromarray(BYTES[..., 0] * 255).save(tmp_path / "x", kind, **options)
    with pytest.raises(
        InputError, match="expected a PNG or a TIFF without loss|compressed with loss"
    ):
        data.open_mask(tmp_path / "x")


def test_a_palette_that_draws_the_target_in_black_is_refused(tmp_path):
    palette_image((255, 255, 255), (0, 0, 0)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="a palette in which 0 is not black"):
        data.open_mask(tmp_path / "x.png")


# ------------------------------------------------------------------------- tables


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("table", ["annotations", "images", "categories"])
def test_an_id_that_stands_for_two_things_is_refused_and_one_written_twice_is_not(tmp_path, table):
    refer_set(tmp_path)
    path = tmp_path / "tiny/instances.json"
    edit_json(path, lambda coco: coco[table].append(dict(coco[table][0])))
    assert len(data.load_samples("tiny", tmp_path)) == 1
    edit_json(path, lambda coco: coco[table].append({**coco[table][0], "name": "another"}))
    with pytest.raises(InputError, match=f"{table} of instances.json: id . stands for two"):
        data.load_samples("tiny", tmp_path)


def python2_pickle(value):
    """As protocol 2 of Python 2 writes it: texts are bytes."""
    if isinstance(value, (str, bytes)):
        content = value.encode() if isinstance(value, str) else value
        return b"U" + bytes([len(content)]) + content
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2_pickle, value)) + b"e"
    return b"}(" + b"".join(python2_pickle(part) for pair in value.items() for part in pair) + b"u"


@pytest.mark.parametrize(
    "phrase, is_read", [("the ship", True), ("船 à gauche", True), (b"caf\xe9", False)]
)
def test_a_pickle_of_python_2_is_read_as_utf8_or_refused(tmp_path, phrase, is_read):
    refer_set(tmp_path)
    path = tmp_path / "tiny/refs(unc).p"
    (ref,) = data.read_refs(path)
    ref["sentences"] = [{"raw": phrase}]
    path.write_bytes(b"\x80\x02" + python2_pickle([ref]) + b".")
    if is_read:
        assert data.load_samples("tiny", tmp_path)[0].phrases == [phrase]
        return
    with pytest.raises(InputError, match="is refused .*utf-8"):
        data.load_samples("tiny", tmp_path)


@pytest.mark.parametrize("listed, stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_file_is_found_in_whichever_form_its_name_is_written(tmp_path, listed, stored):
    listed, stored = (unicodedata.normalize(form, "château") for form in (listed, stored))
    assert listed != stored
    refer_set(tmp_path / "refer", file_name=f"{listed}.jpg")
    images = tmp_path / "refer/images/tiny/JPEGImages"
    (images / "a.jpg").rename(images / f"{stored}.jpg")
    (sample,) = data.load_samples("tiny", tmp_path / "refer")
    assert sample.image().size == (10, 8)
    root = tmp_path / "refsegrs"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
        Image.fromarray(MASK[..., 0]).save(root / name / f"{stored}.png")
    (root / "output_phrase_test.txt").write_text(f"{listed}.png a ship")
    (sample,) = data.load_samples("refsegrs", root)
    assert (sample.mask == MASK[..., 0]).all() and sample.image().size == (9, 6)
    for folder, option in ((images, "tiny"), (root / "images", "refsegrs")):
        shutil.copy(next(folder.glob("ch*")), folder / f"{listed}.jpg")
        with pytest.raises(InputError, match="two names that differ in their form of Unicode"):
            data.load_samples(option, root if option == "refsegrs" else tmp_path / "refer")


def test_a_mask_that_lies_across_its_image_is_refused(tmp_path):
    refer_set(tmp_path, segmentation=[data.encode_rle(np.ones((10, 8), bool))])
    (sample,) = data.load_samples("tiny", tmp_path)
    Image.new("RGB", (10, 8)).save(sample.image_path)
    assert sample.mask.shape == (10, 8)
    with pytest.raises(InputError, match="its mask is 8 x 10, its image 10 x 8"):
        sample.image()


def test_rings_in_a_ring_are_no_polygon():
    ring = [0, 0, 4, 0, 4, 4, 0, 4]
    assert data.decode_segmentation([ring, ring], 8, 8).sum() == 16
    with pytest.raises(InputError, match="a polygon, expected"):
        data.decode_segmentation([[[ring], [ring]]], 8, 8)


# ------------------------------------------------------------------------- model folders


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


def set_fields(path, **fields):
    edit_json(path, lambda content: content.update(fields))


@pytest.mark.parametrize(
    "tokenizer_end, other_ends",
    [("<|endoftext|>", [389, 387]), ("<|endoftext|>", 389), ("<|im_end|>", 387)],
)
def test_an_answer_ends_where_any_config_says_and_sft_teaches_the_end_of_the_chat(
    folder, tiny, tokenizer_end, other_ends
):
    set_fields(folder / "tokenizer_config.json", eos_token=tokenizer_end)
    set_fields(folder / "generation_config.json", eos_token_id=other_ends)
    batch = [Image.new("RGB", (64, 64))], [data.box_prompt("a ship")]
    completions, taught = [], []
    for model, processor in (tiny, sampler.load_policy(folder)):
        prompt = data.collate(processor, *batch)
        ids, mask, _ = sampler.sample_group(model, processor, prompt, 2, 40, 0)
        completions.append(ids[mask].tolist())
        taught.append(data.collate(processor, *batch, ["<answer>[1,2,3,4]</answer>"])["labels"])
    assert completions[0] == completions[1] and taught[0].equal(taught[1])
    named = [other_ends] if isinstance(other_ends, int) else other_ends or []
    assert sampler.end_ids(model, processor) == sorted({389, *named})


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "\n<think>\n\n", "<think>I see. "])
def test_a_template_that_opens_the_reasoning_is_completed_by_the_answer(folder, opening):
    path, header = folder / "chat_template.jinja", "<|im_start|>assistant\n"
    template = path.read_text()
    assert template.count(header) == 1
    path.write_text(template.replace(header, header + opening))
    model, processor = sampler.load_policy(folder)
    for rationale, expected in (("The ship.", "The ship.</think>"), (None, "</think>")):
        answer = data.box_answer([1, 2, 3, 4], rationale)
        prompt = [data.box_prompt("a ship", think=bool(rationale))]
        batch = data.collate(processor, [Image.new("RGB", (64, 64))], prompt, [answer])
        taught = processor.tokenizer.decode(batch["labels"][batch["labels"] != -100])
        assert taught == f"{expected}<answer>[1,2,3,4]</answer><|im_end|>"
        completion = data.think_opening(processor) + taught.removesuffix("<|im_end|>")
        assert grpo.format_reward(completion, answer) == 1
        assert grpo.format_reward(f"{completion}{completion}", answer) == 0
        assert grpo.format_reward(completion.removeprefix("<think>"), answer) == 1
        assert data.parse_boxes(completion) == [(1, 2, 3, 4)]


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(folder):
    edit_json(folder / "tokenizer_config.json", lambda content: content.pop("pad_token"))
    _, processor = sampler.load_policy(folder)
    batch = data.collate(processor, [Image.new("RGB", (64, 64))] * 2, ["a", "a longer text"])
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token
    assert batch["attention_mask"].sum(1).diff() > 0


@pytest.mark.parametrize("kind", ["a layer", "other names"])
def test_a_folder_that_lacks_weights_is_refused(folder, kind):
    state = load_file(folder / "model.safetensors")
    if kind == "a layer":
        state = {name: value for name, value in state.items() if "layers.1.mlp" not in name}
    else:  # as torch's DistributedDataParallel writes them
        state = {f"module.{name}": value for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no model at .*\(it has no "):
        sampler.load_policy(folder)


@pytest.mark.parametrize("in_template", [False, True])
def test_a_prompt_begins_with_one_token_for_that(in_template):
    model, processor = small_policy("LlavaNext")  # its tokenizer writes <|im_start|> first
    processor.tokenizer.bos_token = start = "<|im_start|>"
    processor.chat_template = start * in_template + processor.chat_template
    batch = data.collate(processor, [Image.new("RGB", (64, 64))] * 2, ["a", "a ship"])
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1 and ids[0] == 388


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
def test_code_of_a_checkpoint_is_neither_asked_about_nor_run(folder, file, tmp_path, monkeypatch):
    names = {"config.json": "AutoConfig", "processor_config.json": "AutoProcessor"}
    set_fields(folder / file, auto_map={names[file]: "code.X"}, model_type="its_own")
    if file != "config.json":
        set_fields(folder / file, processor_class="ItsOwn")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(InputError, match="no model at"):
        sampler.load_policy(folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_with_several_chat_templates_is_saved_twice(folder, tmp_path):
    (folder / "additional_chat_templates").mkdir()
    for name in ("tools", "short"):
        (folder / f"additional_chat_templates/{name}.jinja").write_text(name)
    text = (folder / "chat_template.jinja").read_text()
    model, processor = sampler.load_policy(folder)
    processor.chat_template = {"default": text, "tools": "a", "short": "b"}
    for _ in range(2):
        sampler.save_policy(model, processor, tmp_path / "saved")
    saved = tmp_path / "saved/additional_chat_templates"
    assert sorted(path.name for path in saved.iterdir()) == ["short.jinja", "tools.jinja"]
    assert not (tmp_path / "saved/.new").exists()


def test_an_adapter_alone_gives_the_buffers_of_the_merged_folder_in_bfloat16(tmp_path):
    model, processor = sampler.load_policy()
    sampler.add_lora(model, 4, 8)
    sampler.save_adapter(model, tmp_path / "alone/adapter", TINY)
    sampler.save_policy(model, processor, tmp_path / "merged")
    alone, merged = (
        dict(sampler.load_policy(tmp_path / name, dtype=torch.bfloat16)[0].named_buffers())
        for name in ("alone", "merged")
    )
    assert alone and alone.keys() == merged.keys()
    for name, value in alone.items():
        assert value.dtype == merged[name].dtype and value.equal(merged[name]), name


# ------------------------------------------------------------------------- console and environment


def command(script, *options):
    return [*python(), str(ROOT / script), *map(str, options)]


def short_training(small_set, tmp_path, *more):
    options = ["--data_root", small_set, "--log_dir", tmp_path, "--val_limit", 0, "--lora_rank", 4]
    options += ["--batch_size", 2, "--accumulate", 1, "--max_step", 300, "--save_step", 1000]
    return command("sft.py", *options, *more)


def wait_for_lines(path, count, process, seconds=90):
    deadline = time.time() + seconds
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("ending, status", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_training_is_saved_though_nobody_reads_what_it_prints(small_set, tmp_path, ending, status):
    """As with `| tee log` and Ctrl-C, or a terminal that is closed."""
    reader, writer = os.pipe()
    options = {"stdout": writer, "stderr": writer, "restore_signals": False}
    # pytest itself may have been started by nohup
    options["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(short_training(small_set, tmp_path), **options)
    os.close(writer)
    wait_for_lines(tmp_path / "sft/train.jsonl", 2, process)
    os.close(reader)
    process.send_signal(ending)
    assert process.wait(60) == status
    lines = len((tmp_path / "sft/train.jsonl").read_text().splitlines())
    assert [path.name for path in (tmp_path / "sft/checkpoints").iterdir()] == [f"{lines:08}"]


def test_a_console_without_a_character_prints_another(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    options = ["--image", ROOT / "assets/example_input.png", "--query", "le château à gauche"]
    done = subprocess.run(
        command("eval.py", *options, "--log_dir", tmp_path), capture_output=True, env=environment
    )
    assert done.returncode == 0 and b"written: " in done.stdout


def test_a_command_ends_as_usual_though_its_output_goes_to_head(small_set, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    options = ["--data_root", small_set, "--log_dir", tmp_path]
    done = subprocess.run(command("data.py", *options), stdout=writer, stderr=writer)
    assert done.returncode == 0 and (tmp_path / "data/contact_sheet.png").is_file()


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "trouble, workers, processes",
    [
        ("killed", 2, 1),
        ("broken image", 2, 1),
        *(slow(trouble, n, 1) for trouble in ("killed", "broken image") for n in (1, 4)),
        *(slow(trouble, 2, 2) for trouble in ("killed", "broken image")),
    ],
)
def test_a_data_worker_that_fails_ends_training_in_one_line(
    small_set, tmp_path, trouble, workers, processes
):
    root = tmp_path / "data"
    shutil.copytree(small_set, root)
    if trouble == "broken image":
        for image in (root / "images/demo/JPEGImages").iterdir():
            image.write_bytes(image.read_bytes()[:400])
    line = short_training(root, tmp_path, "--workers", workers)
    line[:1] = python(processes)
    process = subprocess.Popen(line, text=True, stderr=subprocess.PIPE)
    running = lambda: subprocess.run(
        ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True
    ).stdout.split()
    if trouble == "killed":
        wait_for_lines(tmp_path / "sft/train.jsonl", 2, process)
        os.kill(max(map(int, running())), signal.SIGKILL)  # the youngest
    errors = process.communicate(timeout=60)[1]
    ours = errors.partition("ChildFailedError")[0]  # torchrun has a traceback of its own
    assert process.returncode == 1 and ("Traceback" not in ours or processes > 1)
    expected = "DataLoader worker" if trouble == "killed" else "cannot read .*--skip_bad"
    assert 1 <= len(re.findall(f"error: .*{expected}", errors)) <= processes
    time.sleep(0.5)
    assert not running()


@pytest.mark.parametrize(
    "change, found",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "'WORLD_SIZE': '2'"),
        ({"WORLD_SIZE": "two"}, "'WORLD_SIZE': 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "::1", "MASTER_PORT": "9"}, "'2'"),
        ({"WORLD_SIZE": "", "RANK": ""}, None),
        ({"RANK": "3"}, None),
        ({"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "1"}, None),
    ],
)
def test_an_environment_that_is_not_torchruns_is_one_line(monkeypatch, change, found):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    if found is None:
        assert sampler.join_processes("cpu") == (0, 1, 0, "cpu")
        return
    with pytest.raises(InputError, match=f"{found}.*start it with torchrun, or unset") as error:
        sampler.join_processes("cpu")
    assert "\n" not in str(error.value)


def test_out_of_memory_on_a_gpu_is_one_line_with_remedies():
    def main(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\n and so on")

    with pytest.raises(SystemExit, match="^error: not enough memory .*--batch_size.*checkpointing"):
        sampler.run_script(main, lambda: None)


def test_streams_that_a_shell_has_closed_do_not_end_a_run(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    sampler.run_script(lambda _: print("nobody reads this"), lambda: None)


def test_a_token_that_no_header_can_hold_is_named(monkeypatch):
    monkeypatch.setenv("REF_TOKEN", "two\nlines\n")
    with pytest.raises(InputError, match="REF_TOKEN holds a line end"):
        ref_server.reference_token()


def test_a_reference_serves_and_is_asked_on_ipv6(tiny):
    process, port = serve("--host", "::1")
    identity = ref_server.model_identity(*tiny, "runs/sft")
    ref_server.Reference([f"http://[::1]:{port}"], identity, patience=5)
    assert grpo.get_args(["--ref_url", f"http://[::1]:{port}"]).ref_url
    process.terminate()
    assert process.wait(20) == 0
