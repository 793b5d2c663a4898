import json
import subprocess
import sys

import pytest

from nemojax.log import METRICS, RunLog, describe_progress, format_seconds, read_metrics


def test_lines_are_written_at_once_and_read_back(tmp_path):
    with RunLog(tmp_path, total_steps=4) as log:
        log.write(1, {"train/loss": 2.5})
        assert read_metrics(tmp_path) == [
            {"step": 1, "train/loss": 2.5}
        ]  # before close: a kill loses nothing
        log.write(2, {"train/loss": float("nan")})
    assert read_metrics(tmp_path)[1] == {"step": 2, "train/loss": None}
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_resume_drops_later_lines_and_a_broken_last_one(tmp_path):
    with RunLog(tmp_path, quiet=True) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step)})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    with RunLog(tmp_path, quiet=True) as log:
        log.truncate(2)
        log.write(3, {"loss": 30.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / METRICS).write_text(json.dumps({"step": 1}) + "\nnonsense\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a JSON object, got 'nonsense'"):
        read_metrics(tmp_path)


def test_without_a_terminal_each_write_is_one_line(tmp_path, capsys):
    with RunLog(tmp_path / "sft", total_steps=400) as log:
        log.write(
            120, {"train/loss": 1.23456, "performance/tokens_per_second": 5120.4, "performance/mfu": 0.31}
        )
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["sft 120/400  train/loss 1.235  5,120 tokens/s  MFU 31%"]


def test_progress_says_how_long():
    assert describe_progress("rl", 3, None, {"reward": 0.5}, None) == "rl 3  reward 0.5"
    assert describe_progress("rl", 3, 9, {}, 80.4).endswith("1:20 left")
    assert [format_seconds(s) for s in (9, 545, 3723)] == ["0:09", "9:05", "1:02:03"]


def test_a_log_loads_no_torch(tmp_path):
    """tensorboardX would, wherever it is installed: seconds of every run."""
    code = (
        "import sys; from nemojax.log import RunLog; log = RunLog(sys.argv[1], total_steps=1); "
        "log.write(1, {'train/loss': 1.0}); log.close(); "
        "print(sorted({'torch', 'tensorboardX'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['tensorboardX']" and list(tmp_path.rglob("events.*"))
