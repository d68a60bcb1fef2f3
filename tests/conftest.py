"""What tests share: a few scenes in the REFER layout, the tiny model, the way to a command."""

import os
import struct
import subprocess
import sys
import time
import timeit
import zlib
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import ref_server
import sampler
from assets import make_demo

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real data and weights; tests that need them skip without
TINY = str(ROOT / "assets" / "tiny_vlm")


def pytest_configure(config):
    """Plain `pytest` leaves the slow tests out, `pytest -m slow` runs them."""
    config.addinivalue_line("markers", "slow: takes minutes")
    config.option.markexpr = config.option.markexpr or "not slow"


def python(processes=1):
    """What a command line starts with, for so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def timeless(lines):
    """Lines of a log less what a clock has measured."""
    clocked = lambda key: "second" in key or "_per_s" in key
    return [{k: v for k, v in line.items() if not clocked(k)} for line in lines]


def fastest(call, *args):
    """CPU seconds that call(*args) takes, the best of five."""
    return min(timeit.repeat(lambda: call(*args), timer=time.process_time, number=1, repeat=5))


def write_header_bomb(path, color_type):
    """A PNG whose header promises 400 million pixels: of grey (color_type 0) or RGB (2)."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, color_type, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\1IDAT" + b"\0" * 5)


def serve(*options, **environment):
    """(process, port) of a reference server of the tiny model that listens."""
    command = [sys.executable, str(ROOT / "ref_server.py"), "--model_path", TINY, "--port", "0"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, **environment}
    process = subprocess.Popen([*command, *options], text=True, env=environment, **pipes)
    return process, ref_server.child_port(process)


@pytest.fixture(scope="session")
def port():
    """Of a reference server for all tests."""
    process, port = serve("--max_mb", "4")
    yield port
    process.terminate()
    assert process.wait(20) == 0


@pytest.fixture(scope="session")
def small_set(tmp_path_factory):
    """--data_root of a demo set with a handful of images."""
    root = tmp_path_factory.mktemp("data")
    make_demo.make_demo(root, counts={"train": 12, "val": 3, "test": 5})
    return root


@pytest.fixture(scope="session")
def tiny():
    """(model, processor) of assets/tiny_vlm. Not to be changed by a test."""
    return sampler.load_policy()


@pytest.fixture(scope="session")
def scene():
    """(image, objects) of a demo scene."""
    return make_demo.draw_scene(np.random.default_rng(4), 4)


@pytest.fixture(scope="session")
def segmenter():
    return sampler.Segmenter()


@pytest.fixture
def run(tmp_path):
    """run("sft.py --max_step 1", processes=2) -> stdout, in its own folder; an error fails it."""

    def call(command, processes=1, fails=False):
        script, *options = command.split()
        command = [*python(processes), str(ROOT / script), *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return call
