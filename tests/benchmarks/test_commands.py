"""``python -m benchmarks``: its help, where it writes, how it ends, and what the documents say about it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.harness import readme
from benchmarks.harness.output import RESULTS, add_output, file_name, settle_output

ROOT = Path(readme.README).parent
QUICK = (
    *("linear", "density2d", "alanine_dipeptide", "mnist", "swaps", "splines", "perturbation", "properties"),
    *("wide", "ranks"),
)


def parser_of(name):
    """The parser of a command; skips where what the command needs is not installed."""
    parser = ArgumentParser(formatter_class=command.Help)
    try:
        command.complete(parser, name)
    except SystemExit as error:
        pytest.skip(str(error))
    return parser


# --- help ---------------------------------------------------------------------------------------------------


def test_general_help_is_fast_and_imports_no_command():
    code = "import sys, benchmarks.__main__ as m\ntry: m.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in command.COMMANDS)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_shows_every_default(name):
    parser = parser_of(name)
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, action.dest
        default = action.default
        if default is None or isinstance(default, bool) or default == SUPPRESS:
            continue
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        # Lines are broken after hyphens as well.
        assert f"(default: {shown})".replace(" ", "") in text.replace(" ", ""), action.dest
    for option in ("--out", "--parts", "--checkpoints", "--data", "--merges"):
        if option in text:
            assert re.search(rf"{option} (?:(?! --).)*\(default: ", text), option


def test_a_missing_package_ends_only_the_command_that_needs_it(monkeypatch, capsys):
    def missing(module):
        if module == "benchmarks.speed.bridge":
            raise ModuleNotFoundError("No module named 'openmm'", name="openmm")
        return import_module(module)

    monkeypatch.setattr(command, "import_module", missing)
    with pytest.raises(SystemExit, match=r"^bridge: openmm is not installed \(pip install '.\[benchmarks\]'\)$"):
        command.main(["bridge"])
    with pytest.raises(SystemExit) as ended:
        command.main(["drift", "--help"])
    assert ended.value.code == 0
    monkeypatch.setattr(readme, "import_module", missing)
    text = "<!-- bridge -->\nas it was\n<!-- /bridge -->"
    assert readme.render(text) == text
    assert capsys.readouterr().err == "bridge: left as it is, since openmm is not installed\n"


# --- where results go ---------------------------------------------------------------------------------------


def test_all_commands_with_quick_are_tested():
    assert {name for name in command.COMMANDS if parser_of(name).get_default("quick") is not None} == set(QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_quick_writes_to_out_and_other_runs_to_the_results(name, monkeypatch, tmp_path):
    parser = parser_of(name)
    monkeypatch.chdir(tmp_path)
    args = parser.parse_args(["--quick"])
    settle_output(args)
    assert (args.out, args.kept) == (Path("out"), Path("out/quick") / name)
    assert args.kept.is_dir()
    args = parser.parse_args(["--quick", "--out", "elsewhere"])
    settle_output(args)
    assert args.out == Path("elsewhere")
    full = parser.parse_args(["--full"] if name == "alanine_dipeptide" else [])
    settle_output(full)
    assert (full.out, full.kept) == (RESULTS, Path("out") / name)


def test_a_quick_run_leaves_the_committed_results_alone(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.paper import linear

    for name, value in (("_BATCH", 4), ("_POINTS", 5), ("_SNAPSHOTS", 5)):
        monkeypatch.setattr(linear, name, value)
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    command.main(["linear", "--quick"])
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before
    pictures = {"linear.png", "linear_eigenvalues.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"linear.json", *pictures, "quick"}


def test_the_demo_writes_to_out(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = parser_of("demo").parse_args([])
    settle_output(args)
    assert (args.out, args.kept) == (Path("out"), Path("out/demo"))


@pytest.mark.parametrize("name", [name for name in command.COMMANDS if name != "readme"])
def test_an_unwritable_out_is_an_error_before_anything_is_measured(name, monkeypatch, tmp_path):
    parser_of(name)
    module = import_module(f"benchmarks.{command.COMMANDS[name][0]}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "run", lambda args: pytest.fail("ran"))
    file = tmp_path / "file"
    file.touch()
    arguments = [name, *(["--full"] if name == "alanine_dipeptide" else []), "--out"]
    with pytest.raises(SystemExit, match=rf"^{name}: --out: cannot write to {file}[^\n]*$"):
        command.main([*arguments, str(file)])
    with pytest.raises(SystemExit, match=rf"^{name}: --out: cannot write to {file}/below[^\n]*$"):
        command.main([*arguments, str(file / "below")])


def test_an_unwritable_file_or_folder_of_unfinished_runs_is_an_error_too(tmp_path):
    (tmp_path / "a.json").mkdir()
    parser = ArgumentParser()
    add_output(parser, "a", ("a.json",), "--parts", committed=True)
    with pytest.raises(ValueError, match=r"^--out: cannot write to .*a\.json: Is a directory$"):
        settle_output(parser.parse_args(["--out", str(tmp_path), "--parts", str(tmp_path)]))
    (tmp_path / "b").touch()
    with pytest.raises(ValueError, match=r"^--parts: cannot write to .*b: File exists$"):
        settle_output(parser.parse_args(["--out", str(tmp_path / "c"), "--parts", str(tmp_path / "b")]))


# --- where to measure ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cost", "step", "wide"])
@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there(name, device, capsys):
    parser = parser_of(name)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--device", device])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"argument --device: expected cpu, or cuda where torch sees a GPU, got {device!r}")


def test_results_of_a_gpu_lie_beside_the_others():
    torch = pytest.importorskip("torch")
    args = parser_of("step").parse_args([])
    assert (args.device, file_name(args)) == (torch.device("cpu"), "step")
    assert file_name(Namespace(name="step", device=torch.device("cuda"))) == "step_cuda"
    assert file_name(Namespace(name="layer")) == "layer"


# --- Ctrl-C -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="there are no POSIX signals")
@pytest.mark.parametrize(
    ("arguments", "sign"),
    [
        ("demo --frames 60000", "50/60000"),  # molecular dynamics
        ("swaps --quick --data breast-cancer", "net_rate"),  # workers that are just starting
        ("mnist --parts parts", "trainings"),
    ],
)
def test_ctrl_c_ends_with_one_line(arguments, sign, tmp_path):
    parser_of(arguments.split()[0])
    environment = {**os.environ, "P4FLOWS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", *arguments.split(), "--out", "results"],
            stdout=subprocess.PIPE,
            stderr=file,
            cwd=tmp_path,
            env=environment,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 120
            while sign not in errors.read_text() and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all at once
            output, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    written = errors.read_text()
    assert process.returncode == 130, written
    assert output == b""
    assert "Traceback" not in written
    lines = [line for line in written.replace("\r", "\n").split("\n") if line and sign.split()[0] not in line]
    assert [line for line in lines if "%|" not in line] == ["interrupted: the same command goes on from here"]
    assert _ends(process.pid)


def _ends(group):
    """Whether all processes of a group are gone within ten seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_an_interrupted_command_leaves_signals_as_they_were(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.speed import layer

    def interrupted(args):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(300):  # threads that pytest and torch have started before may take the signal, too
            time.sleep(0.1)

    monkeypatch.setattr(layer, "run", interrupted)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGUSR1)
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        command.main(["layer", "--out", str(tmp_path)])
    assert ended.value.code == 130
    assert time.monotonic() - start < 20
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert (signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGUSR1)) == before


