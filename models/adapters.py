"""Adapters as an option: MODEL.ADAPTER adds one to the frozen image tower of any method on frame features.

A method offers them through its options class, `AimChoice` or `AdapterChoice`; its attribute `adapter` is the plug-in.
"""

from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from models.adapter_aim import AimAdapters, AimOptions
from models.adapter_d2st import D2stAdapterOptions, D2stAdapters, D2stResnetAdapters
from models.frame_tower import FrameTower
from models.side_network import SideNetwork, SideNetworkOptions
from models.tower_plugin import TowerPlugin
from utils.schema import HEAD_ONLY, ModelOptions


class AimChoice(ModelOptions):
    """The keys of a method that needs CLIP's own features, in the space of the texts."""

    ADAPTER: Literal["none", "aim"] = Field(
        "none", description="layers within CLIP's ViT, whose own weights then stay as loaded: none or aim"
    )
    AIM: AimOptions = AimOptions()

    @property
    def key_of_backbone_layers(self) -> str:
        """See `ModelOptions`."""
        return "" if self.ADAPTER == "none" else "ADAPTER"

    @model_validator(mode="before")
    @classmethod
    def _freeze_the_tower_around_an_adapter(cls, data: Any) -> Any:
        """Sets the default of TRAINABLE, which depends on the adapter."""
        if isinstance(data, dict) and data.get("ADAPTER", cls.model_fields["ADAPTER"].default) != "none":
            return {"TRAINABLE": HEAD_ONLY, **data}
        return data


class AdapterChoice(AimChoice):
    """The keys of a method that takes frame features of any width."""

    ADAPTER: Literal["none", "aim", "d2st", "side-network"] = Field(  # type: ignore[assignment]
        "none",
        description="layers within or beside CLIP's ViT, whose own weights then stay as loaded: none, aim, d2st or "
        "side-network",
    )
    D2ST: D2stAdapterOptions = D2stAdapterOptions()
    SIDE: SideNetworkOptions = SideNetworkOptions()


def attach_adapter(tower: FrameTower, options: ModelOptions, image_size: int) -> TowerPlugin | None:
    """Attaches and returns the adapter of MODEL.ADAPTER, or None if it is `none` or the method has no such option.

    Args:
        tower: CLIP's ViT; D2ST's adapters also support the ImageNet ResNets.
        options: options of the method.
        image_size: height and width of the frames in pixels.

    Raises:
        UserError: the tower does not support plug-ins, or the adapter does not fit it.
    """
    if not isinstance(options, AimChoice) or options.ADAPTER == "none":
        return None
    if isinstance(options, AdapterChoice) and options.ADAPTER == "d2st":
        if options.BACKBONE.startswith("resnet"):
            build = partial(D2stResnetAdapters, options=options.D2ST, image_size=image_size)
            return tower.attach(build, on_resnets=True)
        return tower.attach(partial(D2stAdapters, options=options.D2ST))
    if isinstance(options, AdapterChoice) and options.ADAPTER == "side-network":
        return tower.attach(partial(SideNetwork, options=options.SIDE))
    return tower.attach(partial(AimAdapters, options=options.AIM))
