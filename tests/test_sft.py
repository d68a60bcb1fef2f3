"""The loss, the order of the data, and the command, with one process and with two."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import eval as evaluation
import grpo
import sampler
import sft
from assets.make_demo import make_demo


def test_loss_falls_on_the_answer_tokens_only_with_left_padding_and_batch_3(tiny, scene):
    """Against each row alone, unpadded, from the plain logits of the whole sequence."""
    (model, processor), points = tiny, np.array([[1, 2], [30, 40], [500, 600]])
    images = [scene[0], scene[0].rotate(90), scene[0].rotate(180)]
    prompts = [data.box_prompt("a ship"), data.point_prompt("the ship", points, think=True)]
    prompts.append(data.box_prompt("a large red storage tank on the left", think=True))
    answers = ["<answer>[1,2,3,4]</answer>", "<think>The.</think><answer>[0,1,1]</answer>", "no"]
    with torch.no_grad():
        loss, count = sft.answer_loss(model, data.collate(processor, images, prompts, answers))
        expected, tokens = 0.0, 0
        for image, prompt, text in zip(images, prompts, answers):
            start = data.collate(processor, [image], [prompt])
            target = processor.tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
            ids = torch.cat([start["input_ids"], torch.tensor([target])], 1)
            kinds = (ids == processor.image_token_id).int()
            grid = {k: start[k] for k in ("pixel_values", "image_grid_thw")}
            logits = model(input_ids=ids, mm_token_type_ids=kinds, **grid).logits[0]
            logp = F.log_softmax(logits[-len(target) - 1 : -1], -1)
            expected -= logp[torch.arange(len(target)), target].sum().item()
            tokens += len(target)
    assert count == tokens
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def keys_of(count, rank=0, world=1, batch_size=3):
    args = SimpleNamespace(seed=3, batch_size=batch_size, point_ratio=0.5)
    return data.PromptSampler([(np.arange(count), count)], args, rank, world)


def test_an_epoch_holds_every_sample_once_and_a_batch_one_task():
    keys = keys_of(12)
    epoch = [next(keys) for _ in range(4)]
    assert sorted(index for batch in epoch for _, index, _ in batch) == list(range(12))
    assert all(len({task for _, _, task in batch}) == 1 for batch in epoch)
    later = [next(keys)[0][0] for _ in range(12)]
    assert later[0] == 1 and later[-1] == 3  # it goes on into further epochs


def test_two_processes_walk_the_same_batches_as_one_of_twice_the_size():
    one, two = keys_of(50, batch_size=6), [keys_of(50, rank, 2) for rank in (0, 1)]
    for _ in range(40):  # past the end of an epoch
        assert next(one) == next(two[0]) + next(two[1])


def test_the_order_goes_on_after_batches_that_are_skipped():
    first, again = keys_of(7, batch_size=2), keys_of(7, batch_size=2)
    batches = [next(first) for _ in range(15)]
    again.skip(6)  # into the second epoch, of 4 batches each
    assert again.epoch == 1 and [next(again) for _ in range(9)] == batches[6:]


def prompts_of(small_set, options="", scale=1):
    """The prompts of the demo's training split, in frames of `scale` times its pixels."""
    samples = data.load_samples("demo", small_set, "train")
    frame_of = lambda width, height: (scale * width, scale * height)
    return data.PromptDataset(samples, frame_of, sft.get_args(options.split()))


def test_a_prompt_depends_on_its_key_alone(small_set):
    dataset = prompts_of(small_set)
    for task, read in (("box", data.parse_boxes), ("point", data.parse_labels)):
        prompt = dataset[3, 1, task]
        dataset[0, 0, "point"]
        assert dataset[3, 1, task][1:3] == (prompt.text, prompt.answer)
        found = read(prompt.answer)
        assert found and (task == "box" or f"{len(found)} points" in prompt.text)


def test_the_target_box_is_the_masks_box_in_the_models_frame(small_set):
    dataset = prompts_of(small_set, "--think_ratio 1")
    for index, sample in enumerate(dataset.samples):
        answer = dataset[0, index, "box"].answer
        assert data.parse_boxes(answer) == [tuple(data.mask_to_box(sample.mask))]
        assert answer.startswith("<think>The ") and sample.class_name in answer


