"""Rewards, advantages, loss, several processes, and the shortest real command."""

import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, python
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

import data
import grpo
import sampler
import sft

# ------------------------------------------------------------------------- rewards


def rewards_of(text, answer, task="box"):
    """{name: reward} of a completion for a prompt with this true answer."""
    prompt = data.Prompt(None, "", answer, task, None, (1000, 1000))
    args = SimpleNamespace(reward=["box", "point"])
    return {k: v.item() for k, v in grpo.reward_group([text], prompt, args, None).items()}


def test_extra_missing_and_wrong_boxes_cost():
    one, two = "[0,0,100,100]", "[[0,0,100,100],[500,500,600,600]]"
    for given, truth, reward in (
        (one, one, 1),
        ("[0,0,100,50]", one, 0.5),
        ("[[0,0,100,50],[0,0,100,100]]", one, 0.5),
        ("[200,0,300,100]", one, 0),
        ("a ship", one, 0),
        ("[500,500,600,600]", two, 0.5),
        # a greedy matching would pair the first with the first (0.5) and leave the second nothing
        ("[[0,0,100,50],[0,0,100,100]]", "[[0,0,100,100],[0,0,100,50]]", 1),
    ):
        text, answer = f"<answer>{given}</answer>", f"<answer>{truth}</answer>"
        assert rewards_of(text, answer) == {"box": reward, "format": 1}


def test_a_wrong_number_of_labels_scores_nothing():
    reward = lambda text: rewards_of(text, "<answer>[1,0,1,1]</answer>", "point")["point"]
    assert reward("<answer>[1,0,1,0]</answer>") == 0.75
    for text in ("<answer>[1,0,1]</answer>", "<answer>[1,0,1,1,1]</answer>", "[1,0,1,1]", ""):
        assert reward(text) == 0


def test_the_format_reward_knows_whether_reasoning_was_asked_for():
    plain, thought = "<answer>[1]</answer>", "<think>why</think><answer>[1]</answer>"
    reward = lambda text, answer: rewards_of(text, answer)["format"]
    assert reward(plain, plain) == reward(thought, thought) == reward(thought + "\n", thought) == 1
    assert reward(plain, thought) == reward(thought, plain) == 0
    wrong = ["so " + thought, thought + " so", thought + thought, "<think></think>" + plain]
    for text in (*wrong, "<think>a<think>b</think>" + plain, "<think>why</think>", ""):
        assert reward(text, thought) == 0


# ------------------------------------------------------------------------- advantages and loss


def test_advantages_are_standardised_in_their_group():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    adv = grpo.advantages(rewards)
    assert adv[0].tolist() == pytest.approx([-1.41401, 0, 1.41401, 0], abs=1e-4)
    assert (adv[1] == 0).all()
    assert grpo.advantages(rewards, scale=False)[0].tolist() == [-1, 0, 1, 0]


def test_token_weights_are_those_of_the_published_sums():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])  # the last one was left out
    value = torch.arange(12.0).view(3, 4)
    for loss, expected in (
        ("grpo", ((0 + 1 + 2) / 3 + 4 / 1) / 2),
        ("dr_grpo", (0 + 1 + 2 + 4) / (2 * 10)),
        ("dapo", (0 + 1 + 2 + 4) / 4),
    ):
        weight = grpo.token_weights(mask, loss, completions=2, tokens=4, longest=10)
        assert (weight * value).sum().item() == pytest.approx(expected)


def gradient(ratio, adv, **changes):
    """d loss / d logp of one token whose probability has changed by `ratio`."""
    args = SimpleNamespace(**({"beta": 0.0, "eps_low": 0.1, "eps_high": 0.1} | changes))
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    loss, _, _, clipped = grpo.policy_loss(logp, zero, zero, adv * one, one, args)
    loss.backward()
    return logp.grad.item(), clipped.item()


def test_a_token_is_clipped_on_the_right_side_of_its_advantage():
    # a good token is pushed up until it is eps likelier, and a bad one down until it is eps rarer
    assert gradient(1.05, adv=2.0) == (pytest.approx(-2.0 * 1.05), False)
    assert gradient(1.2, adv=2.0) == (0, True)
    assert gradient(0.8, adv=2.0) == (pytest.approx(-2.0 * 0.8), False)  # far too rare: pushed up
    assert gradient(0.95, adv=-2.0) == (pytest.approx(2.0 * 0.95), False)
    assert gradient(0.8, adv=-2.0) == (0, True)
    # NOTE: what clip(ratio) * adv alone gets wrong: a bad token that has grown must come down
    assert gradient(1.2, adv=-2.0) == (pytest.approx(2.0 * 1.2), False)
    # the two bounds are apart
    assert gradient(1.25, adv=1.0, eps_high=0.3)[0] == pytest.approx(-1.25)
    assert gradient(0.75, adv=-1.0, eps_high=0.3)[0] == 0
    assert gradient(0.75, adv=-1.0, eps_low=0.3)[0] == pytest.approx(0.75)


