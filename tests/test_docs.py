"""Documents against the code: links, commands, snippets, config keys, symbols and tests that they name."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from danlu.cli import VERBS
from danlu.core.bench import BENCHMARKS
from danlu.core.commands import Call, options, parse
from danlu.core.config import make_config
from danlu.core.errors import UserError
from danlu.core.recipe import RECIPES, find_recipe, read_recipe
from danlu.papers.reproduce import EXPERIMENTS
from danlu.train.config import PretrainConfig

ROOT = Path(__file__).parents[1]
IGNORED = {"runs", "build", "dist", "node_modules"}
PAGES = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in IGNORED for part in path.relative_to(ROOT).parts)
)
GUIDES = [page for page in PAGES if page.parent == Path("docs") or page.name.startswith("README")]

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_OPERATORS = re.compile(r"^[|&;()<>]+$")


@cache
def text_of(page: Path) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are written in `language`."""
    return [text for name, text in _FENCE.findall(text_of(page)) if name == language]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", text_of(page))


def of_pages(found: Any, pages: list[Path] = PAGES) -> list[Any]:
    """`found` (page → items) of all pages, as parameters that name their page."""
    return [pytest.param(page, item, id=f"{page}: {item}"[:90]) for page in pages for item in found(page)]


def shell_commands(text: str) -> Iterator[list[str]]:
    """Each command of shell lines as its words, without comments, redirections and what joins commands."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if not _OPERATORS.match(word):
                command.append(word)
            elif command:
                yield command
                command = []


def danlu_words(command: list[str]) -> list[str] | None:
    """What follows `danlu`, or torchrun's `-m danlu.cli`; None for another command."""
    if Path(command[0]).name == "danlu":
        return command[1:]
    return command[command.index("danlu.cli") + 1 :] if "danlu.cli" in command else None


def danlu_commands(page: Path) -> list[str]:
    """The danlu commands in a page's fenced blocks, each as it would be typed after `danlu`."""
    found = [danlu_words(command) for block in blocks(page, "sh") for command in shell_commands(block)]
    return [shlex.join(words) for words in found if words is not None]


def understand(words: list[str]) -> Call:
    """The call that the words mean, its options checked against the verb's config. Raises UserError."""
    call = parse(VERBS, words)
    assert call is not None, "this only shows help"
    values = {"out": "somewhere", **call.values} if call.verb.keeps_nothing else call.values
    if call.recipe is None:
        make_config(call.verb.load_config(), values)
    return call


# The parser of commands, on commands whose words are known.


def test_commands_are_found_in_shell_lines() -> None:
    lines = (
        "printf 'Hi!\\n' | danlu chat runs/q   # a comment with danlu in it\n"
        "make quickstart && .venv/bin/danlu plan q \\\n  a.b=1\n"
        "torchrun --nproc-per-node 2 -m danlu.cli pretrain --data x > log\n"
    )
    found = [words for command in shell_commands(lines) if (words := danlu_words(command)) is not None]
    assert found == [["chat", "runs/q"], ["plan", "q", "a.b=1"], ["pretrain", "--data", "x"]]


def test_the_pages_are_there() -> None:
    assert {"README.md", "README.zh.md", "PAPERS.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md"} <= {
        page.name for page in PAGES
    }
    assert sum(len(danlu_commands(page)) for page in GUIDES) > 30


# Links


