import ast
from pathlib import Path

from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

import sae_lens_dfc

PACKAGE = Path(sae_lens_dfc.__file__).parent

# The data's way, from top to bottom.
LAYERS = [
    "ranks",
    "stopping",
    "terminal",
    "output",
    "files",
    "arrow_file",
    "parquet_file",
    "data_files",
    "gguf_file",
    "state",
    "texts",
    "spans",
    "tokens",
    "segments",
    "alignment",
    "chat",
    "models",
    "prompts",
    "positions",
    "steering",
    "pair",
    "generate",
    "judge",
    "sources",
    "contexts",
    "norms",
    "activations",
    "manifest",
    "cache_writer",
    "cache",
    "provider",
    "crosscoders.partition",
    "crosscoders.selection",
    "crosscoders.sparse",
    "synthetic",
    "crosscoders.losses",
    "metrics.spread",
    "metrics.reconstruction",
    "metrics.moments",
    "metrics.stitching",
    "metrics.code_difference",
    "crosscoders.export",
    "crosscoders.inference",
    "crosscoders.base",
    "crosscoders.standard",
    "crosscoders.topk",
    "crosscoders.batchtopk",
    "crosscoders.dsf",
    "crosscoders.delta",
    "crosscoders.evidence",
    "crosscoders.dfc",
    "metrics.frequency",
    "metrics.cross_reconstruction",
    "metrics.splicing",
    "metrics.downstream",
    "metrics.sparsity",
    "metrics.firings",
    "metrics.contrast",
    "metrics.logit_effects",
    "metrics.pca",
    "metrics.exclusivity",
    "latent_acts",
    "latent_steering",
    "metrics.scaling",
    "metrics.transfer",
    "metrics.span",
    "metrics.significance",
    "metrics.claims",
    "metrics.recovery",
    "metrics.stability",
    "metrics.shuffle",
    "metrics.directions",
    "metrics.outcomes",
    "metrics.effects",
    "metrics.verification",
    "metrics.behaviour",
    "metrics.judged",
    "evaluate",
    "training.data",
    "training.config",
    "recipes",
    "training.caching",
    "training.checkpoint",
    "training.divergence",
    "training.checks",
    "training.trainer",
    "training.parallel",
    "training.runner",
    "pair_data",
    "nulls",
    "assess",
    "gathering",
    "latents",
    "findings",
    "concerns",
    "questions",
    "explain",
    "measures",
    "charts",
    "page_data",
    "summary",
    "report",
    "measured_run",
    "held_out",
    "natural",
    "steer",
    "latent_lines",
    "latent_html",
    "latent_list",
    "progress",
    "screening",
    "verdicts",
    "explaining",
    "screen",
    "exporting",
    "card",
    "hub",
    "demo",
    "benchmark.provenance",
    "benchmark.figures",
    "benchmark.memory",
    "benchmark.imported",
    "benchmark.reference",
    "benchmark.dictionary_learning",
    "benchmark.peers",
    "benchmark.separate",
    "benchmark.recovery",
    "benchmark.data",
    "benchmark.step",
    "benchmark.tables",
    "benchmark.planted.behaviours",
    "benchmark.planted.prompts",
    "benchmark.planted.answers",
    "benchmark.planted.organism",
    "benchmark.planted.finetune",
    "benchmark.planted.from_scratch",
    "benchmark.planted.harvest",
    "benchmark.planted.causal",
    "benchmark.planted.effects",
    "benchmark.planted.probes",
    "benchmark.planted.score",
    "benchmark.planted.training",
    "benchmark.planted.tables",
    "benchmark.planted.run",
    "benchmark.planted.folder",
    "benchmark.evaluate",
    "benchmark.compare",
    "benchmark.comparable",
    "benchmark.plots",
    "benchmark.suite",
    "arguments",
    "__main__",
]


def modules() -> dict[str, Path]:
    paths = (p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in paths}


def imports(path: Path) -> set[str]:
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    names = {node.module or "" for node in nodes}
    # `from sae_lens_dfc import ranks` imports a file too.
    files = {a.name for n in nodes if n.module == "sae_lens_dfc" for a in n.names} & set(modules())
    return files | {
        name.removeprefix("sae_lens_dfc.") for name in names if name.startswith("sae_lens_dfc.")
    }


def test_every_file_has_its_place_in_the_datas_way() -> None:
    assert set(modules()) == set(LAYERS)


def test_a_file_imports_only_from_files_above_it() -> None:
    below = {
        (name, other)
        for name, path in modules().items()
        for other in imports(path)
        if LAYERS.index(other) >= LAYERS.index(name)
    }
    assert below == set()


def test_all_is_what_is_exported() -> None:
    public = {
        name
        for name, value in vars(sae_lens_dfc).items()
        if isinstance(value, type) or callable(value)
        if not name.startswith("_") and value.__module__.startswith("sae_lens_dfc")
    }
    assert public == set(sae_lens_dfc.__all__)


def test_importing_registers_the_architectures_with_saelens() -> None:
    assert {"dfc", "batchtopk_crosscoder"} <= set(SAE_TRAINING_CLASS_REGISTRY)
    assert "crosscoder" in SAE_CLASS_REGISTRY


def test_importing_adds_no_log_handler() -> None:
    import logging

    assert logging.getLogger("sae_lens_dfc").handlers == []
