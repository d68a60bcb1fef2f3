"""A row of the benchmark runs, and its two sides agree."""

import json


def test_a_row_of_the_bench_is_checked_timed_and_written(run, tmp_path):
    printed = run(f"tests/bench.py sam --repeats 1 --json {tmp_path}/bench.json")
    (line,) = json.loads((tmp_path / "bench.json").read_text())
    assert line["ours"] > 0 and line["theirs"] > 0 and line["ratio"] > 1
    assert "k=8 prompts, one image" in printed
