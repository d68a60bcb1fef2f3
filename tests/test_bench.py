"""Every row of the benchmark runs, its two sides agree, and a check that fails is reported."""

import importlib.util
import json

import bench
import pytest
from PIL import Image

import data
import sampler


def test_every_row_runs_and_its_two_sides_agree(run, small_set, tmp_path):
    run(f"tests/bench.py --quick --data_root {small_set} --json {tmp_path}/bench.json")
    lines = json.loads((tmp_path / "bench.json").read_text())
    assert list(dict.fromkeys(line["row"] for line in lines)) == list(bench.ROWS)
    has = importlib.util.find_spec
    missing = {"grpo"} if not (has("trl") and has("peft")) else set()
    missing |= set() if has("pycocotools") else {"rle"}
    assert {line["row"] for line in lines if line.get("left_out")} == missing
    for line in lines:
        assert line["row"] in missing or min(line["ours"], line["theirs"]) > 0


def test_the_phases_of_an_update_are_measured_on_any_device(tmp_path, capsys, monkeypatch):
    path = tmp_path / "bench.json"
    args = ["gpu", "--size", "tiny", "--device", "cpu", "--quick", "--json", str(path)]
    assert bench.main(bench.get_args(args)) == 0
    lines = {line["what"]: line for line in json.loads(path.read_text())}
    assert lines["a whole update"]["seconds"] > 0 and lines["rollout gap"]["nats"] < 0.05
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench.main(bench.get_args(["gpu"])) == 0
    assert "gpu left out: no GPU is here" in capsys.readouterr().out


def test_a_row_whose_check_fails_is_reported_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    right, found = sampler.Segmenter.segment, {"ours": 1.0, "theirs": 2.0, "ratio": 2.0}
    wrong = lambda self, prompts: [(~mask, score) for mask, score in right(self, prompts)]
    monkeypatch.setattr(sampler.Segmenter, "segment", wrong)
    monkeypatch.setitem(bench.ROWS, "sft", lambda args: [("what", "against", None, found, "")])
    args = ["sam", "sft", "--quick", "--json", str(tmp_path / "bench.json")]
    assert bench.main(bench.get_args(args)) == 1
    failed, other = json.loads((tmp_path / "bench.json").read_text())
    assert failed["row"] == "sam" and "masks: the two sides differ by" in failed["failed"]
    assert other["ratio"] == 2.0 and failed["failed"] in capsys.readouterr().out


def test_greedy_completions_may_part_at_a_tie_only(tiny):
    model, processor = tiny
    prompts = [data.box_prompt(phrase) for phrase in ("a ship", "The red aircraft on the left")]
    prompt = data.collate(processor, [Image.new("RGB", (128, 128))] * 2, prompts)
    ours = sampler.sample_group(model, processor, prompt, 2, 6, 0)[0]  # (4, 6)
    theirs = ours.clone()
    theirs[2, 1:4] += 1
    check = lambda *both: bench.check_up_to_ties(model, prompt, *both, 0)
    check(ours, ours)
    with pytest.raises(AssertionError, match="where they part"):
        check(ours, theirs)
    tie = model.lm_head.register_forward_hook(lambda module, inputs, logits: 0 * logits)
    check(ours, theirs)
    tie.remove()