def test_the_penalty_is_the_k3_estimate_and_draws_back_to_the_reference():
    args = SimpleNamespace(beta=0.5, eps_low=0.1, eps_high=0.1)
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    ref = torch.tensor([[-1.5, -2.0]])
    zero, one = torch.zeros(1, 1), torch.ones(1, 2)
    loss, _, kl, _ = grpo.policy_loss(logp, logp.detach(), ref, zero, one, args)
    loss.backward()
    assert kl[0].tolist() == pytest.approx([math.exp(-0.5) + 0.5 - 1, 0])
    assert loss.item() == pytest.approx(0.5 * kl.sum().item())
    assert logp.grad[0].tolist() == pytest.approx([0.5 * (1 - math.exp(-0.5)), 0])


SENSELESS = {
    "--reward box --point_ratio 1": "draws no prompt that --reward would judge",
    "--reward point --point_ratio 0": "draws no prompt that --reward would judge",
    "--warmup 2": "2 is not from 0 to 1",
    "--mask_weight nan": "nan is not from 0",
    "--ref_url host:1": "expected http://host:port",
    "--reference policy --lora_rank 0": "with LoRA and without --ref_url",
    "--reward box,area": "expected some of box,point,mask",
    "--reward mask --mask_weight 0": "all of its weights are 0",
}


@pytest.mark.parametrize("options", SENSELESS)
def test_a_setting_that_makes_no_sense_ends_in_one_line(options, capsys):
    with pytest.raises(SystemExit):
        grpo.get_args(options.split())
    assert SENSELESS[options] in capsys.readouterr().err.splitlines()[-1]


def test_only_tasks_that_have_a_reward_are_asked():
    ratio = lambda options: grpo.get_args(options.split()).point_ratio
    assert ratio("") == ratio("--reward mask") == ratio("--reward mask,box") == 0.2
    assert ratio("--reward box") == 0 and ratio("--reward point") == 1
    assert ratio("--reward box --point_ratio 0.5") == 0.5  # who says so gets it


# ------------------------------------------------------------------------- one process

SHORT = "--lora_rank 4 --group 4 --val_limit 0 --max_new_tokens 40 --accumulate 1"


@pytest.fixture
def train(small_set, tmp_path):
    """train("options") -> lines of the log: grpo.main from the base model, on a few scenes."""

    def call(options):
        common = f"--model_path {TINY} --data_root {small_set} --log_dir {tmp_path} {SHORT}"
        grpo.main(grpo.get_args(f"{common} {options}".split()))
        return lines_of(tmp_path / "grpo")

    return call


def lines_of(folder):
    return data.read_jsonl(folder / "train.jsonl")


KEYS = """step epoch reward reward_box reward_point reward_mask reward_json reward_format reward_std
dropped policy_loss kl clipped length truncated repaired rollout_gap grad_norm lr skipped
tokens_per_s seconds_rollout seconds_reference seconds_scoring seconds_update seconds""".split()


def test_the_shortest_real_command_writes_what_the_contract_says(run, small_set, tmp_path):
    common = f"--model_path {TINY} --data_root {small_set} --max_step 3 --batch_size 3"
    printed = run(f"grpo.py {common} --val_limit 2 --lr 1e-3 --point_ratio 0")
    assert "val, think" in printed and "python eval.py" in printed
    lines, folder = lines_of(tmp_path / "runs/grpo"), tmp_path / "runs/grpo"
    assert [list(line) for line in lines] == [KEYS] * 3
    # the reference is the policy at the start, scored over HTTP by a process of its own
    assert abs(lines[0]["kl"]) < 1e-6 < lines[2]["kl"]
    assert lines[0]["rollout_gap"] < 1e-5 and lines[0]["grad_norm"] > 0
    assert json.loads((folder / "args.json").read_text())["group"] == 8
    model, _ = sampler.load_policy(folder)
    before = sampler.load_policy(TINY)[0].state_dict()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert 0 < (model.state_dict()[name] - before[name]).abs().max() < 0.1


