"""`nemojax search` as a user runs it: a process, a table, a line of numbers, and one line for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemojax.cli import main
from nemojax.compress.baselines import METHODS

ROOT = Path(__file__).parent.parent.parent
ROWS = [
    ("kv4+ffn8", 0.0, 300.0, 9.0),
    ("kv1+ffn8", 0.2, 220.0, 7.0),
    ("-+ffn8", 0.7, 180.0, 5.0),
    ("kv4+-", 1.5, 100.0, 4.0),
    ("-+-", 4.0, 0.0, 0.0),
]


@pytest.fixture
def path(tmp_path):
    """Four layers, the later ones more sensitive. The column `bad` has a hole."""
    layers = [
        [
            {"name": n, "kl": kl * (i + 1), "memory_mib": m, "runtime_ms": t, "params": 1000 * m, "bad": m}
            for n, kl, m, t in ROWS
        ]
        for i in range(4)
    ]
    layers[2][1]["bad"] = float("nan")
    table = {"layers": layers, "fixed": {"memory_mib": 50.0}, "tokens": {"runtime_ms": 360.0}}
    file = tmp_path / "table.json"
    file.write_text(json.dumps({**table, "provenance": {"runtime_ms": "made up"}}))
    return str(file)


def printed(capsys, *args: str) -> str:
    assert main(["search", *args]) == 0
    return capsys.readouterr().out


def refused(capsys, *args: str) -> str:
    assert main(["search", *args]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("nemojax: ") and err.count("\n") == 1
    return err


def test_a_process_without_jax(path):
    """From the shell to the numbers; neither jax nor flax is loaded for it."""
    code = (
        "import sys; from nemojax.cli import main; code = main();"
        "sys.exit(', '.join({'jax', 'flax', 'torch', 'orbax'} & set(sys.modules)) or code)"
    )
    args = ["search", path, "--minimize=kl", "--max=memory_mib:900", "--max=runtime_ms:28", "--json"]
    args += ["--num_solutions=2", "--diversity=2"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    answer = json.loads(done.stdout)
    assert answer["minimize"] == "kl" and answer["method"] == "mip" and len(answer["solutions"]) == 2
    best, other = answer["solutions"]
    assert best["gap"] == 0 and best["objective"] <= other["objective"]
    assert sum(a != b for a, b in zip(best["choices"], other["choices"], strict=True)) >= 2
    for solution in (best, other):
        assert [row["name"] for row in solution["layers"]] == solution["choices"]
        assert [row["layer"] for row in solution["layers"]] == [0, 1, 2, 3]
        assert (
            solution["totals"]["memory_mib"]
            == 50 + sum(row["memory_mib"] for row in solution["layers"])
            <= 900
        )
        assert solution["totals"]["runtime_ms"] == sum(row["runtime_ms"] for row in solution["layers"]) <= 28
        assert solution["objective"] == pytest.approx(sum(row["kl"] for row in solution["layers"]))


def test_what_the_solver_prints_stays_out(path):
    """HiGHS writes to the process's output by itself; here C does so in its place."""
    code = (
        "import ctypes, sys; from scipy import optimize; from nemojax.cli import main\n"
        "real = optimize.milp\n"
        "def loud(*args, **options):\n"
        "    ctypes.CDLL(None).printf(b'a line for its makers\\n')\n"
        "    return real(*args, **options)\n"
        "optimize.milp = loud; sys.exit(main())"
    )
    args = ["search", path, "--minimize=kl", "--max=memory_mib:900", "--json"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["solutions"], done.stdout + done.stderr


def test_for_people(path, capsys):
    text = printed(capsys, path, "--minimize=kl", "--max=memory_mib:900", "--min=runtime_tokens_per_s:12000")
    lines = text.splitlines()
    assert lines[0] == "solution 1 of 1"
    assert any(line.split()[0] == "kl" and line.endswith("optimal") for line in lines)
    [bound] = [line for line in lines if line.startswith("memory_mib")]
    assert bound.endswith("at most 900") and float(bound.split()[1]) <= 900
    [rate] = [line for line in lines if line.startswith("runtime_tokens_per_s")]
    assert rate.endswith("at least 12000") and float(rate.split()[1]) >= 12000
    rows = [line.split() for line in lines[lines.index("") + 2 :][:4]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert all(row[1] in [name for name, *_ in ROWS] for row in rows)
    assert "runtime_ms: made up" in lines and lines[-1].startswith("4 layers, 20 choices, ")
    text = printed(capsys, path, "--minimize=kl", "--num_solutions=9", "--diversity=4", "--fix=0:kv*+ffn8")
    assert "solution 2 of 2" in text and "no more differ in 4 layers" in text


def test_bounds_repeat_and_all_of_them_hold(path, capsys):
    args = [path, "--minimize=kl", "--json", "--max=memory_mib:1200", "--max=memory_mib:700"]
    [found] = json.loads(printed(capsys, *args, "--min=memory_mib:660"))["solutions"]
    assert 660 <= found["totals"]["memory_mib"] <= 700


@pytest.mark.parametrize("method", METHODS)
def test_methods(path, capsys, method):
    args = [path, "--minimize=kl", "--max=memory_mib:800", f"--method={method}", "--seed=3", "--json"]
    [found] = json.loads(printed(capsys, *args))["solutions"]
    assert found["totals"]["memory_mib"] <= 800
    best = json.loads(printed(capsys, path, "--minimize=kl", "--max=memory_mib:800", "--json"))["solutions"][
        0
    ]
    assert found["objective"] >= best["objective"]


def test_options_reach_the_search(path, capsys):
    rules = ["--fix=0-1:kv4+ffn8", "--exclude=2-:-+*", "--prefer_runs=0.5", "--max_seconds=30"]
    args = [path, "--minimize=kl", "--max=memory_mib:1000", "--json"]
    plain = json.loads(printed(capsys, *args))["solutions"][0]["choices"]
    names = json.loads(printed(capsys, *args, *rules))["solutions"][0]["choices"]
    assert names[:2] == ["kv4+ffn8"] * 2 and not any(n.startswith("-+") for n in names[2:]) and names != plain
    most = json.loads(printed(capsys, path, "--maximize=runtime_tokens_per_s", "--max=kl:10", "--json"))
    assert most["maximize"] == "runtime_tokens_per_s" and most["solutions"][0]["totals"]["kl"] <= 10


def test_sweep(path, tmp_path, capsys):
    plot = tmp_path / "front.svg"
    args = [
        path,
        "--minimize=kl",
        "--sweep=memory_mib:40,300,700,1250",
        "--method=mip,greedy",
        f"--plot={plot}",
    ]
    text = printed(capsys, *args)
    assert text.count("impossible") == 2 and len(text.splitlines()) == 9
    assert plot.read_text().startswith("<svg xmlns=") and [p.name for p in tmp_path.glob("*.svg*")] == [
        "front.svg"
    ]
    answer = json.loads(printed(capsys, *args, "--json", "--max=runtime_ms:30"))
    points = answer["points"]["mip"]
    assert [p["bound"] for p in points] == [40, 300, 700, 1250] and points[0]["solution"] is None
    assert "least possible" in points[0]["why"]
    scores = [p["solution"]["objective"] for p in points[1:]]
    assert scores == sorted(scores, reverse=True)
    assert all(p["solution"]["totals"]["runtime_ms"] <= 30 for p in points[1:])
    assert "memory_mib max 49" in refused(capsys, path, "--minimize=kl", "--sweep=memory_mib:40,49")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--max=memory_mib:10"], "memory_mib max 10 (least possible: 50)"),
        (["--max=memory_mib:50", "--max=runtime_ms:-1"], "(least possible with the others held: 0)"),
        (["--min=runtime_ms:99"], "runtime_ms min 99 (most possible: 36)"),
        (["--max=memory:10"], "column 'memory': expected a finite number, got nothing; did you mean"),
        (["--max=bad:700"], "layer 2, choice 'kv1+ffn8', column 'bad': expected a finite number, got nan"),
        (["--max=memory_mib"], "--max=memory_mib: expected COLUMN:VALUE"),
        (["--max=memory_mib:"], "--max=memory_mib:: expected a finite number, got ''"),
        (["--max=:3"], "--max=:3: expected COLUMN:VALUE"),
        (["--min=memory_mib:many"], "--min=memory_mib:many: expected a finite number, got 'many'"),
        (["--min=memory_mib:nan"], "--min=memory_mib:nan: expected a finite number, got 'nan'"),
        (["--maximize=params"], "--minimize and --maximize: give one of them"),
        (["--method=best"], "noop_only, max_params, got 'best'"),
        (["--method=mip,greedy"], "--method: several go with --sweep only"),
        (["--method=greedy", "--num_solutions=2"], "num_solutions: expected 1 with greedy, got 2"),
        (["--num_solutions=0"], "--num_solutions: expected at least 1, got 0"),
        (["--num_solutions=2", "--diversity=5"], "diversity: expected from 1 to the 4 layers, got 5"),
        (["--num_solutions=two"], "argument --num_solutions: invalid int value: 'two'"),
        (["--max_seconds=0"], "--max_seconds: expected a positive number of seconds, got 0"),
        (["--prefer_runs=2"], "--prefer_runs: expected a share"),
        (["--fix=0:kv9*"], "search: layer 0: expected at least one choice, got none of its 5"),
        (["--fix=4:kv4*"], "layers '4': expected ascending layers of 0-3, got '4'"),
        (["--exclude=kv4*"], "rule 'kv4*': expected LAYERS:GLOB"),
        (["--plot=x.svg"], "--plot goes with --sweep"),
        (["--sweep=memory_mib"], "--sweep=memory_mib: expected COLUMN:VALUE,VALUE"),
        (["--sweep=memory_mib:1,,2"], "--sweep=memory_mib:1,,2: expected a finite number, got ''"),
        (["--sweep=memory_mib:700", "--max=memory_mib:1"], "--sweep: memory_mib has a bound by --max"),
        (["--sweep=memory_mib:700", "--num_solutions=2"], "--num_solutions does not go with --sweep"),
        (["--budget=3"], "unrecognized arguments: --budget=3"),
    ],
)  # fmt: skip
def test_bad_input(path, capsys, args, message):
    assert message in refused(capsys, path, "--minimize=kl", *args)


def test_bad_tables(path, tmp_path, capsys):
    assert "column 'score': expected a finite number, got nothing; columns are kl" in refused(capsys, path)
    assert "none.json: no such table" in refused(capsys, str(tmp_path / "none.json"))
    assert "required: TABLE.json" in refused(capsys)
    empty = tmp_path / "empty.json"
    empty.write_text('{"layers": [[{"name": "a", "kl": 1}], []]}')
    assert f"{empty}: table: layer 1: expected at least one choice, got none" in refused(capsys, str(empty))
    empty.write_text('{"layers": [[{"name": "a", "kl": "1.5"}]]}')
    assert "layer 0, choice 'a', column 'kl': expected a finite number, got '1.5'" in refused(
        capsys, str(empty), "--minimize=kl"
    )


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["search", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(
        f"--{flag}" in text for flag in ("minimize", "max ", "min ", "sweep", "fix", "exclude", "json")
    )