def test_a_missed_grid_lies_on_another_object_and_is_labelled_by_the_phrases_own(small_set):
    # scaled, so that rounding moves no point to another pixel
    dataset, missed = prompts_of(small_set, "--miss_ratio 1 --jitter 0", scale=100), 0
    for index, sample in enumerate(dataset.samples[:20]):
        prompt = dataset[0, index, "point"]
        points = np.array(json.loads(re.search(r"points: (\[.*\])", prompt.text)[1])) / 100
        labels = sampler.label_points(points, sample.mask).tolist()
        assert data.parse_labels(prompt.answer) == labels
        missed += sum(labels) == 0
    assert 0 < missed < 20


def test_the_rate_rises_then_falls_to_nothing():
    rates = [sft.cosine(step, 100, 0.1) for step in range(100)]
    assert np.argmax(rates) in (9, 10) and max(rates) == 1 and rates[0] == 0.1
    assert rates[-1] < 0.001 and rates[55] == pytest.approx(0.5)


def test_the_demo_and_the_recipe_resolve_to_their_own_numbers():
    rate = lambda *options: sft.get_args(list(options)).lr
    real = sft.get_args(["--option", "RRSISD"])
    assert (real.lr, real.accumulate, real.epochs, real.think_ratio) == (5e-5, 8, 2, 0)
    assert rate() == rate("--option", "demo_reason : 2, demo") == sft.DEFAULTS["lr"][1]
    assert rate("--option", "demo,RRSISD") == real.lr and rate("--lr", "7") == 7


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (sft, "--option a:x", "--option a:x: 'a:x', expected the name of a set"),
        (sft, "--option nothing", "--option nothing: no such set"),
        (sft, "--model_path runs/sft", "--model_path runs/sft would be moved"),
        (grpo, "", "no model in runs/sft: run python sft.py first"),
    ],
)
def test_a_run_that_cannot_start_ends_in_one_line(script, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/sft").mkdir(parents=True)  # of a run that was cut off before it saved
    (tmp_path / "runs/sft/args.json").write_text("{}")
    with pytest.raises(SystemExit, match=re.escape(f"error: {message}")) as end:
        sampler.run_script(script.main, lambda: script.get_args(options.split()))
    assert "\n" not in str(end.value)


def test_two_processes_take_the_step_of_one_with_twice_the_batch(small_set, run, tmp_path):
    common = f"--data_root {small_set} --max_step 2 --accumulate 2 --lora_rank 4 --lr 1e-4"
    printed = run(f"sft.py {common} --batch_size 2 --val_limit 4 --workers 1", processes=2)
    more = f"--batch_size 4 --val_limit 0 --log_dir {tmp_path}"
    sft.main(sft.get_args(f"{common} {more}".split()))
    folders = tmp_path / "sft", tmp_path / "runs/sft"
    one, two = (load_file(folder / "adapter/adapter_model.safetensors") for folder in folders)
    base = sampler.load_policy()[0].state_dict()
    merger = "model.visual.merger.linear_fc1.weight"
    moved = (one[f"base_model.model.{merger}"] - base[merger]).abs().max()
    assert moved > 5e-5  # and gradients near 0, which Adam blows up to whole steps, agree too
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-5
    # and the command writes what the contract says
    assert printed.count("box IoU") == 2 and printed.count("python eval.py") == 1
    alone, lines = (data.read_jsonl(folder / "train.jsonl") for folder in folders)
    for name in ("step", "loss", "grad_norm", "lr", "skipped"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in alone])


@pytest.mark.slow
def test_bfloat16_arithmetic_trains_and_answers_like_float32(tmp_path, monkeypatch):
    """As far as 80 updates and some 250 phrases can tell: the README has the figures of all 370."""
    make_demo(tmp_path, counts={"train": 400, "val": 100, "test": 1})
    val, scores = data.load_samples("demo", tmp_path, "val"), []
    common = f"--data_root {tmp_path} --log_dir {tmp_path} --max_step 80 --val_limit 0"
    for half in (False, True):
        autocast = lambda model: torch.autocast("cpu", torch.bfloat16, enabled=half)
        monkeypatch.setattr(sampler, "mixed_precision", autocast)
        sft.main(sft.get_args(f"{common} --version_name {half}".split()))
        policy = sampler.load_policy(tmp_path / str(half))
        scores.append(evaluation.validate(*policy, val, limit=len(val))["no think"])
    assert scores[0]["box_iou"] > 0.8  # it has learnt something
    assert scores[1] == pytest.approx(scores[0], abs=0.03)
