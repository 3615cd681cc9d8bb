"""MODEL.ADAPTER of methods that take frame features of any width: adapters in the frozen image tower, or beside it."""

import json
from functools import partial
from typing import Literal, get_args

from pydantic import Field, model_validator

from models.adapter_aim import AimChoice
from models.adapter_d2st import D2stAdapterOptions, D2stAdapters, D2stResnetAdapters
from models.frame_tower import FrameTower
from models.side_network import SideNetwork, SideNetworkOptions
from models.tower_plugin import TowerPlugin

# MODEL.ADAPTER -> the section of MODEL with its sizes.
SECTIONS = {"aim": "AIM", "d2st": "D2ST", "side-network": "SIDE"}


class AdapterChoice(AimChoice):
    """The keys of a method that takes frame features of any width."""

    ADAPTER: Literal["none", "aim", "d2st", "side-network"] = Field(  # type: ignore[assignment]
        "none",
        description="layers within or beside CLIP's ViT, whose own weights then stay as loaded: none, aim, d2st or "
        "side-network",
    )
    D2ST: D2stAdapterOptions = D2stAdapterOptions()
    SIDE: SideNetworkOptions = SideNetworkOptions()

    @classmethod
    def reads(cls, key: str) -> bool:
        """See `ModelOptions`; this excludes the sections of adapters that MODEL.ADAPTER does not accept."""
        accepted = get_args(cls.model_fields["ADAPTER"].annotation)
        unused = [section for adapter, section in SECTIONS.items() if adapter not in accepted]
        return super().reads(key) and key.partition(".")[0] not in unused

    @model_validator(mode="after")
    def _check_sections(self) -> "AdapterChoice":
        """Accepts only the defaults, which older checkpoints contain, in the sections that `reads` excludes."""
        problems = []
        for adapter, section in SECTIONS.items():
            values, defaults = getattr(self, section), type(self).model_fields[section].default
            problems += [
                f"MODEL.{section}.{key} is {json.dumps(value)}, but MODEL.ADAPTER of {self.NAME} cannot be {adapter}, "
                f"so the key has no effect: remove it, or set it to its default, {json.dumps(getattr(defaults, key))}."
                for key, value in values
                if not self.reads(section) and value != getattr(defaults, key)
            ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def attach_adapter(self, tower: FrameTower, image_size: int) -> TowerPlugin | None:
        """See `AimChoice`; D2ST's adapters also support the ImageNet ResNets."""
        if self.ADAPTER == "d2st" and self.BACKBONE.startswith("resnet"):
            build = partial(D2stResnetAdapters, options=self.D2ST, image_size=image_size)
            return tower.attach(build, on_resnets=True)
        if self.ADAPTER == "d2st":
            return tower.attach(partial(D2stAdapters, options=self.D2ST))
        if self.ADAPTER == "side-network":
            return tower.attach(partial(SideNetwork, options=self.SIDE))
        return super().attach_adapter(tower, image_size)
