"""What isolation_reposition_attention.py measures on: a small UNet and a small rotary transformer of diffusers.

Both are trained here by flow matching on scenes of up to five subjects. A prompt names each subject's shape, cell and
size, never its look. An image of 18 x 18 pixels is given to the networks as 9 x 9 tokens of 2 x 2 pixels.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise.papers.running import Run
from headwise.steering.subject_attention import SubjectAttention
from headwise.tasks.subject_consistency import (
    MOST,
    SubjectScenes,
    colour_distance,
    draw_subjects,
    mean_colours,
    patch_features,
    render_subjects,
    same_subject,
    subject_leakage,
)
from headwise.training import OptimiserSpec, fit, warmup_cosine

BATCH, RATE = 32, 2e-3
STEPS = {"unet": 600, "rotary": 700}
TOKENS, CELLS, TEXT = 9, 9, 32
PATCH = 2
KINDS = ("unet", "rotary")
Kind = Literal["unet", "rotary"]


@dataclass(frozen=True)
class Prompts:
    """What n prompts say: `[n s]` shapes, cells and sizes; -1 is no subject."""

    shapes: Tensor
    cells: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, scenes: SubjectScenes) -> "Prompts":
        return cls(scenes.shapes, scenes.cells, scenes.sizes)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Prompts":
        return Prompts(change(self.shapes), change(self.cells), change(self.sizes))


class Painter(nn.Module):
    """A network of diffusers with an embedding of prompts: noisy tokens, times and prompts to clean tokens.

    The UNet reads one text token for each subject and, with its picture, the coordinates of each place. The rotary
    transformer reads one text token for each cell, whose rotary position is the middle of that cell.
    """

    def __init__(self, kind: Kind, text: int = TEXT) -> None:
        super().__init__()
        self.kind = kind
        self.network: Any = _unet(text) if kind == "unet" else _rotary(text)
        self.grid: Tensor
        self.shape, self.cell, self.size = nn.Embedding(4, text), nn.Embedding(CELLS, text), nn.Embedding(2, text)
        self.nothing = nn.Parameter(torch.randn(text))
        place = torch.linspace(-1, 1, TOKENS)
        self.register_buffer("grid", torch.stack(torch.meshgrid(place, place, indexing="ij")), persistent=False)
        self.register_buffer("ids", _ids(torch.arange(TOKENS)), persistent=False)
        self.register_buffer("words", _ids(torch.arange(1, TOKENS, 3)), persistent=False)

    def text(self, prompts: Prompts) -> Tensor:
        """`[n words text]`."""
        given = (prompts.cells >= 0)[..., None]
        cells = prompts.cells.clamp_min(0)
        token = self.shape(prompts.shapes.clamp_min(0)) + self.size(prompts.sizes)
        if self.kind == "unet":
            return torch.where(given, token + self.cell(cells), self.nothing)
        placed = F.one_hot(cells, CELLS).to(token.dtype) * given  # n s cells
        empty = 1 - placed.sum(1)
        return torch.einsum("nsc,nst->nct", placed, token) + empty[..., None] * self.nothing

    def forward(self, x: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """x: `[n 12 9 9]`. t: `[n]` from 0, a picture, to 1, noise."""
        text = self.text(prompts)
        if self.kind == "unet":
            x = torch.cat([x, self.grid.expand(len(x), -1, -1, -1)], 1)
            return self.network(x, 1000 * t, encoder_hidden_states=text).sample
        out = self.network(
            hidden_states=x.flatten(2).mT,
            encoder_hidden_states=text,
            pooled_projections=text.mean(1),
            timestep=t,
            img_ids=self.ids,
            txt_ids=self.words,
        ).sample
        return out.mT.unflatten(-1, (TOKENS, TOKENS))


def _ids(places: Tensor) -> Tensor:
    """Positions `[k * k, 3]` of a grid, as Flux numbers them."""
    return F.pad(torch.cartesian_prod(places, places).float(), (1, 0))


def _unet(text: int) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=TOKENS,
        in_channels=3 * PATCH**2 + 2,  # and the two coordinates
        out_channels=3 * PATCH**2,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text,
        attention_head_dim=4,
    )


def _rotary(text: int) -> Any:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=3 * PATCH**2,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=text,
        pooled_projection_dim=text,
        axes_dims_rope=(4, 14, 14),
    )


def to_tokens(images: Tensor) -> Tensor:
    return F.pixel_unshuffle(images, PATCH)


def to_images(tokens: Tensor) -> Tensor:
    return F.pixel_shuffle(tokens, PATCH).clamp(-1, 1)


def flow_loss(painter: Any, batch: tuple[Tensor, Prompts, Tensor, Tensor]) -> Tensor:
    """Squared error of the picture at a random time of the straight path from it to noise."""
    x, prompts, t, noise = batch
    place = t[:, None, None, None]
    return F.mse_loss(painter((1 - place) * x + place * noise, t, prompts), x)


def scene_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Prompts, Tensor, Tensor]:
    scenes = draw_subjects(BATCH, generator)
    x = to_tokens(scenes.images)
    t = torch.rand(BATCH, generator=generator)
    return x, Prompts.of(scenes), t, torch.randn(x.shape, generator=generator)


def train_painter(kind: Kind, seed: int, steps: int, log: Any = None) -> Painter:
    torch.manual_seed(seed)
    painter = Painter(kind)
    rule, schedule = OptimiserSpec(lr=RATE, betas=(0.9, 0.99)), warmup_cosine(min(50, steps // 4))
    fit(painter, scene_batch, flow_loss, steps=steps, seed=seed, optimiser=rule, schedule=schedule, log=log)
    return painter.eval()


@torch.no_grad()
def paint(painter: Callable[..., Tensor], prompts: Prompts, noise: Tensor, steps: int) -> Tensor:
    """Pictures `[n 3 18 18]` from noise, by Euler's steps along the straight path to what is seen as the picture."""
    x = noise
    for i in range(steps):
        clean = painter(x, torch.full((len(x),), 1 - i / steps), prompts)
        x = x + (clean - x) / (steps - i)
    return to_images(x)


