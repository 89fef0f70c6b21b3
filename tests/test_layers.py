"""The ladder of modules (README, file map): a module imports only from rows above its own, heavy things load late."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PIPELINE = Path(__file__).resolve().parent.parent / "pipeline"

#: Top to bottom. A name stands for pipeline/<name>.py or, with a dot, for a module of a sub-package.
ROWS = """
errors extras environment names job.arithmetic job.quantity job.fields job.placement job.resources job.demand rows
model.preprocessing job.schedule job.uris spec
job.recipe job.training job.complaints job.jobfile job.reference storage disk s3_errors s3_fetch s3
model.modeling_small_stem model.huggingface model.resnet artifact model.describe
unit footer log plan columns cut tar samples read orientation decode careful preprocess lanes
engines.scores engines.feed engines.fused engines.torch_engine engines.gpu_decode
engines.cpu engines.onnx_engine engines.openvino_engine engines.onnx_graph
predict commit verify report
attempt committer start watch cluster stages run keep label
nights.generation tables.published tables.delta tables.iceberg tables.publish nights.lease nights.notify nights.nightly
nights.retried nights.retry
ship submit
prepare.outcome prepare.look prepare.data prepare.metrics prepare.card
prepare.answer prepare.evaluation prepare.evaluation_page prepare.evaluate prepare.timm_config
prepare.parameters prepare.importer prepare.augment prepare.checkpoint prepare.afar prepare.room prepare.shelf prepare.images
prepare.learner prepare.epochs prepare.train
prepare.workers prepare.dataset prepare.resume prepare.finetune prepare.distill prepare.digits
prepare.calibrate prepare.gate prepare.quantize_data prepare.quantize
kube.types kube.pods kube.kuberay kube.cronjob kube.render kube.follow kube.apiserver kube.apply
demo screen prometheus
commands.interrupt commands.options commands.printing commands.model commands.nightly commands.cluster commands.kube cli __main__
"""
LADDER = ROWS.split()

#: Who may import what comes from outside.
KEEPERS = {
    "ray": {"cluster", "keep", "run", "submit", "prepare.workers"},
    "requests": {"submit"},
    "kubernetes": {"kube.apiserver"},
    "lightning": {"prepare.checkpoint", "prepare.epochs", "prepare.learner", "prepare.train"},
    "fsspec": {"s3"},
    "s3fs": {"s3"},
    "typer": {"cli", *(f"commands.{name}" for name in ("cluster", "kube", "model", "nightly", "options", "printing"))},
    "deltalake": {"tables.delta"},
    "pyiceberg": {"tables.iceberg"},
    "rich": {"screen", "cli"},
    "simplejpeg": {"decode"},
    "onnxruntime": {"engines.onnx_engine", "prepare.calibrate"},
    "onnx": {"engines.onnx_graph", "prepare.calibrate"},
    "openvino": {"engines.openvino_engine"},
    "cupy": {"engines.gpu_decode"},
    "transformers": {"model.modeling_small_stem"},
    "cronsim": {"job.schedule"},
}


def modules() -> dict[str, Path]:
    paths = [path for path in sorted(PIPELINE.rglob("*.py")) if path.name != "__init__.py"]
    return {".".join(path.relative_to(PIPELINE).with_suffix("").parts): path for path in paths}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update([node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)])
    return found


def ours(path: Path) -> set[str]:
    return {name.removeprefix("pipeline.") for name in imports(path)} & set(LADDER)


def test_every_module_has_its_place():
    assert set(modules()) == set(LADDER)


@pytest.mark.parametrize("name", LADDER)
def test_imports_go_up_the_ladder(name):
    lower = {other for other in ours(modules()[name]) if LADDER.index(other) >= LADDER.index(name)}
    # storage hands out the two stores and is their interface at once: the one knot, tied at run time.
    assert lower - ({"disk", "s3"} if name == "storage" else set()) == set()


@pytest.mark.parametrize("name", LADDER)
def test_what_comes_from_outside_stays_with_its_keeper(name):
    roots = {imported.split(".")[0] for imported in imports(modules()[name])}
    assert {root for root in roots & set(KEEPERS) if name not in KEEPERS[root]} == set()


def test_packages_import_nothing():
    for path in PIPELINE.rglob("__init__.py"):
        assert imports(path) == set()


@pytest.mark.parametrize("name", LADDER)
def test_budgets(name):
    source = modules()[name].read_text()
    assert source.count("\n") <= 250
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            where = f"{name}.{node.name}"
            length = (node.end_lineno or 0) - node.lineno + 1
            arguments = [argument for argument in (*node.args.args, *node.args.kwonlyargs) if argument.arg not in ("self", "cls")]
            assert length <= 40, f"{where}: {length} lines"
            assert len(arguments) <= 6, f"{where}: {len(arguments)} parameters"


RENDER = ["render", str(PIPELINE.parent / "jobs/nightly-products.yaml"), "--date", "today"]


@pytest.mark.parametrize("words", [["--help"], ["schema"], ["plan", "absent.yaml"], ["model", "show", "absent"], RENDER])
def test_the_command_line_starts_without_ray_and_torch(words):
    assert heavy(words) & {"ray", "torch", "s3fs", "kubernetes"} == set()


def test_submitting_needs_rays_client_and_neither_ray_data_nor_torch():
    loaded = heavy(["list", "--address", "127.0.0.1:1"])
    assert "ray.job_submission" in loaded
    assert loaded & {"ray.data", "torch", "pandas", "s3fs"} == set()


def heavy(words: list[str]) -> set[str]:
    """The modules that a command has loaded at its end."""
    code = (
        "import sys\nsys.argv = ['nightlabel', *sys.argv[1:]]\nfrom pipeline.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write('\\nLOADED ' + ' '.join(sys.modules) + '\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("LOADED "), done.stderr
    return set(done.stderr.splitlines()[-1].split()[1:])
