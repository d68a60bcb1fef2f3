"""Every family of models through the scripts, and what differs: tiles, frames, tokens."""

import json
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from families import QWEN, SIDE, TILED, saved_policy, small_policy
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import data
import eval as evaluation
import grpo
import ref_server
import sampler
import sft
from assets import make_demo
from sampler import InputError

KINDS = ["Qwen2_5_VL", "Qwen3_5", *TILED]


@pytest.mark.parametrize("kind, prompts", [*zip(KINDS, ["points", "sam"] * 3)])
def test_training_and_evaluation_run_on_every_family(kind, prompts, tmp_path, monkeypatch):
    """SFT, GRPO with a reference, evaluation, each from the folder of the one before."""
    base, rewards = saved_policy(kind, tmp_path / "base"), grpo.reward_group
    make_demo.make_demo(tmp_path, counts={"train": 3, "val": 1, "test": 1})
    common = ["--data_root", str(tmp_path), "--log_dir", str(tmp_path), "--prompts", prompts]
    train = ["--batch_size", "2", "--accumulate", "1", "--lora_rank", "4", "--lr", "1e-2"]
    train += ["--gradient_checkpointing", "--val_limit", "0"]
    sft.main(sft.get_args([*common, *train, "--model_path", base, "--max_step", "1"]))
    adapter = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    before = sampler.load_policy(base)[0].state_dict()
    merger = {"Qwen2_5_VL": "visual.merger.mlp.0", "Qwen3_5": "visual.merger.linear_fc1"}
    merger = merger.get(kind, "multi_modal_projector.linear_1")
    moved = adapter[f"base_model.model.model.{merger}.weight"] - before[f"model.{merger}.weight"]
    assert moved.abs().max() > 1e-3

    def by_chance(texts, *rest):  # what random weights write is worth nothing
        return {k: v + torch.arange(len(v)) % 2 for k, v in rewards(texts, *rest).items()}

    monkeypatch.setattr(grpo, "reward_group", by_chance)
    policy = sampler.load_policy(tmp_path / "sft")  # of a server in this process, to save time
    identity = ref_server.model_identity(*policy, "runs/sft")
    server = ref_server.Server(ref_server.get_args(["--port", "0"]), *policy, identity)
    Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    train += ["--ref_url", f"http://127.0.0.1:{server.server_address[1]}", "--max_step", "2"]
    train += ["--group", "3", "--max_new_tokens", "6", "--reward", "box,point,mask"]
    with server:
        grpo.main(grpo.get_args([*common, *train]))
        server.shutdown()
    lines = [json.loads(line) for line in open(tmp_path / "grpo" / "train.jsonl")]
    assert abs(lines[0]["kl"]) < 1e-6 < lines[1]["kl"] and lines[0]["rollout_gap"] < 1e-5
    assert all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in lines)

    test = ["--eval_model_path", str(tmp_path / "grpo"), "--max_new_tokens", "8"]
    evaluation.main(evaluation.get_args([*common, *test]))
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["n"] == metrics["n_failed"] > 0  # nothing is readable, all is counted


# ------------------------------------------------------------------------- coordinates


@pytest.mark.parametrize("kind", [*QWEN, *TILED])
def test_a_family_is_asked_and_answered_in_its_own_coordinates(kind):
    (model, processor), size, box = small_policy(kind), (333, 170), np.array([17, 40, 301, 166])
    frame = sampler.answer_frame(model, processor, *size)
    text = data.box_answer(data.rescale(box, size, frame), frame=frame)
    off = np.abs(data.rescale(data.parse_boxes(text), frame, size)[0] - box).max()
    line = data.box_prompt("a ship", frame).splitlines()[2]
    if kind == "Qwen2_5_VL":  # pixels of the image after its processor has resized it
        grid = processor.image_processor(images=[Image.new("RGB", size)])["image_grid_thw"][0]
        assert frame == (14 * int(grid[2]), 14 * int(grid[1]))
        assert off <= 1 and f"{frame[0]}x{frame[1]}" in line
    else:
        decimal = "<answer>[0.051,0.235,0.904,0.976]</answer>", data.DECIMAL
        relative = "<answer>[51,235,904,976]</answer>", data.RELATIVE
        assert (text, line) == (decimal if "Llava" in kind else relative) and off < 0.2


def test_a_box_is_a_unit_of_its_frame_wide_at_least():
    decimal = data.box_answer([0.5, 0, 0.50001, 1], frame=(1, 1))
    assert decimal == "<answer>[0.500,0.000,0.501,1.000]</answer>"
    assert data.box_answer([500, 0, 500.1, 1000]) == "<answer>[500,0,501,1000]</answer>"


@pytest.mark.parametrize("frame", [(1000, 1000), (1, 1), (333, 170)])
def test_prompts_are_written_in_the_frame_that_they_are_asked_in(frame, small_set):
    samples = data.load_samples("demo", small_set, "train")[:6]
    both = ["--jitter", "0", "--miss_ratio", "0"], ["--prompts", "sam"]
    of_points, of_sam = (
        data.PromptDataset(samples, lambda w, h: frame, sft.get_args(args)) for args in both
    )
    for index, sample in enumerate(samples):
        box, off = data.mask_to_box(sample.mask), 128 / min(frame[0], 200)
        for task, dataset in (("box", of_points), ("sam", of_sam)):
            prompt = dataset[0, index, "box"]
            answer = data.read_answer(prompt.answer, task).to_pixels(frame, prompt.image.size)
            assert np.abs(answer.boxes[0] - box).max() <= off
            assert data.box_prompt("a", frame).splitlines()[2] in prompt.text.splitlines()
        prompt = of_points[0, index, "point"]
        listed = json.loads(prompt.text.partition("points: ")[2].partition("\n")[0])
        points = data.rescale(listed, frame, prompt.image.size)
        expected = sampler.grid_points(box, *prompt.image.size)
        assert np.abs(points - expected).max() <= 128 / min(frame[0] * 1000, 160)


