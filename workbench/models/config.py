"""Which model to build."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pydantic import Field, field_validator

from workbench.config import Arguments, Config, hint
from workbench.errors import unknown
from workbench.registry import ImportPath, Registry

MODELS = Registry(
    "model",
    {
        "resnet20": "workbench.models.resnet:resnet20",
        "resnet32": "workbench.models.resnet:resnet32",
        "resnet56": "workbench.models.resnet:resnet56",
        "resnet18_cifar": "workbench.models.resnet:resnet18_cifar",
        "convnet": "workbench.models.convnet:convnet",
        "mlp": "workbench.models.convnet:mlp",
    },
)
"""Models of the workbench itself; every name of timm is accepted beside them."""

for _name in ("bert_base", "bert_small", "lstm"):
    MODELS.register(_name, f"workbench.models.text:{_name}", input="token ids")


def timm_names() -> frozenset[str]:
    """Names of timm's models from a list shipped with the package, so that checking one does not import timm."""
    return frozenset((files("workbench.models") / "timm_names.txt").read_text().split())


class ModelConfig(Config):
    """A model by name: the workbench's own, timm's, an import path, or a folder with a saved model."""

    name: ImportPath = Field(
        "resnet20",
        description="A registered name, a timm name, 'package.module:function', 'file.py:function', or a run or model folder.",
        json_schema_extra=hint(choices="models"),
    )
    pretrained: bool = Field(False, description="Start from published weights (timm names only; downloads them).")
    num_classes: int | None = Field(
        None, ge=1, description="Outputs of the classifier; by default as many as the data has classes."
    )
    in_channels: int | None = Field(None, ge=1, description="Input channels; by default as many as the data has.")
    args: Arguments = Field(
        {}, description="Further keyword arguments of the model's factory.", json_schema_extra=hint(advanced=True)
    )

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        if MODELS.known(name) or name in timm_names() or "/" in name or Path(name).is_dir():
            return name
        import timm  # a newer timm may know names that the shipped list does not

        if timm.is_model(name):
            return name
        raise unknown("model", name, [*MODELS, *timm_names()])
