"""Every family of models through the scripts, and what differs: tiles, frames, tokens."""

import json
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED
from families import QWEN, SIDE, TILED, saved_policy, small_policy
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
import eval as evaluation
import grpo
import ref_server
import sampler
import sft
from assets import make_demo
from sampler import InputError


@contextmanager
def serving(path):
    """URL of a reference server of a model, in this process: a child would import torch again."""
    policy = sampler.load_policy(path)
    identity = ref_server.model_identity(*policy, path)
    server = ref_server.Server(ref_server.get_args(["--port", "0"]), *policy, identity)
    Thread(target=server.serve_forever, args=[0.05]).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "kind, prompts", [*zip(["Qwen2_5_VL", *TILED], ["points", "sam"] * 3)]
)
def test_training_and_evaluation_run_on_every_family(kind, prompts, tmp_path, monkeypatch):
    """SFT, GRPO with a reference, evaluation, each from the folder of the one before; Qwen-VL with
    its real tokenizer if it is there. (assets/tiny_vlm is a Qwen3-VL.)"""
    real, rewards = SHARED / "tokenizers" / "qwen3", grpo.reward_group
    tokenizer = AutoTokenizer.from_pretrained(real) if kind in QWEN and real.exists() else None
    base = saved_policy(kind, tmp_path / "base", tokenizer)
    make_demo.make_demo(tmp_path, counts={"train": 3, "val": 1, "test": 1})
    common = ["--data_root", str(tmp_path), "--log_dir", str(tmp_path), "--prompts", prompts]
    train = ["--batch_size", "2", "--accumulate", "1", "--lora_rank", "4", "--lr", "1e-2"]
    train += ["--gradient_checkpointing", "--val_limit", "0"]
    sft.main(sft.get_args([*common, *train, "--model_path", base, "--max_step", "1"]))
    adapter = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    before = sampler.load_policy(base)[0].state_dict()
    merger = "visual.merger.mlp.0" if kind in QWEN else "multi_modal_projector.linear_1"
    key = f"model.{merger}.weight"
    assert (adapter[f"base_model.model.{key}"] - before[key]).abs().max() > 1e-3

    def by_chance(texts, *rest):  # what random weights write is worth nothing
        return {k: v + torch.arange(len(v)) % 2 for k, v in rewards(texts, *rest).items()}

    monkeypatch.setattr(grpo, "reward_group", by_chance)
    train += ["--group", "3", "--max_new_tokens", "6", "--reward", "box,point,mask"]
    with serving(str(tmp_path / "sft")) as url:
        grpo.main(grpo.get_args([*common, *train, "--max_step", "2", "--ref_url", url]))
    lines = [json.loads(line) for line in open(tmp_path / "grpo" / "train.jsonl")]
    assert abs(lines[0]["kl"]) < 1e-6 < lines[1]["kl"] and lines[0]["rollout_gap"] < 1e-5
    assert all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in lines)

    test = ["--eval_model_path", str(tmp_path / "grpo"), "--max_new_tokens", "8"]
    evaluation.main(evaluation.get_args([*common, *test]))
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["n"] == metrics["n_failed"] > 0  # nothing is readable, all is counted
