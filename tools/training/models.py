"""The models of a run: which base a recipe converts, its teacher, and a stage's student."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import zoo
from flasheva import EvaConfig, Impl
from recipes import Recipe, Stage, find_recipe, read_recipe, sliding_layers
from recipes import names as recipe_names
from zoo import CausalLM, Tokenizer
from zoo.config import ModelConfig
from zoo.description import describe
from zoo.opening import adapter_of, open_target
from zoo.target import resolve
from zoo.weights.adapter import checksum


class BaseWeights(NamedTuple):
    """Which weights a run begins with.

    Attributes:
        source: where they came from, one phrase.
        checksum: over 64 values of every tensor, as adapters know their bases.
    """

    source: str
    checksum: str


@dataclass(frozen=True)
class Conversion:
    """A recipe, and what it is of.

    Attributes:
        recipe: with at least one stage.
        base: a name or path that `zoo.load` takes.
        weights: of the base, as `zoo.load` takes it; "random" trains from scratch.
        eva, layer_types: of the student.
    """

    recipe: Recipe
    base: str
    weights: str
    eva: EvaConfig
    layer_types: tuple[str, ...]

    @classmethod
    def read(cls, name: str, weights: str = "auto") -> "Conversion":
        """From a recipe file, or the name of a recipe that ships with the package.

        Raises:
            ValueError: no such recipe, one without stages, or one that does not fit its base.
        """
        recipe = read_recipe(name) if name.endswith(".toml") else find_recipe(name)
        trained = [n for n in recipe_names() if (r := find_recipe(n)) and r.stages]
        if recipe is None:
            raise ValueError(
                f"there is no recipe {name!r}; give a .toml file, or one of {', '.join(trained)}"
            )
        if not recipe.stages:
            raise ValueError(
                f"recipe {recipe.name!r} has no [[stages]], so nothing trains; recipes/stages.py "
                f"says what they are, and {', '.join(trained)} have some"
            )
        target = resolve(Path(name) if name.endswith(".toml") else recipe.base)
        base = str(target.base or target.path or target.repo)
        plain = describe(base, weights=weights)
        try:
            eva = EvaConfig.from_dict(recipe.eva)
            types = recipe.layer_types(plain.num_hidden_layers, sliding_layers(plain.layer_types))
        except ValueError as error:
            raise ValueError(f"recipe {recipe.name!r}: {error}") from None
        return cls(recipe, base, weights, eva, types)

    def config(self) -> ModelConfig:
        """The student's, without reading weights."""
        return describe(
            self.base, weights=self.weights, eva=self.eva, layer_types=self.layer_types
        )

    def base_weights(self) -> BaseWeights:
        """What tells the weights of the base from others of the same name; reads all of them.

        Raises:
            ValueError: they cannot be had.
        """
        if self.weights == "random":
            return BaseWeights("random weights", "random")
        target = resolve(self.base)
        adapter = adapter_of(target, self.weights, None, None)
        found = open_target(target, self.weights, None, adapter)
        digest = hashlib.sha256()
        for name in sorted(found.tensors.keys()):
            digest.update(f"{name} {checksum(found.tensors.load(name))}\n".encode())
        return BaseWeights(found.source, digest.hexdigest()[:16])

    def student(
        self, stage: Stage, before: Path | None, device: torch.device, impl: Impl
    ) -> CausalLM:
        """What a stage begins with.

        Args:
            stage: the weights are float32, unless it trains adapters in bfloat16.
            before: the folder of the stage before; None: this is the first one.
            device, impl: as `zoo.load`.
        """
        low = stage.lora is not None and stage.dtype == "bfloat16"
        dtype = torch.bfloat16 if low else torch.float32
        if before is not None:
            return zoo.load(before, device=device, dtype=dtype, impl=impl)
        torch.manual_seed(stage.seed)  # of weights that start at random
        return zoo.load(
            self.base,
            device=device,
            dtype=dtype,
            eva=self.eva,
            layer_types=self.layer_types,
            impl=impl,
            weights=self.weights,
        )

    def teacher(self, stage: Stage, device: torch.device, impl: Impl) -> CausalLM | None:
        """The base as published, in the stage's dtype; None if no loss compares with it."""
        if not stage.needs_teacher:
            return None
        assert self.weights != "random"  # see preflight.py
        dtype = getattr(torch, stage.dtype)
        teacher = zoo.load(self.base, device=device, dtype=dtype, impl=impl, weights=self.weights)
        return teacher.requires_grad_(False)


def give_tokenizer(model: CausalLM, tokenizer: Tokenizer) -> None:
    """For a model without one, which random weights are.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{model.config.vocab_size}"
        )
    model.tokenizer = tokenizer
