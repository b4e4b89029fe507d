"""Imports go one way through the levels; every import of the package is checked, also those inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = "anymamba"

LEVELS = (
    {"base"},
    {"runtimes"},
    {"data", "kernels"},
    {"ops"},
    {"parts"},
    {"layers"},
    {"models"},
    {"generation", "training"},
    {"evaluation", "serving", "compat", "parallel"},
    {"lab"},
    {"experiments"},
    {"console"},
    {"cli"},
)
COMPILED = {f"{PACKAGE}._native", f"{PACKAGE}._build_info"}  # built from csrc, not in the tree
RANK = {name: rank for rank, names in enumerate(LEVELS) for name in names}

# Inside a level, only these modules may be imported by siblings.
SHARED = {
    *("base.errors", "base.files", "base.locks"),
    *("runtimes.nvrtc", "runtimes.cubins", "runtimes.replaying", "kernels.elementwise"),
    *("kernels.selective_scan.arguments", "kernels.causal_conv1d.arguments"),
    "kernels.selective_scan.chunks",
    *("kernels.add_norm.arguments", "kernels.linear_cross_entropy.arguments"),
    *("kernels.packed_linear.arguments", "kernels.packed_linear.formats", "kernels.packed_linear.cuda"),
    *("data.documents", "data.table", "data.tokenizer", "data.token_ids", "data.byte_level"),
    *("data.cache", "data.dna", "data.dna.tokenizer"),
    *("ops.devices", "ops.dispatch", "ops.checks", "ops.observers", "ops.functions", "ops.recomputing"),
    "ops.groups",
    *("parts.derived", "parts.padding", "parts.state", "parts.sequence", "parts.parameters", "parts.derivatives"),
    *("parts.bare", "parts.recipes", "parts.toeplitz"),
    "layers.s6",
    *("models.config", "models.mixers", "models.language_model", "models.checkpoints"),
    *("models.weight_formats", "models.inference"),
    *("generation.sampling", "generation.prompts", "generation.stops", "generation.stepping"),
    *("generation.requests", "generation.running", "generation.scheduling", "generation.speculation"),
    *("generation.beam", "generation.prefix_tree", "generation.state_folder", "generation.state_store"),
    *("training.config", "training.optimizer", "training.checkpoint", "training.metrics"),
    *(
        "training.clock",
        "training.loggers",
        "training.masking",
        "training.lora",
        "training.outline",
        "training.parallel.agreement",
        "training.parallel.launch",
        "training.parallel.processes",
        "training.parallel.start",
        "training.run_config",
        "training.interrupts",
        "training.repeating",
        "training.report",
        "training.snapshot",
        "training.steps",
        "training.tables",
        "training.data",
        "training.genomes",
        "training.genome_splits",
        "training.given_genomes",
        "training.length_warmup",
    ),
    *("serving.limits", "serving.security", "serving.metrics", "serving.structured", "serving.templates"),
    *("serving.worker", "serving.model", "serving.loading", "serving.answering", "serving.gate", "serving.app"),
    *("serving.server", "serving.front", "serving.page", "serving.sessions"),
    *(
        "serving.protocol.bodies",
        "serving.protocol.answers",
        "serving.protocol.chat",
        "serving.protocol.chat_answers",
        "serving.protocol.completions",
        "serving.protocol.errors",
        "serving.protocol.events",
        "serving.protocol.fields",
        "serving.protocol.formats",
        "serving.protocol.openapi",
        "serving.protocol.options",
        "serving.protocol.tables",
        "serving.protocol.token_texts",
        "serving.protocol.tools",
    ),
    *(
        "lab.experiment",
        "lab.results",
        "lab.report",
        "lab.charts",
        "lab.optimization",
        "lab.saving",
        "lab.running",
        "lab.learning",
        "lab.byte_windows",
        "lab.zero_shot",
        "lab.classifiers",
        "lab.genome_models",
        "lab.genomes",
        "lab.language",
    ),
    *("cli.app", "cli.train_help"),
    *(
        "console.flags",
        "console.output",
        "console.mistakes",
        "console.synonyms",
        "console.profiling",
        "console.runtime",
    ),
}

GATHERER = "kernels.backends"  # the list of backends may import them all

# `LanguageModel.from_pretrained` and `.save_pretrained` call the readers and writers, which build models, and
# `.for_inference` makes a model of a subclass. So these methods import them when they are called. No other import may
# close a cycle.
CONVENIENCE = {
    ("models.language_model", "models.checkpoints"),
    ("models.language_model", "models.inference"),
    ("models.language_model", "models.weight_formats"),
}


def modules(source: Path = SOURCE) -> dict[str, Path]:
    """Every module by its dotted name inside the package; a package has the name of its folder."""
    found = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, module: str, known: set[str]) -> set[str]:
    """The modules of the package that a file imports anywhere, also with import_module("...")."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute_name(node, path, module)
            found |= {f"{base}.{alias.name}" if in_package(base) else base for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {nearest_module(name, known) for name in found - COMPILED if in_package(name)} - {module}


def in_package(name: str) -> bool:
    """Whether a dotted name is that of the package or inside it."""
    return name == PACKAGE or name.startswith(PACKAGE + ".")


def absolute_name(node: ast.ImportFrom, path: Path, module: str) -> str:
    """The full name of the module in `from ... import`; relative imports are resolved."""
    if not node.level:
        return node.module or ""
    parts = [PACKAGE, *module.split(".")] if module else [PACKAGE]
    up = node.level - (path.name == "__init__.py")
    return ".".join(parts[: len(parts) - up] + ([node.module] if node.module else []))


def nearest_module(name: str, known: set[str]) -> str:
    """The module that holds a dotted name: `anymamba.ops.dispatch.report` is in `ops.dispatch`."""
    short = name.removeprefix(PACKAGE).removeprefix(".")
    while short not in known:
        short = short.rpartition(".")[0]
    return short


def is_shared(target: str) -> bool:
    """Whether siblings may import a module. For a folder in the list this means only its `__init__`."""
    return target in SHARED


def own_folder(importer: str, target: str) -> bool:
    """Whether a target is in the importer's folder, such as an experiment; in kernels, a backend's folder counts."""
    parts = importer.split(".")
    depth = 3 if parts[0] == "kernels" else 2
    return len(parts) >= depth and target.startswith(".".join(parts[:depth]) + ".")


def complaint(importer: str, target: str) -> str | None:
    """What is wrong with an import, or None."""
    if importer in ("", "__main__"):
        return None  # the package's __init__ imports lazily, and `python -m` is the command line
    if target == "":
        return f"{importer} imports the top of the package, which imports from every level"
    source, destination = importer.split(".")[0], target.split(".")[0]
    if RANK[destination] > RANK[source]:
        return f"{importer} imports {target}, which is higher"
    if RANK[destination] < RANK[source] or is_shared(target) or own_folder(importer, target):
        return None
    if importer == GATHERER or (destination == source and "." not in importer):
        return None  # a level's __init__ may gather its own modules
    return f"{importer} imports {target}, a sibling that is not in the list of shared files"


def import_graph(source: Path = SOURCE) -> dict[str, set[str]]:
    """For each module, the modules that it imports."""
    found = modules(source)
    return {name: imported(path, name, set(found)) for name, path in found.items()}


def without_convenience(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the imports in CONVENIENCE."""
    return {name: {t for t in targets if (name, t) not in CONVENIENCE} for name, targets in graph.items()}


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """One cycle of the graph, or None; the package's __init__ is left out because it imports lazily."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        for target in sorted(graph[name] - {""}):
            found = visit(target, [*trail, name])
            if found:
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if name and (found := visit(name, []))), None)


