"""InternVL and LLaVA through the scripts, and what only they have: tiles, decimals, a projector."""

import json
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import GRIDS, SIDE, TILED, saved_policy, small_policy
from PIL import Image
from safetensors.torch import load_file
from test_data import three
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

import data
import eval as evaluation
import grpo
import ref_server
import sampler
import sft
from sampler import InputError

DECIMALS = ["Llava", "LlavaNext", "LlavaOnevision"]


# ------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize(
    "kind, prompts", [*((kind, "points") for kind in TILED), ("InternVL", "sam"), ("Llava", "sam")]
)
def test_training_and_evaluation_run_on_every_family(
    kind, prompts, tmp_path, small_set, monkeypatch
):
    """SFT, GRPO with a reference of its own, evaluation, each from the folder of the one before."""
    base, common = saved_policy(kind, tmp_path / "base"), ["--data_root", str(small_set)]
    common += ["--log_dir", str(tmp_path), "--prompts", prompts]
    train = ["--max_step", "2", "--batch_size", "3", "--val_limit", "2", "--lora_rank", "4"]
    train += ["--gradient_checkpointing", "--lr", "1e-2"]
    sft.main(sft.get_args([*common, *train, "--model_path", base, "--accumulate", "1"]))
    adapter = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    before = sampler.load_policy(base)[0].state_dict()
    key = "model.multi_modal_projector.linear_1.weight"
    assert (adapter[f"base_model.model.{key}"] - before[key]).abs().max() > 1e-3

    luck = count()  # what random weights write is worth nothing: let rewards differ by chance
    chance = lambda text, truth: float(next(luck) % 2)
    for name in ("box_reward", "point_reward", "instance_reward"):
        monkeypatch.setattr(grpo, name, chance)
    train += ["--group", "3", "--max_new_tokens", "6", "--reward", "box,point,mask"]
    grpo.main(grpo.get_args([*common, *train]))
    lines = [json.loads(line) for line in open(tmp_path / "grpo" / "train.jsonl")]
    assert abs(lines[0]["kl"]) < 1e-6 < lines[1]["kl"] and lines[0]["rollout_gap"] < 1e-5
    assert all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in lines)

    test = ["--eval_model_path", str(tmp_path / "grpo"), "--max_new_tokens", "8"]
    evaluation.main(evaluation.get_args([*common, *test]))
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["n"] == metrics["n_failed"] > 0  # nothing is readable, all is counted


@pytest.mark.parametrize("kind", DECIMALS)
def test_a_box_in_decimals_reaches_the_image_in_pixels(kind, tmp_path, monkeypatch):
    model, processor = small_policy(kind)
    image, asked = Image.new("RGB", (200, 100)), []
    answers = iter(["<answer>[0.25,0.310,0.5,1.000]</answer>", "<answer>[1,0,1]</answer>"])

    def speak(model, processor, views, prompts, room, args):
        asked.extend(prompts)
        return [(text := next(answers), np.ones(len(text)))]

    monkeypatch.setattr(evaluation, "ask", speak)
    args = evaluation.get_args(["--points", "fixed", "--k_min", "1"])
    (row,) = evaluation.predict(model, processor, [image], ["a ship"], [None], args)
    assert row["box_px"].tolist() == [[50, 31, 100, 100]]
    assert "1 points: [[0.375,0.655]]" in asked[1]
    answers = iter(
        ['<answer>[{"bbox_2d":[0.25,0.31,0.5,1],"positive_points":[[0.3,0.5],[0.4,0.5]]}]</answer>']
    )
    args = evaluation.get_args(["--prompts", "sam"])
    (row,) = evaluation.predict(model, processor, [image], ["a ship"], [None], args)
    assert row["box_px"].tolist() == [[50, 31, 100, 100]]
    assert row["points_px"].round(6).tolist() == [[60, 50], [80, 50]]
    assert len(asked) == 3 and all("decimals from 0 to 1" in prompt for prompt in asked)


