"""NAAViT on a trained model: image tokens stop attending, and stay what the other tokens attend to.

The attention output of the rows of image tokens is multiplied by `scale`; at 0 they get no update by attention, and
their feed-forward layers run on. Nothing is trained, so this asks how redundant attention among visual tokens is.

Paper: headwise/papers/saisa.py (Yuan et al., 2025); `headwise.convert(model, to="naavit")` saves the work as well.
"""

from dataclasses import dataclass, field

from torch import Tensor

from headwise.attend.edit import Edit
from headwise.attend.edits import ScaleHeads
from headwise.attend.groups import KeyGroup, first_token, image_tokens
from headwise.attend.step import Step

__all__ = ["Naavit"]


@dataclass
class Naavit(Edit):
    """Take attention away from image tokens as queries, in the named heads.

    scale: what is left of the attention output of their rows; at 1 nothing changes. group: which tokens these are;
    None means the image tokens of the prompt, so that models and prompts without any are refused.
    A bias of the output projection, where a model has one, is still added to these rows.

    >>> Naavit(scale=1.0).neutral
    True
    """

    scale: float = 0.0
    group: KeyGroup | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if callable(self.when) or self.when == "generated":
            raise ValueError(f"Naavit: when is {self.when!r}; image tokens are in the prompt: choose all or prompt")

    @staticmethod
    def example() -> "Naavit":
        """One for a model without images: the first token does not attend."""
        return Naavit(0.4, group=first_token(), heads=["0.1", "1.2"])

    @property
    def neutral(self) -> bool:
        return self.scale == 1

    def primitives(self) -> tuple[Edit, ...]:
        group = image_tokens() if self.group is None else self.group

        def rows(step: Step) -> Tensor:
            return (group.members(step) & step.prompt)[:, step.past : step.past + step.length]

        return (ScaleHeads(self.scale, heads=self.heads, when=rows),)
