"""The training of the tiny models: what packing must not change, and where heads are sent."""

import numpy as np
import pytest
import torch

import data
from assets import make_demo, make_tiny
from sampler import ASSETS


@pytest.fixture
def packer(tiny):
    model, processor = tiny
    return make_tiny.Packer(processor, model)


def scene_and_questions():
    rng = np.random.default_rng(3)
    image, objects = make_demo.draw_scene(rng, 3, plain=True)
    return image, objects, make_tiny.questions(rng, objects, ask_points=True)


def test_the_tiny_models_are_small_safetensors():
    size = lambda folder: sum(f.stat().st_size for f in (ASSETS / folder).iterdir())
    assert size("tiny_vlm") <= 10e6 and size("tiny_sam") <= 2e6
    assert not [f for f in ASSETS.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".p")]


@torch.no_grad()
def test_packed_questions_are_answered_as_each_alone(tiny, packer):
    (model, processor), (image, objects, asked), alone = tiny, scene_and_questions(), []
    row, blank = packer.row(asked), make_tiny.Heads.targets(objects)
    inputs, labels, *_ = packer.batch([(image, row, blank), (image, packer.row(asked[:1]), blank)])
    packed = model(**inputs).logits[0, :-1][labels[0, 1:] != -100]  # (answer tokens, V)
    for q in asked:
        batch = data.collate(processor, [image], [q.prompt], [q.answer])
        answer = batch.pop("labels")[0, 1:] != -100
        alone.append(model(**batch).logits[0, :-1][answer])
    assert torch.allclose(packed, torch.cat(alone), atol=1e-3)


def test_heads_are_sent_to_the_token_under_the_point_and_to_the_labels_point(packer):
    _, objects, asked = scene_and_questions()
    ids, labels, _, _, looks, unders = packer.row(asked)
    text = packer.processor.tokenizer.convert_ids_to_tokens(ids)
    for end, token in [look[1:] for look in looks if look[0] == "point"]:
        row, column = divmod(token - packer.image, make_tiny.SIDE)
        x, y = (int(text[t]) / 1000 * make_demo.SIZE / make_tiny.CELL for t in (end - 2, end))
        assert abs(column + 0.5 - x) < 0.51 and abs(row + 0.5 - y) < 0.51
    for before, end in [look[1:] for look in looks if look[0] == "label"]:
        assert int(text[before + 1]) == unders[end][2]
    points = sum(len(q.tokens) for q in asked if q.under is not None)
    assert len(unders) == points > 0


def test_in_a_list_every_number_looks_at_its_own_instance(packer):
    rng, counts = np.random.default_rng(5), []
    for _ in range(20):
        _, objects = make_demo.draw_scene(rng, 4, plain=True)
        for q in make_tiny.list_questions(rng, objects):
            found = data.parse_instances(q.answer)
            looks = packer.row([q])[4]
            assert len(looks) == 8 * len(found)
            for i, (name, _, seen) in enumerate(looks):
                rows, columns = np.divmod(seen - packer.image, make_tiny.SIDE)
                cells = np.stack([columns, rows], -1) / make_tiny.SIDE * 1000  # upper left corners
                box, margin = np.array(found[i // 8].box), 1000 / make_tiny.SIDE + 8
                assert (cells > box[:2] - margin).all() and (cells < box[2:]).all()
                assert name == "box"
            counts.append(len(found))
    assert {0, 1, 2} <= set(counts)


def test_muon_takes_torchs_steps():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((40, 90), (90, 40), (33, 33))]
    start = [p.detach().clone() for p in ours]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    pair = make_tiny.Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for p, q, first in zip(ours, theirs, start):  # torch's iterations are in bfloat16
        assert torch.allclose(p, q, atol=2e-3) and (p - q).norm() < 0.03 * (p - first).norm()


def test_what_is_reached_is_measured_on_scenes_of_both_kinds(tiny, capsys):
    make_tiny.print_reached(*tiny, count=6)
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == [
        f"{kind} scenes, {name}" for kind in ("plain", "demo") for name in ("no think", "think")
    ]