@pytest.mark.parametrize("kind", TILED)
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(kind):
    """Images of unlike numbers of tiles, behind unlike padding."""
    model, processor = small_policy(kind)
    images, prompts, answers = three(processor)
    images = [image.resize(size) for image, size in zip(images, ((90, 90), (90, 40), (40, 90)))]
    batch = data.collate(processor, images, prompts, answers)
    assert (batch["attention_mask"] == 0).any()
    rows = [data.collate(processor, *([x] for x in row)) for row in zip(images, prompts, answers)]
    with torch.no_grad():
        whole, tokens = sft.answer_loss(model, batch)
        losses, counts = zip(*(sft.answer_loss(model, row) for row in rows))
    assert tokens == sum(counts)
    assert whole.item() == pytest.approx(sum(losses).item(), rel=1e-5)


# ------------------------------------------------------------------------- coordinates


@pytest.mark.parametrize("kind", TILED)
def test_a_family_is_asked_and_answered_in_its_own_coordinates(kind):
    model, processor = small_policy(kind)
    width, height = 333, 170
    frame, box = sampler.answer_frame(model, processor, width, height), np.array([17, 40, 301, 166])
    text = data.box_answer(data.rescale(box, (width, height), frame), frame=frame)
    back = data.rescale(data.parse_boxes(text), frame, (width, height))[0]
    assert np.abs(back - box).max() < 0.2
    if kind == "InternVL":
        assert text == "<answer>[51,235,904,976]</answer>"
        assert "integers from 0 to 1000" in data.box_prompt("a ship", frame)
    else:
        assert text == "<answer>[0.051,0.235,0.904,0.976]</answer>"
        assert "decimals from 0 to 1." in data.box_prompt("a ship", frame)


def test_a_box_in_decimals_is_a_thousandth_wide_at_least():
    assert data.box_answer([0.5, 0, 0.50001, 1], frame=(1, 1)) == (
        "<answer>[0.500,0.000,0.501,1.000]</answer>"
    )
    assert data.box_answer([500, 0, 500.1, 1000]) == "<answer>[500,0,501,1000]</answer>"


@pytest.mark.parametrize("frame", [(1000, 1000), (1, 1), (333, 170)])
def test_questions_are_written_in_the_frame_that_they_are_asked_in(frame, small_set):
    samples = data.load_samples("demo", small_set, "train")
    args = sft.get_args(["--jitter", "0", "--miss_ratio", "0"])
    questions = data.Questions(samples, lambda w, h: frame, args)
    for index, sample in enumerate(samples[:6]):
        image, _, answer, *_ = questions[0, index, "box"]
        box = data.rescale(data.parse_boxes(answer)[0], frame, image.size)
        assert np.abs(box - data.mask_to_box(sample.mask)).max() <= image.width / min(frame[0], 200)
        prompt = questions[0, index, "point"][1]
        listed = prompt.partition("points: ")[2].partition("\n")[0]
        points = data.rescale(json.loads(listed), frame, image.size)
        expected = sampler.grid_points(data.mask_to_box(sample.mask), *image.size)
        assert np.abs(points - expected).max() <= image.width / min(frame[0] * 1000, 160)
    args = sft.get_args(["--prompts", "sam"])
    questions = data.Questions(samples, lambda w, h: frame, args)
    for index, sample in enumerate(samples[:6]):
        question = questions[0, index, "box"]
        ((box, points),) = data.parse_instances(question.answer)
        box = data.rescale(box, frame, question.image.size)
        assert np.abs(box - data.mask_to_box(sample.mask)).max() <= 128 / min(frame[0], 200)
        assert data.box_prompt("a", frame).splitlines()[2] in question.prompt.splitlines()


def test_llava_sees_the_whole_image_not_its_middle_square(tmp_path):
    """NOTE in show_whole_images. And so does every program that loads what was saved."""
    base = saved_policy("Llava", tmp_path / "base")
    image = Image.new("RGB", (120, 40), "black")
    image.paste("white", (0, 0, 30, 40))  # the left quarter, outside of the middle square
    published = small_policy("Llava")[1].image_processor
    model, processor = sampler.load_policy(base)
    both = (published, processor.image_processor)
    seen = [p(images=[image], return_tensors="pt")["pixel_values"][0] for p in both]
    assert all(pixels.shape == (3, SIDE, SIDE) for pixels in seen)
    assert seen[0].std(2).max() < 1e-6  # its middle is black alone
    bright = seen[1].mean((0, 1)) > seen[1].mean()
    assert bright.sum() == SIDE // 4 and bright[: SIDE // 4].all()  # 0 to 0.25 of what is seen
    sampler.save_policy(model, processor, tmp_path / "saved")
    again = sampler.load_policy(tmp_path / "saved")[1].image_processor
    assert again(images=[image], return_tensors="pt")["pixel_values"][0].equal(seen[1])


