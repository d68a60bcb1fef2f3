"""Rewards, advantages, loss, several processes, and the shortest real command."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, timeless
from safetensors.torch import load_file

import data
import grpo
import sampler

# ------------------------------------------------------------------------- rewards


def test_extra_missing_and_wrong_boxes_cost():
    truth = "<answer>[0,0,100,100]</answer>"
    assert grpo.box_reward("<answer>[0,0,100,100]</answer>", truth) == 1
    assert grpo.box_reward("<answer>[0,0,100,50]</answer>", truth) == 0.5
    assert grpo.box_reward("<answer>[[0,0,100,50],[0,0,100,100]]</answer>", truth) == 0.5
    assert grpo.box_reward("<answer>[200,0,300,100]</answer>", truth) == 0
    assert grpo.box_reward("a ship", truth) == 0
    two = "<answer>[[0,0,100,100],[500,500,600,600]]</answer>"
    assert grpo.box_reward("<answer>[500,500,600,600]</answer>", two) == 0.5
    # a greedy matching would pair the first with the first (0.5) and leave the second nothing
    crossed = "<answer>[[0,0,100,100],[0,0,100,50]]</answer>"
    assert grpo.box_reward("<answer>[[0,0,100,50],[0,0,100,100]]</answer>", crossed) == 1


def test_a_wrong_number_of_labels_scores_nothing():
    truth = "<answer>[1,0,1,1]</answer>"
    assert grpo.point_reward("<answer>[1,0,1,0]</answer>", truth) == 0.75
    for text in ("<answer>[1,0,1]</answer>", "<answer>[1,0,1,1,1]</answer>", "[1,0,1,1]", ""):
        assert grpo.point_reward(text, truth) == 0


def test_the_format_reward_knows_whether_reasoning_was_asked_for():
    plain, thought = "<answer>[1]</answer>", "<think>why</think><answer>[1]</answer>"
    assert grpo.format_reward(plain, plain) == grpo.format_reward(thought, thought) == 1
    assert grpo.format_reward(thought + "\n", thought) == 1
    assert grpo.format_reward(plain, thought) == grpo.format_reward(thought, plain) == 0
    for text in (
        "so " + thought,
        thought + " so",
        thought + thought,
        "<think></think><answer>[1]</answer>",
        "<think>a<think>b</think><answer>[1]</answer>",
        "<think>why</think>",
        "",
    ):
        assert grpo.format_reward(text, thought) == 0


# ------------------------------------------------------------------------- advantages and loss


def test_advantages_are_standardised_in_their_group():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    adv = grpo.advantages(rewards)
    assert adv[0].tolist() == pytest.approx([-1.41401, 0, 1.41401, 0], abs=1e-4)
    assert (adv[1] == 0).all()
    assert grpo.advantages(rewards, scale=False)[0].tolist() == [-1, 0, 1, 0]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_token_weights_are_those_of_the_published_sums(loss):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])  # the last one was left out
    value = torch.arange(12.0).view(3, 4)
    weight = grpo.token_weights(mask, loss, completions=2, tokens=4, longest=10)
    expected = {
        "grpo": ((0 + 1 + 2) / 3 + 4 / 1) / 2,
        "dr_grpo": (0 + 1 + 2 + 4) / (2 * 10),
        "dapo": (0 + 1 + 2 + 4) / 4,
    }[loss]
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


def test_the_two_bounds_are_apart():
    assert gradient(1.25, adv=1.0, eps_high=0.3)[0] == pytest.approx(-1.25)
    assert gradient(0.75, adv=-1.0, eps_high=0.3)[0] == 0
    assert gradient(0.75, adv=-1.0, eps_low=0.3)[0] == pytest.approx(0.75)


def test_the_penalty_is_the_k3_estimate_and_draws_back_to_the_reference():
    args = SimpleNamespace(beta=0.5, eps_low=0.1, eps_high=0.1)
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    ref = torch.tensor([[-1.5, -2.0]])
    loss, _, kl, _ = grpo.policy_loss(
        logp, logp.detach(), ref, torch.zeros(1, 1), torch.ones(1, 2), args
    )
    loss.backward()
    d = -0.5
    assert kl[0].tolist() == pytest.approx([2.718281828**d - d - 1, 0])
    assert loss.item() == pytest.approx(0.5 * kl.sum().item())
    assert logp.grad[0].tolist() == pytest.approx([0.5 * (1 - 2.718281828**d), 0])


def test_k3_is_the_kl_divergence_on_average():
    torch.manual_seed(0)
    p, q = torch.randn(2, 6).log_softmax(-1)
    args = SimpleNamespace(beta=1.0, eps_low=0.1, eps_high=0.1)
    one = torch.ones(1, 1)
    terms = [grpo.policy_loss(a[None, None], a, b, one, one, args)[2].item() for a, b in zip(p, q)]
    expected = (p.exp() * (p - q)).sum().item()
    assert sum(w * t for w, t in zip(p.exp().tolist(), terms)) == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------- commands

SHORT = "--lora_rank 4 --group 4 --val_limit 0 --max_new_tokens 40 --accumulate 1"
BASE = ROOT / "assets" / "tiny_vlm"


@pytest.fixture
def train(small_set, tmp_path):
    """train("options") -> lines of the log: grpo.main from the base model, on a few scenes."""

    def call(options):
        common = f"--model_path {BASE} --data_root {small_set} --log_dir {tmp_path} {SHORT}"
        grpo.main(grpo.get_args(f"{common} {options}".split()))
        return lines_of(tmp_path / "grpo")

    return call


def lines_of(folder):
    return [json.loads(line) for line in open(folder / "train.jsonl")]


KEYS = """step epoch reward reward_box reward_point reward_mask reward_json reward_format reward_std
dropped policy_loss kl clipped length truncated repaired rollout_gap grad_norm lr skipped
tokens_per_s seconds_rollout seconds_reference seconds_scoring seconds_update seconds""".split()


def test_the_shortest_real_command_writes_what_the_contract_says(run, small_set, tmp_path):
    printed = run(
        f"grpo.py --model_path {BASE} --data_root {small_set} --max_step 3 --batch_size 3 "
        "--val_limit 4 --lr 1e-3"
    )
    assert "think" in printed and "python eval.py" in printed
    lines, folder = lines_of(tmp_path / "runs/grpo"), tmp_path / "runs/grpo"
    assert [list(line) for line in lines] == [KEYS] * 3
    # the reference is the policy at the start, scored over HTTP by a process of its own
    assert abs(lines[0]["kl"]) < 1e-6 < lines[2]["kl"]
    assert lines[0]["rollout_gap"] < 1e-5 and lines[0]["grad_norm"] > 0
    assert json.loads((folder / "args.json").read_text())["group"] == 8
    model, _ = sampler.load_policy(folder)
    before = sampler.load_policy(BASE)[0].state_dict()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert 0 < (model.state_dict()[name] - before[name]).abs().max() < 0.1
    assert (folder / "adapter/adapter_config.json").exists()


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


def test_truncated_completions_can_be_left_out(train):
    cut = "--max_step 1 --beta 0 --batch_size 2 --max_new_tokens 2 --format_weight 0"
    cut += " --temperature 3"
    kept = train(f"{cut} --loss dapo")[0]
    assert kept["truncated"] == 1 and kept["length"] == 2
    # nobody gets to an answer, so rewards would be alike: let them differ by chance. (At this
    # temperature texts do too; the advantages of texts that are all one add up to nothing.)
    luck = iter(range(10_000))
    score = grpo.box_reward, grpo.point_reward
    grpo.box_reward = grpo.point_reward = lambda text, answer: float(next(luck) % 2)
    try:
        used, left = train(cut)[0], train(f"{cut} --mask_truncated")[0]
    finally:
        grpo.box_reward, grpo.point_reward = score
    assert used["dropped"] == left["dropped"] == 0
    assert used["grad_norm"] > 0 and left["grad_norm"] == 0


def test_the_big_models_flags_and_a_server_of_ones_own(train, port, tmp_path):
    lines = train(
        f"--ref_url http://127.0.0.1:{port} --gradient_checkpointing --max_step 4 --lr 1e-3 "
        "--batch_size 2 --point_ratio 0.5 --box_weight 2 --point_weight 3 --format_weight 0.5"
    )
    assert abs(lines[0]["kl"]) < 1e-6 < lines[-1]["kl"]
    kinds = set()
    for line in lines:  # one micro-batch an update: one task
        weight, task = (2, "box") if line["reward_box"] is not None else (3, "point")
        kinds.add(task)
        parts = weight * line[f"reward_{task}"] + 0.5 * line["reward_format"]
        assert line["reward"] == pytest.approx(parts, abs=1e-5)
    assert kinds == {"box", "point"}
    if importlib.util.find_spec("tensorboard"):
        assert list((tmp_path / "grpo" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    "options",
    ["--warmup 2", "--eps_low -1", "--clip 0", "--point_ratio 7", "--group 1", "--ref_url host:1"],
)
def test_a_setting_out_of_range_ends_in_one_line(options, capsys):
    with pytest.raises(SystemExit):
        grpo.get_args(options.split())
    assert capsys.readouterr().err.count("error:") == 1


def test_the_same_seed_gives_the_same_run(train):
    common = "--max_step 2 --batch_size 2 --beta 0 --lr 1e-3"
    first = timeless(train(common))
    assert first == timeless(train(common)) != timeless(train(f"{common} --seed 1"))


def test_a_loss_that_is_not_finite_is_skipped_and_five_in_a_row_are_an_error(
    train, monkeypatch, tmp_path
):
    whole = grpo.policy_loss
    broken = lambda *args: (whole(*args)[0] * float("nan"), *whole(*args)[1:])
    monkeypatch.setattr(grpo, "policy_loss", broken)
    with pytest.raises(sampler.InputError, match="5 updates in a row"):
        train("--max_step 9 --batch_size 2 --beta 0 --temperature 2")
    lines = lines_of(tmp_path / "grpo")
    assert lines[-1]["skipped"] >= 5 and len(lines) < 9 and lines[-1]["grad_norm"] is None
    assert not (tmp_path / "grpo" / "model.safetensors").exists()


def test_a_missing_sft_model_is_named_with_the_command_that_makes_it(run, small_set):
    message = run(f"grpo.py --data_root {small_set}", fails=True)
    assert "python sft.py" in message and message.count("\n") == 1


def test_an_sft_that_was_cut_off_before_it_saved_is_named_too(run, tmp_path):
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    (tmp_path / "runs" / "sft" / "args.json").write_text("{}")
    message = run("grpo.py", fails=True)
    assert "python sft.py" in message and message.count("\n") == 1


def test_a_model_that_would_be_its_own_reference_is_refused(run):
    message = run("grpo.py --model_path runs/grpo", fails=True)
    assert "--version_name" in message and message.count("\n") == 1


# Real runs whose groups do not depend on how prompts are spread over processes: each prompt is
# sampled alone, with a seed of its own. RANK1_IDLE: the second process never has a group to use.
# RANK1_NAN: its first loss is nan.
PATCHED = """
import os, sys, zlib
import torch
sys.path.insert(0, ROOT)
import grpo, sampler, sft
from safetensors.torch import save_file
sample, roll_out, add_up = sampler.sample_group, grpo.roll_out, sft.sum_gradients

