"""An installed wheel works without the repository: commands, architectures, chat template, report page."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from nemojax.cli import ORDER

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

HELP = """
import contextlib, io
from nemojax.cli import ORDER, main
for name in ORDER:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = main([name, "--help"])
        except SystemExit as stop:
            code = stop.code
    assert not code, name
    print(name, f"nemojax {name}" in out.getvalue())
"""

PACKAGE_DATA = """
from pathlib import Path
import nemojax
from nemojax.arch import load_arch
print(Path(nemojax.__file__).parent)
print(load_arch("llama_3_2_1b").num_params(), load_arch("nemotron_ultra_253b").num_params())
from nemojax.config import load_file
print(len(load_file(Path(nemojax.__file__).parent / "configs" / "quickstart.py")["stages"]))
"""

FROM_TEXT_TO_REPORT = """
from nemojax import pipeline, tokenizer
from nemojax.config import from_dict
from nemojax.data.chat import encode_prompt
from nemojax.data.tokenizer import load_tokenizer
recipe = "def get_config():\\n    return {'stages': {'tokenizer': {'config': {'vocab_size': 320}}, "
recipe += "'report': {'config': {'pipeline': '@.'}}}}\\n"
open("recipe.py", "w").write(recipe)
pipeline.run(pipeline.load("recipe.py"), "run")
made = load_tokenizer("run/tokenizer")
ids = encode_prompt(made, [{"role": "user", "content": "What is 2 + 2?"}], True, limit=200)
print(made.decode(ids, skip_special=False))
print(open("run/report.html").read())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of an environment that has the wheel and this environment's libraries, not nemojax."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--quiet", f"--wheel-dir={folder}", str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("the build backend hatchling cannot be fetched")
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("nemojax-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--quiet", wheel], check=True)
    # Below the wheel on the path, and its own .pth files are not read: an editable nemojax stays out.
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python.parent


def execute(installed: Path, empty: Path, program: str, *arguments: str) -> str:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [installed / program, *arguments],
        cwd=empty,
        env=keep | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_commands(installed, tmp_path):
    overview = execute(installed, tmp_path, "nemojax", "--help")
    assert all(f"  {name} " in overview for name in ORDER)
    assert execute(installed, tmp_path, "nemojax", "--version").strip() == "0.1.0"
    answers = execute(installed, tmp_path, "python", "-c", HELP).split("\n")[:-1]
    assert answers == [f"{name} True" for name in ORDER]


def test_package_data(installed, tmp_path):
    where, sizes, stages = execute(installed, tmp_path, "python", "-c", PACKAGE_DATA).splitlines()
    assert Path(where).is_relative_to(installed.parent) and ROOT not in Path(where).parents
    assert sizes == "1235814400 253401268224" and int(stages) > 5


def test_from_text_to_report(installed, tmp_path):
    out = execute(installed, tmp_path, "python", "-c", FROM_TEXT_TO_REPORT)
    assert "detailed thinking on<|eot_id|>" in out and "What is 2 + 2?" in out
    page = out[out.index("<!") :]
    assert page.rstrip().endswith("</html>") and "tokenizer" in page
    assert (tmp_path / "run" / "report.html").is_file()