# What is done to the target; "like" names another method's attention, given the same masks.
NONE, MASKS, ISOLATE, IR = "no references", "masks only", "isolation", "isolation and reposition"
REPOSITION, MISPLACED, SWAPPED = "reposition", "laid elsewhere", "other's reference"
CONSISTORY, STORY, MASACTRL = "ConsiStory-like", "StoryDiffusion-like", "MasaCtrl-like"
BOOSTED, APART, RANDOM = "IR, logits + 2", "isolation alone", "random isolation"
RIVALS = (CONSISTORY, STORY, MASACTRL)
NUMBERS, GROUPS, PLACED, EULER = (2, 3, 4, 5), 16, 48, 10  # subjects; pictures for each; with near and far; steps
FAR = 2  # cells


@dataclass(frozen=True)
class Group:
    """g targets of s subjects, each with s reference pictures. Batches hold a target's references and then the target.

    subjects, references: masks at the tokens, boxes. inside, reference_inside: the subjects' pixels. seed: of the
    world, for random masks.
    """

    prompts: Prompts
    noise: Tensor
    subjects: Tensor
    references: Tensor
    inside: Tensor
    reference_inside: Tensor
    seed: int

    @property
    def count(self) -> int:
        return self.subjects.shape[1]

    def swapped(self) -> "Group":
        """Each subject is given the next one's reference."""
        s = self.count

        def turn(x: Tensor) -> Tensor:
            x = x.unflatten(0, (-1, s + 1))
            return torch.cat([x[:, :s].roll(1, 1), x[:, s:]], 1).flatten(0, 1)

        prompts, noise = self.prompts.each(turn), turn(self.noise)
        return replace(self, prompts=prompts, noise=noise, references=self.references.roll(1, 1))

    def targets(self) -> "Group":
        """The targets alone."""
        last = slice(self.count, None, self.count + 1)
        return replace(self, prompts=self.prompts.each(lambda x: x[last]), noise=self.noise[last])


def far_cells(cells: Tensor, generator: torch.Generator) -> Tensor:
    """For each cell another one, at least two rows or columns away; of the middle, any other."""
    row, column = torch.arange(CELLS) // 3, torch.arange(CELLS) % 3
    apart = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    allowed = torch.where((apart >= FAR).any(1, keepdim=True), apart >= FAR, apart > 0)
    return torch.multinomial(allowed[cells].float().flatten(0, 1), 1, generator=generator).view_as(cells)