# --- documents ----------------------------------------------------------------------------------------------


def test_documents_agree_with_the_results():
    texts = readme.documents()
    readme.check(texts)
    for path, text in texts.items():
        assert readme.render(text) == text, path


def test_a_table_has_one_place_and_stays_as_it_is_without_a_result(monkeypatch, tmp_path, capsys):
    texts = readme.documents()
    with pytest.raises(ValueError, match=r"expected one pair of markers for 'demo', found 2$"):
        readme.check({**texts, Path("more.md"): "<!-- demo --><!-- /demo -->"})
    with pytest.raises(ValueError, match=r"expected one pair of markers for 'demo', found 0$"):
        readme.check({})
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = "<!-- demo -->\nnot measured\n<!-- /demo -->"
    assert readme.render(text) == text
    assert capsys.readouterr().err == "demo: left as it is, since there is no demo.json yet\n"


JUDGED = (
    *("linear", "density2d", "alanine_dipeptide", "mnist", "layer", "drift", "swaps", "splines"),
    *("perturbation", "properties", "wide"),
)


@pytest.mark.parametrize("name", JUDGED)
def test_every_claim_has_its_rule_beside_it(name):
    parser_of(name)
    module = import_module(f"benchmarks.{readme.TABLES[name]}")
    for row in module.claims(json.loads((RESULTS / f"{name}.json").read_text())):
        assert row["rule"], row
        assert isinstance(row["holds"], bool), row


@pytest.mark.parametrize("name", ["linear", "mnist", "drift", "swaps", "cost", "wide"])
def test_pictures_are_drawn_again_from_the_results(name, tmp_path, monkeypatch):
    parser_of(name)
    monkeypatch.setattr(
        import_module(f"benchmarks.{command.COMMANDS[name][0]}"), "run", lambda args: pytest.fail("ran")
    )
    shutil.copy(RESULTS / f"{name}.json", tmp_path)
    command.main([name, "--redraw", "--out", str(tmp_path)])
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert (tmp_path / f"{name}.json").read_bytes() == (RESULTS / f"{name}.json").read_bytes()


def test_documents_list_the_commands():
    table = (ROOT / "benchmarks" / "README.md").read_text()
    assert re.findall(r"^\| `python -m benchmarks (\w+)", table, re.MULTILINE) == list(command.COMMANDS)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_documents_agree_on_how_long_things_take(target):
    said = [re.search(r"`make demo`.*?(\d+ minutes)", command.COMMANDS["demo"][1])[1]] if target == "demo" else []
    for name in ("README.md", "CONTRIBUTING.md", "Makefile", *(["benchmarks/README.md"] if target == "demo" else [])):
        pattern = rf"^ *(?:make )?{target}(?![\w-]).*#.*?(\d+ minutes)|`make {target}`.*\| (\d+ minutes) \|"
        said += [a or b for a, b in re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE)]
    assert len(said) == (5 if target == "demo" else 3)
    assert len(set(said)) == 1, said


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_prints_what_there_is_to_make():
    text = subprocess.run(["make", "--no-print-directory"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [line.split()[1] for line in text.splitlines()] == targets
    assert all(len(line.split()) > 4 for line in text.splitlines())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_says_in_one_line_that_there_is_none():
    bin_folder = Path(sys.executable).parent
    command_line = ["make", "--no-print-directory", "-o", "install", "gpu", f"BIN={bin_folder}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command_line, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert result.stdout == "make gpu: nothing was run, since torch sees no GPU here\n"
