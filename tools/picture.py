"""Make docs/digits.png: a student's samples beside its teacher's, from equal noise.

python tools/picture.py runs/demo-sid
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from limbeck import artifact, teachers
from limbeck.evaluate.draws import Latents, generate, latents
from limbeck.pictures import grid
from limbeck.summary import sampler_of


def main() -> None:
    student, teacher = artifact.load_generator(sys.argv[1]), teachers.load("digits")
    pictures = []
    for model in (student, teacher):
        sampler, _, shape, classes, _ = sampler_of(model, 18)
        drawn = Latents(latents(0, range(60), shape, classes).z, torch.arange(60) % classes)
        pictures.append(grid(generate(sampler, drawn, classes), 10))
    left, right = pictures
    gap = left.height // 12
    sheet = Image.new("L", (left.width + gap + right.width, left.height), 255)
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + gap, 0))
    sheet.save(Path(__file__).parent.parent / "docs" / "digits.png", optimize=True)


if __name__ == "__main__":
    main()
