"""Variants of a model, ready to continue prompts: loaded, their adapters merged, with one sampler where they can share.

Purpose: `generate` opens one variant or both in the same way. A tuned variant with an adapter has the baseline's
weights within it, so that both together cost one loading and one set of programs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax

from stages.core.adapters.adapted import open_variant
from stages.core.common.paths import Paths
from stages.core.config.schema import Generate
from stages.core.generate.choosing import Drawing
from stages.core.generate.sampling import Sampler, SamplerSettings
from stages.core.generate.texts import Show, Texts
from stages.core.load import variants
from stages.core.load.variants import Preset
from stages.core.model import lora
from stages.core.model.causal_lm import CausalModel, make_model
from stages.core.presets.tokenizer import Tokenizer


@dataclass(frozen=True)
class Side:
    """A variant that continues prompts.

    `weights` returns its weights, one for each variable of the sampler's backbone; at the first call it may add an
    adapter to them.
    """

    variant: str
    tokenizer: Tokenizer
    sampler: Sampler
    weights: Callable[[], list[jax.Array]]
    settings: SamplerSettings
    stop_strings: tuple[str, ...]

    def continued(
        self, prompts: Sequence[Sequence[int]], seed: int, *, samples: int = 1, show: Show | None = None
    ) -> tuple[list[str], list[list[int]]]:
        """Return the text of each row, and its tokens; arguments and rows are those of `Sampler`."""
        texts = Texts(self.tokenizer, len(prompts) * samples, self.stop_strings, show)
        tokens = self.sampler(prompts, self.settings, seed, samples=samples, listen=texts, values=self.weights())
        return texts.texts, tokens


def open_sides(
    paths: Paths,
    preset: Preset,
    tokenizer: Tokenizer,
    names: Sequence[str],
    adapters: Mapping[str, str],
    settings: Generate,
    stops: tuple[int, ...],
    *,
    trying: bool = False,
) -> list[Side]:
    """Load variants and make them ready.

    Args:
        paths: of inputs and outputs.
        preset: from `open_preset`.
        tokenizer: of the preset.
        names: of the variants.
        adapters: folders of those beyond baseline and tuned, by name.
        settings: how to continue.
        stops: ids that end a text.
        trying: nothing is kept: as for `load_variant`.

    Raises:
        StageError: as `open_variant`.
    """
    drawing = Drawing(settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.repetition_penalty)
    stop_strings = tuple(settings.stop_strings or ())
    sampling = SamplerSettings(settings.max_tokens, stops, drawing, tokenizer.vocabulary_size)

    def load(name: str) -> CausalModel:
        model = open_variant(paths, name, adapters, preset, trying=trying)
        return make_model(model.backbone, model.jax_mesh, model.placements)

    def values(causal: CausalModel) -> list[jax.Array]:
        return [variable.value for variable in causal.backbone.variables]

    tuned = variants.read_config(paths, "tuned").tuned if len(names) > 1 else None
    if tuned and tuned.lora.rank:
        causal = load("tuned")
        add = lora.set_aside(causal.backbone, keep_base=True)
        base = lora.values_of_base(causal.backbone)

        @functools.cache
        def merged() -> list[jax.Array]:
            add()
            return values(causal)

        sampler = Sampler(causal)
        weights: dict[str, Callable[[], list[jax.Array]]] = {"baseline": functools.partial(list, base), "tuned": merged}
        # The baseline answers before the adapter is added.
        return [Side(name, tokenizer, sampler, weights[name], sampling, stop_strings) for name in names]
    sides = []
    for name in names:
        causal = load(name)
        lora.merge(causal.backbone)
        held = values(causal)
        sides.append(Side(name, tokenizer, Sampler(causal), functools.partial(list, held), sampling, stop_strings))
    return sides
