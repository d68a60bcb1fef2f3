"""The README is held equal to the code that it shows."""

import importlib
import json
import re
import shlex
import textwrap

import pytest
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
SCRIPTS = ["sampler", "data", "eval", "sft", "ref_server", "grpo"]
SOURCES = {name: (ROOT / f"{name}.py").read_text().splitlines() for name in SCRIPTS}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands():
    """The words of each command line that runs a script of ours."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if any(word.endswith(".py") for word in words)]


def test_it_is_short_enough_to_read():
    lines = TEXT.splitlines()
    assert len(lines) <= 330 and len(TEXT.encode()) <= 26_000
    assert not [line for line in lines if len(line) > 100]


def test_code_that_it_shows_is_in_the_source():
    """As contiguous lines of one script, indented as a whole."""
    assert len(blocks("python")) >= len(SCRIPTS)
    for block in blocks("python"):
        wanted = block.splitlines()
        assert any(
            textwrap.dedent("\n".join(source[i : i + len(wanted)])).splitlines() == wanted
            for source in SOURCES.values()
            for i in range(len(source))
        ), block


def test_pictures_that_it_shows_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_that_it_shows_have_valid_flags(words):
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(words[place].removesuffix(".py").replace("/", "."))
    module.get_args(words[place + 1 :])


def test_prompts_that_it_shows_are_those_of_data():
    data = importlib.import_module("data")
    phrase, points = re.search(r"Phrase: (.*)\n9 points: (\[.*\])", TEXT).groups()
    assert data.box_prompt(phrase) in TEXT
    assert data.point_prompt(phrase, json.loads(points)) in TEXT


def test_line_counts_of_the_map_are_right_within_15():
    counts = dict(re.findall(r"^\| \d \| `(\w+)\.py` \| ([\d,]+) \|", TEXT, re.MULTILINE))
    assert set(counts) == set(SCRIPTS)
    for name, count in counts.items():
        assert abs(len(SOURCES[name]) - int(count.replace(",", ""))) <= 15, name
