import argparse
import subprocess
import sys
import types

import pytest

from kv_cache.errors import ParetoError
from vllm_ext import cli


def command(run=lambda args: 0):
    module = types.SimpleNamespace(HELP="h", DESCRIPTION="d", USER_ERRORS=(ParetoError,), run=run)

    def add_arguments(parser):
        parser.add_argument("--rate", type=float, default=1.0)
        parser.add_argument("--sizes", type=int, nargs="+")
        parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True)

    module.add_arguments = add_arguments
    return module


@pytest.fixture
def front_door(monkeypatch):
    def install(module):
        entry = types.SimpleNamespace(name="try", load=lambda: module)
        monkeypatch.setattr(cli, "commands", lambda: {"try": entry})

    return install


def test_flags_override_the_file(front_door, tmp_path):
    seen = {}
    front_door(command(lambda args: seen.update(vars(args)) or 0))
    config = tmp_path / "c.yaml"
    config.write_text("rate: 2.5\nsizes: [1, 2]\nstream: false\n")
    assert cli.main(["try", "--config", str(config), "--sizes", "3"]) == 0
    assert (seen["rate"], seen["sizes"], seen["stream"]) == (2.5, [3], False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raet: 1", "unknown key 'raet'; valid keys: no-stream, rate, sizes, stream"),
        ("- rate", "expected a mapping"),
        ("rate: [", "not valid YAML"),
    ],
)
def test_a_bad_file_gets_one_line(front_door, tmp_path, capsys, text, message):
    front_door(command())
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert cli.main(["try", "--config", str(config)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_missing_file_gets_one_line(front_door, capsys):
    front_door(command())
    assert cli.main(["try", "--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("pareto try: error: --config nowhere.yaml: No such file")


def test_a_file_that_is_no_text_gets_one_line(front_door, tmp_path, capsys):
    front_door(command())
    config = tmp_path / "c.yaml"
    config.write_bytes(b"\xff\xfe\x00")
    assert cli.main(["try", "--config", str(config)]) == 2
    assert f"--config {config}: 'utf-8' codec can't decode" in capsys.readouterr().err


def test_an_unknown_command_lists_the_known(front_door, capsys):
    front_door(command())
    assert cli.main(["tyr"]) == 2
    assert capsys.readouterr().err == "pareto: error: unknown command 'tyr'; commands: try\n"


def test_bad_input_is_one_line_and_a_bug_is_not_hidden(front_door, capsys, monkeypatch):
    monkeypatch.delenv("PARETO_DEBUG", raising=False)

    def bad(args):
        raise ParetoError("that is wrong; do this")

    front_door(command(bad))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "pareto try: error: that is wrong; do this\n"

    def bug(args):
        raise ZeroDivisionError

    front_door(command(bug))
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_ctrl_c_exits_with_130(front_door):
    def interrupted(args):
        raise KeyboardInterrupt

    front_door(command(interrupted))
    assert cli.main(["try"]) == 130


def test_every_installed_command_teaches(capsys):
    assert list(cli.commands())[: len(cli.ORDER)] == list(cli.ORDER)
    for name in cli.commands():
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert f"usage: pareto {name}" in text
        assert "--config" in text
        assert f"pareto {name}" in text.partition("usage:")[2]
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in cli.commands())


def test_a_list_in_the_file_does_not_swallow_what_follows(front_door, tmp_path):
    seen = {}
    module = command(lambda args: seen.update(vars(args)) or 0)
    add = module.add_arguments
    module.add_arguments = lambda parser: (parser.add_argument("model"), add(parser))
    front_door(module)
    config = tmp_path / "c.yaml"
    config.write_text("sizes: [1, 2]\n")
    assert cli.main(["try", "--config", str(config), "mine"]) == 0
    assert cli.main(["try", "mine", "--config", str(config)]) == 0
    assert (seen["model"], seen["sizes"]) == ("mine", [1, 2])


def test_commands_that_say_how_threads_wait_say_so_before_pytorch_is_there():
    # PyTorch's threads read that once, when it is imported (quant_methods/threads.py).
    program = (
        "import sys; from vllm_ext import cli\n"
        "for name in ('compress', 'finetune', 'distill'):\n"
        "    cli.commands()[name].load()\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert not told.returncode, told.stderr