def test_a_second_update_on_a_rollout_has_ratios_that_are_clipped(train):
    common = "--max_step 1 --lr 1e-2 --batch_size 4 --warmup 0 --beta 0"
    assert train(f"{common} --mu 2")[0]["clipped"] > 0.01
    assert train(f"{common} --mu 1")[0]["clipped"] == 0


def test_groups_that_say_nothing_are_dropped_and_training_goes_on(train):
    # at this temperature all completions of a group are alike
    alike = "--temperature 1e-4 --point_ratio 0"
    lines = train(f"--max_step 8 --batch_size 6 --accumulate 2 --beta 0 {alike}")
    # 96 prompts were asked of some 30 refs
    assert len(lines) == 8 and lines[-1]["epoch"] > 1
    assert all(line["dropped"] == 1 and line["grad_norm"] == 0 for line in lines)
    assert lines[0]["kl"] is None and lines[0]["reward"] > 0


def test_truncated_completions_can_be_left_out(train, monkeypatch):
    # nobody gets to an answer, so rewards would be alike: let them differ, as the texts do
    luck = lambda texts, *_: {"box": torch.arange(len(texts)) % 2.0}
    monkeypatch.setattr(grpo, "reward_group", luck)
    cut = "--max_step 1 --beta 0 --batch_size 2 --max_new_tokens 2 --temperature 3"
    used, left = train(cut)[0], train(f"{cut} --mask_truncated")[0]
    assert used["truncated"] == 1 and used["length"] == 2
    assert used["dropped"] == left["dropped"] == 0
    assert used["grad_norm"] > 0 and left["grad_norm"] == 0


def test_the_big_models_flags_and_a_server_of_ones_own(train, port):
    lines = train(
        f"--ref_url http://127.0.0.1:{port} --gradient_checkpointing --max_step 4 --lr 1e-3 "
        "--batch_size 2 --point_ratio 0.5 --box_weight 2 --point_weight 3 --format_weight 0.5"
    )
    assert abs(lines[0]["kl"]) < 1e-6 < lines[-1]["kl"]
    for line in lines:  # one micro-batch an update: one task
        parts = 2 * (line["reward_box"] or 0) + 3 * (line["reward_point"] or 0)
        assert line["reward"] == pytest.approx(parts + 0.5 * line["reward_format"], abs=1e-5)
    assert {line["reward_box"] is None for line in lines} == {True, False}
    assert all((line["reward_box"] is None) != (line["reward_point"] is None) for line in lines)


def test_the_reference_inside_the_policy_gives_the_run_that_a_server_gives(train, port):
    common = "--max_step 3 --lr 1e-3 --batch_size 2 --accumulate 2"
    server = train(f"{common} --ref_url http://127.0.0.1:{port}")
    for line, other in zip(server, train(f"{common} --reference policy"), strict=True):
        for key in ("reward", "kl", "policy_loss", "grad_norm", "length"):
            assert line[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), key


# ------------------------------------------------------------------------- two processes
# torchrun starts this file once, with two processes, and each takes its part in all of RUNS. Each
# prompt is sampled alone, with a seed of its own, so groups do not depend on who samples them.

RUNS = {
    "LoRA": "--max_step 2 --lr 1e-4 --warmup 0",
    "all parameters": "--max_step 2 --lr 1e-4 --warmup 0 --lora_rank 0 --beta 0",
    # in the first update, the second process has no group to use; in the second, its loss is nan
    "trouble": "--max_step 3 --mu 2 --beta 0",
    "trouble of all parameters": "--max_step 3 --mu 2 --beta 0 --lora_rank 0 --lr 1e-4",
}


