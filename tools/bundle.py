"""Turn a finished run of `limbeck teach` into package data: half precision, with its recipe and scores in the card.

python tools/bundle.py runs/digits-classifier digits
python tools/bundle.py runs/digits-teacher digits
"""

import argparse
import json
import math
from pathlib import Path

import torch

from limbeck import artifact, summary
from limbeck.config import Evaluation
from limbeck.data import load
from limbeck.denoiser import Denoiser
from limbeck.evaluate import Reference, measure
from limbeck.features import Classifier
from limbeck.features import load as load_features
from limbeck.files import sha256
from limbeck.noise import Karras


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    arguments = parser.parse_args()
    run, name = arguments.run, arguments.name
    kind = "classifier" if (run / "classifier.safetensors").is_file() else "denoiser"
    source, target = run / f"{kind}.safetensors", artifact.bundled(f"{name}-{kind}.safetensors")
    facts = {k: v for k, v in artifact.read_card(source).items() if k not in ("format", "kind", "card")}
    facts["versions"] = json.loads((run / "report.json").read_text())["versions"]

    def write() -> torch.nn.Module:
        module = artifact.load(source, kind)
        if isinstance(module, Denoiser) and module.sigma_max == math.inf:  # taught before runs kept their range
            reach = Karras().scaled(module.unit)
            module.sigma_min, module.sigma_max = reach.sigma_min, reach.sigma_max
        artifact.save(target, kind, module, facts, torch.float16)
        return artifact.load(target, kind)  # what users get: the weights after rounding

    model = write()
    data = load(facts["recipe"]["data"])
    if isinstance(model, Classifier):
        facts["scores"] = {"held_out_accuracy": summary.held_out_accuracy(model, data.split()[1])}
        write()
        reference = Reference.measure(data, load_features(name), sha256(target))
        reference.save(artifact.bundled(f"{name}-reference.npz"))
    else:
        assert isinstance(model, Denoiser)
        settings = Evaluation()
        judge = summary.judge_for(name, settings, model)
        assert judge is not None
        sampler, nfe, shape, classes, contexts = summary.sampler_of(model, settings.teacher_steps)
        scores = measure(sampler, nfe, judge, shape, classes, contexts, samples=settings.samples)
        facts["scores"] = {"nfe": nfe, **scores.metrics}
        facts["floor"] = judge.floor(settings.samples).metrics
        write()
    print(target, target.stat().st_size, json.dumps(facts["scores"]))


if __name__ == "__main__":
    main()