# ------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("kind", TILED)
def test_image_and_text_apart_hold_the_tokens_of_the_whole(kind):
    processor = small_policy(kind)[1]
    images = [Image.new("RGB", size) for size in ((90, 90), (40, 100))]
    token = processor.image_token
    prompts = [data.box_prompt("a ship"), data.point_prompt(f"{token} a house", [[1, 2]] * 9)]
    whole = data.collate(processor, images, prompts)
    first = data.collate_images(processor, images)
    second = data.collate_text(processor, prompts)
    for row, mask in enumerate(whole["attention_mask"].bool()):
        image = first["input_ids"][row][first["attention_mask"][row].bool()]
        text = second["input_ids"][row][second["attention_mask"][row].bool()]
        assert torch.cat([image, text]).tolist() == whole["input_ids"][row][mask].tolist()
        assert not (text == processor.image_token_id).any()


def test_text_behind_an_image_is_tokenised_as_such_and_not_as_a_beginning():
    """NOTE in collate_text: a tokenizer like Llama's puts a space before a beginning."""
    words = {word: i for i, word in enumerate(["<unk>", "<pad>", "<image>", "hi", "▁hi", "▁you"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    chats = lambda chats, **_: [f"<image>{c[0]['content'][1]['text']}" for c in chats]
    processor = SimpleNamespace(
        image_token="<image>", tokenizer=tokenizer, apply_chat_template=chats
    )
    batch = data.collate_text(processor, ["hi", "hi you"])
    assert tokenizer("hi")["input_ids"] == [words["▁hi"]]
    assert batch["input_ids"].tolist() == [[words["<pad>"], words["hi"]], [3, words["▁you"]]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]


# ------------------------------------------------------------------------- models that are refused


def refused(model, processor, folder, why):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with pytest.raises(InputError, match=f"has {why}.*: expected a Qwen-VL, InternVL or") as error:
        sampler.load_policy(folder)
    assert "\n" not in str(error.value)


def test_a_model_whose_images_cannot_be_told_apart_is_refused_in_one_line(tmp_path):
    """LLaVA with Pixtral's encoder: images of any size, in rows of patches with breaks."""
    _, processor = small_policy("Llava")
    vision = {"model_type": "pixtral", "hidden_size": 32, "num_attention_heads": 2}
    vision |= {"intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28, "patch_size": 7}
    text = {"model_type": "llama", "vocab_size": 1500, "hidden_size": 32, "intermediate_size": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=7)
    refused(LlavaForConditionalGeneration(config), processor, tmp_path, "images in a form")


def test_a_model_without_a_chat_template_is_refused_in_one_line(tmp_path):
    model, processor = small_policy("LlavaNext")
    processor.chat_template = processor.tokenizer.chat_template = None
    refused(model, processor, tmp_path, "no chat template")


def test_a_model_without_an_image_token_is_refused_in_one_line():
    model, processor = small_policy("InternVL")
    processor.image_token = None
    with pytest.raises(InputError, match="no image token"):
        sampler.check_family(model, processor, "somewhere")


# ------------------------------------------------------------------------- the reference's checks


@pytest.fixture(params=TILED)
def asked(request):
    """(kind, model, processor, a good request): two prompts, on images of unlike tiles."""
    kind = request.param
    model, processor = small_policy(kind)
    images = [Image.new("RGB", size) for size in ((90, 90), (40, 90))]
    prompts = [data.box_prompt("a ship", think=True), data.box_prompt("a white house on the left")]
    prompt = data.collate(processor, images, prompts)
    completions = torch.full((4, 5), 50)
    request = {"completions": completions, "mask": completions > 0}
    return kind, model, processor, {**prompt, **request, "temperature": torch.tensor(0.9)}


def broken(kind, processor, good):
    """(name, changed tensors) of requests that must be refused."""
    pixels, ids, flags = (good[k] for k in ("pixel_values", "input_ids", "attention_mask"))
    image = processor.image_token_id
    yield "a tile less", {"pixel_values": pixels[:-1]}
    yield "a tile more", {"pixel_values": torch.cat([pixels, pixels[:1]])}
    yield "narrow tiles", {"pixel_values": pixels[..., :-1]}
    yield "one dimension", {"pixel_values": pixels.flatten()}
    yield "no tile", {"pixel_values": pixels[:0]}
    yield "nan", {"pixel_values": torch.full_like(pixels, float("nan"))}
    yield "numbers of another type", {"pixel_values": pixels.long()}
    yield "a grid", {"image_grid_thw": torch.ones(2, 3, dtype=torch.long)}
    for token in sampler.vision_tokens(*small_policy(kind)):
        yield f"completion with {token}", {"completions": torch.full((4, 5), token)}
    # image tokens: none in a prompt; one too few; one in front of the run, cut off from it
    for name, change in {
        "an imageless prompt": lambda row, first: row.masked_fill_(row == image, 50),
        "a token too few": lambda row, first: row.__setitem__(first, 50),
        "a run in two": lambda row, first: row.__setitem__(first + 1, 50),
        "a token alone": lambda row, first: row.__setitem__(-1, image),
    }.items():
        changed = ids.clone()
        change(changed[0], int((ids[0] == image).nonzero()[0]))
        kinds = (changed == image).int()
        yield name, {"input_ids": changed, "mm_token_type_ids": kinds}
    # as many in all as before, but each prompt with the other's
    moved = ids.clone()
    end = [int((row == image).nonzero()[-1]) for row in ids]
    moved[0, end[0]], moved[1, end[1] + 1] = 50, image
    kinds = (moved == image).int()
    yield "one moved to the other", {"input_ids": moved, "mm_token_type_ids": kinds}
    yield "kinds of tokens", {"mm_token_type_ids": good["mm_token_type_ids"] * 0}
    yield "padding on an image", {"attention_mask": flags * 0 + (torch.arange(ids.shape[1]) > 40)}
    if "image_sizes" in good:
        sizes = good["image_sizes"]
        yield "sizes swapped", {"image_sizes": sizes.flip(0)}
        yield "sizes turned", {"image_sizes": sizes.flip(1)}
        yield "sizes of one", {"image_sizes": sizes[:1]}
        yield "sizes in floats", {"image_sizes": sizes.float()}
        for number in (0, -1, 2**15, 2**62):
            yield f"a side of {number}", {"image_sizes": sizes * 0 + number}
        yield "fewer tiles than sizes say", {"pixel_values": pixels[:, :1]}
        yield "no tiles", {"pixel_values": pixels[:, :0]}
    else:
        yield "sizes", {"image_sizes": torch.ones(2, 2, dtype=torch.long)}


def test_the_reference_takes_a_good_request_and_no_broken_one(asked):
    kind, model, processor, good = asked
    ref_server.check_request(good, model, processor)
    for name, change in broken(kind, processor, good):
        with pytest.raises(InputError) as error:
            ref_server.check_request({**good, **change}, model, processor)
        assert "\n" not in str(error.value), name
    for name in set(good) - {"temperature"}:
        with pytest.raises(InputError, match=f"missing tensors .*{name}"):
            ref_server.check_request({k: v for k, v in good.items() if k != name}, model, processor)


@pytest.mark.parametrize("kind", ["LlavaNext", "LlavaOnevision"])
def test_any_size_of_image_is_counted_as_the_processor_counts_it(kind):
    """Also the longest and thinnest; and what is not refused can be scored."""
    model, processor = small_policy(kind)
    completions = torch.full((1, 2), 50)
    rest = {"completions": completions, "mask": completions > 0, "temperature": torch.tensor(1.0)}
    for size in [(1, 1), (28, 28), (199, 1), (1, 199), (640, 480), (333, 1000)]:
        image = [Image.new("RGB", size)]
        good = data.collate(processor, image, ["a ship"])
        ref_server.check_request({**good, **rest}, model, processor)
        with torch.no_grad():
            assert sampler.completion_logps(model, good, completions, rest["mask"]).isfinite().all()
    pixels = torch.zeros(1, 1 + len(GRIDS), 3, SIDE, SIDE)
    for sides in ([1, 32767], [32767, 1], [32767, 32767]):
        odd = {**good, **rest, "pixel_values": pixels, "image_sizes": torch.tensor([sides])}
        with pytest.raises(InputError, match="runs of image tokens"):
            ref_server.check_request(odd, model, processor)