def test_every_module_has_a_level():
    unknown = {name.split(".")[0] for name in modules()} - set(RANK) - {"", "__main__"}
    assert not unknown, f"modules outside the levels: {sorted(unknown)}"


def test_imports_go_down_the_levels():
    complaints = [c for name, targets in import_graph().items() for t in targets if (c := complaint(name, t))]
    assert not complaints, "\n".join(sorted(complaints))


def test_no_import_cycles():
    assert cycle(without_convenience(import_graph())) is None


def test_the_excuses_are_imports_inside_functions():
    graph = import_graph()
    for name, target in CONVENIENCE:
        assert target in graph[name], f"{name} no longer imports {target}"
        tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
        at_top = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
        assert f"{PACKAGE}.{target}" not in at_top


def test_shared_list_has_no_dead_entries():
    names = set(modules())
    assert {s for s in SHARED if s not in names} == set()


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("ops.selective_scan", "kernels.selective_scan.portable", True),
        ("ops.selective_scan", "ops.dispatch", True),
        ("ops.selective_scan", "ops.causal_conv1d", False),
        ("ops.selective_scan", "parts.state", False),
        ("kernels.selective_scan.portable", "kernels.selective_scan.reference", False),
        ("kernels.selective_scan.portable.forward", "kernels.selective_scan.portable.block", True),
        ("kernels.selective_scan.portable.forward", "kernels.selective_scan.reference", False),
        ("kernels.selective_scan.portable", "data.table", True),
        ("models.checkpoints.transformers", "models.checkpoints.folder", True),
        ("models.language_model", "training.config", False),
        ("training.trainer", "generation.generate", False),
        ("training.trainer", "cli.main", False),
        ("training.trainer", "", False),
        ("cli.train", "training.trainer", True),
        ("cli.train", "cli.generate", False),
        ("experiments.copying.plot", "experiments.copying.measure", True),
        ("experiments.copying.plot", "experiments.scaling.measure", False),
    ],
)
def test_the_rule_itself(importer, target, allowed):
    assert (complaint(importer, target) is None) is allowed


def test_imports_inside_functions_and_by_name_are_seen(tmp_path):
    folder = tmp_path / PACKAGE / "ops"
    folder.mkdir(parents=True)
    for name in ("a", "b", "c", "d"):
        (folder / f"{name}.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "x.py").write_text(
        "from importlib import import_module\n"
        "def f():\n    from anymamba.ops.a import thing\n    from . import b\n    from .c import other\n"
        "    import_module('anymamba.ops.d')\n"
    )
    assert import_graph(tmp_path)["ops.x"] >= {"ops.a", "ops.b", "ops.c", "ops.d"}


def test_cycles_are_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b"}, "b": set()}) is None
