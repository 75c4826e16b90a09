"""Head sets as the authors of ACT publish them: Python lists of lists, a row a layer, the first row layer 2.

Paper: headwise/papers/attention_calibration.py (Yu et al., ICML 2024). Their file is not part of this package.
"""

import ast
import os
from pathlib import Path

from headwise.attend.addresses import Head, Layout
from headwise.errors import InputError

__all__ = ["read_calibration_heads"]

FIRST_LAYER = 2  # the paper leaves out the first two layers


def read_calibration_heads(
    path: str | os.PathLike[str], layout: Layout | None = None, *, first_layer: int = FIRST_LAYER
) -> dict[str, list[Head]]:
    """The head sets in a file such as `augment_index.py`, by the name of their variable.

    A line is `name = [[heads of layer 2], [heads of layer 3], ...]`; the file is read as text and never run. layout: of
    the model that the heads are for. first_layer: the layer of the first row.

    Raises InputError for a file that cannot be read, holds no such list, or names heads that the layout has not.

    >>> read_calibration_heads("models/augment_index.py")["indices_comb_MC"][:2]  # doctest: +SKIP
    [Head(2, 8), Head(2, 13)]
    """
    where = os.fspath(path)
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: cannot be read ({error}); check the path") from None
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{where}: is not Python text ({error}); expected name = [[heads of a layer], ...]") from None
    found: dict[str, list[Head]] = {}
    for statement in tree.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        name = statement.targets[0].id
        try:
            rows = ast.literal_eval(statement.value)
        except ValueError:
            continue  # something that is computed
        if isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows):
            found[name] = [
                _head(f"{where}: {name}", first_layer + number, head, layout)
                for number, row in enumerate(rows)
                for head in row
            ]
    if not found:
        raise InputError(f"{where}: holds no head set; expected name = [[heads of layer {first_layer}], ...]")
    return found


def _head(where: str, layer: int, head: object, layout: Layout | None) -> Head:
    if not isinstance(head, int) or isinstance(head, bool) or head < 0:
        raise InputError(f"{where}: {head!r} in the row of layer {layer} is no head; expected numbers from 0")
    try:
        return Head(layer, head) if layout is None else layout.check(Head(layer, head))
    except ValueError as error:
        raise InputError(f"{where}: {error}; the heads are those of another model") from None
