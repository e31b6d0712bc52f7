"""Whether a registered artifact is the model that was evaluated: it is loaded back and has to predict the same."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pipeline import storage
from pipeline.records import Check, Evaluation
from pipeline.registry.model_package import checkpoint_structure
from pipeline.storage.names import CHECKPOINT_FOLDER, PROBE_FOLDER, PROBE_IMAGES, PROBE_LABELS, WEIGHTS_FILE
from segvit.decoders import DECODERS

# Rounding differs between devices and moves single border pixels; another model or preprocessing moves many.
MIN_PROBE_AGREEMENT = 0.995
# Where an evaluation in bf16 meets a machine without it; patches that Shrunk leaves out may then be others.
MIN_PROBE_AGREEMENT_BF16 = 0.98
LOAD_TIMEOUT_S = 600

# Run by a bare interpreter: -I leaves out the working directory, PYTHONPATH and the user's own packages, -B leaves
# no compiled files in the artifact. It lives for seconds: a fifth of them would go into looking for garbage.
LOAD_AND_PREDICT = """
import gc, sys, warnings
gc.disable()
warnings.simplefilter("ignore")
import mlflow.pyfunc
import numpy as np
folder, images, labels, *modules = sys.argv[1:]
model = mlflow.pyfunc.load_model(folder)
np.save(labels, model.predict(np.load(images, allow_pickle=False)), allow_pickle=False)
print(*(sys.modules[name].__file__ for name in modules), sep="\\n")
"""


def reproduces(folder: Path, evaluation: Evaluation) -> Check:
    """Whether the registered model in a local folder is the evaluated one, in weights and in predictions.

    It is loaded by an interpreter of its own that sees nothing of this source tree, as any user of it would.
    """

    def result(passed: bool, detail: str) -> Check:
        return Check(name="artifact", passed=passed, detail=f"the registered artifact {detail}")

    weights = folder / CHECKPOINT_FOLDER / WEIGHTS_FILE
    if not weights.is_file() or storage.file_digest(str(weights)) != evaluation.checkpoint_digest:
        return result(False, "does not hold the evaluated weights")
    probe_uri = storage.join(evaluation.uri, PROBE_FOLDER)
    if not all(storage.exists(storage.join(probe_uri, file)) for file in (PROBE_IMAGES, PROBE_LABELS)):
        return result(
            False, f"cannot be compared, the evaluated predictions at {probe_uri} are gone; run its flow again"
        )
    with tempfile.TemporaryDirectory(prefix="segvit-probe-") as scratch:
        probe = storage.fetch_folder(probe_uri, Path(scratch) / PROBE_FOLDER)
        expected = np.load(probe / PROBE_LABELS, allow_pickle=False)
        written = Path(scratch) / "predicted.npy"
        plugin = DECODERS.plugin(checkpoint_structure(weights.parent))
        modules = ["segvit", *([plugin.module] if plugin is not None else [])]
        arguments = [str(folder), str(probe / PROBE_IMAGES), str(written), *modules]
        try:
            ended = subprocess.run(
                [sys.executable, "-IB", "-c", LOAD_AND_PREDICT, *arguments],
                cwd=scratch,
                env=_bare_environment(),
                capture_output=True,
                text=True,
                timeout=LOAD_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return result(False, f"does not load and predict within {LOAD_TIMEOUT_S} s")
        if ended.returncode != 0:
            lines = ended.stderr.strip().splitlines()
            return result(False, f"does not load: {lines[-1] if lines else f'exit code {ended.returncode}'}")
        for used in map(Path, ended.stdout.strip().splitlines()[-len(modules) :]):
            if not used.resolve().is_relative_to(folder.resolve()):
                return result(False, f"does not carry its own code but used {used}")
        predicted = np.load(written, allow_pickle=False)
    if predicted.shape != expected.shape:
        return result(False, f"predicts shape {predicted.shape}, evaluated was {expected.shape}")
    agreement = float((predicted == expected).mean())
    least = least_agreement(evaluation)
    return result(agreement >= least, f"predicts as evaluated in {agreement:.2%} of pixels, at least {least:.2%}")


def least_agreement(evaluation: Evaluation) -> float:
    """The share of a probe's pixels that the artifact has to predict as the evaluation did."""
    return MIN_PROBE_AGREEMENT_BF16 if evaluation.inference.get("precision") == "bf16" else MIN_PROBE_AGREEMENT


def _bare_environment() -> dict[str, str]:
    # Ray gives tasks that reserve no CPU one thread; this process may use the machine for its few seconds.
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return kept | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR"}