def train_by_prompt(name, options, folder):
    """The run `name`, whose first summed gradients go to a file."""
    rank, gradients = os.environ.get("RANK", "0"), folder / f"{name}.safetensors"
    whole_sample, reward_all = sampler.sample_group, grpo.reward_all
    clip, policy_loss = torch.nn.utils.clip_grad_norm_, grpo.policy_loss
    # --mu 2 updates twice; sharded weights score a group without signal, too
    idle, factors = iter([True]), iter([1.0, 1.0] * ("parameters" in name) + [math.nan] * 2)

    def sample_group(model, processor, prompt, group, longest, temperature):
        parts = []
        for row in range(len(prompt["input_ids"])):
            one = sampler.select_prompts(prompt, [row])
            real = one["attention_mask"][0].bool()
            torch.manual_seed(zlib.crc32(bytes(one["input_ids"][0][real].numpy())))
            parts.append(whole_sample(model, processor, one, group, longest, temperature))
        columns = [[row for part in parts for row in part[i]] for i in range(3)]
        return tuple(pad_sequence(rows, batch_first=True) for rows in columns)

    def keep_gradients(parameters, limit):
        grads = {str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}
        whole = lambda grad: grad.full_tensor() if sft.is_sharded([grad]) else grad
        grads = {i: whole(grad) for i, grad in grads.items()}
        if rank == "0" and not gradients.exists():
            save_file(grads, gradients)
        return clip(parameters, limit)

    def alike_at_first(*args):
        rewards = reward_all(*args)
        return torch.ones_like(rewards) if next(idle, False) else rewards

    def spoilt_loss(*args):
        loss, *parts = policy_loss(*args)
        return loss * next(factors, 1), *parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "sample_group", sample_group)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", keep_gradients)
        if name.startswith("trouble") and rank == "1":
            patch.setattr(grpo, "reward_all", alike_at_first)
            patch.setattr(grpo, "policy_loss", spoilt_loss)
        common = ["--model_path", TINY, "--log_dir", str(folder), "--version_name", name]
        grpo.main(grpo.get_args([*common, *SHORT.split(), *options, *RUNS[name].split()]))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, small_set):
    """The folder with the results of all RUNS."""
    folder = tmp_path_factory.mktemp("two")
    command = [*python(2), __file__, folder, "--data_root", small_set, "--batch_size", "2"]
    subprocess.run(list(map(str, command)), cwd=folder, check=True, timeout=240)
    return folder


@pytest.mark.parametrize("name", ["LoRA", "all parameters"])
def test_two_processes_take_the_step_of_one_on_the_same_groups(
    name, two_processes, small_set, port, tmp_path
):
    """With LoRA, and with all parameters, whose optimizer two processes share out."""
    options = f"--batch_size 4 --data_root {small_set} --ref_url http://127.0.0.1:{port}"
    train_by_prompt(name, options.split(), tmp_path)
    folders = tmp_path, two_processes
    one, two = (load_file(folder / f"{name}.safetensors") for folder in folders)
    assert one.keys() == two.keys() and len(one) > 20
    norm = lambda grads: sum((g.double() ** 2).sum() for g in grads) ** 0.5
    assert norm(one[k] - two[k] for k in one) < 1e-5 * norm(one.values())
    keys = ["reward", "policy_loss", "grad_norm", "length", "dropped", "reward_std"]
    for key in keys + ["kl"] * (name == "LoRA"):
        for x, y in zip(*(lines_of(folder / name) for folder in folders), strict=True):
            # the second line tells whether the first step was the same
            assert x[key] == pytest.approx(y[key], rel=1e-3, abs=1e-6), key
    weights = (load_file(folder / name / "model.safetensors") for folder in folders)
    base = load_file(Path(TINY) / "model.safetensors")
    first, second = ({k: w[k] - base[k] for k in base} for w in weights)
    assert norm(first.values()) > 1e-4
    assert (two_processes / name / "adapter/adapter_config.json").exists() == (name == "LoRA")
    assert norm([first["model.visual.blocks.0.attn.qkv.weight"]]) > 0 or name == "LoRA"
    assert norm(first[k] - second[k] for k in base) < 1e-2 * norm(first.values())


@pytest.mark.parametrize("name", ["trouble", "trouble of all parameters"])
def test_a_process_without_a_usable_group_does_not_hang_the_others(two_processes, name):
    lines = lines_of(two_processes / name)
    assert len(lines) == 3 and lines[0]["grad_norm"] > 0 and lines[0]["skipped"] == 0


@pytest.mark.parametrize("name", ["trouble", "trouble of all parameters"])
def test_a_nan_in_one_process_makes_all_skip_the_update(two_processes, name):
    lines = lines_of(two_processes / name)[1:]
    assert [line["skipped"] for line in lines] == [2, 2]
    assert lines[0]["grad_norm"] is None and lines[1]["grad_norm"] > 0


if __name__ == "__main__":
    folder, *options = sys.argv[1:]
    join = dist.init_process_group
    for name in RUNS:  # each with a meeting place of its own, as the processes meet anew
        store = dist.FileStore(f"{folder}/{name} meets", 2)
        meet = dict(store=store, rank=int(os.environ["RANK"]), world_size=2)
        dist.init_process_group = lambda backend, meet=meet, **_: join(backend, **meet)
        train_by_prompt(name, options, Path(folder))