def by_prompt(model, processor, prompt, group, longest, temperature):
    parts = []
    for row in range(len(prompt["input_ids"])):
        one = sampler.take_prompts(prompt, [row])
        real = one["attention_mask"][0].bool()
        torch.manual_seed(zlib.crc32(bytes(one["input_ids"][0][real].numpy())))
        parts.append(sample(model, processor, one, group, longest, temperature))
    width = max(ids.shape[1] for ids, _, _ in parts)
    pad = lambda x: torch.nn.functional.pad(x, (0, width - x.shape[1]))
    return tuple(torch.cat([pad(part[i]) for part in parts]) for i in range(3))

def idle(*args):
    batch = roll_out(*args)
    if os.environ.get("RANK") == "1":
        args[-1].update(trained=0, trained_tokens=0)
        return None
    return batch

def keep(parameters):
    add_up(parameters)
    if os.environ.get("RANK") == "0" and not os.path.exists(GRADIENTS):
        grads = {str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}
        save_file(grads, GRADIENTS)

GRADIENTS = sys.argv.pop()
sampler.sample_group, sft.sum_gradients = by_prompt, keep
if os.environ.get("RANK1_IDLE"):
    grpo.roll_out = idle
if os.environ.get("RANK1_NAN") and os.environ.get("RANK") == "1":
    whole, factors = grpo.policy_loss, iter([float("nan")])
    grpo.policy_loss = lambda *a: (whole(*a)[0] * next(factors, 1), *whole(*a)[1:])
