"""What the documents tell people to type is understood, and what they point at exists."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import eval
from evaluation.questions import QuestionConfig
from evaluation.score import ScoreConfig
from tests.conftest import ROOT
from training.command_line import TrainFlags, flag_types, read_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKE = (ROOT / "make.sh").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> Iterator[str]:
    """Every line of the shell blocks of a document, without its comment."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            yield shlex.join(shlex.split(line, comments=True))


def check(command: str) -> None:
    words = shlex.split(command)
    if words[:2] == ["python", "train.py"]:
        read_command(words[2:])
    elif words[0] == "torchrun":
        read_command(words[words.index("train.py") + 1 :])
    elif words[:2] == ["python", "eval.py"]:
        eval.read_command(words[2:])
    elif words[:2] == ["python", "-m"]:
        # These commands parse as they run: here each must exist and have the flags.
        own, _, shared = command.partition(" -- ")  # what follows are flags of train.py
        if shared:
            read_command(shlex.split(shared))
        flags = {word for word in shlex.split(own)[3:] if word.startswith("--")}
        assert flags <= flags_of_module(words[2])
    elif words[:2] == ["bash", "make.sh"]:
        assert re.search(rf"^    {re.escape(words[2])}\)$", MAKE, re.MULTILINE)
    else:
        assert words == ["source", ".venv/bin/activate"]


def flags_of_module(name: str) -> set[str]:
    module = ROOT / f"{name.replace('.', '/')}.py"
    return set(re.findall(r"--[a-z-]+", module.read_text(encoding="utf-8")))


@pytest.mark.parametrize("command", [line for line in commands(README) if line])
def test_commands_of_the_readme_are_understood(command: str) -> None:
    check(command)


def test_commands_of_the_demonstration_are_understood() -> None:
    shown = re.findall(r"^ +(?:show|go_on \S+) \$python (.*)$", MAKE, re.MULTILINE)
    assert len(shown) == 3
    for command in shown:
        check(f"python {command}")


def test_the_readme_names_the_commands_that_do_everything() -> None:
    assert {"bash make.sh demo", "bash make.sh test"} <= set(commands(README))
    ran = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert ran[-1] == "bash make.sh test"


def test_flags_in_the_readme_exist() -> None:
    # Of torchrun, of data.preview, the word for "any flag", and of the other commands.
    elsewhere = {"--nproc-per-node", "--help", "--show-text"}
    for module in re.findall(r"python -m ([\w.]+)", README):
        elsewhere |= flags_of_module(module)
    configs = (TrainFlags, ScoreConfig, QuestionConfig)
    known = {flag for config in configs for flag in flag_types(config)} | elsewhere
    assert set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", README)) <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (document.parent / target).exists(), target


def test_no_document_names_a_place_of_one_machine() -> None:
    for path in [*DOCUMENTS, ROOT / "make.sh", ROOT / ".ci" / "run", ROOT / "pyproject.toml"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.$}])/(home|root|opt|mnt|Users)/", text), path
        # An index is the reader's to name, as a folder is.
        assert not re.search(r"--\S*index-url|--default-index|find-links (?!\"\$2\")", text), path
