"""export_model: from a model to a folder that `transformers` loads, with the same logits.

A model that is not converted is one that transformers knows: its folder is what `zoo.save` writes.
Any other gets the files of `remote_code/` beside its weights, and a config.json that leads
transformers to them, under a `model_type` of its own: without `trust_remote_code` it is refused,
never run with another attention.
"""

import shutil
from pathlib import Path

from recipes import is_converted
from zoo.causal_lm import CausalLM
from zoo.config import to_hf
from zoo.weights.atomic import replacing_folder
from zoo.weights.checkpoint import write_folder

REMOTE_CODE = Path(__file__).parent / "remote_code"

_FAMILIES = {"gpt_neox": "GPTNeoX", "llama": "Llama", "phi": "Phi"}  # as the classes' names say


def export_model(model: CausalLM, folder: str | Path, *, tokenizer: bool = True) -> None:
    """Writes `model` to a new folder for `transformers`; a kill leaves no half of one.

    The weights are in the model's own dtype, under the published names. Load a hybrid with
    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

    Args:
        model: from `zoo.load`.
        folder: made, or filled if it is empty.
        tokenizer: whether to write the model's tokenizer, for AutoTokenizer.

    Raises:
        ValueError: `folder` is a file or has files, the model has no tokenizer to write, or it is
            converted and of a family without code in `remote_code/`.
    """
    folder = Path(folder)
    check_exportable(folder)
    if tokenizer and model.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer to export; without one is possible: tokenizer=False, "
            "or --no-tokenizer on the command line"
        )
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    config = to_hf(model.config, model.hf_config, dtype)
    config.pop("auto_map", None)  # of a repository that once came with code of its own
    hybrid = is_converted(model.config.layer_types)
    if hybrid and model.config.model_type not in _FAMILIES:
        raise ValueError(
            f"cannot export a converted {model.config.model_type}, only the unmodified model; "
            f"converted ones may be {', '.join(_FAMILIES)}"
        )
    with replacing_folder(folder, owned=lambda name: True) as fresh:
        write_folder(
            fresh,
            config=_hybrid(config) if hybrid else config,
            tensors={model.hf_name(n): p.detach().cpu() for n, p in model.named_parameters()},
            tokenizer=model.tokenizer if tokenizer else None,
        )
        if hybrid:
            for file in REMOTE_CODE.glob("*.py"):
                shutil.copyfile(file, fresh / file.name)


def check_exportable(folder: Path) -> None:
    """Raises ValueError unless `folder` is new or empty; creates nothing."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot export to {folder}, which is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"will not export to {folder}, which has files; name a new folder")


def _hybrid(config: dict[str, object]) -> dict[str, object]:
    """The config.json of a hybrid: its family's fields, and where its classes are."""
    family, layer_types = str(config.pop("model_type")), config.pop("layer_types")
    prefix = f"ZooEva{_FAMILIES[family]}"
    return config | {
        "model_type": f"zoo_eva_{family}",
        "attention_types": layer_types,
        "architectures": [f"{prefix}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_zoo_eva.{prefix}Config",
            "AutoModelForCausalLM": f"modeling_zoo_eva.{prefix}ForCausalLM",
        },
    }