grpo.main(grpo.get_args())
"""


@pytest.fixture
def start_patched(tmp_path, small_set):
    """start_patched("options", processes) -> (log lines, summed gradients of the first update)."""

    def call(options, processes, **environment):
        script, name = tmp_path / "patched.py", f"{processes}"
        script.write_text(PATCHED.replace("ROOT", repr(str(ROOT)), 1))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", str(script), "--version_name", name]
        command += f"--model_path {BASE} --data_root {small_set} {SHORT} {options}".split()
        environment = {**os.environ, **environment}
        command.append(f"gradients{name}")
        subprocess.run(command, cwd=tmp_path, check=True, env=environment, timeout=240)
        return lines_of(tmp_path / "runs" / name), load_file(tmp_path / f"gradients{name}")

    return call


@pytest.mark.parametrize("options", ["--lora_rank 4", "--lora_rank 0 --beta 0"])
def test_two_processes_take_the_step_of_one_on_the_same_groups(start_patched, options, tmp_path):
    """With LoRA, and with all parameters, whose optimizer two processes share out."""
    common = f"--max_step 2 --lr 1e-4 --warmup 0 {options}"
    a, one = start_patched(f"{common} --batch_size 4", 1)
    b, two = start_patched(f"{common} --batch_size 2", 2)
    assert one.keys() == two.keys() and len(one) > 20
    norm = lambda grads: sum((g.double() ** 2).sum() for g in grads) ** 0.5
    assert norm(one[k] - two[k] for k in one) < 1e-5 * norm(one.values())
    keys = ["reward", "policy_loss", "grad_norm", "length", "dropped", "reward_std"]
    for key in keys + ["kl"] * ("--beta" not in options):
        for x, y in zip(a, b):  # the second line tells whether the first step was the same
            assert x[key] == pytest.approx(y[key], rel=1e-3, abs=1e-6), key
    weights = (load_file(tmp_path / "runs" / run / "model.safetensors") for run in "12")
    base = load_file(BASE / "model.safetensors")
    first, second = ({k: w[k] - base[k] for k in base} for w in weights)
    assert norm(first.values()) > 1e-4
    assert norm(first[k] - second[k] for k in base) < 1e-2 * norm(first.values())


def test_a_process_without_a_usable_group_does_not_hang_the_others(start_patched):
    lines, _ = start_patched("--max_step 2 --batch_size 2 --mu 2 --beta 0", 2, RANK1_IDLE="1")
    assert len(lines) == 2 and all(line["grad_norm"] > 0 for line in lines)


def test_a_nan_in_one_process_makes_all_skip_the_update(start_patched):
    lines, _ = start_patched("--max_step 2 --batch_size 2 --beta 0", 2, RANK1_NAN="1")
    assert [line["skipped"] for line in lines] == [1, 1]
    assert lines[0]["grad_norm"] is None and lines[1]["grad_norm"] > 0


def test_gradients_of_two_halves_add_up_to_those_of_the_whole():
    """Micro-batches and processes alike: what token_weights is given are the whole's numbers."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    args = SimpleNamespace(beta=0.1, eps_low=0.1, eps_high=0.1)
    torch.manual_seed(0)
    logp, ref, adv = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 1)
    for loss in ("grpo", "dr_grpo", "dapo"):
        grads = []
        for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
            x = logp.clone().requires_grad_()
            for part in parts:
                weight = grpo.token_weights(mask[part], loss, 4, 8, 10)
                old = x[part].detach()
                grpo.policy_loss(x[part], old, ref[part], adv[part], weight, args)[0].backward()
            grads.append(x.grad)
        assert torch.allclose(*grads)


def test_the_order_goes_on_from_a_cursor():
    args = SimpleNamespace(seed=3, batch_size=2, point_ratio=0.4)
    first = data.Order(7, args, 0, 1)
    for _ in range(6):  # into the second epoch, of 4 batches each
        next(first)
    again = data.Order(7, args, 0, 1)
    again.set_epoch(first.epoch, first.cursor)
    assert first.epoch == 1
    assert [next(first) for _ in range(9)] == [next(again) for _ in range(9)]
