"""Teaches text encoders to read captions of scenes, before they are trained with a denoiser."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimdiff.reference.captions import caption, scenes
from slimdiff.reference.optim import Optimizer, Rates, warm_and_decay
from slimdiff.reference.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene
from slimdiff.reference.tokenizer import encode_captions, tokenizer

log = logging.getLogger(__name__)

VOCABULARIES: tuple[tuple[str, ...], ...] = (tuple(SIZES), tuple(COLOURS), SHAPES)


class Reader(nn.Module):
    """Reads the scene off the text encoder's states; a training aid, not kept.

    At the last word of each object: its size, colour, shape and position. At the end token:
    the background, and for each position the object there, or none.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        counts = [len(v) for v in VOCABULARIES]
        self.object_counts = [*counts, len(POSITIONS)]
        self.scene_counts = [len(BACKGROUNDS), *(c + 1 for _ in POSITIONS for c in counts)]
        self.of_object = nn.Linear(width, sum(self.object_counts))
        self.of_scene = nn.Linear(width, sum(self.scene_counts))

    def loss(self, states: Tensor, batch: list[Scene]) -> Tensor:
        """Mean cross-entropy of all readings from `states` (n, 20, width)."""
        rows, columns, labels = _object_labels(batch)
        own = self.of_object(states[rows, columns]).split(self.object_counts, -1)
        ends = torch.tensor([1 + len(caption(s).split()) for s in batch])
        whole = self.of_scene(states[torch.arange(len(batch)), ends]).split(self.scene_counts, -1)
        pairs = [*zip(own, labels.T), *zip(whole, _scene_labels(batch).T)]
        return torch.stack([nn.functional.cross_entropy(p, y) for p, y in pairs]).mean()


def _object_labels(batch: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Image row, token column and the four labels of every object."""
    rows, columns, labels = [], [], []
    for i, scene in enumerate(batch):
        for k, o in enumerate(scene.objects):
            rows.append(i)
            columns.append(6 + 7 * k)  # start token, then six words to an object and "and"
            words = (o.size, o.colour, o.shape)
            own = [v.index(w) for v, w in zip(VOCABULARIES, words)]
            labels.append([*own, tuple(POSITIONS).index(o.position)])
    return torch.tensor(rows), torch.tensor(columns), torch.tensor(labels)


def _scene_labels(batch: list[Scene]) -> Tensor:
    """Background, then size, colour and shape at each position, 0 for none: (n, 13)."""
    labels = []
    for scene in batch:
        by_place = {o.position: (o.size, o.colour, o.shape) for o in scene.objects}
        row = [tuple(BACKGROUNDS).index(scene.background)]
        for place in POSITIONS:
            words = by_place.get(place, (None,) * len(VOCABULARIES))
            row += [v.index(w) + 1 if w else 0 for v, w in zip(VOCABULARIES, words)]
        labels.append(row)
    return torch.tensor(labels)


def teach_scenes(
    text: nn.Module,
    states_of: Callable[[nn.Module, Tensor], Tensor],
    steps: int,
    seed: int,
    *,
    batch: int = 128,
) -> None:
    """Teach `text` to bind words to objects, which CLIP brings along and it does not.

    What is read are `states_of(text, tokens)`, (batch, 20, width).
    """
    generator = torch.Generator().manual_seed(seed)
    pool = scenes("train", min(20_000, steps * batch), seed + 1)
    device = next(text.parameters()).device
    tokens = encode_captions(tokenizer(), [caption(s) for s in pool]).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = Reader(states_of(text, tokens[:1]).shape[-1]).to(device)
    parameters = {**dict(text.named_parameters()), **dict(reader.named_parameters())}
    optimizer = Optimizer(parameters, _is_inner_linear, Rates(muon=2e-3, adam=2e-3))
    for step in range(steps):
        picks = torch.randint(len(pool), (batch,), generator=generator)
        loss = reader.loss(states_of(text, tokens[picks]), [pool[i] for i in picks])
        text.zero_grad()
        reader.zero_grad()
        loss.backward()
        optimizer.step(step + 1, warm_and_decay(step, steps), 0.0)
        if step % 100 == 0:
            log.info("text step %d of %d: loss %.4f", step, steps, float(loss.detach()))


def _is_inner_linear(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and ".layers." in name
