"""The house keeps its own rules: floors, circles, names, sizes, words and the list of packages."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from house import MODULES, PROJECT, ROOT

ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()

# A file imports only from lower floors (earlier rows), from rooms left of its own in its row, and from its own room.
FLOORS = [re.findall(r"`([^`]+)`", row) for row in re.findall(r"^\| \d+ \| ([^|]+) \|", ARCHITECTURE, re.MULTILINE)]
ORDER = [room for floor in FLOORS for room in floor]
DOORS = {
    "__init__", "__main__", "api", "compress", "errors", "fake_quantize", "io", "observer", "ops", "passes", "presets",
    "torch_private",
}  # fmt: skip

# What the text of a public library has no business saying. The brackets keep these lines from matching themselves.
FORBIDDEN = {
    "an issue by its number": r"(?<![\w&])[#]\d{1,2}\b|\bissue \d+\b",
    "a path of one machine": r"(?<![\w.])/(?:work|root|home)/|/tmp[/]\w",
    "how the work was organised": r"(?i)\b(?:this|a|the|our|each|next|last|another) session[s]?\b|\bworkplac[e]\b",
}


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


# Floors


def room_of(module: str) -> str:
    """The room of a dotted name: `qpass.comm.wire.codec` -> `comm/wire`, `qpass` -> `__init__`; "" without one."""
    path = "/".join(module.split(".")[1:]) or "__init__"
    return max((room for room in ORDER if f"{path}/".startswith(f"{room}/")), key=len, default="")


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of qpass in `source`, wherever it stands: in a function, for types only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join(base + ([node.module] if node.module else []))
            longer = [f"{origin}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES or origin == "qpass" else origin for name in longer]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "qpass")


def imports_from_above(source: str, module: str, is_package: bool = False) -> list[str]:
    own = room_of(module)
    rooms = ((line, room_of(name) or "__init__") for line, name in imported(source, module, is_package))
    return [f"{module}:{line} imports {room}" for line, room in rooms if ORDER.index(room) > ORDER.index(own)]


def test_every_module_is_in_a_room() -> None:
    assert [name for name in MODULES if not room_of(name)] == []
    rooms = {room_of(name) for name in MODULES}
    assert [room for room in ORDER if room not in rooms] == []


def test_nothing_lies_loose_but_the_doors() -> None:
    assert {file.stem for file in (ROOT / "qpass").glob("*.py")} == DOORS


def test_imports_point_down_only() -> None:
    files = [(file.read_text(), name, file.stem == "__init__") for name, file in MODULES.items()]
    assert [problem for file in files for problem in imports_from_above(*file)] == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("qpass.ir.editor", "from qpass.quantize.passes.annotate import x", ["qpass.ir.editor:1 imports quantize"]),
        ("qpass.ir.editor", "from .. import quantize", ["qpass.ir.editor:1 imports quantize"]),
        ("qpass.ir.editor", "from qpass import errors, prepare", ["qpass.ir.editor:1 imports __init__"]),
        ("qpass.ir.text", "def f():\n    import qpass.spec", ["qpass.ir.text:2 imports spec"]),
        ("qpass.comm.graph.coded", "from qpass.comm import eager\nfrom qpass.comm.wire import codec", []),
        ("qpass.ir.editor", "from .text import show\nfrom qpass.errors import near\nimport torch", []),
    ],
)
def test_an_import_from_above_is_seen(module: str, source: str, expected: list[str]) -> None:
    assert imports_from_above(source, module) == expected


def imports_of(name: str, file: Path) -> set[str]:
    """The files that a file imports, those read in functions and for types only among them."""
    return {found for _, found in imported(file.read_text(), name, file.stem == "__init__") if found in MODULES}


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Some circle of imports, its first name again at the end; empty where there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_imports_go_in_a_circle() -> None:
    assert circle({name: imports_of(name, file) for name, file in MODULES.items()}) == []


def test_a_circle_of_any_length_is_seen(tmp_path: Path) -> None:
    late = "if TYPE_CHECKING:\n    import qpass.ir.editor\ndef f():\n    from . import text"
    (tmp_path / "alias.py").write_text(late)
    assert imports_of("qpass.ir.alias", tmp_path / "alias.py") == {"qpass.ir.editor", "qpass.ir.text"}
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert sorted(set(circle({"a": {"b"}, "b": {"c"}, "c": {"d", "a"}, "d": set()}))) == ["a", "b", "c"]
    assert circle({"a": {"a"}}) == ["a", "a"]


# torch's private names

DOCUMENTED = {"torch._check", "torch._check_value", "torch._check_with"}


def private_names(source: str) -> list[str]:
    """``line: name`` of every private name of torch that `source` imports or reads. Operators are not meant."""
    found = []
    tree = ast.parse(source)
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and node not in inner:
            names = [ast.unparse(node)]
        found += [
            f"{node.lineno}: {name}" for name in names
            if re.match(r"torch\.(\w+\.)*_[a-zA-Z]", name) and not name.startswith("torch.ops.")
            and ".".join(name.split(".")[:2]) not in DOCUMENTED
        ]  # fmt: skip
    return found


def test_torchs_private_names_stand_in_one_file() -> None:
    files = {name: file for name, file in MODULES.items() if name != "qpass.torch_private"}
    assert {name: found for name, file in files.items() if (found := private_names(file.read_text()))} == {}


def test_a_private_name_of_torch_is_seen() -> None:
    source = "import torch\nfrom torch._ops import OpOverload\nx = torch._C._len_torch_dispatch_stack()\n"
    assert private_names(source) == ["2: torch._ops.OpOverload", "3: torch._C._len_torch_dispatch_stack"]


def test_every_private_name_is_there() -> None:
    from qpass import torch_private

    found = {name: getattr(torch_private, name, None) for name in torch_private.HOMES}
    assert [name for name, value in found.items() if value is None] == []
    # a name is looked up once: a flag would stay what it was then, so its module is listed
    assert [name for name, value in found.items() if isinstance(value, bool | int | float | str)] == []


# What ARCHITECTURE.md says


def paragraphs(text: str) -> Iterator[str]:
    """Each paragraph and each item of a list; fenced code, tables and headings are none."""
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    lines = (line for line in prose.splitlines() if not line.startswith(("|", "#")))
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        yield from (part for part in re.split(r"\n(?=- |\d+\. )", block.strip("\n")) if part)


def named_paths(text: str) -> list[str]:
    """The paths in backticks: what ends as a file of Python or text does, or as a folder."""
    return re.findall(r"`([\w./-]+(?:\.py|\.md|\.toml|/))`", text)


def test_the_plan_of_the_house_is_easy_to_read() -> None:
    assert [line for line in ARCHITECTURE.splitlines() if len(line) > 120] == []
    assert [text for text in paragraphs(ARCHITECTURE) if len(text.splitlines()) > 6] == []


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_every_path_of_a_page_is_there(name: str) -> None:
    found = named_paths((ROOT / name).read_text())
    assert found or name != "ARCHITECTURE.md"
    assert [path for path in found if not any((base / path).exists() for base in (ROOT, ROOT / "qpass"))] == []


def test_long_paragraphs_and_wrong_paths_are_seen() -> None:
    long = "\n".join(f"line {number}" for number in range(7))
    assert list(paragraphs(f"# Title\n{long}\n\n- one\n- two\n```\n{long}\n```")) == [long, "- one", "- two"]
    assert named_paths("`ir/editor.py` `no/where/` `torch.nn` `a/b` `README.md`") == [
        "ir/editor.py",
        "no/where/",
        "README.md",
    ]


def test_the_table_of_meta_keys_is_what_the_code_uses() -> None:
    table = set(re.findall(r"^\| `(qpass\w*)` \|", ARCHITECTURE.partition("## What rides on nodes")[2], re.MULTILINE))
    assert table == {key for file in MODULES.values() for key in meta_keys(file.read_text())}


def meta_keys(source: str) -> set[str]:
    """The texts by which `source` writes into ``meta``: constants, but for namespaces of operators, and literals."""
    named = set(re.findall(r'^(?!NAMESPACE)[A-Z_]+ = "(qpass(?:_\w+)?)"$', source, re.MULTILINE))
    return named | set(re.findall(r'\bmeta(?:\[|\.get\(|\.pop\(|\.setdefault\()"(qpass\w*)"', source))


def test_the_table_of_passes_is_the_passes() -> None:
    named = re.findall(r"`(\w+)`", ARCHITECTURE.partition("## The passes")[2].partition("Each pass is one file")[0])
    files = {name.split(".")[-1]: file for name, file in MODULES.items() if name.split(".")[-2:-1] == ["passes"]}
    classes = {name for file in files.values() for name in frozen_dataclasses(file.read_text())}
    assert set(named) == classes - {"RecogniseIslands"}  # which the backend runs by itself


# Names, sizes, words


def test_the_door_holds_no_logic() -> None:
    body = ast.parse((ROOT / "qpass" / "__init__.py").read_text()).body
    assert [type(node) for node in body[1:] if not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)] == []


def test_no_file_is_named_for_having_no_idea() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [relative(file) for file in [*MODULES.values(), *TESTS] if vague & set(file.with_suffix("").parts)] == []


def test_files_are_short() -> None:
    """A test file may be longer: it lists the cases of one subject, and cases have little to do with each other."""
    for files, most in ((MODULES.values(), 300), (TESTS, 400)):
        lines = {relative(file): len(file.read_text().splitlines()) for file in files}
        assert {name: count for name, count in lines.items() if count > most} == {}


def test_no_folder_of_tests_hides_a_module() -> None:
    """`tests/` is on the path: with an `__init__.py`, `tests/inspect/` would be what `import inspect` finds."""
    packages = {file.parent.name for file in TESTS if file.name == "__init__.py"}
    assert packages <= {"models", "benchmarks"}


def frozen_dataclasses(source: str) -> list[str]:
    """Names of the classes of `source` that are decorated `@dataclass(frozen=True)` and have a method `run`."""
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        and any("dataclass" in (text := ast.unparse(d)) and "frozen=True" in text for d in node.decorator_list)
        and any(isinstance(method, ast.FunctionDef) and method.name == "run" for method in node.body)
    ]


def test_a_pass_file_is_named_by_its_pass() -> None:
    passes = {name.split(".")[-1]: file for name, file in MODULES.items() if name.split(".")[-2:-1] == ["passes"]}
    found = {
        stem: [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() for name in frozen_dataclasses(file.read_text())]
        for stem, file in passes.items()
    }
    assert found == {stem: [stem] for stem in passes}


def texts() -> Iterator[Path]:
    folders = (ROOT / name for name in ("qpass", "patterns", "tests", "examples", "docs", ".ci", ".github"))
    yield from (file for file in ROOT.iterdir() if file.suffix in (".md", ".toml", ".txt", ".yml", ".yaml"))
    for folder in folders:
        files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        yield from (file for file in files if file.suffix != ".png")


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_text_speaks_to_its_reader(what: str) -> None:
    found = [
        f"{relative(file)}:{number}: {line.strip()[:100]}"
        for file in texts()
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1)
        if re.search(FORBIDDEN[what], line)
    ]
    assert found == []


# What is installed


def test_the_list_of_packages_is_the_folders() -> None:
    folders = {name if file.stem == "__init__" else name.rpartition(".")[0] for name, file in MODULES.items()}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)
    assert sorted(name for name in folders if MODULES.get(name, Path()).stem != "__init__") == []


def test_the_version_is_said_once_and_the_same() -> None:
    import qpass

    assert qpass.__version__ == PROJECT["project"]["version"]


@pytest.mark.parametrize("name", ["patterns", "rules.patterns"])
def test_the_catalogue_refuses_another_name(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "patterns" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError) as refused:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert str(refused.value) == (
        f"the pattern catalogue is the package 'qpass.patterns', but it was imported as {name!r}\n"
        "  to do: write 'import qpass.patterns'; if that fails, install qpass (pip install -e .)"
    )
