"""The loss, the order of the data, several processes, and the shortest real command."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_data import three

import data
import eval
import sampler
import sft
from assets.make_demo import make_demo


def test_loss_falls_on_the_answer_tokens_only_with_left_padding_and_batch_3(tiny):
    """Against each row alone, unpadded, from the plain logits of the whole sequence."""
    model, processor = tiny
    images, prompts, answers = three(processor)
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
            begin = start["input_ids"].shape[1]
            logp = F.log_softmax(logits[begin - 1 : -1], -1)
            expected -= logp[torch.arange(len(target)), target].sum().item()
            tokens += len(target)
    assert count == tokens
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_an_epoch_holds_every_sample_once_in_every_split_into_processes():
    args = sft.get_args(["--batch_size", "3", "--point_ratio", "0.5"])
    for world in (1, 2):
        streams = [data.Order(12, args, rank, world) for rank in range(world)]
        keys = [next(stream) for _ in range(12 // (3 * world)) for stream in streams]
        assert sorted(index for batch in keys for _, index, _ in batch) == list(range(12))
        assert all(len({task for _, _, task in batch}) == 1 for batch in keys)  # one task a batch
    later = [next(streams[0])[0][0] for _ in range(9)]
    assert later[0] == 1 and later[-1] > 3  # it goes on into further epochs


def test_two_processes_walk_the_same_batches_as_one_of_twice_the_size():
    one = data.Order(50, sft.get_args(["--batch_size", "6"]), 0, 1)
    half = sft.get_args(["--batch_size", "3"])
    two = [data.Order(50, half, rank, 2) for rank in (0, 1)]
    for _ in range(40):  # past the end of an epoch
        assert next(one) == next(two[0]) + next(two[1])


def test_an_example_depends_on_its_key_alone(small_set, tiny):
    samples = data.load_samples("demo", small_set, "train")
    questions = data.Questions(samples, lambda w, h: (1000, 1000), sft.get_args([]))
    for task in ("box", "point"):
        _, prompt, answer, *_ = questions[3, 1, task]
        questions[0, 0, "point"]
        assert questions[3, 1, task][1:3] == (prompt, answer)
        labels = data.parse_labels(answer) if task == "point" else data.parse_boxes(answer)
        assert labels and (task == "box" or f"{len(labels)} points" in prompt)


def test_the_target_box_is_the_masks_box_in_the_models_frame(small_set):
    samples = data.load_samples("demo", small_set, "train")
    questions = data.Questions(samples, lambda w, h: (w, h), sft.get_args(["--think_ratio", "1"]))
    for index, sample in enumerate(samples):
        answer = questions[0, index, "box"].answer
        assert data.parse_boxes(answer) == [tuple(data.mask_to_box(sample.mask))]
        assert answer.startswith("<think>The ") and sample.class_name in answer


def test_a_missed_grid_lies_on_another_object_and_is_labelled_by_the_phrases_own(small_set):
    samples = data.load_samples("demo", small_set, "train")
    fine = lambda w, h: (100 * w, 100 * h)  # so that rounding moves no point to another pixel
    args = sft.get_args(["--miss_ratio", "1", "--jitter", "0"])
    questions, missed = data.Questions(samples, fine, args), 0
    for index, sample in enumerate(samples[:20]):
        _, prompt, answer, *_ = questions[0, index, "point"]
        points = np.array(json.loads(re.search(r"points: (\[.*\])", prompt)[1])) / 100
        labels = sampler.label_points(points, sample.mask).tolist()
        assert data.parse_labels(answer) == labels
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


@pytest.mark.parametrize("script", ["sft.py", "grpo.py"])
def test_a_set_that_cannot_be_meant_ends_in_one_line(script, run):
    (line,) = run(f"{script} --option a:x", fails=True).splitlines()
    assert line.startswith("error: --option a:x: 'a:x', expected the name of a set")


SHORT = "--max_step 2 --accumulate 2 --lora_rank 4 --lora_dropout 0 --val_limit 0"


def test_two_processes_take_the_step_of_one_with_twice_the_batch(small_set, run, tmp_path):
    common = f"sft.py --data_root {small_set} {SHORT} --lr 1e-4"
    run(f"{common} --batch_size 4 --version_name one")
    run(f"{common} --batch_size 2 --version_name two", processes=2)
    name = "adapter/adapter_model.safetensors"
    one, two = (load_file(tmp_path / "runs" / run_name / name) for run_name in ("one", "two"))
    base = sampler.load_policy()[0].state_dict()
    merger = "model.visual.merger.linear_fc1.weight"
    moved = (one[f"base_model.model.{merger}"] - base[merger]).abs().max()
    assert moved > 5e-5  # and gradients near 0, which Adam blows up to whole steps, agree too
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-5


def test_the_shortest_real_command_writes_what_the_contract_says(small_set, run, tmp_path):
    printed = run(
        f"sft.py --data_root {small_set} --max_step 2 --accumulate 1 --batch_size 2 --workers 1"
    )
    assert "box IoU" in printed and "python eval.py" in printed
    lines = [json.loads(line) for line in open(tmp_path / "runs/sft/train.jsonl")]
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["loss"] > 0
    assert json.loads((tmp_path / "runs/sft/args.json").read_text())["max_step"] == 2
    model, processor = sampler.load_policy(tmp_path / "runs/sft")
    assert (tmp_path / "runs/sft/adapter/adapter_config.json").exists()


def test_full_fine_tuning_moves_the_vision_encoder_too(small_set, run, tmp_path):
    run(f"sft.py --data_root {small_set} --max_step 1 --batch_size 2 --lora_rank 0 --val_limit 0")
    before = sampler.load_policy()[0].model.visual.blocks[0].attn.qkv.weight
    after = sampler.load_policy(tmp_path / "runs/sft")[0].model.visual.blocks[0].attn.qkv.weight
    assert 0 < (before - after).abs().max() < 0.01
    assert not (tmp_path / "runs/sft/adapter").exists()


def test_a_run_into_the_folder_that_it_starts_from_is_refused(run):
    message = run("sft.py --model_path runs/sft", fails=True)
    assert "--version_name" in message and message.count("\n") == 1


def test_a_wrong_option_ends_in_one_line(run, small_set):
    message = run(f"sft.py --data_root {small_set} --option nothing", fails=True)
    assert message.startswith("error: --option nothing") and message.count("\n") == 1


@pytest.mark.slow
def test_bfloat16_arithmetic_trains_and_answers_like_float32(tmp_path, monkeypatch):
    """As far as 80 updates and some 250 phrases can tell: the README has the figures of all 370."""
    make_demo(tmp_path, counts={"train": 400, "val": 100, "test": 1})
    val = data.load_samples("demo", tmp_path, "val")
    common = f"--data_root {tmp_path} --log_dir {tmp_path} --max_step 80 --val_limit 0"
    results = {}
    for name in ("float32", "bfloat16"):
        if name == "bfloat16":
            half = lambda model: torch.autocast("cpu", torch.bfloat16)
            monkeypatch.setattr(sampler, "mixed_precision", half)
        sft.main(sft.get_args(f"{common} --version_name {name}".split()))
        model, processor = sampler.load_policy(tmp_path / name)
        results[name] = eval.validate(model, processor, val, limit=len(val))
    assert results["float32"]["box_iou"] > 0.8  # it has learnt something
    for key, value in results["float32"].items():
        assert results["bfloat16"][key] == pytest.approx(value, abs=0.03)
