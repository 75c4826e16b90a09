# /// script
# dependencies = ["pycocotools==2.0.11", "numpy>=2.0", "safetensors>=0.5"]
# ///
"""COCO's own average precision of random boxes: truth, predictions and figures.

tests/tasks/test_detection.py scores the same boxes. Images are 100 x 100 with two to six boxes of three classes; most
predictions are moved true boxes, some are of another class and some anywhere. No crowds, sizes of all kinds.
"""

import contextlib
import io
import sys
from importlib.metadata import version

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.numpy import save_file

IMAGES, CLASSES = 20, 3


def drawn(random: np.random.Generator, count: int) -> np.ndarray:
    """x0, y0, x1, y1."""
    low = random.uniform(0, 60, (count, 2))
    return np.concatenate([low, low + random.uniform(5, 40, (count, 2))], 1)


def main(path: str) -> None:
    random = np.random.default_rng(0)
    true, said = [], []  # rows: image, class, box, and for predictions the score
    for image in range(IMAGES):
        boxes = drawn(random, int(random.integers(2, 7)))
        kinds = random.integers(0, CLASSES, len(boxes))
        true += [[image, kind, *box] for kind, box in zip(kinds, boxes, strict=True)]
        near = boxes + random.normal(0, 2.5, boxes.shape)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        other = np.where(random.random(len(boxes)) < 0.2, random.integers(0, CLASSES, len(boxes)), kinds)
        twice, wild = near[:1] + 0.5, drawn(random, 3)
        kinds = np.concatenate([other, other[:1], random.integers(0, CLASSES, 3)])
        found = np.concatenate([near, twice, wild])
        scores = random.permutation(len(found)) / len(found) * 0.9 + random.uniform(0, 0.05, len(found))
        said += [[image, kind, *box, score] for kind, box, score in zip(kinds, found, scores, strict=True)]
    truth, guess = np.array(true), np.array(said)

    def annotation(number: int, row: np.ndarray) -> dict:
        x0, y0, x1, y1 = (float(value) for value in row[2:6])
        return {
            "id": number, "image_id": int(row[0]), "category_id": int(row[1]), "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0), "iscrowd": 0,
        }  # fmt: skip

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": image, "width": 100, "height": 100} for image in range(IMAGES)],
            "categories": [{"id": kind, "name": str(kind)} for kind in range(CLASSES)],
            "annotations": [annotation(number, row) for number, row in enumerate(truth, 1)],
        }
        coco.createIndex()
        results = [{**annotation(number, row), "score": float(row[6])} for number, row in enumerate(guess, 1)]
        scored = COCOeval(coco, coco.loadRes(results), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    by_class = scored.eval["precision"][:, :, :, 0, 2].mean(
        (0, 1)
    )  # thresholds, recalls, classes; all areas, 100 boxes
    figures = np.array([scored.stats[0], scored.stats[1], scored.stats[2], *by_class])
    metadata = {"pycocotools": version("pycocotools"), "seed": "0", "figures": "AP, AP50, AP75, AP of each class"}
    save_file({"true": truth, "predicted": guess, "figures": figures}, path, metadata)


if __name__ == "__main__":
    main(sys.argv[1])
