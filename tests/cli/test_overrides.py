"""The text of a setting passes unchanged through Hydra's grammar and OmegaConf's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from shell import TINY, Shell

from sparsetrain.cli.checks import as_typed
from sparsetrain.cli.quoting import TextSetting, quoted, with_interpolation, without_interpolation
from sparsetrain.cli.resolve import load
from sparsetrain.errors import UserError

PROMPT = TextSetting("prompt", optional=False, many=False)
PATH = TextSetting("run_dir", optional=True, many=False)
# All characters with a meaning in Hydra, OmegaConf or YAML, and some without one.
MARKS = [
    "'",
    '"',
    "\\",
    "${",
    "$",
    "{",
    "}",
    " ",
    "a",
    ",",
    "[",
    "]",
    "(",
    ")",
    "=",
    "\n",
    "é",
    "日",
    "???",
    "null",
    "#",
]
MARKS += [":", "1.10", "1e3", "1_000", "true", "@", "~", "%", "&", "*", "?", "|"]


@given(st.lists(st.sampled_from(MARKS), max_size=8).map("".join))
def test_any_text_arrives_as_it_was_typed(text: str) -> None:
    """Single runs and sweeps, parsed by Hydra's own parser into OmegaConf's own text node."""
    as_quoted = len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]
    (override,) = quoted([f"prompt={text}"], {"prompt": PROMPT}, known=lambda _: True)
    parsed = OverridesParser.create().parse_override(override)
    again = OverridesParser.create().parse_override(f"prompt={parsed.get_value_element_as_str()}")  # as a sweep does
    for value in (parsed.value(), again.value()):
        tree = OmegaConf.create({"prompt": ""})
        OmegaConf.update(tree, "prompt", value)
        plain = OmegaConf.to_container(tree, resolve=True)
        assert isinstance(plain, dict)
        assert plain["prompt"] == text or (as_quoted and plain["prompt"] in text)
    assert with_interpolation(without_interpolation(text)) == text


@pytest.mark.parametrize(
    "text",
    ["1.10", "1e3", "1_000", "true", "Null", "nullable", "a, b", "x=y", "my notes (1)", "[a].txt", "${nosuch}", " a "],
)
def test_a_directory_keeps_its_name(text: str) -> None:
    """The dataclass of a single run holds the text; only null makes an optional setting absent."""
    assert load("pretrain", ["data.path=notes.txt", f"run_dir={text}"]).run_dir == text
    assert load("pretrain", ["data.path=notes.txt", "run_dir=null"]).run_dir is None


def test_an_interpolation_of_a_setting_is_its_value_in_a_path_and_text_in_a_prompt() -> None:
    config = load("pretrain", ["data.path=notes.txt", "seed=7", "run_dir=runs/${seed}"])
    assert config.run_dir == "runs/7"
    config = load("pretrain", ["data.path=a${oc.env:NOSUCH,b}.txt"])
    assert config.data.path == "ab.txt"
    assert as_typed("generate", ["prompt=${seed} ${x}"]) == [r"prompt='\${seed} \${x}'"]


def test_names_in_a_list_keep_their_digits() -> None:
    config = load("pretrain", ["data.path=notes.txt", "sparsity.exclude=[1.10, 'a,b', x*, true]"])
    assert config.sparsity.exclude == ["1.10", "a,b", "x*", "true"]
    assert load("pretrain", ["data.path=notes.txt", "sparsity.exclude=[]"]).sparsity.exclude == []


@pytest.mark.parametrize(
    ("setting", "typed", "values"),
    [
        (PATH, "a.txt,b.txt", ["a.txt", "b.txt"]),
        (PATH, "1.10,1e3,null", ["1.10", "1e3", None]),
        (PATH, "'a, b',c", ["a, b", "c"]),
        (PATH, "a(1).txt", ["a(1).txt"]),
        (PROMPT, "'yes','no, never'", ["yes", "no, never"]),
        (PROMPT, "'In patients, we saw'", ["In patients, we saw"]),
        (PATH, "a b,c", None),
        (PATH, "a (1).txt,b", None),
        (PROMPT, "yes,no", None),
        (PROMPT, "In patients, we saw", None),
        (PROMPT, "it's so, isn't it", None),
    ],
)
def test_commas_in_a_multirun(setting: TextSetting, typed: str, values: list[str | None] | None) -> None:
    """Words make a sweep; if a comma may belong to the text, the message asks for quotes, and its example works."""
    settings = {setting.name: setting}
    if values is None:
        with pytest.raises(UserError, match="quotes") as caught:
            quoted([f"{setting.name}={typed}"], settings, lambda _: False, sweep=True)
        example = str(caught.value).partition("with commas write ")[2].partition(" (quotes inside")[0]
        (override,) = quoted([example], settings, lambda _: False, sweep=True)
        assert OverridesParser.create().parse_override(override).value() == typed
        return
    (override,) = quoted([f"{setting.name}={typed}"], settings, lambda _: False, sweep=True)
    parsed = OverridesParser.create().parse_override(override)
    found = list(parsed.sweep_iterator()) if parsed.is_sweep_override() else [parsed.value()]
    assert [getattr(value, "text", value) for value in found] == values


@pytest.mark.parametrize("lr", ["interval(1,2)", "glob(*)", "range(0,1,0)", "range(0,1e9)", "interval()", "choice()"])
def test_a_sweep_that_has_no_list_of_values_is_refused(shell: Shell, lr: str) -> None:
    assert lr in shell.refused("pretrain", "-m", *shell.tiny, f"optimizer.lr={lr}")


@pytest.mark.parametrize("text", ["In patients, we saw", "see [1]: a=b", "1e3", "${x} costs \\${y}", "true", "???"])
def test_the_question_what_the_configuration_is_shows_text_as_it_was_typed(shell: Shell, text: str) -> None:
    """``--cfg job`` accepts what the run accepts, and a YAML reader returns the text that it prints."""
    for words in ([], ["--resolve"]):
        status, out, err = shell.run("generate", "--cfg", "job", *words, "init_from=run", f"prompt={text}")
        assert (status, err) == (0, "")
        assert yaml.safe_load(out)["prompt"] == text


def test_a_section_of_the_configuration(shell: Shell) -> None:
    status, out, _ = shell.run("pretrain", "--cfg", "job", "--package", "budget", "budget.steps=3")
    assert (status, out.splitlines()[0], yaml.safe_load(out)["steps"]) == (0, "# @package budget", 3)
    assert "stage is now loop" in shell.refused("pretrain", "--cfg", "job", "--package", "stage")
    assert "nowhere" in shell.refused("pretrain", "--cfg", "job", "--package", "nowhere")
    assert "--cfg" in shell.refused("pretrain", "--resolve")
    assert "needs a value" in shell.refused("pretrain", "--cfg")


def test_text_in_a_multirun_and_in_names_of_directories(shell: Shell) -> None:
    """A path with brackets is read, a directory keeps its digits, and each job gets the whole sentence."""
    notes = shell.home / "my notes (1).txt"
    notes.write_text("\n\n".join(f"Note {n}: the aim of study {n} was to see." for n in range(80)))
    words = [*TINY[:-1], "budget.steps=1", f"data.path={notes.name}"]
    status, _, err = shell.run("pretrain", "-m", *words, "run_dir=1.10,1e3")
    assert (status, err) == (0, "")
    assert {path.name for path in shell.home.glob("1*")} == {"1.10", "1e3"}
    prompt = "In patients, ${we} saw [it] = 1.50"
    asked = ["init_from=1.10", "max_new_tokens=1", "temperature=0"]
    assert "quotes" in shell.refused("generate", "-m", *asked, f"prompt={prompt}", "seed=0,1")
    status, out, err = shell.run("generate", "-m", *asked, f"prompt='{prompt}'", "seed=0,1")
    assert (status, err) == (0, "")
    assert out.count(prompt) == 2
    status, out, err = shell.run("generate", *asked, "prompt=true")
    assert (status, err, out[:4]) == (0, "", "true")


def test_an_experiment_of_ones_own(shell: Shell) -> None:
    """``--config-dir`` adds a directory to single runs and multiruns; an error in it names the directory."""
    folder = shell.home / "mine" / "experiment"
    folder.mkdir(parents=True)
    head = "# @package _global_\ndefaults:\n  - override /sparsity: rigl\n"
    (folder / "mine.yaml").write_text(head + "sparsity:\n  evolution:\n    every: 1\n    stop: 1.0\n")
    (folder / "late.yaml").write_text(head)
    words = ["--config-dir", "mine", *shell.tiny]
    status, _, err = shell.run("pretrain", *words, "experiment=mine", "run_dir=run")
    assert (status, err) == (0, "")
    assert "rule: rigl" in (shell.home / "run" / "config.yaml").read_text()
    status, _, err = shell.run("pretrain", "-m", "--config-dir=mine", *shell.tiny, "experiment=mine", "seed=0,1")
    assert (status, err) == (0, "")
    assert len(list((shell.home / "runs").glob("pretrain-*rigl*"))) == 2
    assert "mine, " in shell.refused("pretrain", *words, "experiment=mnie")
    assert "--config-dir=mine" in shell.refused("pretrain", *words, "experiment=late")


LONG = "x" * 5000


@pytest.mark.parametrize("path", ["~nosuchuser/x", LONG, "a\0b", ""], ids=["nobody", "long", "nul", "empty"])
@pytest.mark.parametrize("setting", ["data.path", "data.tokenizer_path", "init_from", "run_dir", "runs_dir"])
def test_what_is_no_path_is_refused_with_the_setting(shell: Shell, setting: str, path: str) -> None:
    line = shell.refused("pretrain", *shell.tiny, f"{setting}={path}")
    assert line.startswith(f"sparsetrain: {setting}")
    assert len(line) < 200


def test_other_words_that_are_no_paths(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs that take paths, and environment variables that hold one."""
    (shell.home / "loop").symlink_to("loop")
    for path in ("~nosuchuser/x", LONG, "loop"):
        assert "PATH=" in shell.refused("report", path)
        assert "RUNS=" in shell.refused("sweep", path)
        assert "--out=" in shell.refused("sweep", "runs", "--out", path)
        assert "PATH=" in shell.refused("mask", "inspect", path)
        assert "picture=" in shell.refused("mask", "inspect", "masks.npz", f"picture={path}")
    assert "task.path" in shell.refused("data", shell.tiny[-1], "task=pubmedqa", "task.path=~nosuchuser")
    for path in ("~nosuchuser/x", LONG, str(Path("loop").absolute())):
        monkeypatch.setenv("SPARSETRAIN_CACHE", path)
        assert "SPARSETRAIN_CACHE" in shell.refused("data", shell.tiny[-1])
    monkeypatch.delenv("SPARSETRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~nosuchuser/x")
    assert "XDG_CACHE_HOME" in shell.refused("data", shell.tiny[-1])