def test_a_box_in_decimals_reaches_the_image_in_pixels(monkeypatch):
    policy, image, asked = small_policy("Llava"), Image.new("RGB", (200, 100)), []
    answers = iter(["<answer>[0.25,0.310,0.5,1.000]</answer>", "<answer>[1]</answer>"])
    speak = lambda model, processor, prefix, which, prompts, *_: (
        asked.extend(prompts) or [(text := next(answers), np.ones(len(text)))]
    )
    monkeypatch.setattr(evaluation, "generate_answers", speak)
    args = evaluation.get_args(["--points", "fixed", "--k_min", "1"])
    (found,) = evaluation.predict(*policy, [image], ["a ship"], [None], args)
    assert found.boxes.tolist() == [[50, 31, 100, 100]] and found.labels == [1]
    assert found.all_points.tolist() == [[75, 65.5]] and "1 points: [[0.375,0.655]]" in asked[1]


def test_llava_sees_the_whole_image_not_its_middle_square(tmp_path):
    """NOTE in disable_center_crop. And so does every program that loads what was saved."""
    image = Image.new("RGB", (120, 40), "black")
    image.paste("white", (0, 0, 30, 40))  # the left quarter, outside of the middle square
    model, processor = sampler.load_policy(saved_policy("Llava", tmp_path / "base"))
    sampler.save_policy(model, processor, tmp_path / "saved")
    saved = hf.AutoProcessor.from_pretrained(tmp_path / "saved")
    published, ours, again = (
        p.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
        for p in (small_policy("Llava")[1], processor, saved)
    )
    assert published.shape == ours.shape == (3, SIDE, SIDE) and again.equal(ours)
    assert published.std(2).max() < 1e-6  # its middle is black alone
    bright = ours.mean((0, 1)) > ours.mean()
    assert bright.sum() == SIDE // 4 and bright[: SIDE // 4].all()  # 0 to 0.25 of what is seen


# ------------------------------------------------------------------------- tokens and refusals


def test_text_behind_an_image_is_tokenised_as_such_and_not_as_a_beginning():
    """NOTE in collate_text: a tokenizer like Llama's puts a space before a beginning."""
    words = {word: i for i, word in enumerate(["<unk>", "<pad>", "<image>", "hi", "▁hi", "▁you"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    chats = lambda chats, **_: [f"<image>{c[0]['content'][1]['text']}" for c in chats]
    parts = {"image_token": "<image>", "tokenizer": tokenizer, "apply_chat_template": chats}
    batch = data.collate_text(SimpleNamespace(**parts), ["hi", "hi you"])
    assert tokenizer("hi")["input_ids"] == [words["▁hi"]]
    assert batch["input_ids"].tolist() == [[words["<pad>"], words["hi"]], [3, words["▁you"]]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("flaw", ["pixels", "chat_template", "image_token"])
def test_a_model_that_cannot_be_trained_is_refused_in_one_line(flaw, tmp_path, monkeypatch):
    model, processor = small_policy("Llava")
    if flaw == "pixels":  # in another order than the prompts
        encode = processor.image_processor.preprocess
        turn = lambda images, *a, **k: encode(images[::-1], *a, **k)
        monkeypatch.setattr(processor.image_processor, "preprocess", turn)
    else:
        setattr(processor, flaw, None)
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    load = lambda *_, **__: (model, {"missing_keys": set()})
    monkeypatch.setattr(hf.AutoModelForImageTextToText, "from_pretrained", load)
    with pytest.raises(
        InputError, match=f"{tmp_path} is a llava that .*: expected a Qwen-VL"
    ) as error:
        sampler.load_policy(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["Qwen2_5_VL", *TILED])
def test_the_reference_takes_good_requests_and_none_that_it_would_score_wrongly(kind):
    model, processor = small_policy(kind)
    ids, prompts = torch.full((4, 5), 50), [data.box_prompt("a ship"), data.box_prompt("a house")]
    rest = {"completions": ids, "mask": ids > 0, "temperature": torch.tensor(0.9)}
    for sizes in (((640, 480), (28, 28)), ((99, 1), (1, 99)), ((90, 90), (40, 90))):
        images = [Image.new("RGB", size) for size in sizes]
        good = {**data.collate(processor, images, prompts), **rest}
        ref_server.check_request(good, model, processor)
    broken, late = [{"completions": ids * 0 + processor.image_token_id}], good["input_ids"] * 0
    late[:, -2:] = 1
    broken += [{"mm_token_type_ids": late * 0}, {"attention_mask": late}]  # padding on an image
    for name in good.keys() & {"image_sizes", "image_grid_thw"}:
        broken += [{name: good[name].flip(0)}, {name: good[name][:1]}]  # the other's; one less
        broken += [{name: good[name] * 0 + 2**62}]
    for changed in broken:
        with pytest.raises(InputError) as error:
            ref_server.check_request({**good, **changed}, model, processor)
        assert "\n" not in str(error.value), changed
