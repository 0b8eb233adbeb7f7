"""Writes a folder of images anew at half their size: each pixel the mean of four.

python paper/ours/half/halve.py cifar10-png half-cifar10
"""

import sys
from pathlib import Path

from PIL import Image

source, made = map(Path, sys.argv[1:])
for path in sorted(source.glob("*/*/*")):
    image = Image.open(path).convert("RGB")
    place = (made / path.relative_to(source)).with_suffix(".png")
    place.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX).save(place)