def draw_group(n: int, s: int, seed: int, place: Literal["near", "far", "any"]) -> Group:
    """Targets of s subjects of any looks; a reference has its subject alone, of the same shape and size, in the same
    cell, a far one or any. The same seed gives the same targets and noise."""
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_subjects(n, generator, subjects=(s, s))
    noise = torch.randn(n, s + 1, 3 * PATCH**2, TOKENS, TOKENS, generator=generator)
    shapes, cells, sizes = (x[:, :s] for x in (drawn.shapes, drawn.cells, drawn.sizes))
    there = torch.randint(CELLS, (n, s), generator=generator) if place == "any" else cells
    there = far_cells(cells, generator) if place == "far" else there
    shape, cell, size = (x.reshape(-1, 1) for x in (shapes, there, sizes))
    alone = render_subjects(shape, cell, size, torch.zeros(n * s, 1), torch.zeros(n * s, 1, dtype=torch.long))
    said = []
    for target, reference, nothing in ((shapes, shapes, -1), (cells, there, -1), (sizes, sizes, 0)):
        words = torch.full((n, s + 1, MOST), nothing)
        words[:, :s, 0], words[:, s, :s] = reference, target
        said.append(words.flatten(0, 1))
    prompts = Prompts(said[0], said[1], said[2])
    inside, boxes = drawn.masks[:, :s], drawn.boxes[:, :s]
    reference_inside, reference_boxes = (x.view(n, s, *x.shape[2:]) for x in (alone.masks, alone.boxes))
    coarse = [F.max_pool2d(x.float(), PATCH) > 0 for x in (boxes, reference_boxes)]
    return Group(prompts, noise.flatten(0, 1), coarse[0], coarse[1], inside, reference_inside, seed)


class Misplaced(SubjectAttention):
    """References are laid one cell below and beside their subjects, over the edge from the other side."""

    def place(self, target: Tensor, size: tuple[int, int]) -> Tensor:
        return target.unflatten(-1, size).roll((3, 3), (-2, -1)).flatten(-2)


def shuffled(masks: Tensor, seed: int) -> Tensor:
    """Masks of the same sizes at random tokens, one permutation for all subjects of a picture."""
    order = torch.rand(len(masks), TOKENS**2, generator=torch.Generator().manual_seed(seed)).argsort(1)
    flat = masks.flatten(2)
    return flat.gather(2, order[:, None].expand_as(flat)).view_as(masks)


def steered(network: Any, how: str, group: Group) -> SubjectAttention | None:
    """The context of a condition; None where nothing is done. References are read in all layers and steps, without
    mask dropout but in ConsiStory's; cross-attention is left alone, for these prompts say where a subject is."""
    common: dict[str, Any] = {"mutual_cross_attention": 0.0, "start_layer": 0}
    exact: dict[str, Any] = common | {"mask_dropout": 0.0}
    everywhere = torch.ones_like(group.subjects)
    subjects, references = group.subjects, group.references
    if how == NONE:
        return None
    if how in (APART, RANDOM):
        masks = subjects if how == APART else shuffled(subjects, group.seed)
        return SubjectAttention(network, masks, **exact)
    if how == CONSISTORY:  # every query reads every reference's subject, half of it at each step
        open_to_all: dict[str, Any] = common | {"isolate": False, "reposition": False, "overlap": "neither"}
        return SubjectAttention(network, everywhere, references, mask_dropout=0.5, seed=group.seed, **open_to_all)
    if how == STORY:  # every query reads a random half of every reference picture
        half = torch.rand(references.shape, generator=torch.Generator().manual_seed(group.seed)) < 0.5
        return SubjectAttention(network, everywhere, half, isolate=False, reposition=False, overlap="neither", **exact)
    if how == MASACTRL:  # a subject's queries read the reference only
        return SubjectAttention(network, subjects, references, isolate=False, reposition=False, boost=30.0, **exact)
    kind = Misplaced if how == MISPLACED else SubjectAttention
    switches: dict[str, Any] = {
        "isolate": how in (ISOLATE, IR, BOOSTED),
        "reposition": how in (IR, BOOSTED, REPOSITION, MISPLACED),
        "boost": 2.0 if how == BOOSTED else 0.0,
    }
    return kind(network, subjects, references, **switches, **exact)


@dataclass
class Looks:
    """What one condition gave, for each target: `[g]` but pictures, `[g s + 1 3 p p]`.

    own, other: cosine of the looks of its subjects and their own references, and of other subjects' references.
    colours: the same as own by colour histograms. distance: between the mean colours of its subjects.
    """

    own: Tensor
    other: Tensor
    colours: Tensor
    distance: Tensor
    pictures: Tensor