def links(page: Path) -> list[str]:
    return [link for link in _LINK.findall(prose(page)) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """The names that headings have in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "link"), of_pages(links))
def test_links_point_to_what_is_there(page: Path, link: str) -> None:
    name, _, anchor = link.partition("#")
    target = (ROOT / page.parent / name).resolve() if name else ROOT / page
    assert target.exists()
    if anchor:
        assert anchor in anchors(target.relative_to(ROOT))


def test_every_page_of_the_docs_is_linked_from_both_readmes() -> None:
    pages = {str(page) for page in PAGES if page.parent == Path("docs")}
    for readme in (Path("README.md"), Path("README.zh.md")):
        assert pages <= set(links(readme))


# Commands


@pytest.mark.parametrize(("page", "command"), of_pages(danlu_commands, GUIDES))
def test_commands_parse(page: Path, command: str) -> None:
    understand(shlex.split(command))


@pytest.mark.parametrize(("page", "block"), of_pages(lambda page: blocks(page, "sh")))
def test_targets_of_make_are_there(page: Path, block: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for command in shell_commands(block):
        if command[0] == "make":
            for target in (word for word in command[1:] if "=" not in word):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def named(page: Path) -> list[tuple[str, str]]:
    """(verb, name) of every `danlu reproduce NAME` and `danlu bench NAME`, wherever it stands."""
    return re.findall(r"\bdanlu (reproduce|bench) ([a-z][\w-]*)", text_of(page))


@pytest.mark.parametrize(("page", "what"), of_pages(named))
def test_experiments_and_benchmarks_are_there(page: Path, what: tuple[str, str]) -> None:
    verb, name = what
    known = (
        EXPERIMENTS if verb == "reproduce" else {f.stem.replace("_", "-") for f in BENCHMARKS.glob("*.py")}
    )
    assert name in known


def without_comments(page: Path) -> list[list[str]]:
    return [command for block in blocks(page, "sh") for command in shell_commands(block)]


def verbs_in_table(page: Path) -> list[str]:
    return re.findall(r"^\| (`danlu .*?) \|", text_of(page), re.MULTILINE)


def test_the_chinese_readme_has_the_same_commands() -> None:
    english, chinese = Path("README.md"), Path("README.zh.md")
    assert without_comments(chinese) == without_comments(english)
    assert verbs_in_table(chinese) == verbs_in_table(english)


def test_the_readme_lists_every_verb_once() -> None:
    code = " ".join(" ".join(_CODE.findall(row)) for row in verbs_in_table(Path("README.md")))
    words = re.sub(r"\bdanlu\b|\b[A-Z]+\b", " ", code).split()
    assert sorted(words) == sorted(" ".join(verb.name for verb in VERBS).split())


# Python, recipes, config keys


@pytest.mark.parametrize(("page", "snippet"), of_pages(lambda page: blocks(page, "python")))
def test_snippets_compile_and_import_what_is_there(page: Path, snippet: str) -> None:
    compile(snippet, str(page), "exec")
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "danlu":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize(("page", "block"), of_pages(lambda page: blocks(page, "yaml")))
def test_recipes_are_valid(page: Path, block: str, tmp_path: Path) -> None:
    assert "stages" in yaml.safe_load(block)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block, "utf-8")
    read_recipe(recipe, VERBS)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_run(path: Path) -> None:
    """To the last option, which is checked before anything runs."""
    read_recipe(path, VERBS)


@pytest.mark.parametrize("verb", ["sft", "reward", "dpo", "grpo", "ppo", "best-of-n"])
def test_a_stage_that_lacks_its_model_is_found_before_anything_runs(verb: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: lacks\nstages: [{{name: one, verb: {verb}, options: {{data: rows}}}}]", "utf-8")
    with pytest.raises(UserError, match="stage one: init_from: is required and missing"):
        read_recipe(recipe, VERBS)


def test_recipes_that_go_by_their_name_are_there() -> None:
    for page in GUIDES:
        for command in danlu_commands(page):
            words = shlex.split(command)
            if words[0] in ("run", "plan") and not words[1].endswith(".yaml"):
                read_recipe(find_recipe(Path(words[1])), VERBS)


def config_keys(page: Path) -> list[str]:
    """Code like `optim.lr` whose first word is a part of the config of training."""
    groups = {option.path[0] for option in options(PretrainConfig) if len(option.path) > 1}
    code = [re.sub(r"[=:].*", "", text) for text in _CODE.findall(prose(page))]
    return [key for key in code if re.fullmatch(r"\w+(\.\w+)+", key) and key.split(".")[0] in groups]


@pytest.mark.parametrize(("page", "key"), of_pages(config_keys))
def test_config_keys_are_there(page: Path, key: str) -> None:
    assert key in {".".join(option.path) for option in options(PretrainConfig)}


@pytest.mark.parametrize(
    ("page", "field"), of_pages(lambda page: re.findall(r"^\| `(model\.\w+)`.*\|$", text_of(page), re.M))
)
def test_the_table_of_sizes_has_the_right_defaults(page: Path, field: str) -> None:
    row = re.search(rf"^\| `{re.escape(field)}` .*\| (\S+) \|$", text_of(page), re.MULTILINE)
    assert row
    from danlu.model.config import ModelConfig

    assert yaml.safe_load(row[1].replace("1e-5", "1.0e-5")) == getattr(ModelConfig(), field.split(".")[1])


# Files, symbols, tests

_PATH = re.compile(r"(?:danlu|tests|benchmarks|recipes|docs)/[\w./-]+\.\w+")


def paths(page: Path) -> list[str]:
    return [text for text in _CODE.findall(prose(page)) if _PATH.fullmatch(text)]


@pytest.mark.parametrize(("page", "path"), of_pages(paths))
def test_files_that_are_named_are_there(page: Path, path: str) -> None:
    assert (ROOT / path).is_file()


def cells(code: str) -> list[str]:
    return [text for text in _CODE.findall(text_of(Path("PAPERS.md"))) if re.fullmatch(code, text)]


def test_every_row_of_the_papers_is_whole() -> None:
    rows = [
        row.split(" | ") for row in re.findall(r"^\| (.+?) ?\|$", text_of(Path("PAPERS.md")), re.MULTILINE)
    ]
    papers = [row for row in rows if row[0] not in ("paper", "---") and not row[0].startswith("---")]
    assert papers
    for row in papers:
        paper, method, symbols, commands, tests = row[:5]
        assert re.search(r" (19|20)\d\d, \"", paper), f"no year and title: {paper}"
        assert method
        assert re.search(r"`danlu/\S+\.py:\w", symbols), f"no symbol: {paper}"
        assert re.search(r"`tests/\S+\.py::test_\w+`", tests), f"no test: {paper}"
        for command in _CODE.findall(commands):
            words = command.split("danlu.cli ")[-1].removeprefix("danlu ").split()
            assert any(words[: len(verb.name.split())] == verb.name.split() for verb in VERBS), command


@pytest.mark.parametrize("symbol", sorted(set(cells(r"danlu/\S+\.py:\S+"))))
def test_symbols_of_the_papers_are_there(symbol: str) -> None:
    file, _, name = symbol.partition(":")
    assert (ROOT / file).is_file()
    found: Any = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)


@pytest.mark.parametrize("test", sorted(set(cells(r"tests/\S+\.py::\S+"))))
def test_tests_of_the_papers_are_there(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_papers_name_every_experiment() -> None:
    assert {name for verb, name in named(Path("PAPERS.md")) if verb == "reproduce"} == set(EXPERIMENTS)