def centred_look() -> Callable[[Tensor, Tensor], Tensor]:
    """Patch features less their mean over drawn subjects, so that unrelated looks have a cosine of about 0."""
    known = draw_subjects(512, torch.Generator().manual_seed(2**31), subjects=(1, 1))
    mean = patch_features(known.images, known.masks[:, :1]).mean(0)
    return lambda images, masks: patch_features(images, masks) - mean


def looks(pictures: Tensor, group: Group, look: Callable[[Tensor, Tensor], Tensor]) -> Looks:
    s = group.count
    given = (pictures[:, s], group.inside, pictures[:, :s], group.reference_inside)
    alike = same_subject(*given, features=look)
    return Looks(
        own=alike.diagonal(dim1=1, dim2=2).mean(-1),
        other=subject_leakage(alike),
        colours=same_subject(*given).diagonal(dim1=1, dim2=2).mean(-1),
        distance=colour_distance(pictures[:, s], group.inside),
        pictures=pictures,
    )


def reference_distance(pictures: Tensor, group: Group) -> Tensor:
    """`[g]`: between the mean colours of a target's references, pictures that know nothing of each other."""
    s = group.count
    colours = mean_colours(pictures[:, :s].flatten(0, 1), group.reference_inside.flatten(0, 1)[:, None])
    colours = colours.view(-1, s, colours.shape[-1])
    return (colours[:, :, None] - colours[:, None]).norm(dim=-1).sum((-2, -1)) / (s * (s - 1))


def painted(painter: Painter, how: str, group: Group, plain: Tensor | None = None) -> Tensor:
    """Pictures `[g s + 1 3 p p]` under a condition. plain: those without any, for conditions without references."""
    s = group.count
    given = group.swapped() if how == SWAPPED else group
    if how in (APART, RANDOM):
        given = group.targets()
    context = steered(painter.network, MASKS if how == SWAPPED else how, given)
    with contextlib.nullcontext() if context is None else context:
        made = paint(painter, given.prompts, given.noise, EULER)
    if how in (APART, RANDOM):
        assert plain is not None
        return torch.cat([plain[:, :s], made[:, None]], 1)
    made = made.unflatten(0, (-1, s + 1))
    if how == SWAPPED:
        made = torch.cat([made[:, :s].roll(-1, 1), made[:, s:]], 1)
    return made


@dataclass
class Trained:
    """Networks; looks by network, number of subjects or place, and condition; distances between references."""

    painters: dict[str, Painter]
    groups: dict[Any, Group] = field(default_factory=dict)
    looks: dict[tuple[str, Any, str], Looks] = field(default_factory=dict)
    apart: dict[int, Tensor] = field(default_factory=dict)

    def pooled(self, kind: str, how: str, what: str, places: Sequence[Any] = NUMBERS) -> Tensor:
        """A figure of all groups of several numbers of subjects."""
        return torch.cat([getattr(self.looks[kind, place, how], what) for place in places])


MANY = (NONE, MASKS, ISOLATE, IR, *RIVALS, BOOSTED, APART, RANDOM)
ROTARY_FAR = (NONE, MASKS, REPOSITION, IR, MISPLACED, SWAPPED, *RIVALS)


def measure(made: Trained, kind: str, place: Any, group: Group, conditions: Sequence[str]) -> None:
    look, painter = centred_look(), made.painters[kind]
    made.groups[place] = group
    plain = painted(painter, NONE, group)
    for how in conditions:
        pictures = plain if how == NONE else painted(painter, how, group, plain)
        made.looks[kind, place, how] = looks(pictures, group, look)
    if isinstance(place, int):
        made.apart[place] = reference_distance(plain, group)


def train_all(run: Run, steps: Mapping[str, int] | None = None) -> Trained:
    made = Trained({})
    for kind in KINDS:
        run.log(f"training: {kind}")
        made.painters[kind] = train_painter(kind, run.seed, (steps or STEPS)[kind])
    for number in NUMBERS:
        run.log(f"painting {number} subjects")
        measure(made, "unet", number, draw_group(GROUPS, number, 1000 + 10 * run.seed + number, "any"), MANY)
    for place in ("near", "far"):
        run.log(f"painting with references {place}")
        group = draw_group(PLACED, 2, 5000 + run.seed, place)
        measure(made, "unet", place, group, (NONE, MASKS, REPOSITION))
        measure(made, "rotary", place, group, ROTARY_FAR if place == "far" else (NONE, MASKS, REPOSITION))
    return made
